"""From one command to a run folder, and from run folders to caches, students and scores."""

import csv
import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

import research.config as config
from research.evaluation.evaluate import ITEM_COLUMNS, metric_names
from research.results.record import RunRecord, read_record

MEASURED_AT_ONCE = ("test/errors", "test/nll", "test/accuracy", "test/brier")


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


RUN = ("train", "trainer.max_epochs=3", "trainer.enable_progress_bar=false", "threads=1")


def only_run_in(folder: Path) -> Path:
    (record,) = (folder / "outputs" / "train").glob("*/run.json")
    return record.parent


@pytest.fixture(scope="module")
def run(distill: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `distill train` leaves; several workers may make it, so it takes no process of its own."""
    folder = tmp_path_factory.mktemp("run")
    assert distill(*RUN, cwd=folder).code == 0
    return only_run_in(folder)


def test_the_console_command_leaves_what_its_function_leaves(
    run: Path, run_console: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run_console(*RUN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a run that goes well says nothing on standard error"
    assert "test/errors" in done.stdout and done.stdout.splitlines()[-1].startswith("record: ")
    there = only_run_in(tmp_path)
    assert {path.name for path in there.iterdir()} == {path.name for path in run.iterdir()}
    ours, theirs = read_record(run / "run.json"), read_record(there / "run.json")
    assert theirs.metrics == ours.metrics and theirs.overrides == ours.overrides and theirs.config == ours.config


def test_a_run_leaves_its_record(run: Path) -> None:
    record = read_record(run / "run.json")
    assert (record.command, record.experiment, record.status, record.seed) == ("distill train", "train", "completed", 0)
    assert record.overrides == ["trainer.max_epochs=3", "trainer.enable_progress_bar=false", "threads=1"]
    assert {name.partition("/")[2] for name in record.metrics if name.startswith("test/")} <= set(metric_names(10))
    assert 0 < record.metrics["test/errors"] < 360 and record.data["summary"]["rows"]["test"] == 360
    assert record.ledger["student_update"]["flops"] > 0 and record.ledger["teacher_scoring"]["flops"] == 0
    assert record.hardware["threads"] == 1 and record.versions["torch"]


def test_a_run_leaves_the_config_it_was_composed_of(run: Path) -> None:
    composed = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    record = read_record(run / "run.json")
    assert composed["trainer"]["max_epochs"] == record.config["trainer"]["max_epochs"] == 3
    assert not any(str(run) in str(value) for value in record.config.values()), "the config names no run folder"


def test_a_run_leaves_its_student_items_metrics_checkpoints_and_log(run: Path) -> None:
    assert (run / "student" / "model.safetensors").exists() and (run / "student" / "architecture.json").exists()
    items = pq.read_table(run / "items_test.parquet")
    assert items.num_rows == 360 and set(items.column_names) <= set(ITEM_COLUMNS)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    logged = rows_of(run / "csv" / "metrics.csv")
    assert {"train/loss", "train/hard", "val/errors", "val/nll"} <= set(logged[0])
    log = (run / "train.log").read_text()
    assert "completed after" in log and "test/errors" in log


def test_p90_evaluate_gives_what_the_run_recorded(run: Path, distill: Callable[..., Any], tmp_path: Path) -> None:
    record = read_record(run / "run.json")
    for split in ("test", "val"):
        done = distill("evaluate", str(run), f"split={split}", cwd=tmp_path)
        assert done.code == 0, done.err
        scored = json.loads((run / f"evaluation_{split}.json").read_text())["metrics"]
        recorded = {name: value for name, value in record.metrics.items() if name in scored}
        assert len(recorded) > (10 if split == "test" else 1)
        assert {name: scored[name] for name in recorded} == pytest.approx(recorded, rel=1e-6)


def test_evaluate_measures_against_another_network(
    run: Path, digits_teacher: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    done = distill("evaluate", f"run='{run}'", f"reference='{digits_teacher}'", cwd=tmp_path)
    assert done.code == 0 and "test/agreement_at_1" in done.out
    teacher = read_record(digits_teacher / "run.json")
    scored = json.loads((run / "evaluation_test.json").read_text())["metrics"]
    assert scored["test/teacher_errors"] == teacher.metrics["test/errors"]


def test_evaluate_needs_a_completed_run(run: Path, distill: Callable[..., Any], tmp_path: Path) -> None:
    content = json.loads((run / "run.json").read_text()) | {"status": "failed", "reason": "lost power"}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text(json.dumps(content))
    assert "is failed (lost power); only a completed run" in distill("evaluate", "broken", cwd=tmp_path).error


def test_p115_a_run_folder_from_elsewhere_names_only_data(
    run: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    content = json.loads((run / "run.json").read_text())
    content["config"]["data"] = {"_target_": "os.system", "command": f"touch {tmp_path}/trapped"}
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text(json.dumps(content))
    assert "data._target_ is 'os.system'" in distill("evaluate", "foreign", cwd=tmp_path).error
    assert not (tmp_path / "trapped").exists()


# -- in this process: the same code, without another import of torch ---------------------------------------------------


@pytest.fixture
def trained(distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path) -> Callable[..., RunRecord]:
    """`trained("name", overrides...)`: a tiny run in its own folder, and its record."""

    def train(name: str, *overrides: str) -> RunRecord:
        done = distill("train", *tiny, "logger=none", f"hydra.run.dir={name}", *overrides, cwd=tmp_path)
        assert done.code == 0, done.err
        return read_record(tmp_path / name / "run.json")

    return train


def test_the_same_seed_gives_the_same_student(trained: Callable[..., RunRecord]) -> None:
    first, again, other = trained("a", "seed=3"), trained("b", "seed=3"), trained("c", "seed=4")
    assert first.student["sha256"] == again.student["sha256"] != other.student["sha256"]
    assert first.metrics == again.metrics
    assert first.config_hash == again.config_hash != other.config_hash


def test_a_cache_teaches_what_its_teacher_teaches(
    trained: Callable[..., RunRecord], digits_teacher: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    done = distill("cache", f"teacher.path='{digits_teacher}'", "cache_dir=cache", "shard_rows=500", cwd=tmp_path)
    assert done.code == 0 and "1437 rows in cache" in done.out and "T=20: 0.00e+00" in done.out
    soft = ("method=soft_target", "method.temperature=3", "method.hard_weight=0.3")
    reference = ("teacher@reference=frozen", f"reference.path='{digits_teacher}'")
    live = trained("live", *soft, *reference, "teacher=frozen", f"teacher.path='{digits_teacher}'")
    cached = trained("cached", *soft, *reference, "teacher=cached", f"teacher.path='{tmp_path}/cache'")
    assert cached.metrics == pytest.approx(live.metrics, rel=1e-6, abs=1e-6)
    assert live.teacher is not None and cached.teacher is not None
    assert (live.teacher["kind"], cached.teacher["kind"]) == ("frozen", "cached")
    assert (
        live.teacher["sha256"] == cached.teacher["sha256"] == read_record(digits_teacher / "run.json").student["sha256"]
    )


def test_a_finished_cache_is_not_written_again(
    digits_teacher: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    command = ("cache", f"teacher.path='{digits_teacher}'", "cache_dir=cache", "top_k=3")
    assert distill(*command, cwd=tmp_path).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    assert distill(*command, cwd=tmp_path).code == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    assert "top_k: cache has 3, needed 4" in distill(*command[:-1], "top_k=4", cwd=tmp_path).error


def test_a_multirun_leaves_one_folder_for_each_job(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    done = distill("train", "-m", "seed=0,1", *tiny, "logger=none", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.code == 0, done.err
    records = [read_record(tmp_path / "sweep" / str(number) / "run.json") for number in (0, 1)]
    assert [record.seed for record in records] == [0, 1]
    assert (tmp_path / "sweep" / "0" / "train.log").read_text().count("completed after") == 1


def test_ctrl_c_ends_a_whole_multirun(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from research.errors import Preempted

    def stopped(cfg: Any) -> None:
        raise Preempted("SIGTERM at step 3", 143)

    monkeypatch.setattr("research.sweeps.jobs.train_job", stopped)
    done = distill("train", "-m", "seed=0,1,2", *tiny, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.code == 143 and done.err.splitlines()[-1] == "error: stopped: SIGTERM at step 3"
    assert not (tmp_path / "sweep" / "1").exists(), "the next job was not started"


@pytest.mark.parametrize("debug", ["fast", "profile"])
def test_debug(debug: str, distill: Callable[..., Any], tmp_path: Path) -> None:
    done = distill("train", f"debug={debug}", "hydra.run.dir=run", "trainer.enable_progress_bar=false", cwd=tmp_path)
    assert done.code == 0, done.err
    assert read_record(tmp_path / "run" / "run.json").status == "completed"
    assert (tmp_path / "run" / "checkpoints").exists() is (debug == "profile")


@pytest.mark.slow
def test_debug_overfit_learns_its_batches(distill: Callable[..., Any], tmp_path: Path) -> None:
    flags = ("hydra.run.dir=run", "trainer.enable_progress_bar=false", "evaluation.splits=[train]")
    assert distill("train", "debug=overfit", *flags, cwd=tmp_path).code == 0
    logged = rows_of(tmp_path / "run" / "csv" / "metrics.csv")
    losses = [float(row["train/loss"]) for row in logged if row["train/loss"]]
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_recorded(distill: Callable[..., Any], tmp_path: Path) -> None:
    done = distill("train", "optimizer.lr=1e30", "trainer=smoke", "hydra.run.dir=run", cwd=tmp_path)
    assert "the loss is not finite at step" in done.error and "batch indices" in done.error and done.code == 1
    record = read_record(tmp_path / "run" / "run.json")
    assert record.status == "failed" and "not finite" in str(record.reason)


# -- secrets ----------------------------------------------------------------------------------------------------------


class KeyLogger(CSVLogger):
    """A logger of a service that wants a key."""

    received = ""

    def __init__(self, save_dir: str, api_key: str, name: str = "csv", version: str = "") -> None:
        super().__init__(save_dir, name=name, version=version)
        type(self).received = api_key


def test_p116_a_secret_of_the_environment_is_used_and_never_written(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("own_loggers")
    monkeypatch.setitem(sys.modules, "own_loggers", module)
    monkeypatch.setattr(KeyLogger, "__module__", "own_loggers")
    monkeypatch.setattr(module, "KeyLogger", KeyLogger, raising=False)
    monkeypatch.setattr(config, "ALLOWED_PREFIXES", (*config.ALLOWED_PREFIXES, "own_loggers."))
    monkeypatch.setenv("SERVICE_KEY", "hunter2hunter2")
    own = ("logger._target_=own_loggers.KeyLogger", "+logger.api_key=${oc.env:SERVICE_KEY}", "hydra.run.dir=run")
    done = distill("train", *tiny, *own, cwd=tmp_path)
    assert done.code == 0, done.err
    assert KeyLogger.received == "hunter2hunter2"
    assert "hunter2" not in done.out + done.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8 and not [path for path in written if b"hunter2" in path.read_bytes()]
    assert read_record(tmp_path / "run" / "run.json").config["logger"]["api_key"] == "***"


@pytest.mark.parametrize("override", ["logger.api_key=hunter2", "+token=hunter2", "+data.hf_token=hunter2"])
@pytest.mark.parametrize("multirun", [False, True])
def test_p116_a_literal_secret_is_refused_before_anything_is_written(
    override: str, multirun: bool, distill: Callable[..., Any], tmp_path: Path
) -> None:
    done = distill("train", *(["-m"] if multirun else []), override, "seed=0", cwd=tmp_path)
    assert "is a secret" in done.error and "hunter2" not in done.out + done.err
    assert list(tmp_path.iterdir()) == []


# -- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_leave_the_record_of_one(
    run_console: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    """The first rank alone evaluates: no test row is counted twice."""
    for devices in (1, 2):
        flags = ("trainer=smoke", f"trainer.devices={devices}", f"hydra.run.dir=on_{devices}")
        done = run_console("train", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (read_record(tmp_path / f"on_{devices}" / "run.json") for devices in (1, 2))
    assert {name: two.metrics[name] for name in MEASURED_AT_ONCE} == pytest.approx(
        {name: one.metrics[name] for name in MEASURED_AT_ONCE}, rel=1e-3
    )


def test_logging_is_left_alone_by_a_run(trained: Callable[..., RunRecord]) -> None:
    before = list(logging.getLogger().handlers)
    trained("quiet")
    assert logging.getLogger().handlers == before
