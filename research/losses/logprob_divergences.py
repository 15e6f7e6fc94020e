"""The one definition of each divergence, on rows of natural-log probabilities.

Dense logits (``divergences.py``) and top-k buckets (``sparse.py``) both end here. ``p`` is the teacher, ``q`` the
student; every function takes ``(student_logprobs_NV, teacher_logprobs_NV)``, rows normalised over the last dimension,
and returns ``[...]``, in nats (total variation: a probability). ``-inf`` is a class of probability zero.

Three choices keep values and gradients right in float32:

* A KL is summed as ``p log(p/q) + q - p``. The two added columns sum to zero over normalised rows, but make every
  term non-negative and of second order in the difference, so near-equal rows lose nothing to cancellation and equal
  rows give exactly 0.
* A mixture enters only as the log of its ratio to one of its parts, so a weight of 1e-6 is not rounded away.
* Probability zero is a finite floor inside, so no ``0 * inf`` reaches the gradient. Where the true value is infinite
  (the second argument of a KL lacks a class that the first has) the value is ``inf`` and that row's gradient is 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# exp(LOG_FLOOR) is 0 in every float type, and a difference of two floored logs is still finite in float32.
LOG_FLOOR = -1e30


def forward_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(teacher || student)."""
    return _kl(teacher_logprobs_NV, student_logprobs_NV)


def reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(student || teacher)."""
    return _kl(student_logprobs_NV, teacher_logprobs_NV)


def jsd(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, teacher_mixture_weight: float) -> Tensor:
    """``b KL(p||m) + (1-b) KL(q||m)``, ``m = b p + (1-b) q``, ``b`` the teacher's weight, strictly inside (0, 1)."""
    weight = teacher_mixture_weight
    if not 0 < weight < 1:
        raise ValueError(
            f"teacher_mixture_weight={weight!r}: jsd expects a number strictly between 0 and 1, since it is 0 "
            "everywhere at both ends; normalised_jsd takes the ends and equals forward_kl (0) and reverse_kl (1) there"
        )
    teacher_part = _kl_to_mixture(teacher_logprobs_NV, student_logprobs_NV, weight, 1 - weight)
    student_part = _kl_to_mixture(student_logprobs_NV, teacher_logprobs_NV, 1 - weight, weight)
    return weight * teacher_part + (1 - weight) * student_part


def normalised_jsd(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, teacher_mixture_weight: float) -> Tensor:
    """``JSD_b / (b (1-b))``; at ``b=0`` its limit KL(p||q), at ``b=1`` its limit KL(q||p)."""
    weight = teacher_mixture_weight
    if not 0 <= weight <= 1:
        raise ValueError(
            f"teacher_mixture_weight={weight!r}: normalised_jsd expects a number from 0 to 1, ends allowed"
        )
    if weight == 0:
        return forward_kl(student_logprobs_NV, teacher_logprobs_NV)
    if weight == 1:
        return reverse_kl(student_logprobs_NV, teacher_logprobs_NV)
    teacher_part = _kl_to_mixture(teacher_logprobs_NV, student_logprobs_NV, weight, 1 - weight)
    student_part = _kl_to_mixture(student_logprobs_NV, teacher_logprobs_NV, 1 - weight, weight)
    return teacher_part / (1 - weight) + student_part / weight


def skewed_forward_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, skew_weight: float) -> Tensor:
    """``KL(p || a p + (1-a) q)``, ``a`` the skew weight in [0, 1); ``a=0`` is the forward KL."""
    _check_skew_weight(skew_weight)
    return _kl_to_mixture(teacher_logprobs_NV, student_logprobs_NV, skew_weight, 1 - skew_weight)


def skewed_reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, skew_weight: float) -> Tensor:
    """``KL(q || a q + (1-a) p)``, ``a`` the skew weight in [0, 1); ``a=0`` is the reverse KL."""
    _check_skew_weight(skew_weight)
    return _kl_to_mixture(student_logprobs_NV, teacher_logprobs_NV, skew_weight, 1 - skew_weight)


def total_variation(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """``1/2 sum |p - q|``, between 0 and 1."""
    return (teacher_logprobs_NV.exp() - student_logprobs_NV.exp()).abs().sum(dim=-1) / 2


LOGPROB_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jsd,
        normalised_jsd,
        skewed_forward_kl,
        skewed_reverse_kl,
        total_variation,
    )
}


def _check_skew_weight(skew_weight: float) -> None:
    if not 0 <= skew_weight < 1:
        raise ValueError(
            f"skew_weight={skew_weight!r}: expected a number from 0 up to but not including 1, where the skewed KL is "
            "0 everywhere"
        )


def _kl(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    """KL(first || second); ``inf`` where ``second`` lacks a class that ``first`` has."""
    log_ratio_NV = first_NV.clamp(min=LOG_FLOOR) - second_NV.clamp(min=LOG_FLOOR)
    value_N = _sum_kl_terms(first_NV.exp(), second_NV.exp(), log_ratio_NV)
    unsupported_N = (log_ratio_NV > -LOG_FLOOR / 2).any(dim=-1)  # only a floored second can be so far below
    return value_N.masked_fill(unsupported_N, math.inf)


def _kl_to_mixture(first_NV: Tensor, other_NV: Tensor, first_weight: float, other_weight: float) -> Tensor:
    """KL(first || first_weight first + other_weight other); both weights are given, so that neither is rounded."""
    if first_weight == 0:
        return _kl(first_NV, other_NV)
    difference_NV = other_NV.clamp(min=LOG_FLOOR) - first_NV.clamp(min=LOG_FLOOR)
    log_ratio_NV = -_log_mixture_over_first(difference_NV, first_weight, other_weight)
    first_probs_NV = first_NV.exp()
    mixture_NV = first_weight * first_probs_NV + other_weight * other_NV.exp()
    return _sum_kl_terms(first_probs_NV, mixture_NV, log_ratio_NV)


def _log_mixture_over_first(difference_NV: Tensor, first_weight: float, other_weight: float) -> Tensor:
    """``log(first_weight + other_weight exp(difference))``: exactly 0 at difference 0, finite at any finite one."""
    far_NV = torch.logaddexp(
        torch.full_like(difference_NV, math.log(first_weight)), difference_NV + math.log(other_weight)
    )
    near_NV = torch.log1p(other_weight * torch.expm1(difference_NV.clamp(-1, 1)))
    return torch.where(difference_NV.abs() <= 1, near_NV, far_NV)


def _sum_kl_terms(first_NV: Tensor, second_NV: Tensor, log_ratio_NV: Tensor) -> Tensor:
    """``sum(first log_ratio + second - first)``, ``log_ratio = log(first / second)``.

    Where the ratio is not far below 1 the term is written ``first (log_ratio + expm1(-log_ratio))``, the same number
    without the cancellation; elsewhere that form would overflow, and there is nothing to cancel.
    """
    near_NV = first_NV * (log_ratio_NV + torch.expm1(-log_ratio_NV.clamp(min=-1)))
    far_NV = first_NV * log_ratio_NV + (second_NV - first_NV)
    return torch.where(log_ratio_NV > -1, near_NV, far_NV).sum(dim=-1)
