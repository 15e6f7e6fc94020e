"""Each divergence's value together with its gradient in the student's logits, written out for speed.

The definitions are in ``logprob_divergences.py``; ``tests/unit/losses/test_logit_gradients.py`` pins every form here to
them. ``p`` is the teacher, ``q`` the student, both at the temperature already; a form takes logits and returns the
value of each row and ``d value / d logit``. Ratios are kept as ``log_ratio = log(p / q)``, from the logits themselves:
nothing overflows where a probability vanishes. In float32 a value is within 3e-7 nats of the definition's, and exactly
0 where both sides' logits are the same numbers.

A divergence without a form of its own, and a block in which a value does not come out finite (a class that does not
exist has the logit ``-inf``), are differentiated by autograd through the definition. Only the values are looked at, not
the logits: two passes over them would take a sixth of the time. A mixture takes a class that one side alone lacks as
one that is e**85 times less likely there, to 1e-5 nats in float32.
"""

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from research.losses.logprob_divergences import LOGPROB_DIVERGENCES
from research.losses.sparse import bucket_logprobs

Form = Callable[..., tuple[Tensor, Tensor]]
# exp of it is finite in float32, and exp of minus it is nothing beside 1
FAR = 85.0
# a mixture nearer to one end than this loses digits that the definition keeps
NEAR_END = 0.05


def value_and_gradient(
    name: str,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    weights: Mapping[str, float],
    form: Form | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence called ``name`` of two blocks of logits, ``[N]``, and its gradient in the student's, ``[N, V]``.

    ``form`` is :func:`form_of` this divergence, or the same compiled; None looks it up. Neither argument is changed.
    """
    form = form_of(name, weights) if form is None else form
    if form is not None:
        value_N, gradient_NV = form(student_logits_NV, teacher_logits_NV, *weights.values())
        if bool(value_N.isfinite().all()):
            return value_N, gradient_NV
    return _by_definition(name, student_logits_NV, teacher_logits_NV, weights)


def form_of(name: str, weights: Mapping[str, float]) -> Form | None:
    """The form of the divergence called ``name``; None where it has none at these weights."""
    weight = weights.get("teacher_mixture_weight")
    if weight is not None and not NEAR_END <= weight <= 1 - NEAR_END:
        ends: dict[float, Form] = {0.0: _forward_form, 1.0: _reverse_form}
        return ends.get(weight) if name == "normalised_jsd" else None
    return FORMS.get(name)


def softmax_and_norm(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(logits)``, fresh, and its log-normaliser [N, 1]: the largest logit less the log of its probability."""
    probs_NV = torch.softmax(logits_NV, dim=-1)
    return probs_NV, logits_NV.amax(-1, keepdim=True) - probs_NV.amax(-1, keepdim=True).log()


def _probs_and_log_ratio(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``q``, ``p`` and ``log(p / q)``.

    The two normalisers, large numbers that nearly agree, enter by their difference alone: the largest logits, less the
    logs of their probabilities, which divided by one another are near 1. So the ratio is good to a few units of 1e-7.
    """
    student_probs_NV, teacher_probs_NV = torch.softmax(student_NV, dim=-1), torch.softmax(teacher_NV, dim=-1)
    norms_N1 = teacher_NV.amax(-1, keepdim=True) - student_NV.amax(-1, keepdim=True)
    norms_N1 -= (teacher_probs_NV.amax(-1, keepdim=True) / student_probs_NV.amax(-1, keepdim=True)).log_()
    return student_probs_NV, teacher_probs_NV, (teacher_NV - student_NV).sub_(norms_N1)


def _forward_form(student_NV: Tensor, teacher_NV: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    """``sum p log(p/q)``, gradient ``q - p``, whose sum, 0 but for rounding, takes the rounding out of the value."""
    student_probs_NV, teacher_probs_NV, log_ratio_NV = _probs_and_log_ratio(student_NV, teacher_NV)
    gradient_NV = student_probs_NV.sub_(teacher_probs_NV)
    return torch.linalg.vecdot(teacher_probs_NV, log_ratio_NV) + gradient_NV.sum(-1), gradient_NV


def _reverse_form(student_NV: Tensor, teacher_NV: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    """``KL = sum q log(q/p)``, gradient ``q (log(q/p) - KL)``."""
    student_probs_NV, teacher_probs_NV, log_ratio_NV = _probs_and_log_ratio(student_NV, teacher_NV)
    mean_N1 = torch.linalg.vecdot(student_probs_NV, log_ratio_NV).unsqueeze(-1)
    rounding_N = teacher_probs_NV.sub_(student_probs_NV).sum(-1)
    gradient_NV = log_ratio_NV.sub_(mean_N1).mul_(student_probs_NV).neg_()
    return rounding_N - mean_N1.squeeze(-1), gradient_NV


def _mixture_form(student_NV: Tensor, teacher_NV: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """``JSD_b = sum (b p log(p/m) - (1-b) q log(m/q))``, gradient ``-(1-b) q (log(m/q) - sum q log(m/q))``.

    ``m = b p + (1-b) q``; ``log(m/q) = log1p(b expm1(log(p/q)))`` is exact at equality.
    """
    student_probs_NV, teacher_probs_NV, log_ratio_NV = _probs_and_log_ratio(student_NV, teacher_NV)
    log_ratio_NV.clamp_(-FAR, FAR)
    log_mixture_NV = torch.expm1(log_ratio_NV).mul_(weight).log1p_()
    teacher_part_N = torch.linalg.vecdot(teacher_probs_NV, log_ratio_NV.sub_(log_mixture_NV))
    mean_N = torch.linalg.vecdot(student_probs_NV, log_mixture_NV)
    gradient_NV = log_mixture_NV.sub_(mean_N.unsqueeze(-1)).mul_(student_probs_NV).mul_(weight - 1)
    return weight * teacher_part_N - (1 - weight) * mean_N, gradient_NV


def _normalised_mixture_form(student_NV: Tensor, teacher_NV: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    value_N, gradient_NV = _mixture_form(student_NV, teacher_NV, weight)
    scale = 1 / (weight * (1 - weight))
    return value_N * scale, gradient_NV.mul_(scale)


FORMS: dict[str, Form] = {
    "forward_kl": _forward_form,
    "reverse_kl": _reverse_form,
    "jsd": _mixture_form,
    "normalised_jsd": _normalised_mixture_form,
}


@functools.lru_cache(maxsize=len(FORMS))
def compiled_form(form: Form) -> Form:
    """The form with its elementwise work fused by ``torch.compile``, once for the whole process."""
    return torch.compile(form)


def top_k_value_and_gradient(
    name: str, student_logits_NV: Tensor, ids_NK: Tensor, teacher_NK1: Tensor, weights: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """The same over K kept classes and a tail bucket; ``teacher_NK1`` as ``sparse.teacher_bucket_logprobs`` gives it.

    The bucket's logit is the log-sum-exp of the classes in it, so its gradient reaches each of them by its share of
    the tail; what is differentiated by autograd is K + 1 wide.
    """
    whole = teacher_NK1.shape[-1] == ids_NK.shape[-1]  # K = V: there is no tail
    if whole or not bool(student_logits_NV.amin() > -math.inf):
        buckets = functools.partial(bucket_logprobs, ids_NK=ids_NK)
        return _by_definition(name, student_logits_NV, teacher_NK1, weights, buckets)
    kept_NK = student_logits_NV.gather(-1, ids_NK)
    share_NV, norm_N1 = softmax_and_norm(student_logits_NV.scatter(-1, ids_NK, -math.inf))
    buckets_NK1 = torch.cat([kept_NK, norm_N1], dim=-1)
    value_N, gradient_NK1 = _by_definition(name, buckets_NK1, teacher_NK1, weights)
    gradient_NV = share_NV.mul_(gradient_NK1[..., -1:]).scatter_(-1, ids_NK, gradient_NK1[..., :-1])
    return value_N, gradient_NV


def _by_definition(
    name: str,
    student_NV: Tensor,
    teacher_NV: Tensor,
    weights: Mapping[str, float],
    logprobs: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Value and gradient by autograd; logprobs are logits like any others, so both sides may be given as either.

    ``logprobs`` makes the student's from its logits, as wide as ``teacher_NV``; None is the log-softmax.
    """
    with torch.enable_grad():
        leaf_NV = student_NV.detach().requires_grad_()
        student_logprobs_NV = torch.log_softmax(leaf_NV, dim=-1) if logprobs is None else logprobs(leaf_NV)
        value_N = LOGPROB_DIVERGENCES[name](student_logprobs_NV, torch.log_softmax(teacher_NV, dim=-1), **weights)
        (gradient_NV,) = torch.autograd.grad(value_N.sum(), leaf_NV)
    return value_N.detach(), gradient_NV
