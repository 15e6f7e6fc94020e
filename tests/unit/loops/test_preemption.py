"""The real command in a process of its own, stopped by a real signal, and gone on with in the same folder."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")
RUN = (
    "train",
    "seed=4",
    "student.hidden=[16]",
    "student.dropout=0.5",
    "data.shift_pixels=1",
    "trainer.max_epochs=20",
    "trainer.enable_progress_bar=false",
    "logger=none",
)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def stop(number: signal.Signals, folder: Path, begin: Callable[..., Any]) -> tuple[int, str]:
    """Start the command, signal it in its second epoch; the exit code, and what was printed to standard error."""
    process = begin(*RUN, f"hydra.run.dir={folder}", cwd=folder.parent)
    while process.code is None and not (folder / "progress.json").exists():  # written after the first epoch
        time.sleep(0.01)
    return process.signal(number), process.err.read_text()


@pytest.fixture(scope="module")
def whole(distill: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = distill(*RUN, f"hydra.run.dir={folder}/run", cwd=folder)
    assert done.code == 0, done.err
    return folder / "run"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_p86_p87_a_stopped_command_says_so_and_the_same_folder_goes_on(
    distill: Callable[..., Any], begin: Callable[..., Any], tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    code, told = stop(number, folder, begin)
    assert code == 128 + number
    message = told.splitlines()[-1]
    assert message.startswith(f"error: stopped: {number.name} at step ") and str(folder) in message
    first = record(folder)
    assert first["status"] == "preempted" and first["reason"].startswith(f"{number.name} at step ")
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    total = json.loads((whole / "progress.json").read_text())["total_steps"]
    assert 20 <= step < total  # after the first epoch and before the last
    assert not (folder / "student").exists()

    done = distill(*RUN, "ckpt_path=last", f"hydra.run.dir={folder}", cwd=folder.parent)
    assert done.code == 0, done.err
    last, expected = record(folder), record(whole)
    assert last["status"] == "completed"
    assert last["student"]["sha256"] == expected["student"]["sha256"]
    assert last["metrics"] == expected["metrics"]
    assert last["ledger"]["student_update"]["tokens"] == expected["ledger"]["student_update"]["tokens"]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(folder)[name])


def test_another_architecture_cannot_go_on_with_the_checkpoint(
    distill: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    resumed = f"ckpt_path={whole}/checkpoints/last.ckpt"
    done = distill(*RUN, "student.hidden=[17]", resumed, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert done.code == 1
    assert "body.1.weight: file has (16, 64), network needs (17, 64)" in done.error
    assert record(tmp_path / "run")["status"] == "failed"


def test_a_loss_that_is_not_finite_ends_the_command_with_step_and_rows(
    distill: Callable[..., Any], tmp_path: Path
) -> None:
    done = distill(*RUN, "optimizer=sgd", "optimizer.lr=1e30", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert done.code == 1 and "not finite" in done.error and "at step" in done.error
    assert "batch indices" in done.error and "Last good checkpoint" in done.error
    assert record(tmp_path / "run")["status"] == "failed"
