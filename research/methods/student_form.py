"""In which form a method has its student's logits: all of them, or hidden states and head that make some at a time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from research.errors import ConfigError
from research.losses.divergences import divergence_weights
from research.losses.linear import linear_cross_entropy
from research.losses.linear_chunks import product_dtype
from research.losses.logit_gradients import form_of
from research.losses.soft_target import soft_target
from research.losses.supervised import cross_entropy
from research.methods.completion_places import drawn_logprobs, logits_at, mean_entropy, projection_at, teacher_logprobs
from research.records import HiddenProjection, LossSum, TeacherSignal, TokenBatch
from research.teachers.base import AbstractTeacher

Student = Tensor | HiddenProjection


class StudentForm:
    """The student's logits for the losses of a method of text, and these losses in the form that the logits have.

    They come as hidden states and output head where the teacher's do (``teacher.signal=hidden``) or where
    ``chunk_rows`` is given, and are then never all written out; elsewhere they are. Values and gradients are the same
    but for rounding, and FLOPs are counted as if all logits were written out once: drawn tokens' are made twice.

    chunk_rows    most places whose logits exist at a time; None: as many as keep the products at their full rate
    float32_head_gradient   add the chunks' gradients of a half-precision head in float32, for 4 bytes per weight of it
    compiled      let ``torch.compile`` fuse the divergence's elementwise part: slow in the first step, and on a CPU it
                  needs a C++ compiler
    divergence    options of ``soft_target`` that the method trains with; None: it trains with no divergence

    Raises ConfigError, naming the key, for options that cannot be, or that would change nothing.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: AbstractTeacher | None = None,
        *,
        chunk_rows: int | None = None,
        float32_head_gradient: bool = False,
        compiled: bool = False,
        divergence: Mapping[str, Any] | None = None,
    ) -> None:
        can_project = hasattr(student, "hidden_projection")
        if chunk_rows is not None and chunk_rows < 1:
            raise ConfigError(f"method.chunk_rows is {chunk_rows}; expected at least 1 place, or null")
        if chunk_rows is not None and not can_project:
            raise ConfigError(
                f"method.chunk_rows is {chunk_rows}, and the student is a {type(student).__name__}, which has no "
                "output head to make some logits at a time with; leave it null"
            )
        self.is_hidden = can_project and (chunk_rows is not None or (teacher is not None and teacher.gives_hidden))
        for name, value in (("float32_head_gradient", float32_head_gradient), ("compiled", compiled)):
            if value and not self.is_hidden:
                raise ConfigError(
                    f"method.{name} is true, and all logits are written out at once, where it would change nothing; "
                    "give method.chunk_rows or teacher.signal=hidden, or leave it false"
                )
        if compiled:
            _check_compiled(divergence)
        self.chunk_rows = chunk_rows
        self._chunks: dict[str, Any] = {"chunk_rows": chunk_rows, "float32_head_gradient": float32_head_gradient}
        self._compiled = compiled

    # -- the student --------------------------------------------------------------------------------------------------

    def everywhere(self, network: Any, tokens: TokenBatch) -> Student:
        """At every place of a batch, [B, T, ...], over all rows of the head."""
        inputs = tokens.network_inputs()
        student: Student = network.hidden_projection(*inputs) if self.is_hidden else network(*inputs)
        return student

    def at(self, network: Any, tokens: TokenBatch, vocab_size: int) -> Student:
        """At the completion's places, [N, ...], over the tokens that the tokenizer has."""
        return (projection_at if self.is_hidden else logits_at)(network, tokens, vocab_size)

    @staticmethod
    def dtype_of(student: Student) -> torch.dtype:
        """The precision that the logits are made in."""
        return student.dtype if isinstance(student, Tensor) else product_dtype(student)

    # -- its losses ---------------------------------------------------------------------------------------------------

    def soft_target(self, student: Student, signal: TeacherSignal, **options: Any) -> LossSum:
        """``losses.soft_target.soft_target``."""
        chunks = {**self._chunks, "compiled": self._compiled} if isinstance(student, HiddenProjection) else {}
        return soft_target(student, signal, **options, **chunks)

    def cross_entropy(self, student: Student, label_N: Tensor, **options: Any) -> LossSum:
        """``losses.supervised.cross_entropy``."""
        if isinstance(student, HiddenProjection):
            return linear_cross_entropy(student, label_N, **options, **self._chunks)
        return cross_entropy(student, label_N, **options)

    def logprobs(self, student: Student, label_N: Tensor, sampling_temperature: float) -> Tensor:
        """``completion_places.drawn_logprobs``."""
        return drawn_logprobs(student, label_N, sampling_temperature, **self._chunks)

    def teacher_logprobs(self, signal: TeacherSignal, label_N: Tensor, sampling_temperature: float) -> Tensor:
        """``completion_places.teacher_logprobs``."""
        return teacher_logprobs(signal, label_N, sampling_temperature, chunk_rows=self.chunk_rows)

    def mean_entropy(self, student: Student) -> float:
        """``completion_places.mean_entropy``."""
        return mean_entropy(student, chunk_rows=self.chunk_rows)


def _check_compiled(divergence: Mapping[str, Any] | None) -> None:
    if divergence is None:
        raise ConfigError(
            "method.compiled is true, and it fuses the work of a divergence; this method trains with none, leave it "
            "false"
        )
    name = divergence["divergence"]
    weights = {key: divergence.get(key) for key in ("teacher_mixture_weight", "skew_weight")}
    if form_of(name, divergence_weights(name, **weights)) is None:
        raise ConfigError(
            f"method.compiled is true, and {name} has no part that can be compiled at these weights; leave it false, "
            "or choose forward_kl, reverse_kl, jsd or normalised_jsd with a weight that is not near 0 or 1"
        )
