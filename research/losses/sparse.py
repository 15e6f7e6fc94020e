"""The same divergences against a teacher of whom only the top K classes and the mass of the rest are known.

Both sides become distributions over K+1 buckets: the K kept classes, and one tail bucket with everything else. A
divergence of buckets is never negative, never above the dense one (merging classes only loses information), zero only
where kept classes and tail mass all agree, and the dense one at K = V. Dropping the tail, or renormalising the kept
classes, has none of these properties.
"""

import math

import torch
from torch import Tensor

from research.losses.divergences import divergence_weights
from research.losses.logprob_divergences import LOGPROB_DIVERGENCES
from research.losses.logprobs import check_temperature, tempered_logprobs, working_dtype
from research.records import TopKLogprobs


def sparse_divergence(
    name: str,
    student_logits_NV: Tensor,
    signal: TopKLogprobs,
    *,
    temperature: float = 1.0,
    teacher_mixture_weight: float | None = None,
    skew_weight: float | None = None,
) -> Tensor:
    """The divergence called ``name`` over the K+1 buckets: ``[..., V]`` logits and ``[..., K]`` logprobs -> ``[...]``.

    Direction, units, weights and errors are those of the dense function of that name in ``divergences.py``; the
    teacher is detached. No temperature-squared factor. At a temperature other than 1 the teacher's tail is an
    approximation, see :func:`teacher_bucket_logprobs`.

    Where K < V and the teacher's tail logprob is ``-inf`` the teacher is taken at its word: probability zero, so the
    reverse KL of a student with mass there is ``inf``. Cut a signal with :func:`bucket_logprobs`, whose tail is exact
    down to the smallest exponent, and not with ``1 - sum``.
    """
    weights = divergence_weights(name, teacher_mixture_weight=teacher_mixture_weight, skew_weight=skew_weight)
    _check_signal(student_logits_NV, signal)
    dtype = working_dtype(student_logits_NV, signal.logprobs_NK)
    student_NK1 = bucket_logprobs(student_logits_NV, signal.ids_NK, temperature, dtype)
    teacher_NK1 = teacher_bucket_logprobs(signal, temperature, dtype)
    return LOGPROB_DIVERGENCES[name](student_NK1, teacher_NK1, **weights)


def bucket_logprobs(
    logits_NV: Tensor, ids_NK: Tensor, temperature: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Natural-log probabilities of the K kept classes, then of the tail: ``[..., K+1]``, or ``[..., K]`` at K = V.

    The tail is a log-sum-exp over the classes not kept, never one minus the kept mass, so it is right at 1e-12 and
    far below. At K = V there is no tail, and no column for it. Exact at every temperature.
    """
    logprobs_NV = tempered_logprobs(logits_NV, temperature, dtype or working_dtype(logits_NV))
    ids_NK = ids_NK.long()
    kept_NK = logprobs_NV.gather(-1, ids_NK)
    if ids_NK.shape[-1] == logits_NV.shape[-1]:
        return kept_NK
    rest_NV = logprobs_NV.scatter(-1, ids_NK, -math.inf)
    # A log-sum-exp over nothing but -inf has a NaN gradient: such rows are summed over zeros and then set to -inf.
    empty_N1 = torch.isneginf(rest_NV).all(dim=-1, keepdim=True)
    tail_N1 = torch.logsumexp(rest_NV.masked_fill(empty_N1, 0.0), dim=-1, keepdim=True)
    return torch.cat([kept_NK, tail_N1.masked_fill(empty_N1, -math.inf)], dim=-1)


def teacher_bucket_logprobs(signal: TopKLogprobs, temperature: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """The teacher's natural-log probabilities over the buckets at ``temperature``, detached and normalised.

    The signal was cut at temperature 1. Softening the kept classes is exact up to the normaliser; softening the tail
    needs each of its V-K probabilities, which are gone. They are taken to be equal: the tail's softened weight is
    ``(V-K) (tail / (V-K)) ** (1/temperature)``. That is exact at temperature 1, at K = V, and wherever the tail is
    uniform; otherwise it overstates the tail above temperature 1 (a uniform tail is the softest one of its mass) and
    understates it below, and so understates (overstates) the kept classes.

    At K = V the tail logprob is ignored: no class is left to carry it.
    """
    check_temperature(temperature)
    kept_NK = signal.logprobs_NK.detach().to(dtype or working_dtype(signal.logprobs_NK))
    num_tail = signal.num_classes - kept_NK.shape[-1]
    if num_tail == 0:
        return torch.log_softmax(kept_NK / temperature, dim=-1)
    tail_N1 = signal.tail_logprob_N.detach().to(kept_NK.dtype).unsqueeze(-1)
    tempered_tail_N1 = (tail_N1 - math.log(num_tail)) / temperature + math.log(num_tail)
    return torch.log_softmax(torch.cat([kept_NK / temperature, tempered_tail_N1], dim=-1), dim=-1)


def _check_signal(student_logits_NV: Tensor, signal: TopKLogprobs) -> None:
    width, kept = student_logits_NV.shape[-1], signal.ids_NK.shape[-1]
    if width != signal.num_classes:
        raise ValueError(
            f"the student has {width} classes and the top-{kept} teacher signal was cut from {signal.num_classes}: "
            "a divergence compares equal class lists; use the cache of a teacher with the student's classes"
        )
    if not 1 <= kept <= width:
        raise ValueError(f"the teacher signal keeps {kept} classes of {width}: expected at least 1 and at most {width}")
    rows = student_logits_NV.shape[:-1]
    shapes = (signal.ids_NK.shape, signal.logprobs_NK.shape, signal.tail_logprob_N.shape)
    if shapes != ((*rows, kept), (*rows, kept), rows):
        raise ValueError(
            f"student logits have shape {tuple(student_logits_NV.shape)}; the teacher signal has ids, logprobs and "
            f"tail of shapes {', '.join(str(tuple(shape)) for shape in shapes)}: expected {(*rows, kept)} twice and "
            f"{tuple(rows)}, one teacher row for each student row"
        )
