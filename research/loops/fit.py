"""One call of Lightning's fit, with what every run needs around it: checkpoints, signals, and a typed outcome."""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import SIGTERMException

from research.errors import CheckpointError, NonFiniteLoss, Preempted, Pruned
from research.loops.pruning_stop import PruningStop
from research.loops.signals import handled
from research.methods.base import AbstractMethod
from research.models.weights import is_finite
from research.results.record import PROGRESS_FILE

CHECKPOINTS = "checkpoints"
LAST, BEST = "last.ckpt", "best.ckpt"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitOutcome:
    """How a fit ended. `status` is completed, pruned, preempted or failed; `seconds` counts this process alone.

    signal_number  of the signal that stopped a preempted fit
    """

    status: str
    reason: str | None
    seconds: float
    signal_number: int | None = None

    def raise_if_stopped(self, run_dir: Path) -> None:
        """Raises Preempted, Pruned or NonFiniteLoss where the fit did not complete."""
        if self.status == "pruned":
            raise Pruned(str(self.reason))
        if self.signal_number is not None:
            raise Preempted(f"{self.reason} (run folder {run_dir})", 128 + self.signal_number)
        if self.status != "completed":
            raise NonFiniteLoss(str(self.reason))


class StopOnInterrupt(Callback):
    """Turns Ctrl-C into the graceful stop that SIGTERM already is: at the end of the step, after a checkpoint.

    Lightning would break into the middle of a step on Ctrl-C, where the weights may be half updated. The second
    Ctrl-C does so. Before the first step there is nothing to save, and either signal stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_training = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Own both signals inside; Lightning's SIGTERM handler, while it trains, is set on top and calls ours too."""
        self.received, self._is_training = None, False
        with handled({signal.SIGINT: self._interrupt, signal.SIGTERM: self._note}):
            yield

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_training = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if not self._is_training:
            raise SIGTERMException

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._note(number, frame)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)


class KeepLast(ModelCheckpoint):
    """`last.ckpt`, written at the end of every epoch and on an exception, so that a run can always go on.

    every_n_steps   written after so many optimizer steps too, when the next one begins: what a step brings with it, a
                    validation for one, is done by then. None: not within an epoch

    Weights that are not finite never replace it: there is no going on from them. Nor does an exception before the first
    step, when a checkpoint that is resumed may be half loaded.
    """

    def __init__(self, folder: Path, every_n_steps: int | None = None) -> None:
        super().__init__(
            dirpath=folder,
            filename="last",
            save_top_k=1,
            every_n_epochs=1,
            save_on_exception=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self._is_training = False
        self._path, self._every_n_steps, self._saved_step = folder / LAST, every_n_steps, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._is_training, self._saved_step = True, trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step, loop = trainer.global_step, trainer.fit_loop.epoch_loop
        begins_step = batch_idx > 0 and batch_idx % trainer.accumulate_grad_batches == 0
        if self._every_n_steps is None or not begins_step or step % self._every_n_steps or step == self._saved_step:
            return
        self._saved_step = step
        if is_finite(pl_module):
            # a resumed loop counts this step for its loggers once more
            loop._batches_that_stepped -= 1
            trainer.save_checkpoint(self._path)
            loop._batches_that_stepped += 1

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._is_training and is_finite(pl_module):
            super().on_exception(trainer, pl_module, exception)


def better_of(metric: str) -> Literal["max", "min"]:
    """Which values of a validation metric are the better ones: the highest of an accuracy, the lowest of all others."""
    return "max" if metric.endswith("accuracy") else "min"


def checkpoint_callbacks(folder: Path, monitor: str, has_val: bool, every_n_steps: int | None = None) -> list[Callback]:
    """`last.ckpt` always; `best.ckpt`, lowest `monitor` (an accuracy: highest), where there is a validation split.

    A run that ends before its first validation leaves no `best.ckpt`.
    """
    callbacks: list[Callback] = [KeepLast(folder, every_n_steps)]
    if has_val:
        best = ModelCheckpoint(
            dirpath=folder,
            filename="best",
            monitor=monitor,
            mode=better_of(monitor),
            save_top_k=1,
            save_on_train_epoch_end=False,  # after a validation: a run may end in an epoch that none has judged
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        callbacks.append(best)
    return callbacks


def fit(
    trainer: L.Trainer,
    method: AbstractMethod,
    data: L.LightningDataModule,
    interrupt: StopOnInterrupt,
    ckpt_path: str | None,
) -> FitOutcome:
    """Run `trainer.fit` and say how it ended; only programming errors come through as exceptions.

    A signal is `preempted`, with the checkpoint it left; a loss that is not finite is `failed`, and the last checkpoint
    is that of the last step with finite weights.
    """
    started = time.perf_counter()

    def ended(status: str, reason: str | None, number: int | None = None) -> FitOutcome:
        return FitOutcome(status, reason, time.perf_counter() - started, number)

    def stopped(number: int) -> FitOutcome:
        name = signal.Signals(number).name
        return ended("preempted", f"{name} at step {trainer.global_step}; resume with ckpt_path=last", number)

    try:
        with interrupt.watching():
            trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SIGTERMException:
        return stopped(interrupt.received or signal.SIGTERM)
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes the second of the first
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        return stopped(signal.SIGINT)
    except NonFiniteLoss as error:
        return ended("failed", f"{error}. Last good checkpoint: {_last_checkpoint(trainer)}")
    pruners = [one for one in trainer.callbacks if isinstance(one, PruningStop)]  # type: ignore[attr-defined]
    if pruners and pruners[0].reason is not None:
        return ended("pruned", pruners[0].reason)
    if interrupt.received is not None:  # in the last moments of the fit, after Lightning's own last look
        return stopped(interrupt.received)
    return ended("completed", None)


def _last_checkpoint(trainer: L.Trainer) -> str:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return LAST if folder is not None and (Path(folder) / LAST).exists() else "none was written yet"


@contextmanager
def stopped_by_signals(where: str) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Preempted at once: for what surrounds a fit, which is repeated on a resume."""

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Preempted(f"{name} {where}; resume with ckpt_path=last", 128 + number)

    with handled({signal.SIGINT: stop, signal.SIGTERM: stop}):
        yield


def found_checkpoint(ckpt_path: str | None, run_dir: Path) -> Path | None:
    """The checkpoint that `ckpt_path` names, a given file or this folder's own for "last"; None where none is there."""
    if ckpt_path is None:
        return None
    path = run_dir / CHECKPOINTS / LAST if ckpt_path == "last" else Path(ckpt_path)
    return path if path.exists() else None


def resume_path(ckpt_path: str | None, run_dir: Path, *, is_asked: bool = True) -> str | None:
    """The checkpoint to go on from, see :func:`found_checkpoint`.

    A folder that has none yet begins at step 0, and the log says so where ``last`` ``is_asked`` for by a user: a run
    killed in its first epoch left nothing to go on from. Raises CheckpointError where a given file does not exist.
    """
    found = found_checkpoint(ckpt_path, run_dir)
    if found is not None or ckpt_path is None:
        return None if found is None else str(found)
    if ckpt_path != "last":
        raise CheckpointError(f"ckpt_path is {ckpt_path}, which does not exist; give a .ckpt file, or `last`")
    path = run_dir / CHECKPOINTS / LAST
    if is_asked:
        log.warning("no %s, so this run begins at step 0; hydra.run.dir=FOLDER names the run to go on with", path)
    return None


class ReportProgress(Callback):
    """Keeps `progress.json` in the run folder: where a run stands, for whoever watches many of them."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / PROGRESS_FILE

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            told = {"step": trainer.global_step, "total_steps": _total_steps(trainer, pl_module)}
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(told))
            os.replace(partial, self._path)  # whoever reads it finds one state or the next, never half of one


def _total_steps(trainer: L.Trainer, method: L.LightningModule) -> int:
    """Of the whole fit; where a budget ends it, as many as it would pay for at the price so far."""
    steps = float(trainer.estimated_stepping_batches)
    if isinstance(method, AbstractMethod) and method.budget is not None:
        fraction = method.budget.fraction(method.spent())  # of this rank: the others are not here to be asked
        steps = min(steps, trainer.global_step / min(1.0, fraction)) if fraction > 0 else steps
    return round(steps) if math.isfinite(steps) else 0


def profiler_into(run_dir: Path, kind: str) -> SimpleProfiler | AdvancedProfiler:
    """Lightning's profiler of that name, which writes `fit-profile.txt` into the run folder."""
    chosen = SimpleProfiler if kind == "simple" else AdvancedProfiler
    return chosen(dirpath=run_dir, filename="profile")
