"""A run that ends by its budget: at which step, at which rates, and just the same where it was interrupted."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from research.data.digits import Digits
from research.errors import ConfigError
from research.loops.fit import StopOnInterrupt
from research.loops.training import TrainingRun
from research.methods.base import Training
from research.methods.budget import Budget
from research.methods.supervised import Supervised
from research.models.build import build_network, describe
from research.results.record import RunRecord, read_record

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}
MLP: dict[str, Any] = {"_target_": "research.models.classifiers.Mlp", "hidden": [12], "dropout": 0.5}
UPDATE = 3 * 2 * (64 * 12 + 12 * 10) - 2 * 64 * 12  # FLOPs of one row, forward and backward
ROWS = 37  # five steps an epoch: 8, 8, 8, 8, 5
COSINE = partial(CosineAnnealingLR, T_max=None, eta_min=0.0)


def make_run(folder: Path, budget: Budget | None, scheduler: Any = None, **config: Any) -> TrainingRun:
    torch.manual_seed(0)
    network = build_network(MLP, **FACTS)
    training = Training(network, partial(torch.optim.Adam, lr=0.02), scheduler, describe(MLP, **FACTS), budget)
    evaluation = {"splits": ["test"], "weights": "last", "batch_size": 400, "bias_classes": [], "val_problems": 0}
    plain: dict[str, Any] = {"name": "run", "seed": 3, "ckpt_path": None, "keep_checkpoints": True, "trainer": {}}
    return TrainingRun(
        run_dir=folder,
        data=Digits(batch_size=8, num_train=ROWS, holdout=20, seed=3),
        method=Supervised(training),
        architecture=describe(MLP, **FACTS),
        reference=None,
        variants={},
        config={**plain, "monitor": "val/errors", **config, "evaluation": evaluation},
        command="distill train",
        overrides=[],
    )


class Rates(L.Callback):
    """The rate of every step; an error when step number ``boom`` begins."""

    def __init__(self, boom: int | None = None) -> None:
        self.used: list[float] = []
        self.boom = boom

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.boom:
            raise RuntimeError("boom")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


def go(run: TrainingRun, rates: Rates | None = None, **options: Any) -> RunRecord:
    interrupt = StopOnInterrupt()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    plain: dict[str, Any] = {"accelerator": "cpu", "max_epochs": -1, "num_sanity_val_steps": 0, **quiet, **options}
    run.run_dir.mkdir(parents=True, exist_ok=True)
    callbacks = [*run.callbacks(interrupt), *([] if rates is None else [rates])]
    return run.run(L.Trainer(**plain, callbacks=callbacks), interrupt)


def rows_after(steps: int) -> int:
    return steps // 5 * ROWS + steps % 5 * 8


def test_the_run_stops_at_the_first_step_that_reaches_the_budget(tmp_path: Path) -> None:
    """50 rows' worth: 45 after step 6, 53 after step 7. Each step's rate is where the schedule stood before it."""
    rates = Rates()
    record = go(make_run(tmp_path, Budget(flops=50.0 * UPDATE), COSINE), rates)
    assert record.status == "completed" and record.ledger["student_update"]["tokens"] == 53
    assert record.metrics["budget/steps"] == 7 and record.metrics["budget/fraction"] == 53 / 50
    assert record.metrics["budget/flops"] == 53 * UPDATE and "budget/tokens" not in record.metrics
    assert record.reason == f"budget.flops is {50 * UPDATE:g}, of which {53 * UPDATE:g} is spent after step 7"
    assert read_record(tmp_path / "run.json").reason == record.reason
    shares = torch.tensor([rows_after(step) / 50 for step in range(7)], dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(rates.used, dtype=torch.float64),
        0.01 * (1 + torch.cos(torch.pi * shares)),
        atol=1e-5,  # a schedule has 10,000 places
        rtol=0.0,
    )
    assert "val/errors" in record.metrics, "the last step is validated"


def test_the_first_of_several_limits_ends_the_run(tmp_path: Path) -> None:
    record = go(make_run(tmp_path, Budget(flops=500.0 * UPDATE, tokens=40, seconds=1000.0)))
    assert record.ledger["student_update"]["tokens"] == 45 and str(record.reason).startswith("budget.tokens is 40,")
    assert {"budget/flops", "budget/tokens", "budget/seconds"} <= record.metrics.keys()


def test_micro_batches_count_when_their_step_is_taken(tmp_path: Path) -> None:
    record = go(make_run(tmp_path, Budget(tokens=12)), accumulate_grad_batches=2, limit_train_batches=4)
    assert record.ledger["student_update"]["tokens"] == 16 and record.metrics["budget/steps"] == 2


@pytest.mark.parametrize("boom", [1, 4, 5, 6])
@pytest.mark.parametrize("limits", [{"flops": 50.0 * UPDATE}, {"tokens": 50}], ids=["flops", "tokens"])
def test_p81_an_interrupted_run_takes_the_same_steps(tmp_path: Path, boom: int, limits: dict[str, Any]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    budget, rates = Budget(**limits), [Rates(), Rates(boom), Rates()]
    expected = go(make_run(whole, budget, COSINE), rates[0])
    with pytest.raises(RuntimeError, match="boom"):
        go(make_run(cut, budget, COSINE), rates[1])
    torch.manual_seed(99)
    resumed = go(make_run(cut, budget, COSINE, ckpt_path="last"), rates[2])
    assert rates[1].used + rates[2].used == rates[0].used
    assert resumed.student["sha256"] == expected.student["sha256"] and resumed.reason == expected.reason
    assert resumed.metrics == expected.metrics


def test_a_run_that_is_done_takes_no_further_step(tmp_path: Path) -> None:
    """As after a kill in the evaluation."""
    first = go(make_run(tmp_path, Budget(tokens=50)))
    rates = Rates()
    again = go(make_run(tmp_path, Budget(tokens=50), ckpt_path="last"), rates)
    assert rates.used == [] and again.student["sha256"] == first.student["sha256"]
    assert (again.reason, again.metrics["test/errors"]) == (first.reason, first.metrics["test/errors"])


def test_a_budget_that_is_already_spent_is_refused(tmp_path: Path) -> None:
    go(make_run(tmp_path, Budget(tokens=50)))
    with pytest.raises(ConfigError, match=r"budget\.tokens is 30, of which 53 is spent by the checkpoint"):
        go(make_run(tmp_path, Budget(tokens=30), ckpt_path="last"))


def test_a_raised_budget_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    """Without a schedule, which would stand elsewhere. 21 rows end in the middle of an epoch, 37 at its end."""
    whole = go(make_run(tmp_path / "whole", Budget(tokens=90)))
    for first in (21, 37):
        go(make_run(tmp_path / str(first), Budget(tokens=first)))
        resumed = go(make_run(tmp_path / str(first), Budget(tokens=90), ckpt_path="last"))
        assert resumed.student["sha256"] == whole.student["sha256"], first
        assert resumed.ledger["student_update"]["tokens"] == whole.ledger["student_update"]["tokens"] == 90


def test_a_budget_below_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget\.tokens is 7, of which 8 is spent by the first optimizer step"):
        go(make_run(tmp_path, Budget(tokens=7)))
    assert go(make_run(tmp_path / "exact", Budget(tokens=8))).metrics["budget/steps"] == 1


def test_a_budget_that_is_not_used_up_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        record = go(make_run(tmp_path, Budget(tokens=1000)), max_epochs=2)
    assert "budget.tokens is 1000, of which 74 is spent after step 10, where trainer.max_epochs=2" in caplog.text
    assert record.reason is None and record.metrics["budget/fraction"] == 0.074


@pytest.mark.parametrize("scheduler", [partial(StepLR, step_size=5), partial(CosineAnnealingLR, T_max=100)])
def test_a_schedule_of_its_own_length_is_refused(tmp_path: Path, scheduler: Any) -> None:
    with pytest.raises(ConfigError, match="this scheduler counts its own steps"):
        go(make_run(tmp_path, Budget(tokens=50), scheduler))
