"""One divergence from whatever is known of the teacher: all logits, what makes them, or the top K and a tail."""

import torch
from torch import Tensor

from research.losses.divergences import divergence as divergence_named
from research.losses.logprobs import check_same_shape
from research.losses.projection import project
from research.losses.sparse import sparse_divergence
from research.records import DenseLogits, HiddenProjection, TeacherSignal, TopKLogprobs


def signal_divergence(
    name: str,
    student_logits_NV: Tensor,
    signal: TeacherSignal,
    *,
    temperature: float = 1.0,
    teacher_mixture_weight: float | None = None,
    skew_weight: float | None = None,
) -> Tensor:
    """The divergence called ``name`` at ``temperature``, position by position: ``[..., V]`` logits -> ``[...]``.

    A dense or hidden signal is compared over all V classes, a top-k one over K kept classes and a tail bucket; a hidden
    one is projected here, all positions at once. Raises as ``divergences.divergence`` does, ValueError on other rows or
    classes than the student's, TypeError on an unknown kind of signal.
    """
    weights = {"teacher_mixture_weight": teacher_mixture_weight, "skew_weight": skew_weight}
    if isinstance(signal, TopKLogprobs):
        return sparse_divergence(name, student_logits_NV, signal, temperature=temperature, **weights)
    bound = divergence_named(name, **weights)
    teacher_logits_NV = teacher_logits(signal)
    check_same_shape(student_logits_NV, teacher_logits_NV)
    return bound(student_logits_NV, teacher_logits_NV, temperature=temperature)


def teacher_logits(signal: TeacherSignal) -> Tensor:
    """All V logits of the teacher, detached, in its own precision; TypeError for a signal that does not have them."""
    if isinstance(signal, DenseLogits):
        return signal.logits_NV.detach()
    if isinstance(signal, HiddenProjection):
        with torch.no_grad(), torch.autocast(signal.hidden_ND.device.type, enabled=False):
            return project(signal)
    raise TypeError(
        f"a teacher signal of type {type(signal).__name__}: expected DenseLogits, HiddenProjection or TopKLogprobs"
    )
