"""The soft-target loss: a divergence from whatever is known of the teacher, and its high-temperature limit."""

import math
from typing import Any

import torch
from torch import Tensor

from research.losses.linear import linear_divergence
from research.losses.logprobs import check_same_shape, working_dtype
from research.losses.reduce import fill_masked_rows, masked_sum
from research.losses.signal_divergence import signal_divergence, teacher_logits
from research.records import DenseLogits, HiddenProjection, LossSum, TeacherSignal, TopKLogprobs


def soft_target(
    student: Tensor | HiddenProjection,
    signal: TeacherSignal,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = True,
    teacher_mixture_weight: float | None = None,
    skew_weight: float | None = None,
    loss_mask_N: Tensor | None = None,
    chunk_rows: int | None = None,
    float32_head_gradient: bool = False,
    compiled: bool = False,
) -> LossSum:
    """``temperature ** 2 * divergence(student, teacher)`` at ``temperature``, in nats, summed over trained positions.

    ``divergence`` names a function of ``divergences.py``; ``teacher_mixture_weight`` goes with ``jsd`` and
    ``normalised_jsd``, ``skew_weight`` with the skewed KLs, and either is refused elsewhere. A dense or hidden signal
    is compared over all V classes, a top-k one over K kept classes and a tail bucket.

    ``student`` is logits ``[..., V]``, or the hidden states and head that make them: then neither side's logits are
    ever whole, see ``linear.linear_divergence``, which ``chunk_rows``, ``float32_head_gradient`` and ``compiled`` are
    for; with logits they would change nothing and are refused.

    The gradient of a divergence in the logits falls as ``1 / temperature ** 2``; the factor keeps the balance with a
    hard-label term when the temperature changes (Hinton et al. 2015, section 2). ``scale_by_temperature_squared=False``
    leaves it out. For the forward KL the scaled gradient is ``temperature * (q - p)`` in each student logit.

    Raises ValueError on an unknown divergence, a weight too many or missing or out of range, a bad temperature, and
    student and signal that differ in class count or rows; TypeError on an unknown kind of signal.
    """
    chunks: dict[str, Any] = {
        "chunk_rows": chunk_rows, "float32_head_gradient": float32_head_gradient, "compiled": compiled
    }  # fmt: skip
    options = {"temperature": temperature, "teacher_mixture_weight": teacher_mixture_weight, "skew_weight": skew_weight}
    if isinstance(student, HiddenProjection):
        return linear_divergence(
            student,
            signal,
            divergence=divergence,
            scale_by_temperature_squared=scale_by_temperature_squared,
            loss_mask_N=loss_mask_N,
            **options,  # type: ignore[arg-type]
            **chunks,
        )
    if any(value not in (None, False) for value in chunks.values()):
        raise ValueError(f"{chunks}: these are for a student given by hidden states and head; leave them with logits")
    student_logits_NV = fill_masked_rows(student, loss_mask_N)
    signal = _fill_masked_signal(signal, loss_mask_N)
    per_position_N = signal_divergence(divergence, student_logits_NV, signal, **options)  # type: ignore[arg-type]
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


def _fill_masked_signal(signal: TeacherSignal, loss_mask_N: Tensor | None) -> TeacherSignal:
    """The signal with its masked rows made harmless: zeros, or classes 0 to K-1 of a uniform distribution.

    Rows that disagree with the mask are left to the divergence, which refuses them with both shapes.
    """
    if loss_mask_N is None:
        return signal
    if not isinstance(signal, TopKLogprobs):
        logits_NV = teacher_logits(signal)
        agree = logits_NV.shape[:-1] == loss_mask_N.shape
        return DenseLogits(fill_masked_rows(logits_NV, loss_mask_N) if agree else logits_NV)
    if signal.ids_NK.shape[:-1] != loss_mask_N.shape:
        return signal
    width, kept = signal.num_classes, signal.ids_NK.shape[-1]
    first_ids_K = torch.arange(kept, device=signal.ids_NK.device, dtype=signal.ids_NK.dtype)
    tail = math.log((width - kept) / width) if width > kept else -math.inf
    return TopKLogprobs(
        ids_NK=torch.where(loss_mask_N.unsqueeze(-1), signal.ids_NK, first_ids_K),
        logprobs_NK=fill_masked_rows(signal.logprobs_NK, loss_mask_N, -math.log(width)),
        tail_logprob_N=signal.tail_logprob_N.masked_fill(~loss_mask_N, tail),
        num_classes=width,
    )
