"""Budgets from the command line: what is refused, what the record says, and one end for all ranks."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from research.results.record import read_record

pytestmark = pytest.mark.filterwarnings("ignore")
RUN = ("trainer.max_epochs=-1", "trainer.enable_progress_bar=false", "student.hidden=[16]", "logger=none", "threads=1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["budget.flops=0"], "budget.flops is 0.0; expected a number above 0"),
        (["budget.flop=1e9"], "budget.flop"),
        (["checkpoint_steps=0"], "checkpoint_steps is 0; expected at least 1"),
        (["budget.tokens=50"], "budget.tokens is 50, of which 64 is spent by the first optimizer step"),
        (["budget.tokens=500", "scheduler=constant", "scheduler._target_=torch.optim.lr_scheduler.StepLR",
          "+scheduler._partial_=true", "+scheduler.step_size=3"], "this scheduler counts its own steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    flags: list[str], message: str, distill: Callable[..., Any], tmp_path: Path
) -> None:
    assert message in distill("train", *RUN, *flags, "hydra.run.dir=run", cwd=tmp_path).error


def test_a_budget_ends_one_fit(distill: Callable[..., Any], tmp_path: Path) -> None:
    flags = ("experiment=sum8_trace", "loop=self_taught", "budget.flops=1e9", "hydra.run.dir=run")
    assert "budget ends one fit, and this loop runs several" in distill("train", *flags, cwd=tmp_path).error


@pytest.mark.slow
def test_all_ranks_end_at_one_step(run_console: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    ended = {}
    for devices in (1, 2):
        flags = (f"trainer.devices={devices}", "budget.flops=1e8", "checkpoint_steps=7", f"hydra.run.dir=on_{devices}")
        done = run_console("train", *RUN, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        record = read_record(tmp_path / f"on_{devices}" / "run.json")
        assert str(record.reason).startswith("budget.flops is 1e+08")
        ended[devices] = record.metrics["budget/steps"]
    assert ended[1] == ended[2] > 10
