"""What a run may cost, so that arms that do different things stop at the same price."""

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from research.errors import ConfigError

SCHEDULE_LENGTH = 10_000  # steps in which a schedule is laid over a budget


@dataclass(frozen=True)
class Spent:
    """What a run has cost so far; flops None where what a part of it cost is not known."""

    flops: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Budget:
    """Upper limits on what :meth:`AbstractMethod.spent` counts; the first that is reached ends the run. None: no limit.

    flops    of student updates, rollouts (prompts included) and teacher scoring; never of the teacher's own training
    tokens   that went through a network: trained on, prompted with, generated, read by the teacher
    seconds  of wall time in fits, without validation: the one limit that two runs do not reach at the same step

    Raises ConfigError for a limit that is not above 0.
    """

    flops: float | None = None
    tokens: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not limit > 0:
                raise ConfigError(f"budget.{name} is {limit}; expected a number above 0, or null for no limit")

    @property
    def limits(self) -> dict[str, float]:
        """Name -> limit, of those that are set."""
        return {name: float(limit) for name, limit in asdict(self).items() if limit is not None}

    def fraction(self, spent: Spent) -> float:
        """The largest share of a limit that is spent: from 1 on the budget is used up; 0 where there is no limit.

        Raises ConfigError where FLOPs are limited and those of a part of the run are not known.
        """
        return max(self._shares(spent).values(), default=0.0)

    def described(self, spent: Spent) -> str:
        """The limit that is nearest, and what is spent of it: ``budget.flops is 1e+12, of which 5e+11 is spent``."""
        shares = self._shares(spent)
        if not shares:
            return "no budget"
        name = max(shares, key=lambda name: shares[name])
        return f"budget.{name} is {self.limits[name]:g}, of which {getattr(spent, name):g} is spent"

    def _shares(self, spent: Spent) -> dict[str, float]:
        shares = {}
        for name, limit in self.limits.items():
            value = getattr(spent, name)
            if value is None or math.isnan(value):
                raise ConfigError(
                    f"budget.{name} is {limit:g}, but what this run spends is not known (its text or its signal comes "
                    "from a server); give budget.tokens or budget.seconds"
                )
            shares[name] = float(value) / limit
        return shares


def check_schedule(scheduler: LRScheduler) -> None:
    """Raise ConfigError for a schedule that cannot be put at a place: its rate follows from the rate before."""
    if not isinstance(scheduler, LambdaLR) and not hasattr(scheduler, "_get_closed_form_lr"):
        raise ConfigError(
            f"scheduler {type(scheduler).__name__} gives each rate from the one before, and a budget puts the schedule "
            "where the budget stands; choose one that is a function of the step, such as scheduler=warmup_then_linear, "
            "cosine or constant"
        )


def place_schedule(scheduler: LRScheduler, fraction: float) -> None:
    """Set the rates that a schedule of SCHEDULE_LENGTH steps has after ``fraction`` of them; from 1 on, its last."""
    place = round(min(1.0, fraction) * SCHEDULE_LENGTH)
    if isinstance(scheduler, LambdaLR):  # a function of the place itself
        scheduler.last_epoch = place - 1
        scheduler.step()
        return
    scheduler.last_epoch = place
    rates = cast(Any, scheduler)._get_closed_form_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)
