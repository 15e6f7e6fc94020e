"""Losses from hidden states: output head and divergence chunk by chunk, so that no N x V tensor is ever kept.

Logits of N positions over V classes take ``N V`` numbers, several times over with their softmax and gradients; a
vocabulary of 152,000 and 8,192 positions make 5 GB of each. Here the logits of ``chunk_rows`` positions exist at a
time. The gradients in hidden states, head and bias are formed while they are there, and only those are kept. Values and
gradients are those of ``soft_target`` and ``cross_entropy`` on the whole logits, but for the order of sums.

Gradients are summed before the loss is scaled (by the mean's denominator, or a float16 loss scale), in the precision
of hidden states and head: in float16 the small ones are lost, train in bfloat16. Not twice differentiable.
"""

from dataclasses import replace

import torch
from torch import Tensor

from research.losses.divergences import divergence_weights
from research.losses.linear_chunks import Objective, Plan, chunked_total, chunked_values
from research.losses.linear_objectives import CrossEntropy, Divergence
from research.losses.logprobs import check_temperature, working_dtype
from research.losses.projection import first_classes, on_shared_classes, project
from research.losses.reduce import check_mask
from research.losses.signal_divergence import signal_divergence
from research.losses.supervised import (
    check_label_range,
    check_labels,
    check_mask_or_weight,
    check_smoothing,
    cross_entropy,
)
from research.records import DenseLogits, HiddenProjection, LossSum, TeacherSignal, TopKLogprobs

# Logits of one chunk where nobody says how many rows: enough rows for the products to run at their full rate.
CHUNK_LOGITS = {"cpu": 2**24}
CHUNK_LOGITS_ELSEWHERE = 2**28
FEWEST_CHUNK_ROWS, MOST_CHUNK_ROWS = 256, 4096
# So few positions are taken whole: their logits are small, and the head's gradient need not be scaled afterwards.
DENSE_ROWS = 16


def linear_divergence(
    student: HiddenProjection,
    signal: TeacherSignal,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = True,
    teacher_mixture_weight: float | None = None,
    skew_weight: float | None = None,
    loss_mask_N: Tensor | None = None,
    num_classes: int | None = None,
    chunk_rows: int | None = None,
    float32_head_gradient: bool = False,
    compiled: bool = False,
) -> LossSum:
    """``soft_target(project(student), signal, ...)`` without the student's logits, nor a hidden teacher's, ever whole.

    Any leading dimensions are positions, flattened before they are cut. Positions outside ``loss_mask_N`` are taken out
    first: they cost nothing, whatever they hold, and add exactly 0 to value and gradient.

    num_classes            V where heads are padded to different numbers of rows: the first V classes are compared, the
                           rest have neither probability nor gradient; None: the heads must agree
    chunk_rows             most positions whose logits exist at a time; None chooses, and takes few positions whole
    float32_head_gradient  add the chunks' gradients of a half-precision head in float32, for 4 bytes per weight of it;
                           float16 always does
    compiled               let ``torch.compile`` fuse the elementwise part (needs a C++ compiler, slow at the first
                           call); top-k signals and divergences without a form in ``logit_gradients.py`` stay as they
                           are

    Raises as ``soft_target`` does, and ValueError on heads and classes that do not fit or a chunk_rows below 1.
    """
    weights = divergence_weights(divergence, teacher_mixture_weight=teacher_mixture_weight, skew_weight=skew_weight)
    check_temperature(temperature)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: expected at least 1, or None")
    student, signal = on_shared_classes(student, signal, num_classes)
    check_same_rows(student, signal)
    mask_N = _checked_mask(student, loss_mask_N)
    places_N = None if mask_N is None else mask_N.flatten().nonzero().squeeze(-1)
    student, signal = _flat(student, mask_N), _flat_signal(signal, mask_N)
    scale, rows = temperature**2 if scale_by_temperature_squared else 1.0, student.hidden_ND.shape[0]
    count = torch.full((), rows, dtype=torch.int64, device=student.hidden_ND.device)
    if chunk_rows is None and rows <= DENSE_ROWS:
        given = {"teacher_mixture_weight": teacher_mixture_weight, "skew_weight": skew_weight}
        if isinstance(signal, DenseLogits) and places_N is not None:
            signal = DenseLogits(signal.logits_NV[places_N])
        value_N = signal_divergence(divergence, project(student), signal, temperature=temperature, **given)
        return LossSum(value_N.sum() * scale, count)
    dtype = working_dtype(student.hidden_ND, student.weight_VD)
    objective = Divergence(divergence, signal, weights, temperature, dtype, places_N, compiled)
    plan = _plan(student, objective, chunk_rows, float32_head_gradient, temperature=temperature, scale=scale)
    return LossSum(chunked_total(student, plan), count)


def linear_cross_entropy(
    student: HiddenProjection,
    label_N: Tensor,
    loss_mask_N: Tensor | None = None,
    label_smoothing: float = 0.0,
    weight_N: Tensor | None = None,
    *,
    num_classes: int | None = None,
    chunk_rows: int | None = None,
    float32_head_gradient: bool = False,
) -> LossSum:
    """``cross_entropy(project(student), label_N, ...)`` without the logits ever whole; see :func:`linear_divergence`.

    Positions outside the mask, or of weight 0, are taken out first. Raises as ``cross_entropy`` does.
    """
    check_smoothing(label_smoothing)
    student = student if num_classes is None else first_classes(student, num_classes)
    check_labels(label_N, student.hidden_ND.shape[:-1])
    check_mask_or_weight(loss_mask_N, weight_N)
    mask_N = _checked_mask(student, loss_mask_N if weight_N is None else weight_N > 0)
    student, label_N = _flat(student, mask_N), _flat_rows(label_N.long(), mask_N)
    check_label_range(label_N, student.num_classes)
    rows = student.hidden_ND.shape[0]
    count = torch.full((), rows, dtype=torch.int64, device=label_N.device)
    if weight_N is not None:
        weight_N = _flat_rows(weight_N.detach(), mask_N).to(working_dtype(student.hidden_ND))
        count = weight_N.sum()
    if chunk_rows is None and rows <= DENSE_ROWS:
        dense = cross_entropy(project(student), label_N, None, label_smoothing, weight_N)
        return LossSum(dense.total, count)
    objective = CrossEntropy(label_N, weight_N, label_smoothing)
    plan = _plan(student, objective, chunk_rows, float32_head_gradient)
    return LossSum(chunked_total(student, plan), count)


def linear_logprobs(
    student: HiddenProjection,
    label_N: Tensor,
    loss_mask_N: Tensor | None = None,
    *,
    temperature: float = 1.0,
    num_classes: int | None = None,
    chunk_rows: int | None = None,
    float32_head_gradient: bool = False,
) -> Tensor:
    """``log_softmax(project(student) / temperature)`` at one class of each position: natural logs, shaped as labels.

    Each position answers for its own gradient, so a loss may weigh and clip them as it likes (policy gradients); their
    logits are made a second time in the backward pass, and none are kept. Positions outside the mask get 0 and gradient
    exactly 0, whatever they and their labels hold. For the rest see :func:`linear_divergence`.

    Raises as ``cross_entropy`` does, and ValueError on a bad temperature or chunk_rows.
    """
    check_temperature(temperature)
    student = student if num_classes is None else first_classes(student, num_classes)
    check_labels(label_N, student.hidden_ND.shape[:-1])
    mask_N, shape = _checked_mask(student, loss_mask_N), label_N.shape
    student, label_N = _flat(student, mask_N), _flat_rows(label_N.long(), mask_N)
    check_label_range(label_N, student.num_classes)
    objective = CrossEntropy(label_N, None, label_smoothing=0.0)
    plan = _plan(student, objective, chunk_rows, float32_head_gradient, temperature=temperature, scale=-1.0)
    logprob_N = chunked_values(student, plan)
    return logprob_N.reshape(shape) if mask_N is None else logprob_N.new_zeros(shape).masked_scatter(mask_N, logprob_N)


def check_same_rows(student: HiddenProjection, signal: TeacherSignal) -> None:
    """Raise ValueError unless the teacher has one row for each of the student's positions."""
    rows = student.hidden_ND.shape[:-1]
    if isinstance(signal, TopKLogprobs):
        kept = signal.ids_NK.shape[-1]
        shapes = {signal.ids_NK.shape[:-1], signal.logprobs_NK.shape[:-1], signal.tail_logprob_N.shape}
        if signal.logprobs_NK.shape[-1] != kept or not 1 <= kept <= signal.num_classes:
            raise ValueError(
                f"the teacher signal has {kept} ids and {signal.logprobs_NK.shape[-1]} logprobs a row of "
                f"{signal.num_classes} classes: expected equally many, from 1 to {signal.num_classes}"
            )
    else:
        tensor = signal.logits_NV if isinstance(signal, DenseLogits) else signal.hidden_ND
        shapes = {tensor.shape[:-1]}
    if shapes != {rows}:
        raise ValueError(
            f"the student has positions of shape {tuple(rows)} and the teacher of "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}: expected one teacher row for each student row"
        )


def _plan(
    student: HiddenProjection,
    objective: Objective,
    chunk_rows: int | None,
    wide_head: bool,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> Plan:
    tensors = (student.hidden_ND, student.weight_VD, student.bias_V)
    grad = torch.is_grad_enabled()
    if chunk_rows is None:
        chunk_rows = automatic_chunk_rows(student.num_classes, student.weight_VD.device)
    return Plan(
        objective=objective,
        softcap=student.softcap,
        temperature=temperature,
        scale=scale,
        chunk_rows=chunk_rows,
        wide_head=wide_head,
        needs=tuple(grad and tensor is not None and tensor.requires_grad for tensor in tensors),  # type: ignore[arg-type]
    )


def automatic_chunk_rows(num_classes: int, device: torch.device) -> int:
    """A power of two of rows, so that a chunk's logits neither starve the products nor fill the memory."""
    most = CHUNK_LOGITS.get(device.type, CHUNK_LOGITS_ELSEWHERE) // num_classes
    return min(max(1 << most.bit_length() - 1 if most else 1, FEWEST_CHUNK_ROWS), MOST_CHUNK_ROWS)


def _checked_mask(student: HiddenProjection, loss_mask_N: Tensor | None) -> Tensor | None:
    if loss_mask_N is not None:
        check_mask(loss_mask_N, student.hidden_ND.shape[:-1])
    return loss_mask_N


def _flat(projection: HiddenProjection, mask_N: Tensor | None) -> HiddenProjection:
    """The trained positions, laid out ``[N, D]``."""
    return replace(projection, hidden_ND=_flat_rows(projection.hidden_ND, mask_N, 1))


def _flat_signal(signal: TeacherSignal, mask_N: Tensor | None) -> TeacherSignal:
    """The same of a signal, but for dense logits: only flattened, their trained rows are taken chunk by chunk."""
    if isinstance(signal, DenseLogits):
        return DenseLogits(_flat_rows(signal.logits_NV, None, 1))
    if isinstance(signal, HiddenProjection):
        return _flat(signal, mask_N)
    return TopKLogprobs(
        ids_NK=_flat_rows(signal.ids_NK, mask_N, 1),
        logprobs_NK=_flat_rows(signal.logprobs_NK, mask_N, 1),
        tail_logprob_N=_flat_rows(signal.tail_logprob_N, mask_N),
        num_classes=signal.num_classes,
    )


def _flat_rows(tensor: Tensor, mask_N: Tensor | None, last: int = 0) -> Tensor:
    """All dimensions but the ``last`` ones in one, less the rows outside the mask."""
    if mask_N is not None:
        return tensor[mask_N]
    return tensor.reshape(-1, *tensor.shape[tensor.dim() - last :])
