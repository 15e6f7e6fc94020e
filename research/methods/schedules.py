"""Learning-rate schedules over optimizer steps that know the length of the run."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from research.errors import ConfigError


def warmup_then_linear(
    optimizer: Optimizer, total_steps: int, *, warmup_fraction: float = 0.05, final_fraction: float = 0.0
) -> LambdaLR:
    """Linear rise over the first `warmup_fraction` of `total_steps`, then linear fall to `final_fraction` of the peak.

    Step k (from 0) uses (k + 1) / warmup_steps of the peak while warming up, so no step has rate 0 before the end.
    """
    if not 0 <= warmup_fraction < 1:
        raise ConfigError(f"scheduler.warmup_fraction is {warmup_fraction}; expected a number in [0, 1)")
    if not 0 <= final_fraction <= 1:
        raise ConfigError(f"scheduler.final_fraction is {final_fraction}; expected a number in [0, 1]")
    warmup_steps = round(warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        fallen = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1.0 + fallen * (final_fraction - 1.0)

    return LambdaLR(optimizer, factor)
