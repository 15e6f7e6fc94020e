"""From logits to log-probabilities: the temperature, the working precision and the checks every loss shares."""

import math
from numbers import Real

import torch
from torch import Tensor


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is a finite number above 0."""
    if not isinstance(temperature, Real) or not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(
            f"temperature={temperature!r}: expected a finite number above 0 (1 leaves the distribution as it is, "
            "above 1 softens it, between 0 and 1 sharpens it)"
        )


def check_same_shape(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> None:
    """Raise ValueError unless student and teacher agree in every dimension; a class count is named as such."""
    student_width, teacher_width = student_logits_NV.shape[-1], teacher_logits_NV.shape[-1]
    if student_width != teacher_width:
        raise ValueError(
            f"the student has {student_width} classes and the teacher {teacher_width}: a divergence compares equal "
            "class lists; cut both heads to the classes they share, or give unused classes the logit -inf in both"
        )
    if student_logits_NV.shape != teacher_logits_NV.shape:
        raise ValueError(
            f"student logits have shape {tuple(student_logits_NV.shape)} and teacher logits "
            f"{tuple(teacher_logits_NV.shape)}: expected one teacher row for each student row"
        )


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: half precisions are computed in float32.

    Raises TypeError on a tensor that is not floating point (class ids given for logits).
    """
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"expected floating-point logits or logprobs, got a tensor of {tensor.dtype}")
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def tempered_logprobs(logits_NV: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Natural logs of ``softmax(logits_NV / temperature)`` over the last dimension, computed in ``dtype``."""
    check_temperature(temperature)
    return torch.log_softmax(logits_NV.to(dtype) / temperature, dim=-1)
