"""A run that was interrupted and gone on with ends in the weights of the run that was not, to the last bit.

With everything that has a state: dropout, shifted images, Adam, a schedule, a validation split, and a teacher.
"""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from research.data.digits import Digits
from research.errors import ConfigError
from research.loops.fit import FitOutcome, KeepLast, StopOnInterrupt, checkpoint_callbacks, fit
from research.methods.soft_target import SoftTarget
from research.records import ClassBatch

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS, STEPS_PER_EPOCH = 2, 5
ROWS = EPOCHS * 37


class Boom(Exception):
    """An error in the middle of a step."""


class Interrupted(SoftTarget):
    """Soft and hard targets; at one call of the step, before or after its forward pass, something happens."""

    def arm(self, call: int, event: Any, before_forward: bool = False) -> "Interrupted":
        self.call, self.event, self.before_forward, self.calls = call, event, before_forward, 0
        return self

    def _happen(self) -> None:
        if isinstance(self.event, signal.Signals):
            os.kill(os.getpid(), self.event)
        else:
            raise self.event

    def training_step(self, batch: ClassBatch, batch_idx: int) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        due = self.calls == getattr(self, "call", None)
        if due and self.before_forward:
            self._happen()
        loss = super().training_step(batch, batch_idx)
        if due and not self.before_forward:
            self._happen()
        return loss


def make(kit: SimpleNamespace) -> Interrupted:
    training = kit.make_training(**kit.make_adam(dropout=0.5))
    return Interrupted(training, kit.make_teacher(), temperature=4.0, hard_weight=0.5)


def make_data() -> Digits:
    return Digits(batch_size=8, num_train=37, holdout=20, shift_pixels=1, seed=3)


def run(
    kit: SimpleNamespace,
    method: Interrupted,
    folder: Path,
    micro_batches: int,
    ckpt_path: Path | None = None,
    seed: int = 7,
) -> tuple[FitOutcome, Any]:
    interrupt = StopOnInterrupt()
    trainer = kit.make_trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=micro_batches,
        enable_checkpointing=True,
        callbacks=[*checkpoint_callbacks(folder, "val/errors", has_val=True), interrupt],
    )
    torch.manual_seed(seed)
    outcome = fit(trainer, method, make_data(), interrupt, None if ckpt_path is None else str(ckpt_path))
    return outcome, trainer


@pytest.fixture(scope="module")
def uninterrupted(kit: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @lru_cache
    def weights(micro_batches: int) -> torch.Tensor:
        method = make(kit)
        outcome, _ = run(kit, method, tmp_path_factory.mktemp("whole"), micro_batches)
        assert outcome.status == "completed" and method.rows_seen == ROWS
        return kit.flat(method.student)

    return weights


def assert_goes_on_exactly(kit: SimpleNamespace, uninterrupted: Any, folder: Path, micro_batches: int) -> None:
    """Resumed in a process whose random numbers are elsewhere: the end is the same."""
    last = folder / "last.ckpt"
    method = make(kit)
    outcome, trainer = run(
        kit, method, folder, micro_batches, last if last.exists() else None, seed=99 if last.exists() else 7
    )
    assert outcome.status == "completed" and trainer.global_step == EPOCHS * STEPS_PER_EPOCH
    assert torch.equal(kit.flat(method.student), uninterrupted(micro_batches))
    assert method.rows_seen == method.teacher_rows == ROWS


def test_the_setting_has_what_could_go_wrong(kit: SimpleNamespace, uninterrupted: Any, tmp_path: Path) -> None:
    """Other random numbers end elsewhere: dropout is on. And two micro-batches draw other masks than one batch."""
    method = make(kit)
    run(kit, method, tmp_path, 1, seed=8)
    assert not torch.equal(kit.flat(method.student), uninterrupted(1))
    assert not torch.equal(uninterrupted(1), uninterrupted(2))


# Calls of the step, from 1: in the first step, in the middle, at the end of an epoch, at its start, at the very end.
CALLS = {1: (1, 4, 5, 6, 10), 2: (1, 2, 5, 9, 10, 11, 20)}
MOMENTS = [(micro_batches, call) for micro_batches, calls in CALLS.items() for call in calls]


@pytest.mark.parametrize("event", [signal.SIGTERM, signal.SIGINT], ids=lambda event: event.name)
@pytest.mark.parametrize(("micro_batches", "call"), MOMENTS)
def test_p81_p82_p86_a_signal(
    kit: SimpleNamespace, uninterrupted: Any, tmp_path: Path, event: signal.Signals, micro_batches: int, call: int
) -> None:
    outcome, trainer = run(kit, make(kit).arm(call, event), tmp_path, micro_batches)
    assert outcome.status == "preempted" and outcome.signal_number == event
    assert outcome.reason == f"{event.name} at step {trainer.global_step}; resume with ckpt_path=last"
    assert (tmp_path / "last.ckpt").exists() or trainer.global_step == 0
    assert_goes_on_exactly(kit, uninterrupted, tmp_path, micro_batches)


@pytest.mark.parametrize("before_forward", [True, False])
@pytest.mark.parametrize(("micro_batches", "call"), MOMENTS)
def test_p81_p82_an_error_within_a_step(
    kit: SimpleNamespace, uninterrupted: Any, tmp_path: Path, before_forward: bool, micro_batches: int, call: int
) -> None:
    with pytest.raises(Boom):
        run(kit, make(kit).arm(call, Boom(), before_forward), tmp_path, micro_batches)
    assert_goes_on_exactly(kit, uninterrupted, tmp_path, micro_batches)


def test_p81_ctrl_c_twice(kit: SimpleNamespace, uninterrupted: Any, tmp_path: Path) -> None:
    """The second one breaks into the step, as an error does."""
    outcome, _ = run(kit, make(kit).arm(4, KeyboardInterrupt()), tmp_path, 1)
    assert outcome.status == "preempted" and outcome.signal_number == signal.SIGINT
    assert_goes_on_exactly(kit, uninterrupted, tmp_path, 1)


def test_p81_a_kill_loses_the_steps_since_the_last_epoch(
    kit: SimpleNamespace, uninterrupted: Any, tmp_path: Path
) -> None:
    """SIGKILL leaves what was on disk: here the checkpoint of the first epoch, while the second was half done."""

    class KeepNoException(KeepLast):
        def on_exception(self, *_: Any) -> None:
            pass

    trainer = kit.make_trainer(max_epochs=EPOCHS, enable_checkpointing=True, callbacks=[KeepNoException(tmp_path)])
    method = make(kit).arm(9, Boom())
    torch.manual_seed(7)
    with pytest.raises(Boom):
        trainer.fit(method, datamodule=make_data())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == STEPS_PER_EPOCH
    assert_goes_on_exactly(kit, uninterrupted, tmp_path, 1)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("boom_step", "saved_step"), [(2, None), (3, 2), (4, 2), (5, 4), (6, 5), (8, 6), (9, 8)])
def test_p81_a_kill_within_an_epoch_loses_few_steps(
    kit: SimpleNamespace, uninterrupted: Any, tmp_path: Path, micro_batches: int, boom_step: int, saved_step: int | None
) -> None:
    """last.ckpt after every second step of ten and after both epochs; killed within the step of that number."""

    class KeepNoException(KeepLast):
        def on_exception(self, *_: Any) -> None:
            pass

    keep = KeepNoException(tmp_path, every_n_steps=2)
    trainer = kit.make_trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=micro_batches, enable_checkpointing=True, callbacks=[keep]
    )
    method = make(kit).arm(boom_step * micro_batches, Boom())
    torch.manual_seed(7)
    with pytest.raises(Boom):
        trainer.fit(method, datamodule=make_data())
    last = tmp_path / "last.ckpt"
    found = torch.load(last, weights_only=True)["global_step"] if last.exists() else None
    assert found == saved_step and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"] * last.exists()
    assert_goes_on_exactly(kit, uninterrupted, tmp_path, micro_batches)


def test_steps_are_logged_under_their_own_numbers_after_a_resume(kit: SimpleNamespace, tmp_path: Path) -> None:
    """The loop's own count of steps for loggers, which a checkpoint within an epoch must not move."""

    class Steps(L.Callback):
        def __init__(self, boom: int | None = None) -> None:
            self.boom, self.seen = boom, []

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.seen.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped))
            if trainer.global_step == self.boom:
                raise Boom

    class KeepNoException(KeepLast):
        def on_exception(self, *_: Any) -> None:
            pass

    steps = {}
    for name, boom, ckpt_path in (("whole", None, None), ("cut", 4, None), ("resumed", None, tmp_path / "last.ckpt")):
        steps[name] = Steps(boom)
        folder = tmp_path / "whole" if name == "whole" else tmp_path
        callbacks = [KeepNoException(folder, every_n_steps=2), steps[name]]
        trainer = kit.make_trainer(max_epochs=EPOCHS, enable_checkpointing=True, callbacks=callbacks)
        try:
            trainer.fit(make(kit), datamodule=make_data(), ckpt_path=ckpt_path, weights_only=True)
        except Boom:
            assert name == "cut"
    assert steps["whole"].seen == [(step, step - 1) for step in range(1, 1 + EPOCHS * STEPS_PER_EPOCH)]
    assert steps["resumed"].seen == steps["whole"].seen[2:]


@pytest.mark.parametrize(
    "interval", [{"val_check_interval": 3, "check_val_every_n_epoch": None}, {"val_check_interval": 0.4}]
)
@pytest.mark.parametrize("boom", [2, 3, 4, 6, 7, 9, 10])
def test_p81_validations_within_an_epoch_come_where_they_came(
    kit: SimpleNamespace, uninterrupted: Any, tmp_path: Path, boom: int, interval: dict[str, Any]
) -> None:
    """Every third batch over epochs' ends, and every second of an epoch's five; an error in the step of that number."""

    class Validations(L.Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.steps.append(trainer.global_step)

    def fitted(method: Interrupted, folder: Path, seed: int) -> list[int]:
        seen, last = Validations(), folder / "last.ckpt"
        callbacks = [*checkpoint_callbacks(folder, "val/errors", has_val=True), seen]
        trainer = kit.make_trainer(max_epochs=EPOCHS, enable_checkpointing=True, callbacks=callbacks, **interval)
        torch.manual_seed(seed)
        fit(trainer, method, make_data(), StopOnInterrupt(), str(last) if last.exists() else None)
        return seen.steps

    whole = fitted(make(kit), tmp_path / "whole", 7)
    cut, resumed = make(kit).arm(boom, KeyboardInterrupt()), make(kit)
    seen = fitted(cut, tmp_path / "cut", 7)
    seen += fitted(resumed, tmp_path / "cut", 99)
    assert torch.equal(kit.flat(resumed.student), uninterrupted(1)) and resumed.rows_seen == ROWS
    assert seen == whole == ([3, 6, 9] if "check_val_every_n_epoch" in interval else [2, 4, 7, 9])


def test_a_validation_within_an_optimizer_step_is_refused(kit: SimpleNamespace) -> None:
    """It would come twice where the run is stopped there, and what counts validations would count one too many."""

    def fitted(**options: Any) -> None:
        trainer = kit.make_trainer(max_epochs=1, accumulate_grad_batches=5, limit_train_batches=5, **options)
        trainer.fit(make(kit), datamodule=make_data())

    with pytest.raises(ConfigError, match=r"validates every 3 batches, within an optimizer step of .*=5: give a"):
        fitted(val_check_interval=3)
    with pytest.raises(ConfigError, match="validates every 2 batches"):
        fitted(val_check_interval=0.4)
    fitted(val_check_interval=1.0)
    fitted(val_check_interval=3, limit_val_batches=0)
    fitted(val_check_interval=10, check_val_every_n_epoch=None)
    fitted(val_check_interval=timedelta(hours=1))


KILLED = f"""
import os, signal, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
import conftest, test_resume
kit = conftest.make_kit()
test_resume.run(kit, test_resume.make(kit).arm(9, signal.SIGKILL), Path(sys.argv[1]), 1)
"""


@pytest.mark.slow  # a process that loads everything
def test_p81_a_real_kill(kit: SimpleNamespace, uninterrupted: Any, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_goes_on_exactly(kit, uninterrupted, tmp_path, 1)
