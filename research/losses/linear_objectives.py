"""What chunks of the student's logits are compared with: a teacher's signal, or true classes."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from research.losses.linear_chunks import Block, in_one_precision, product
from research.losses.logit_gradients import (
    Form,
    compiled_form,
    form_of,
    softmax_and_norm,
    top_k_value_and_gradient,
    value_and_gradient,
)
from research.losses.projection import capped
from research.losses.sparse import teacher_bucket_logprobs
from research.records import DenseLogits, HiddenProjection, TeacherSignal, TopKLogprobs


@dataclass(frozen=True)
class Divergence:
    """A divergence by name from the teacher's distribution of each position, both sides at the temperature.

    signal    one row for each position ``[N, ...]``; a hidden one is projected chunk by chunk, in its own precision
    dtype     of the student's logits as they come to a block
    places_N  where the positions stand among the rows of dense logits; None: they are those rows
    """

    name: str
    signal: TeacherSignal
    weights: Mapping[str, float]
    temperature: float
    dtype: torch.dtype
    places_N: Tensor | None = None
    compiled: bool = False

    def begin(self, chunk_rows: int) -> Callable[[slice], Block]:
        if isinstance(self.signal, TopKLogprobs):
            return functools.partial(self._top_k_chunk, self.signal)
        form = form_of(self.name, self.weights)
        form = compiled_form(form) if self.compiled and form is not None else form
        logits_of = _chunk_logits(self.signal, self.places_N, chunk_rows)

        def chunk(rows: slice) -> Block:
            logits_NV = logits_of(rows)
            return lambda block, student_NV: self._compared(logits_NV[block], student_NV, form)

        return chunk

    def _compared(self, teacher_NV: Tensor, student_NV: Tensor, form: Form | None) -> tuple[Tensor, Tensor]:
        teacher_NV = teacher_NV.to(student_NV.dtype)
        if isinstance(self.signal, HiddenProjection) and self.signal.softcap is not None:
            teacher_NV = capped(teacher_NV, self.signal.softcap)
        if self.temperature != 1:
            teacher_NV = teacher_NV / self.temperature
        return value_and_gradient(self.name, student_NV, teacher_NV, self.weights, form)

    def _top_k_chunk(self, signal: TopKLogprobs, rows: slice) -> Block:
        part = TopKLogprobs(
            signal.ids_NK[rows].long(), signal.logprobs_NK[rows], signal.tail_logprob_N[rows], signal.num_classes
        )
        buckets_NK1 = teacher_bucket_logprobs(part, self.temperature, self.dtype)
        return lambda block, student_NV: top_k_value_and_gradient(
            self.name, student_NV, part.ids_NK[block], buckets_NK1[block].to(student_NV.dtype), self.weights
        )


@dataclass(frozen=True)
class CrossEntropy:
    """``-sum y log q`` with labels mixed with the uniform distribution, each position times its weight."""

    label_N: Tensor
    weight_N: Tensor | None
    label_smoothing: float

    def begin(self, chunk_rows: int) -> Callable[[slice], Block]:
        return lambda rows: lambda block, logits_NV: self._of(rows, block, logits_NV)

    def _of(self, rows: slice, block: slice, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        label_N1 = self.label_N[rows][block].unsqueeze(-1)
        gradient_NV, norm_N1 = softmax_and_norm(logits_NV)
        value_N1 = norm_N1 - (1 - self.label_smoothing) * logits_NV.gather(-1, label_N1)
        if self.label_smoothing > 0:
            value_N1 = value_N1 - self.label_smoothing * logits_NV.mean(-1, keepdim=True)
            gradient_NV -= self.label_smoothing / logits_NV.shape[-1]
        gradient_NV.scatter_add_(-1, label_N1, torch.full_like(norm_N1, self.label_smoothing - 1))
        if self.weight_N is not None:
            weight_N1 = self.weight_N[rows][block].unsqueeze(-1).to(value_N1.dtype)
            value_N1, gradient_NV = value_N1 * weight_N1, gradient_NV.mul_(weight_N1)
        return value_N1.squeeze(-1), gradient_NV


def _chunk_logits(
    signal: DenseLogits | HiddenProjection, places_N: Tensor | None, chunk_rows: int
) -> Callable[[slice], Tensor]:
    """Rows -> the teacher's logits of them, uncapped; a projection's in one buffer."""
    if isinstance(signal, DenseLogits):
        logits_NV = signal.logits_NV.detach()
        return lambda rows: logits_NV[rows] if places_N is None else logits_NV[places_N[rows]]
    hidden_ND, weight_VD, bias_V = in_one_precision(signal, autocast=False)
    buffer_CV = hidden_ND.new_empty(min(chunk_rows, len(hidden_ND)), len(weight_VD))
    return lambda rows: product(hidden_ND[rows], weight_VD, bias_V, buffer_CV)
