"""From hidden states to logits, and the classes that two sides share."""

from dataclasses import replace

import torch
from torch import Tensor

from research.losses.logprobs import working_dtype
from research.records import DenseLogits, HiddenProjection, TeacherSignal


def project(projection: HiddenProjection) -> Tensor:
    """The logits ``[..., V]`` that a projection stands for, all of them at once, with gradient where it has one.

    The product is taken in the precision of hidden states and head (autocast's, where it is on), the cap in float32 or
    float64. Raises ValueError on a hidden width that is not the head's.
    """
    _check_width(projection)
    hidden_ND, weight_VD = projection.hidden_ND, projection.weight_VD
    bias_V = projection.bias_V
    if not torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    return logits_NV if projection.softcap is None else capped(logits_NV, projection.softcap)


def capped(logits_NV: Tensor, softcap: float) -> Tensor:
    """``c tanh(x / c)``, ``c = softcap`` above 0, in float32 (float64 stays): never beyond -c and c."""
    if not softcap > 0:
        raise ValueError(f"softcap={softcap!r}: expected a number above 0, or None for logits without a cap")
    return softcap * torch.tanh(logits_NV.to(working_dtype(logits_NV)) / softcap)


def first_classes(signal: HiddenProjection, num_classes: int) -> HiddenProjection:
    """The projection with the first ``num_classes`` rows of its head; itself where it has no more."""
    if signal.num_classes == num_classes:
        return signal
    if not 1 <= num_classes <= signal.num_classes:
        raise ValueError(
            f"num_classes={num_classes} of a head with {signal.num_classes} rows: expected 1 to {signal.num_classes}"
        )
    bias_V = None if signal.bias_V is None else signal.bias_V[:num_classes]
    return replace(signal, weight_VD=signal.weight_VD[:num_classes], bias_V=bias_V)


def on_shared_classes(
    student: HiddenProjection, signal: TeacherSignal, num_classes: int | None
) -> tuple[HiddenProjection, TeacherSignal]:
    """Both sides over the first ``num_classes`` classes; None: all of them, which must then be equally many.

    A head may be padded with rows that stand for no token, and student and teacher by different numbers. A top-k
    signal cannot be cut: what it kept, and its tail, are of the distribution it was taken from.
    """
    if not isinstance(signal, TeacherSignal):
        raise TypeError(
            f"a teacher signal of type {type(signal).__name__}: expected DenseLogits, HiddenProjection or TopKLogprobs"
        )
    width = student.num_classes if num_classes is None else num_classes
    student = first_classes(student, width)
    if num_classes is not None and isinstance(signal, HiddenProjection):
        signal = first_classes(signal, width)
    elif num_classes is not None and isinstance(signal, DenseLogits) and signal.num_classes > width:
        signal = DenseLogits(signal.logits_NV[..., :width])
    if signal.num_classes != width:
        raise ValueError(
            f"the student has {width} classes and the teacher {signal.num_classes}: a divergence compares equal class "
            "lists; give num_classes, the tokens that both heads share"
        )
    return student, signal


def _check_width(projection: HiddenProjection) -> None:
    hidden, head = projection.hidden_ND.shape, projection.weight_VD.shape
    if len(head) != 2 or hidden[-1] != head[1]:
        raise ValueError(
            f"hidden states have shape {tuple(hidden)} and the head {tuple(head)}: expected [..., D] and [V, D]"
        )
