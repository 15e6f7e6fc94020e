"""Learning rates against their closed forms, and the length of the run that the trainer fills in."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, OneCycleLR

from research.data.digits import Digits
from research.errors import ConfigError
from research.methods.schedules import warmup_then_linear

pytestmark = pytest.mark.filterwarnings("ignore")


def rates(total_steps: int, **options: float) -> list[float]:
    """The rate that each step uses, and the one that stands after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = warmup_then_linear(optimizer, total_steps, **options)
    used = []
    for _ in range(total_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*used, optimizer.param_groups[0]["lr"]]


def test_warmup_then_linear_by_hand() -> None:
    # 2 steps up, 8 down to a tenth: each step down takes 0.9 / 8 of the peak of 2.0
    down = [2.0 * (1 - 0.9 * k / 8) for k in range(9)]
    assert rates(10, warmup_fraction=0.2, final_fraction=0.1) == pytest.approx([1.0, 2.0, *down])
    assert rates(4, warmup_fraction=0.0) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert rates(3, warmup_fraction=0.0, final_fraction=1.0) == pytest.approx([2.0] * 4)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 20, 997])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 0.5, 0.99])
def test_no_step_has_rate_zero_and_none_is_above_the_peak(total_steps: int, warmup_fraction: float) -> None:
    found = rates(total_steps, warmup_fraction=warmup_fraction)
    assert all(0 < rate <= 2.0 + 1e-12 for rate in found[:-1])
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1]) and found[peak:] == sorted(found[peak:], reverse=True)


@pytest.mark.parametrize(
    "options",
    [{"warmup_fraction": 1.0}, {"warmup_fraction": -0.1}, {"final_fraction": 1.1}, {"final_fraction": math.nan}],
)
def test_bad_fractions_are_named(options: dict) -> None:
    with pytest.raises(ConfigError, match=rf"scheduler\.{next(iter(options))}"):
        rates(3, **options)


class Rates(L.Callback):
    """The rate of every step."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


def used_rates(kit: SimpleNamespace, scheduler: Any, **options: Any) -> list[float]:
    callback = Rates()
    data = Digits(batch_size=8, num_train=21, holdout=0)  # three steps per epoch
    kit.fit(kit.make_method("supervised", scheduler=scheduler), data, callbacks=[callback], **options)
    return callback.used


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_length_of_the_run_is_filled_in_as_optimizer_steps(kit: SimpleNamespace, micro_batches: int) -> None:
    options = {"max_epochs": 4, "accumulate_grad_batches": micro_batches}
    found = used_rates(kit, partial(CosineAnnealingLR, T_max=None, eta_min=0.01), **options)
    expected = [0.01 + (0.05 - 0.01) * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    assert found == pytest.approx(expected)
    found = used_rates(kit, partial(warmup_then_linear, warmup_fraction=0.25), **options)
    assert found == pytest.approx([0.05 * k / 3 for k in (1, 2, 3)] + [0.05 * (1 - k / 9) for k in range(9)])


def test_max_steps_is_the_length_where_it_comes_first(kit: SimpleNamespace) -> None:
    found = used_rates(kit, partial(warmup_then_linear, warmup_fraction=0.0), max_epochs=4, max_steps=5)
    assert found == pytest.approx([0.05 * (1 - k / 5) for k in range(5)])


def test_a_given_length_stays(kit: SimpleNamespace) -> None:
    found = used_rates(kit, partial(LinearLR, start_factor=1.0, end_factor=0.5, total_iters=2), max_epochs=2)
    assert found == pytest.approx([0.05, 0.0375, 0.025, 0.025, 0.025, 0.025])
    found = used_rates(kit, partial(ConstantLR, factor=0.5, total_iters=None), max_epochs=1)
    assert found == pytest.approx([0.025] * 3)
    found = used_rates(kit, partial(OneCycleLR, max_lr=0.1, total_steps=None), max_epochs=2)
    assert len(found) == 6 and max(found) == pytest.approx(0.1, rel=0.05)


def test_without_a_scheduler_the_rate_is_the_optimizer_s(kit: SimpleNamespace) -> None:
    assert used_rates(kit, None, max_epochs=2) == [0.05] * 6


def test_a_run_without_an_end_has_no_length_to_fill_in(kit: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs or trainer\.max_steps"):
        used_rates(kit, partial(CosineAnnealingLR, T_max=None), max_epochs=-1, max_time="00:00:01:00")
