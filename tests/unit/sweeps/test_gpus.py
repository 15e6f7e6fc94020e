"""One GPU for every worker: counted on the command's machine, unless the launcher places a job itself."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from research.sweeps import gpus
from research.sweeps.gpus import GpuShare, gpus_of


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`pin` sets the environment for good: what stood there before stands again after a test."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(gpus, "_pinned", None)
    for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


def seen() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def in_a_worker(share: GpuShare) -> GpuShare:
    """The share as a launcher hands it on."""
    found: GpuShare = pickle.loads(pickle.dumps(share))
    return found


def test_gpus_are_counted_where_there_are_several_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_of(None, 2).values == (), "no nvidia-smi"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A'; echo '  MIG 1g'; echo 'GPU 1: A'; echo 'GPU 2: A'\n")
    program.chmod(0o755)
    assert gpus_of(None, 2).values == ("0", "1", "2") and gpus_of(None, 1).values == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert gpus_of(None, 2).values == ("4", "6") and gpus_of([7], 2).values == ("7",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert gpus_of(None, 2).values == ()


def test_workers_in_turn_see_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    share = in_a_worker(gpus_of(None, 2))
    told = []
    for index in range(3):  # trials of a batch that one process runs one after the other
        share.pin(index)
        told.append(seen())
    assert told == ["4", "6", "4"]


@pytest.mark.parametrize(
    ("variable", "value"), [("SLURM_JOB_ID", "17"), ("CUDA_VISIBLE_DEVICES", "1"), ("CUDA_VISIBLE_DEVICES", "")]
)
def test_what_a_launcher_gave_a_job_stands(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the command's machine are other GPUs there, or another job's; unless the user named them."""
    counted, asked = GpuShare(("0", "1")), gpus_of([0, 1], 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    counted_in_job = GpuShare(("0", "1"))
    monkeypatch.setenv(variable, value)
    before = seen()
    for share in (counted, counted_in_job):
        in_a_worker(share).pin(1)
        assert seen() == before
    in_a_worker(asked).pin(1)
    assert seen() == "1"


def test_on_another_machine_the_numbers_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    share = in_a_worker(GpuShare(("0", "1")))
    monkeypatch.setattr(gpus.platform, "node", lambda: "elsewhere")
    share.pin(1)
    assert seen() is None
