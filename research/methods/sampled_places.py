"""From a loss at every drawn token to a component: which places count alike, and what the step divides by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from research.errors import ConfigError
from research.methods.base import Component
from research.methods.rollouts import StepCounts
from research.records import LossSum

REDUCTIONS = ("token", "sequence", "fixed")


def check_reduction(reduction: str, fixed_length: int | None, valid: Sequence[str] = REDUCTIONS) -> None:
    """Raise ConfigError for a reduction that is none of the valid ones, or a fixed length it does not take."""
    if reduction not in valid:
        raise ConfigError(f"method.reduction is {reduction!r}; expected one of {', '.join(valid)}")
    if (reduction == "fixed") != (fixed_length is not None) or (fixed_length is not None and fixed_length < 1):
        raise ConfigError(
            f"method.fixed_length is {fixed_length} with reduction={reduction}; give tokens, at least 1, for "
            "reduction=fixed and leave it out elsewhere"
        )


def check_policy_sampling(sampling_temperature: float, top_p: float) -> None:
    """Raise ConfigError for samples that are not the policy's own: a policy gradient would follow another policy's."""
    if top_p < 1 or sampling_temperature == 0:
        raise ConfigError(
            f"method.top_p is {top_p} and method.sampling_temperature {sampling_temperature}; a policy gradient needs "
            "samples of the policy itself: top_p=1 and a temperature above 0"
        )


def denominator(reduction: str, counts: StepCounts, fixed_length: int | None) -> float:
    """What a step's sum is divided by: its tokens, its rows, or its rows times a fixed length."""
    by_name = {"token": counts.tokens, "sequence": counts.rows, "fixed": counts.rows * (fixed_length or 1)}
    return float(by_name[reduction])


def component(
    name: str,
    per_place_N: Tensor,
    lengths: Sequence[int],
    weight: float,
    *,
    reduction: str,
    counts: StepCounts,
    fixed_length: int | None,
) -> Component:
    """A component of a loss per drawn token.

    lengths    tokens of each row of the micro-batch, in the order in which their places stand in ``per_place_N``
    reduction  token     mean over the step's drawn tokens: each counts alike (DAPO)
               sequence  mean over each row's own tokens, then over rows: each rollout counts alike (GRPO)
               fixed     sum over rows * ``fixed_length``: a constant, whatever the lengths (Dr. GRPO)
    """
    if reduction == "sequence":
        length_R = torch.tensor(lengths, dtype=torch.int64, device=per_place_N.device)
        per_place_N = per_place_N / length_R.repeat_interleave(length_R)
    micro = StepCounts(sum(lengths), len(lengths))
    count = torch.tensor(denominator(reduction, micro, fixed_length), device=per_place_N.device)
    return Component(name, LossSum(per_place_N.sum(), count), weight, denominator(reduction, counts, fixed_length))
