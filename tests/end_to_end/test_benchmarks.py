"""The benchmarks of text run in small, and what they compare is the same work. No time is asserted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "performance"


def quick(*names: str, script: str = "traces_benchmark.py") -> tuple[dict[str, Any], list[str]]:
    """What each named benchmark found, and the lines of the tables."""
    command = [sys.executable, str(FOLDER / script), *names, "--quick"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    written = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()} == written
    lines = done.stdout.splitlines()
    split = [line.split(" ", 1) for line in lines if line.startswith(names)]
    return {name: json.loads(told) for name, told in split}, [line for line in lines if line.startswith("|")]


@pytest.mark.slow
def test_benchmarks_of_traces_compare_the_same_work() -> None:
    found, table = quick("step", "rollout")
    assert found["step"]["sum8"]["weights_differ_by"] < 1e-5
    greedy, sampled = found["rollout"]["greedy"], found["rollout"]["sampled"]
    assert greedy["equal_completions"] == greedy["prompts"] == 16
    assert sampled["distinct_lengths"] > 1
    for entry in (found["step"]["sum8"], greedy, sampled):
        assert 0 < entry["low"] <= entry["ratio"] <= entry["high"] and entry["rounds"] == 2
    assert len(table) == 2 + 3 + 2


@pytest.mark.slow
def test_benchmark_of_filters_meets_every_reason_and_the_store_every_row() -> None:
    """Of 2,000 rows one in a hundred is spoilt for each filter; of the duplicates the first is kept."""
    found, table = quick("rows")
    rows = found["rows"]
    assert len(table) == 2 + 2 + 3
    assert set(rows["filters"]["dropped"]) == set(rows["filters"]["filters"])
    assert rows["filters"]["dropped"].pop("duplicates") == 19
    assert set(rows["filters"]["dropped"].values()) == {20}
    assert rows["filters"]["kept"] == 2000 - 6 * 20 - 19
    assert rows["write"]["rows"] == rows["read"]["rows"] == 2000 and rows["write"]["shards"] == 100
    assert all(0 < rows[part]["peak_mb_before"] <= rows[part]["peak_mb"] for part in ("filters", "write", "read"))


@pytest.mark.slow
def test_benchmark_of_packing_runs_on_real_lengths(require_data: Callable[..., Path]) -> None:
    require_data("traces")
    for arms in quick("packing")[0]["packing"].values():
        if "packed" not in arms:  # hardware and versions
            continue
        packed = arms["packed"]
        assert 1 <= packed["places_per_token"] < packed["padded_places_per_token"]
        assert packed["packed_to"] >= packed["longest"]


@pytest.mark.slow
def test_benchmark_of_losses_compares_the_same_gradients_and_names_what_is_missing() -> None:
    """Every arm that is installed has our gradients, or the benchmark stops; the others' rows say why not."""
    command = [sys.executable, str(FOLDER / "losses_benchmark.py"), "--smoke", "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    written = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()} == written
    lines = done.stdout.splitlines()
    found = [json.loads(line[line.index("{") :]) for line in lines if line.startswith("time ")]
    assert len(found) == 2 and {"floor", "chunked", "dense"} <= found[0].keys()
    for arm in (entry for arms in found for entry in arms.values()):
        assert "not installed" in arm["missing"] if "missing" in arm else arm["floors"] > 0
    assert all(arms[name]["gradients_differ_by"] < 1e-4 for arms in found for name in ("chunked", "dense"))
    memory = [json.loads(line[line.index("{") :]) for line in lines if line.startswith("memory ")]
    assert len(memory) == 2 and all(arms["chunked"]["mb"] >= 0 for arms in memory)
    assert any(line.startswith("| Liger | ") for line in lines)


@pytest.mark.slow
def test_benchmark_of_own_words_tells_the_parts_of_a_step_and_what_is_missing() -> None:
    """As many tokens as expected in every arm and one loss, or it stops; TRL's rows say where it is not installed."""
    found, table = quick("step", "share", script="on_policy_benchmark.py")
    for name in ("GKDTrainer", "DistillationTrainer"):
        entry = found["step"][name]
        if "missing" in entry:
            assert "not installed" in entry["missing"] and found["step"]["ours_ms"] > 0
        else:
            assert 0 < entry["low"] <= entry["ratio"] <= entry["high"] and entry["loss_differs_by"] < 1e-4
            assert entry["rounded"]["ratio"] > 0
    for method, entry in ((method, found["share"][method]) for method in ("on_policy", "policy_gradient")):
        parts = {part: spread["median"] for part, spread in entry["parts"].items()}
        assert sum(parts.values()) == pytest.approx(100, abs=1)
        assert (parts.pop("teacher") > 0) == (method == "on_policy") and min(parts.values()) > 0
        assert 0 < entry["outside"]["median"] < 100
    has_peers = all("missing" not in found["step"][name] for name in ("GKDTrainer", "DistillationTrainer"))
    assert len(table) == 2 + 2 + 2 * has_peers + 2 + 8


@pytest.mark.slow
def test_benchmark_of_sweeps_compares_as_many_trials_and_the_same_points() -> None:
    found, table = quick("processes", "overhead", "pruning", script="sweep_benchmark.py")
    processes = found["processes"]
    assert processes["trials"] == 2 and 0 < processes["low"] <= processes["ratio"] <= processes["high"]
    assert {"1", "2"} <= found["overhead"].keys() and all(
        0 < found["overhead"][key]["outside_percent"] < 100 for key in ("1", "2")
    )
    assert found["pruning"]["reached"] == len(found["pruning"]["seconds_to_best"]) <= found["pruning"]["seeds"] == 1
    assert len(table) == 2 + 1 + 2 + 2
