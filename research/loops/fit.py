"""One call of Lightning's fit, with what every run needs around it: checkpoints, signals, and a typed outcome."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from research.data.base import AbstractClassData
from research.errors import NonFiniteLoss
from research.methods.base import AbstractMethod

CHECKPOINTS = "checkpoints"
PROGRESS_FILE = "progress.json"
EXIT_CODES = {"SIGINT": 128 + signal.SIGINT, "SIGTERM": 128 + signal.SIGTERM}


@dataclass(frozen=True)
class FitOutcome:
    """How a fit ended. `status` is completed, preempted or failed; `seconds` counts this process alone."""

    status: str
    reason: str | None
    seconds: float
    error: BaseException | None = None


class StopOnInterrupt(Callback):
    """Turns Ctrl-C into the graceful stop that SIGTERM already is: at the end of the step, after a checkpoint.

    Lightning would break into the middle of a step on Ctrl-C, where the weights may be half updated. The second
    Ctrl-C does so.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not the main thread: whoever owns it handles Ctrl-C
            self._previous = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: Any) -> None:
        self.received = "SIGINT"
        signal.signal(signal.SIGINT, self._previous)
        os.kill(os.getpid(), signal.SIGTERM)


class KeepLast(ModelCheckpoint):
    """`last.ckpt`, written at the end of every epoch and on an exception, so that a run can always go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder, filename="last", save_top_k=1, every_n_epochs=1, save_on_exception=True,
            save_on_train_epoch_end=True, enable_version_counter=False,
        )  # fmt: skip


def checkpoint_callbacks(folder: Path, monitor: str, has_val: bool) -> list[Callback]:
    """`last.ckpt` always; `best.ckpt`, lowest `monitor`, where there is a validation split to select on."""
    callbacks: list[Callback] = [KeepLast(folder)]
    if has_val:
        callbacks.append(
            ModelCheckpoint(
                dirpath=folder, filename="best", monitor=monitor, mode="min", save_top_k=1,
                auto_insert_metric_name=False, enable_version_counter=False,
            )  # fmt: skip
        )
    return callbacks


def fit(
    trainer: L.Trainer, method: AbstractMethod, data: AbstractClassData, interrupt: StopOnInterrupt, ckpt_path: str | None
) -> FitOutcome:
    """Run `trainer.fit` and say how it ended; only programming errors come through as exceptions.

    A signal is `preempted`, with the checkpoint it left; a loss that is not finite is `failed`, weights and last
    checkpoint being those of the step before.
    """
    started = time.perf_counter()

    def ended(status: str, reason: str | None, error: BaseException | None = None) -> FitOutcome:
        return FitOutcome(status, reason, time.perf_counter() - started, error)

    try:
        trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SIGTERMException as error:
        name = interrupt.received or "SIGTERM"
        return ended("preempted", f"{name} at step {trainer.global_step}; resume with ckpt_path=last", error)
    except (KeyboardInterrupt, SystemExit) as error:
        return ended("preempted", f"SIGINT at step {trainer.global_step}; resume with ckpt_path=last", error)
    except NonFiniteLoss as error:
        last = getattr(trainer.checkpoint_callback, "best_model_path", "") or "none was written yet"
        return ended("failed", f"{error}. Last good checkpoint: {Path(last).name}", error)
    return ended("completed", None)


def resume_path(ckpt_path: str | None, run_dir: Path) -> str | None:
    """The checkpoint to go on from: a given file, this folder's own for "last" (None where it has none yet)."""
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        own = run_dir / CHECKPOINTS / "last.ckpt"
        return str(own) if own.exists() else None
    if not Path(ckpt_path).exists():
        raise FileNotFoundError(f"ckpt_path is {ckpt_path}, which does not exist; give a .ckpt file, or `last`")
    return ckpt_path


class ReportProgress(Callback):
    """Keeps `progress.json` in the run folder: where a run stands, for whoever watches many of them."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / PROGRESS_FILE

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            told = {"step": trainer.global_step, "total_steps": int(trainer.estimated_stepping_batches)}
            self._path.write_text(json.dumps(told))
