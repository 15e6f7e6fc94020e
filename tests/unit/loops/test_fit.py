"""One fit: the checkpoints it leaves, how it ends, and that nothing of it stays behind in the process."""

import json
import logging
import math
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks.model_checkpoint import warning_cache
from torch import Tensor, nn

from research.data.digits import Digits
from research.data.loader import TensorLoader
from research.errors import CheckpointError, NonFiniteLoss, Preempted
from research.loops.fit import (
    FitOutcome,
    ReportProgress,
    StopOnInterrupt,
    checkpoint_callbacks,
    fit,
    found_checkpoint,
    resume_path,
    stopped_by_signals,
)
from research.methods.base import Training
from research.methods.supervised import Supervised

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS_PER_EPOCH = 3


class Student(nn.Module):
    """A linear network whose gradient is not finite from one call on, although its loss is."""

    def __init__(self, bad_call: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)
        self.bad_call, self.calls = bad_call, 0

    def forward(self, inputs: Tensor) -> Tensor:
        logits_NV = self.layer(inputs)
        self.calls += self.training
        if self.training and self.bad_call == self.calls:
            logits_NV.register_hook(lambda gradient: gradient * math.nan)
        return logits_NV


def make_method(bad_call: int | None = None) -> Supervised:
    return Supervised(Training(Student(bad_call), partial(torch.optim.Adam, lr=0.05), None, {}))


def make_data(holdout: int = 20) -> Digits:
    return Digits(batch_size=8, num_train=21, holdout=holdout, seed=3)


def run(
    method: Supervised,
    folder: Path,
    *callbacks: L.Callback,
    data: Digits | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> FitOutcome:
    data, interrupt = data or make_data(), StopOnInterrupt()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        **{"accelerator": "cpu", "max_epochs": 4, "num_sanity_val_steps": 0, **quiet, **options},
        callbacks=[*checkpoint_callbacks(folder, "val/errors", data.selection.holdout > 0), interrupt, *callbacks],
    )
    return fit(trainer, method, data, interrupt, ckpt_path)


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


class At(L.Callback):
    """Something at one hook; the third occurrence unless told otherwise."""

    def __init__(self, hook: str, event: Any, occurrence: int = 3) -> None:
        self.left = occurrence
        setattr(self, hook, lambda *_, **__: self._count(event))

    def _count(self, event: Any) -> None:
        self.left -= 1
        if self.left == 0:
            event()


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Errors(L.Callback):
    """val/errors and the weights after every validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, Tensor]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        layer = pl_module.student.layer.weight.detach().clone()
        self.seen.append((float(trainer.callback_metrics["val/errors"]), layer))


def test_p119_a_monitor_with_a_slash_leaves_its_file_in_the_folder_itself(tmp_path: Path) -> None:
    errors = Errors()
    outcome = run(make_method(), tmp_path / "checkpoints", errors, max_epochs=6)
    assert outcome.status == "completed" and outcome.reason is None and outcome.seconds > 0
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    lowest = min(value for value, _ in errors.seen)
    assert lowest < errors.seen[-1][0] or lowest < errors.seen[0][0]  # the best is not every one
    best = next(layer for value, layer in errors.seen if value == lowest)
    assert torch.equal(weights(tmp_path / "checkpoints/best.ckpt")["student.layer.weight"], best)
    assert torch.equal(weights(tmp_path / "checkpoints/last.ckpt")["student.layer.weight"], errors.seen[-1][1])


@pytest.mark.parametrize(("steps", "left"), [(2, ["last.ckpt"]), (5, ["best.ckpt", "last.ckpt"])])
def test_an_epoch_that_ends_before_its_validation_has_no_best_weights(
    steps: int, left: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A run of two steps, or of an epoch of three and two more: the best are a validation's, or there are none."""
    warning_cache.clear()
    errors = Errors()
    run(make_method(), tmp_path, errors, max_epochs=-1, max_steps=steps)
    assert not [str(one.message) for one in recwarn if "monitored key" in str(one.message)]
    assert sorted(path.name for path in tmp_path.iterdir()) == left and len(errors.seen) == len(left) - 1
    for _, layer in errors.seen:
        assert torch.equal(weights(tmp_path / "best.ckpt")["student.layer.weight"], layer)


def test_without_a_validation_split_only_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    run(make_method(), tmp_path, data=make_data(holdout=0))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_again_in_the_same_folder_makes_no_second_version(tmp_path: Path) -> None:
    for _ in range(2):
        run(make_method(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


# -- losses and gradients that are not finite -------------------------------------------------------------------------


def test_a_row_that_is_not_a_number_fails_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    data = make_data()
    inputs, _, index_N = data.split_tensors("train")
    row = data.train_dataloader().order(0)[10]  # in the second step
    good = inputs[row].clone()
    inputs[row] = math.nan
    method = make_method()
    outcome = run(method, tmp_path, data=data)
    assert outcome.status == "failed" and outcome.signal_number is None
    assert "not finite at step 1 (hard=nan)" in str(outcome.reason)
    assert str(int(index_N[row])) in str(outcome.reason).partition("batch indices")[2]
    assert str(outcome.reason).endswith("Last good checkpoint: last.ckpt")
    with pytest.raises(NonFiniteLoss, match="not finite at step 1"):
        outcome.raise_if_stopped(tmp_path)

    inputs[row] = good  # repaired: the run goes on from there, and ends as if nothing had been
    resumed, whole = make_method(), make_method()
    assert run(resumed, tmp_path, data=data, ckpt_path=str(tmp_path / "last.ckpt")).status == "completed"
    run(whole, tmp_path / "whole", data=data)
    assert torch.equal(resumed.student.layer.weight, whole.student.layer.weight)


def test_a_first_step_that_fails_says_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    data = make_data()
    data.split_tensors("train")[0].fill_(math.nan)
    outcome = run(make_method(), tmp_path, data=data)
    assert outcome.status == "failed" and str(outcome.reason).endswith("Last good checkpoint: none was written yet")
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("bad_call", [STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH + 2, 2 * STEPS_PER_EPOCH])
def test_weights_that_are_not_finite_never_become_the_last_checkpoint(tmp_path: Path, bad_call: int) -> None:
    """A finite loss with a gradient that is not, within the second epoch: the first epoch's checkpoint stays."""
    method = make_method(bad_call)
    outcome = run(method, tmp_path)
    assert outcome.status == "failed" and "not finite" in str(outcome.reason)
    assert not bool(method.student.layer.weight.isfinite().all())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS_PER_EPOCH
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint["state_dict"].values())


# -- signals ----------------------------------------------------------------------------------------------------------


def handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def interrupt_me(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_train_batch_end", "on_validation_batch_end", "on_train_epoch_end"]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_p86_a_signal_at_any_time_is_preempted(tmp_path: Path, hook: str, number: signal.Signals) -> None:
    before = handlers()
    occurrence = 1 if hook == "on_fit_start" else 2
    outcome = run(make_method(), tmp_path, At(hook, partial(interrupt_me, number), occurrence))
    assert (outcome.status, outcome.signal_number) == ("preempted", number)
    assert str(outcome.reason).startswith(f"{number.name} at step ")
    with pytest.raises(Preempted) as told:
        outcome.raise_if_stopped(tmp_path)
    assert told.value.exit_code == 128 + number and str(tmp_path) in str(told.value)
    assert handlers() == before
    assert (tmp_path / "last.ckpt").exists() == (hook != "on_fit_start")  # before the first step there is nothing


def test_p86_a_signal_in_the_last_moments_of_a_fit_is_not_lost(tmp_path: Path) -> None:
    outcome = run(make_method(), tmp_path, At("on_train_end", partial(interrupt_me, signal.SIGTERM), 1))
    assert (outcome.status, outcome.signal_number) == ("preempted", signal.SIGTERM)
    resumed = make_method()
    assert run(resumed, tmp_path, ckpt_path=str(tmp_path / "last.ckpt")).status == "completed"


def test_ctrl_c_breaks_into_a_step_the_second_time_alone(tmp_path: Path) -> None:
    """The first Ctrl-C lets the step end; from then on Python's own handler stands."""
    seen: list[Any] = []

    def first() -> None:
        interrupt_me(signal.SIGINT)
        seen.append(signal.getsignal(signal.SIGINT))

    before = handlers()
    run(make_method(), tmp_path, At("on_before_backward", first))
    assert seen == [signal.default_int_handler] and handlers() == before


class NoRows(Digits):
    """Fails when the loader is asked for: on a resume that is after the checkpoint was read, before the first step."""

    def train_dataloader(self) -> TensorLoader:
        raise RuntimeError("boom")


def test_an_error_before_the_first_step_leaves_the_checkpoint_that_is_resumed_alone(tmp_path: Path) -> None:
    """What would be saved then may be half loaded, and is no state that the run has ever been in."""
    run(make_method(), tmp_path, max_epochs=2)
    last = tmp_path / "last.ckpt"
    before = last.read_bytes()
    with pytest.raises(RuntimeError, match="boom"):
        run(make_method(), tmp_path, data=NoRows(batch_size=8, num_train=21, holdout=20), ckpt_path=str(last))
    assert last.read_bytes() == before


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), NonFiniteLoss("nan")])
def test_whatever_ends_a_fit_the_process_gets_its_handlers_back(tmp_path: Path, error: BaseException) -> None:
    """A later job of the same process must be stopped by Ctrl-C in its own way."""

    def fail() -> None:
        raise error

    before = handlers()
    try:
        run(make_method(), tmp_path, At("on_train_batch_end", fail))
    except RuntimeError as raised:
        assert raised is error
    assert handlers() == before


def test_a_fit_outside_the_main_thread_leaves_signals_alone(tmp_path: Path) -> None:
    outcomes: list[FitOutcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run(make_method(), tmp_path, max_epochs=1)))
    thread.start()
    thread.join()
    assert [outcome.status for outcome in outcomes] == ["completed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_after_the_fit_raise_preempted(number: signal.Signals) -> None:
    before = handlers()
    told = pytest.raises(Preempted, match=rf"{number.name} in the test; resume with ckpt_path=last")
    with told as error, stopped_by_signals("in the test"):
        interrupt_me(number)
        threading.Event().wait(5)  # a signal is handled between two instructions
    assert error.value.exit_code == 128 + number
    assert handlers() == before
    with stopped_by_signals("in the test"):
        pass
    assert handlers() == before


# -- going on ---------------------------------------------------------------------------------------------------------


def test_p87_last_is_this_folder_s_own_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resume_path(None, tmp_path) is None
    with caplog.at_level(logging.WARNING):
        assert resume_path("last", tmp_path) is None
    assert "begins at step 0" in caplog.text and "last.ckpt" in caplog.text  # said, not silent
    caplog.clear()
    assert resume_path("last", tmp_path, is_asked=False) is None and caplog.text == "", "of a study or sweep"
    (tmp_path / "checkpoints").mkdir()
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.touch()
    caplog.clear()
    assert resume_path("last", tmp_path) == str(last) and resume_path(str(last), tmp_path / "other") == str(last)
    assert caplog.text == ""
    assert found_checkpoint("last", tmp_path) == last == found_checkpoint(str(last), tmp_path / "other")
    for named in (None, str(tmp_path / "nowhere.ckpt")):
        assert found_checkpoint(named, tmp_path) is None
    assert found_checkpoint("last", tmp_path / "other") is None
    with pytest.raises(CheckpointError, match=r"ckpt_path is .*nowhere\.ckpt, which does not exist"):
        resume_path(str(tmp_path / "nowhere.ckpt"), tmp_path)


def test_progress_is_a_whole_file_at_every_moment(tmp_path: Path) -> None:
    told: list[dict[str, int]] = []

    class Read(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            told.append(json.loads((tmp_path / "progress.json").read_text()))

    run(make_method(), tmp_path / "checkpoints", ReportProgress(tmp_path), Read())
    assert told == [{"step": STEPS_PER_EPOCH * epoch, "total_steps": 12} for epoch in (1, 2, 3, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "progress.json"]
