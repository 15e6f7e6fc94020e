"""The machinery of ``linear.py``: logits of one chunk of positions at a time, and the gradients formed from them.

A chunk's logits are written into a buffer that every chunk uses again. Value and gradient are taken block by block, a
few rows that stay in the processor's cache, and the gradient is written over the logits it belongs to; two products
then carry it into hidden states and head. So three products and one buffer serve the student, one product and one
buffer a teacher given by its hidden states.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from research.losses.logprobs import working_dtype
from research.records import HiddenProjection

# (rows of this chunk, the student's logits of them at the temperature) -> value of each row, gradient in those logits
Block = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
# logits of one block: in the cache of one core; on an accelerator as many as fill it
BLOCK_LOGITS = {"cpu": 2**17}
BLOCK_LOGITS_ELSEWHERE = 2**27
HEAD_SLICE = 4096


class Objective(Protocol):
    """What the student's logits are compared with."""

    def begin(self, chunk_rows: int) -> Callable[[slice], Block]:
        """Buffers for one pass; then, chunk by chunk, the function of its blocks."""


@dataclass(frozen=True)
class Plan:
    """One loss, apart from the student's tensors.

    softcap       of the student's logits
    temperature   they are divided by it
    scale         factor of the total
    chunk_rows    most positions whose logits exist at a time
    wide_head     sum the head's gradient over chunks in float32, whatever the head's precision
    needs         which of hidden states, head and bias get a gradient
    """

    objective: Objective
    softcap: float | None
    temperature: float
    scale: float
    chunk_rows: int
    wide_head: bool
    needs: tuple[bool, bool, bool]


def chunked_total(student: HiddenProjection, plan: Plan) -> Tensor:
    """The sum over all positions ``[N, D]`` of the plan's loss, times its scale, differentiable in the student."""
    return _ChunkedTotal.apply(*in_one_precision(student), plan)


def chunked_values(student: HiddenProjection, plan: Plan) -> Tensor:
    """The plan's loss of every position ``[N, D]``, times its scale, ``[N]``, differentiable in the student.

    What each position counts is known in the backward pass alone, so the logits are made again there: one product more
    than :func:`chunked_total`, and nothing is kept but the student's own tensors.
    """
    return _ChunkedValues.apply(*in_one_precision(student), plan)


class _ChunkedTotal(torch.autograd.Function):
    """Gradients are formed in the forward pass, while the logits are there, and handed out by the first backward.

    They are scaled in place and given away, so that no second copy of the head's exists; a graph that is kept for
    another backward pass forms them anew.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: Plan) -> Tensor:
        value_N, ctx.gradients = _passed(hidden_ND, weight_VD, bias_V, plan)
        ctx.plan = plan
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        return value_N.sum() * plan.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden_ND, weight_VD, bias_V = ctx.saved_tensors
            _, gradients = _passed(hidden_ND, weight_VD, bias_V, ctx.plan)
        factor = grad_output * (ctx.plan.scale / ctx.plan.temperature)
        given = (
            None if gradient is None else gradient.mul_(factor).to(tensor.dtype)
            for gradient, tensor in zip(gradients, ctx.saved_tensors, strict=True)
        )
        return (*given, None)


class _ChunkedValues(torch.autograd.Function):
    """Values without gradients in the forward pass; gradients, each position's times its own factor, in the backward.

    The factor is multiplied in where the logits are, before the products: two positions never share one.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: Plan) -> Tensor:
        value_N, _ = _passed(hidden_ND, weight_VD, bias_V, replace(plan, needs=(False, False, False)))
        ctx.plan = plan
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        return value_N * plan.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output_N: Tensor) -> tuple[Tensor | None, ...]:
        factor_N = grad_output_N * (ctx.plan.scale / ctx.plan.temperature)
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        _, gradients = _passed(hidden_ND, weight_VD, bias_V, ctx.plan, factor_N)
        given = (
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, ctx.saved_tensors, strict=True)
        )
        return (*given, None)


def _passed(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: Plan, factor_N: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """One pass over all chunks: the values, not scaled, and the gradients that are needed, times each row's factor."""
    with torch.autocast(hidden_ND.device.type, enabled=False), torch.no_grad():
        dtype = working_dtype(hidden_ND)
        rows, width = hidden_ND.shape[0], weight_VD.shape[0]
        value_N = hidden_ND.new_empty(rows, dtype=dtype)
        gradients = _Gradients(hidden_ND, weight_VD, bias_V, plan)
        size = balanced_chunk(rows, plan.chunk_rows)
        logits_CV = hidden_ND.new_empty(min(size, rows), width)
        chunk_of = plan.objective.begin(size)
        for chunk in spans(rows, size):
            logits_NV = product(hidden_ND[chunk], weight_VD, bias_V, logits_CV)
            block_of = chunk_of(chunk)
            for block in spans(len(logits_NV), block_rows(logits_NV)):
                factor_N1 = None if factor_N is None else factor_N[chunk][block].unsqueeze(-1)
                value_N[chunk][block] = _differentiated(logits_NV[block], block, block_of, plan, factor_N1)
            gradients.add(chunk, logits_NV)
        return value_N, gradients.all()


def _differentiated(
    logits_NV: Tensor, block: slice, block_of: Block, plan: Plan, factor_N1: Tensor | None = None
) -> Tensor:
    """The values of one block, whose logits are overwritten by the loss's gradient in them, times each row's factor."""
    raw_NV = logits_NV.to(working_dtype(logits_NV))
    slope_NV = None
    if plan.softcap is not None:
        raw_NV = torch.tanh(raw_NV / plan.softcap)
        slope_NV, raw_NV = 1 - raw_NV.square(), raw_NV * plan.softcap
    value_N, gradient_NV = block_of(block, raw_NV if plan.temperature == 1 else raw_NV / plan.temperature)
    if slope_NV is not None:
        gradient_NV = gradient_NV * slope_NV
    if factor_N1 is not None:
        gradient_NV = gradient_NV * factor_N1
    if any(plan.needs):
        logits_NV.copy_(gradient_NV)
    return value_N


class _Gradients:
    """Gradients in the student's tensors, filled chunk by chunk from those in its logits.

    Those are of the plain value in the tempered logits; the backward pass puts in its own factor, the plan's scale and
    one over the temperature, all at once.
    """

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: Plan) -> None:
        self._hidden_ND, self._weight_VD = hidden_ND, weight_VD
        for_hidden, for_weight, for_bias = plan.needs
        wide = working_dtype(weight_VD)
        narrow = weight_VD.dtype != wide
        # an unscaled sum over thousands of positions may leave float16's range
        self._wide = narrow and (plan.wide_head or weight_VD.dtype == torch.float16)
        self._in_hidden = torch.zeros_like(hidden_ND) if for_hidden else None
        self._in_weight = torch.zeros_like(weight_VD, dtype=wide if self._wide else None) if for_weight else None
        self._in_bias = torch.zeros_like(bias_V, dtype=wide) if for_bias and bias_V is not None else None

    def add(self, chunk: slice, gradient_NV: Tensor) -> None:
        if self._in_hidden is not None:
            torch.mm(gradient_NV, self._weight_VD, out=self._in_hidden[chunk])
        if self._in_weight is not None:
            self._add_to_head(self._in_weight, gradient_NV, self._hidden_ND[chunk])
        if self._in_bias is not None:
            self._in_bias += gradient_NV.sum(0, dtype=self._in_bias.dtype)

    def _add_to_head(self, sum_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
        if not self._wide:
            sum_VD.addmm_(gradient_NV.T, hidden_ND)
            return
        for part in spans(sum_VD.shape[0], HEAD_SLICE):
            sum_VD[part] += torch.mm(gradient_NV[:, part].T, hidden_ND)

    def all(self) -> tuple[Tensor | None, ...]:
        return (self._in_hidden, self._in_weight, self._in_bias)


def product(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, buffer_CV: Tensor) -> Tensor:
    """``hidden @ weight.T + bias`` written into the first rows of the buffer."""
    out_NV = buffer_CV[: len(hidden_ND)]
    if bias_V is None:
        return torch.mm(hidden_ND, weight_VD.T, out=out_NV)
    return torch.addmm(bias_V, hidden_ND, weight_VD.T, out=out_NV)


def spans(rows: int, size: int) -> Iterator[slice]:
    """The rows in runs of ``size``, the last one shorter."""
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def balanced_chunk(rows: int, most: int) -> int:
    """The size that cuts the rows into as few chunks of at most ``most`` as can be, nearly equal ones."""
    if most < 1:
        raise ValueError(f"chunk_rows={most}: expected at least 1, or None")
    number = max(-(-rows // most), 1)
    return max(-(-rows // number), 1)


def block_rows(logits_NV: Tensor) -> int:
    """Rows of one block."""
    return max(BLOCK_LOGITS.get(logits_NV.device.type, BLOCK_LOGITS_ELSEWHERE) // max(logits_NV.shape[-1], 1), 1)


def in_one_precision(projection: HiddenProjection, autocast: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, head and bias as the product takes them: autocast's precision, or the wider of the two."""
    dtype, bias_V = product_dtype(projection, autocast), projection.bias_V
    return projection.hidden_ND.to(dtype), projection.weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)


def product_dtype(projection: HiddenProjection, autocast: bool = True) -> torch.dtype:
    """The precision that logits are made in."""
    dtype = torch.promote_types(projection.hidden_ND.dtype, projection.weight_VD.dtype)
    device = projection.hidden_ND.device.type
    if autocast and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype
