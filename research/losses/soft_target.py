"""The soft-target loss: a divergence from whatever is known of the teacher, and its high-temperature limit."""

import math

import torch
from torch import Tensor

from research.losses.divergences import divergence as divergence_named
from research.losses.logprobs import check_same_shape, working_dtype
from research.losses.reduce import fill_masked_rows, masked_sum
from research.losses.sparse import sparse_divergence
from research.records import DenseLogits, LossSum, TeacherSignal, TopKLogprobs


def soft_target(
    student_logits_NV: Tensor,
    signal: TeacherSignal,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = True,
    teacher_mixture_weight: float | None = None,
    skew_weight: float | None = None,
    loss_mask_N: Tensor | None = None,
) -> LossSum:
    """``temperature ** 2 * divergence(student, teacher)`` at ``temperature``, in nats, summed over trained positions.

    ``divergence`` names a function of ``divergences.py``; ``teacher_mixture_weight`` goes with ``jsd`` and
    ``normalised_jsd``, ``skew_weight`` with the skewed KLs, and either is refused elsewhere. A dense signal is compared
    over all V classes, a top-k one over K kept classes and a tail bucket.

    The gradient of a divergence in the logits falls as ``1 / temperature ** 2``; the factor keeps the balance with a
    hard-label term when the temperature changes (Hinton et al. 2015, section 2). ``scale_by_temperature_squared=False``
    leaves it out. For the forward KL the scaled gradient is ``temperature * (q - p)`` in each student logit.

    Raises ValueError on an unknown divergence, a weight too many or missing or out of range, a bad temperature, and
    student and signal that differ in class count or rows; TypeError on an unknown kind of signal.
    """
    student_logits_NV = fill_masked_rows(student_logits_NV, loss_mask_N)
    if isinstance(signal, DenseLogits):
        bound = divergence_named(divergence, teacher_mixture_weight=teacher_mixture_weight, skew_weight=skew_weight)
        check_same_shape(student_logits_NV, signal.logits_NV)
        teacher_logits_NV = fill_masked_rows(signal.logits_NV, loss_mask_N)
        per_position_N = bound(student_logits_NV, teacher_logits_NV, temperature=temperature)
    elif isinstance(signal, TopKLogprobs):
        per_position_N = sparse_divergence(
            divergence,
            student_logits_NV,
            _fill_masked_signal(signal, loss_mask_N),
            temperature=temperature,
            teacher_mixture_weight=teacher_mixture_weight,
            skew_weight=skew_weight,
        )
    else:
        raise TypeError(f"a teacher signal of type {type(signal).__name__}: expected DenseLogits or TopKLogprobs")
    loss = masked_sum(per_position_N, loss_mask_N)
    return LossSum(loss.total * temperature**2, loss.count) if scale_by_temperature_squared else loss


def logit_matching(student_logits_NV: Tensor, teacher_logits_NV: Tensor, loss_mask_N: Tensor | None = None) -> LossSum:
    """``1/(2V) sum_i ((z_i - mean z) - (v_i - mean v))^2``, logits squared, summed over trained positions.

    ``z`` are the student's logits, ``v`` the teacher's (detached). It is the limit of ``T^2 KL(teacher || student)`` at
    temperature T as T grows, gradient ``((z_i - mean z) - (v_i - mean v)) / V`` included, because a softmax does not
    see a constant added to all logits (Hinton et al. 2015, section 2.1, which centres by assumption). A class that
    both sides give the logit -inf does not exist: it counts neither in the means nor in V.

    Raises ValueError on different class counts or shapes.
    """
    check_same_shape(student_logits_NV, teacher_logits_NV)
    dtype = working_dtype(student_logits_NV, teacher_logits_NV)
    student_NV = fill_masked_rows(student_logits_NV, loss_mask_N).to(dtype)
    teacher_NV = fill_masked_rows(teacher_logits_NV.detach(), loss_mask_N).to(dtype)
    absent_NV = torch.isneginf(student_NV) & torch.isneginf(teacher_NV)
    difference_NV = student_NV.masked_fill(absent_NV, 0.0) - teacher_NV.masked_fill(absent_NV, 0.0)
    num_classes_N1 = (~absent_NV).sum(dim=-1, keepdim=True)
    centred_NV = difference_NV - difference_NV.sum(dim=-1, keepdim=True) / num_classes_N1
    squares_N = centred_NV.masked_fill(absent_NV, 0.0).square().sum(dim=-1)
    return masked_sum(squares_N / (2 * num_classes_N1.squeeze(-1)), loss_mask_N)


def _fill_masked_signal(signal: TopKLogprobs, loss_mask_N: Tensor | None) -> TopKLogprobs:
    """The signal with its masked rows made harmless: classes 0 to K-1 of a uniform distribution."""
    if loss_mask_N is None or signal.ids_NK.shape[:-1] != loss_mask_N.shape:
        return signal  # rows that disagree are refused, with both shapes, by the divergence
    width, kept = signal.num_classes, signal.ids_NK.shape[-1]
    first_ids_K = torch.arange(kept, device=signal.ids_NK.device, dtype=signal.ids_NK.dtype)
    tail = math.log((width - kept) / width) if width > kept else -math.inf
    return TopKLogprobs(
        ids_NK=torch.where(loss_mask_N.unsqueeze(-1), signal.ids_NK, first_ids_K),
        logprobs_NK=fill_masked_rows(signal.logprobs_NK, loss_mask_N, -math.log(width)),
        tail_logprob_N=signal.tail_logprob_N.masked_fill(~loss_mask_N, tail),
        num_classes=width,
    )
