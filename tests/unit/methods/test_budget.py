"""Limits on what a run costs: shares by hand, and schedules laid over a budget against their closed forms."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
)

from research.errors import ConfigError
from research.methods.budget import SCHEDULE_LENGTH, Budget, Spent, check_schedule, place_schedule
from research.methods.schedules import warmup_then_linear


def test_the_limit_that_is_nearest_decides() -> None:
    spent = Spent(flops=30.0, tokens=40, seconds=9.0)
    assert Budget(flops=120.0).fraction(spent) == 0.25
    assert Budget(flops=120.0, tokens=50, seconds=90.0).fraction(spent) == 0.8
    assert Budget(flops=20.0, tokens=50).fraction(spent) == 1.5
    assert Budget(tokens=50, seconds=90.0).described(spent) == "budget.tokens is 50, of which 40 is spent"
    assert Budget().fraction(spent) == 0.0 and Budget().limits == {}


def test_flops_that_nobody_knows_are_not_taken_for_none() -> None:
    for unknown in (None, math.nan):
        spent = Spent(flops=unknown, tokens=10, seconds=1.0)
        with pytest.raises(ConfigError, match=r"budget\.flops is 100, but what this run spends is not known"):
            Budget(flops=100.0).fraction(spent)
        assert Budget(tokens=20).fraction(spent) == 0.5


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_a_limit_of_nothing_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match=r"budget\.seconds is .*; expected a number above 0"):
        Budget(seconds=limit)


def made(factory: Any) -> tuple[LRScheduler, torch.optim.Optimizer]:
    parameters = [{"params": [torch.zeros(1, requires_grad=True)]}, {"params": [torch.zeros(1)], "lr": 0.5}]
    optimizer = torch.optim.SGD(parameters, lr=2.0)
    return factory(optimizer), optimizer


FACTORIES = {
    "warmup": partial(warmup_then_linear, total_steps=SCHEDULE_LENGTH, warmup_fraction=0.1, final_fraction=0.2),
    "cosine": partial(CosineAnnealingLR, T_max=SCHEDULE_LENGTH, eta_min=0.1),
    "linear": partial(LinearLR, start_factor=1.0, end_factor=0.25, total_iters=SCHEDULE_LENGTH),
    "polynomial": partial(PolynomialLR, total_iters=SCHEDULE_LENGTH, power=2.0),
    "constant": partial(ConstantLR, factor=0.5, total_iters=SCHEDULE_LENGTH),
}


def by_hand(name: str, peak: float, share: float) -> float:
    if name == "warmup":
        if share < 0.1:
            return peak * (share + 1 / SCHEDULE_LENGTH) / 0.1
        return peak * (1 - 0.8 * (share - 0.1) / 0.9)
    return {
        "cosine": 0.1 + (peak - 0.1) * (1 + math.cos(math.pi * share)) / 2,
        "linear": peak * (1 - 0.75 * share),
        "polynomial": peak * (1 - share) ** 2,
        "constant": peak * (0.5 if share < 1 else 1.0),
    }[name]


@pytest.mark.parametrize("name", FACTORIES)
def test_a_schedule_stands_where_the_budget_stands(name: str) -> None:
    """In leaps of any size, one of them backwards: what a rate was before does not matter."""
    scheduler, optimizer = made(FACTORIES[name])
    check_schedule(scheduler)
    optimizer.step()
    for share in (0.03, 0.2, 0.15, 0.5, 0.97, 1.0):
        place_schedule(scheduler, share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [by_hand(name, 2.0, share), by_hand(name, 0.5, share)]
        )
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    ended = [group["lr"] for group in optimizer.param_groups]
    place_schedule(scheduler, 1.3)
    assert [group["lr"] for group in optimizer.param_groups] == ended


@pytest.mark.parametrize(
    "factory",
    [
        partial(OneCycleLR, max_lr=2.0, total_steps=SCHEDULE_LENGTH),
        partial(CosineAnnealingWarmRestarts, T_0=10),
    ],
)
def test_a_schedule_that_cannot_be_placed_is_refused(factory: Any) -> None:
    with pytest.raises(ConfigError, match="puts the schedule where the budget stands"):
        check_schedule(made(factory)[0])
