"""The run record: its frozen surface, atomic writing, masking, and blank costs."""

import dataclasses
import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from research.results.record import (
    LEDGER_PARTS,
    RECORD_KEYS,
    RunRecord,
    collect_versions,
    git_revision,
    hardware,
    hash_config,
    ledger_total,
    mask_overrides,
    mask_secrets,
    read_record,
    write_record,
)

RECORD = RunRecord(
    command="distill train experiment=digits",
    experiment="digits",
    status="completed",
    seed=3,
    config={"method": {"temperature": 4.0}},
    metrics={"test/errors": 7.0},
    started_at="2026-01-02T03:04:05+00:00",
    wall_s=12.5,
)


def test_record_schema_is_frozen(tmp_path: Path) -> None:
    """A change of these keys needs a new schema number: results of older runs are read by them."""
    expected = (
        "schema", "command", "experiment", "status", "reason", "seed", "config", "config_hash", "overrides", "versions",
        "revision", "hardware", "started_at", "wall_s", "metrics", "ledger", "data", "student", "teacher", "artifacts",
    )  # fmt: skip
    assert expected == RECORD_KEYS
    assert tuple(json.loads(write_record(tmp_path / "run.json", RECORD).read_text())) == expected
    assert LEDGER_PARTS == ("student_update", "teacher_scoring", "teacher_training", "rollout", "prompt_prefill")


def test_record_survives_the_round_trip(tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, metrics={"a/x": math.inf, "a/y": -math.inf, "a/z": 0.1}, config_hash="given")
    back = read_record(write_record(tmp_path / "deep" / "run.json", record))
    assert back == record
    nan = dataclasses.replace(RECORD, metrics={"train/loss": math.nan})
    text = write_record(tmp_path / "run.json", nan).read_text()
    assert "NaN" not in text and math.isnan(read_record(tmp_path / "run.json").metrics["train/loss"])


def test_writing_leaves_the_old_record_where_it_cannot_finish(tmp_path: Path) -> None:
    path = write_record(tmp_path / "run.json", RECORD)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_record(path, dataclasses.replace(RECORD, data={"name": object()}))
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_leaves_the_old_record_whole(tmp_path: Path) -> None:
    """The process may write files of at most 100 bytes: the write fails half way, as on a full disk."""
    path = write_record(tmp_path / "run.json", RECORD)
    before = path.read_bytes()
    script = (
        "import resource, sys; from research.results.record import read_record, write_record; "
        "record = read_record(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
        "write_record(sys.argv[1], record)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert result.returncode != 0 and "OSError" in result.stderr
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "done"}, "'done'; expected one of completed, failed, preempted"),
        ({"status": "failed"}, "needs a reason"),
        ({"ledger": {"teacher": {"flops": 1.0}}}, "'teacher'"),
    ],
)
def test_record_refuses_what_it_cannot_mean(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECORD, **change)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a run record"), ("[]", "schema"), ('{"schema": 9}', "schema is 9"), ('{"schema": 1}', "missing")],
)
def test_a_broken_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_record(path)
    assert "run.json" in str(caught.value)


def test_p116_secrets_do_not_reach_the_file(tmp_path: Path) -> None:
    secret = "s3cr3t-value"
    config = {
        "logger": {"api_key": secret, "wandb": [{"hf_token": secret}], "authToken": secret, "PASSWORD": secret},
        "secrets": {"a": secret},
        "aws_secret_access_key": secret,
    }
    record = dataclasses.replace(
        RECORD,
        config=config,
        overrides=[
            f"logger.api_key={secret}",
            f"+hub.token={secret}",
            "seed=3",
            f"logger={{project: a, api_key: {secret}}}",
        ],
        command=f"distill train logger.password={secret} seed=3",
    )
    assert secret not in write_record(tmp_path / "run.json", record).read_text()


def test_p116_what_is_no_secret_stays() -> None:
    config = {
        "max_tokens": 512,
        "tokenizer": "byte",
        "eos_token": "</s>",
        "api_key": None,
        "num_tokens": [1, 2],
        "token": "",
    }
    masked = mask_secrets(config)
    assert {**config, "token": "***"} == masked
    assert mask_overrides(["max_tokens=5", "data=mnist", "~logger", "x.tokenizer=a"]) == [
        "max_tokens=5", "data=mnist", "~logger", "x.tokenizer=a",
    ]  # fmt: skip


def test_config_hash_ignores_order_and_secrets_only() -> None:
    one = hash_config({"a": 1, "b": {"c": 2.0, "api_key": "x"}})
    assert one == hash_config({"b": {"api_key": "y", "c": 2.0}, "a": 1})
    assert one != hash_config({"a": 1, "b": {"c": 2.5, "api_key": "x"}})


def test_p78_versions_come_from_distribution_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "liar"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.1.19"')
    info = tmp_path / "liar-0.1.25.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: liar\nVersion: 0.1.25\n")
    monkeypatch.syspath_prepend(tmp_path)
    versions = collect_versions(["liar", "numpy", "no-such-package"])
    assert versions["liar"] == "0.1.25"
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert versions["no-such-package"] is None and versions["python"]


def test_git_revision_of_a_checkout_and_of_a_plain_folder(tmp_path: Path) -> None:
    assert git_revision(tmp_path) == {"commit": None, "dirty": None}
    assert git_revision(tmp_path / "absent") == {"commit": None, "dirty": None}

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    assert git_revision(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "b").write_text("untracked")
    assert git_revision(tmp_path)["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path)["dirty"] is True


def test_hardware_names_what_the_run_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = hardware(accelerator="a GPU")
    assert set(found) == {"machine", "processor", "cores", "threads", "accelerator"}
    assert (found["threads"], found["accelerator"]) == (3, "a GPU") and found["cores"] >= 1
    assert hardware(threads=7)["threads"] == 7


def test_p122_a_missing_cost_is_never_zero() -> None:
    ledger = {"student_update": {"flops": 5.0, "tokens": None}, "teacher_scoring": {"flops": 0.0, "tokens": 1.0}}
    assert ledger_total(ledger, "flops", ["student_update", "teacher_scoring"]) == 5.0
    assert ledger_total(ledger, "tokens", ["student_update", "teacher_scoring"]) is None
    assert ledger_total(ledger, "seconds", ["student_update"]) is None
    assert ledger_total(ledger, "flops", ["student_update", "teacher_scoring", "rollout"]) is None
