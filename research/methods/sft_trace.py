"""Supervised fine-tuning on written traces, beside a soft-target term on the same tokens where a teacher is given."""

import torch
from torch import Tensor

from research.errors import ConfigError
from research.methods.base import AbstractMethod, Component, Training
from research.methods.sampled_places import check_reduction
from research.methods.soft_target import check_weights, checked_divergence
from research.methods.student_form import Student, StudentForm
from research.methods.token_validation import METRICS as TOKEN_METRICS
from research.methods.token_validation import log_token_validation
from research.records import LossSum, TokenBatch
from research.teachers.base import AbstractTeacher


class SftTrace(AbstractMethod):
    """Masked next-token cross-entropy, the same whoever wrote the text; ``weight_BT`` of the batch says what counts.

    reduction     token     sum over all places / their weight in the whole optimizer step: every token counts alike
                  sequence  mean over each document's own places, then over documents: every document counts alike
                  fixed     sum over all places / (documents * ``fixed_length``): a constant, whatever the lengths
    fixed_length  tokens, for reduction=fixed only
    hard_weight   of the cross-entropy with the trace's tokens; soft_weight, temperature, divergence, ... of the
                  teacher's distribution at the completion's places, as for :class:`SoftTarget` (sequence-level and
                  token-level distillation at once, where the trace is the teacher's own)
    chunk_rows, float32_head_gradient, compiled   see :class:`StudentForm`
    """

    validation_metrics = (*TOKEN_METRICS, "val/errors", "val/accuracy")

    def __init__(
        self,
        training: Training,
        teacher: AbstractTeacher | None = None,
        *,
        reduction: str = "token",
        fixed_length: int | None = None,
        hard_weight: float = 1.0,
        soft_weight: float = 0.0,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        teacher_mixture_weight: float | None = None,
        skew_weight: float | None = None,
        scale_by_temperature_squared: bool = True,
        chunk_rows: int | None = None,
        float32_head_gradient: bool = False,
        compiled: bool = False,
    ) -> None:
        if soft_weight != 0 and teacher is None:
            raise ConfigError(f"method.soft_weight is {soft_weight} and there is no teacher; choose teacher=frozen")
        super().__init__(training, teacher)
        check_reduction(reduction, fixed_length)
        check_weights(hard_weight=hard_weight, soft_weight=soft_weight)
        self.reduction, self.fixed_length = reduction, fixed_length
        self.hard_weight, self.soft_weight, self.temperature = hard_weight, soft_weight, temperature
        self._options = checked_divergence(
            divergence=divergence,
            temperature=temperature,
            teacher_mixture_weight=teacher_mixture_weight,
            skew_weight=skew_weight,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )
        self._form = StudentForm(
            training.student,
            teacher if soft_weight else None,
            chunk_rows=chunk_rows,
            float32_head_gradient=float32_head_gradient,
            compiled=compiled,
            divergence=self._options if soft_weight else None,
        )

    def components(self, batch: TokenBatch) -> list[Component]:
        student = self._form.everywhere(self.student, batch)
        parts = []
        if self.hard_weight != 0:
            parts.append(self._component("hard", self._hard(student, batch), self.hard_weight, batch))
        if self.soft_weight != 0:
            signal = self.teacher_signal(batch)
            loss = self._form.soft_target(student, signal, loss_mask_N=batch.completion_BT, **self._options)
            parts.append(Component("soft", loss, self.soft_weight, batch.step_completion_tokens))
        return parts

    def _hard(self, student: Student, batch: TokenBatch) -> LossSum:
        weight_BT = batch.weight_BT
        if self.reduction == "sequence":
            weight_BT = weight_BT.double() / _document_weight(batch).double().clamp(min=1e-12)
        return self._form.cross_entropy(student, batch.label_BT, weight_N=weight_BT)

    def _component(self, name: str, loss: LossSum, weight: float, batch: TokenBatch) -> Component:
        if self.reduction == "token":
            return Component(name, loss, weight, batch.step_weight)
        if self.reduction == "sequence":
            return Component(name, loss, weight, batch.step_rows)
        return Component(name, loss, weight, batch.step_rows * float(self.fixed_length or 1))

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        log_token_validation(self, self.student, batch)


def _document_weight(batch: TokenBatch) -> Tensor:
    """At every place the summed weight of the document that it belongs to, [B, T]."""
    segments = int(batch.segment_BT.max()) + 1
    rows, weight_BT = batch.segment_BT.shape[0], batch.weight_BT
    weight_BS = torch.zeros(rows, segments, dtype=weight_BT.dtype, device=weight_BT.device)
    weight_BS.scatter_add_(1, batch.segment_BT, weight_BT)
    return weight_BS.gather(1, batch.segment_BT)
