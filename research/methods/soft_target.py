"""Soft targets: match the teacher's softened distribution beside the label (Hinton, Vinyals and Dean, 2015)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from research.errors import ConfigError
from research.losses.soft_target import logit_matching, soft_target
from research.losses.supervised import cross_entropy
from research.methods.base import AbstractMethod, Component, Training
from research.records import ClassBatch, DenseLogits
from research.teachers.base import AbstractTeacher


class SoftTarget(AbstractMethod):
    """`hard_weight * cross_entropy + soft_weight * T^2 * divergence(teacher_T, student_T)`.

    temperature   T > 0 softens teacher and student alike in training; the student is used at 1
    hard_weight, soft_weight        not negative, not both zero; each term keeps its own mean
    divergence    forward_kl = KL(teacher || student), reverse_kl, jsd, normalised_jsd, skewed_forward_kl,
                  skewed_reverse_kl or total_variation
    teacher_mixture_weight          for the two JSDs; skew_weight for the two skewed KLs; null elsewhere
    scale_by_temperature_squared    True keeps the balance with the hard term when T changes
    """

    needs_teacher = True

    def __init__(
        self,
        training: Training,
        teacher: AbstractTeacher | None = None,
        *,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        soft_weight: float = 1.0,
        divergence: str = "forward_kl",
        teacher_mixture_weight: float | None = None,
        skew_weight: float | None = None,
        scale_by_temperature_squared: bool = True,
    ) -> None:
        super().__init__(training, teacher)
        check_weights(hard_weight=hard_weight, soft_weight=soft_weight)
        self.temperature, self.hard_weight, self.soft_weight = temperature, hard_weight, soft_weight
        self._options = checked_divergence(
            divergence=divergence,
            temperature=temperature,
            teacher_mixture_weight=teacher_mixture_weight,
            skew_weight=skew_weight,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )

    def components(self, batch: ClassBatch) -> list[Component]:
        logits_NV = self.student(batch.inputs)
        parts = []
        if self.soft_weight != 0:
            loss = soft_target(logits_NV, self.teacher_signal(batch), **self._options)
            parts.append(Component("soft", loss, self.soft_weight, batch.step_rows))
        if self.hard_weight != 0:
            hard = cross_entropy(logits_NV, batch.label_B)
            parts.append(Component("hard", hard, self.hard_weight, batch.step_rows))
        return parts


class LogitMatching(AbstractMethod):
    """Half the squared error of zero-mean logits: the limit of soft targets as the temperature grows.

    hard_weight, soft_weight  as for :class:`SoftTarget`, whose gradient at large T this has with equal weights
    """

    needs_teacher = True

    def __init__(
        self,
        training: Training,
        teacher: AbstractTeacher | None = None,
        *,
        hard_weight: float = 0.0,
        soft_weight: float = 1.0,
    ) -> None:
        super().__init__(training, teacher)
        check_weights(hard_weight=hard_weight, soft_weight=soft_weight)
        self.hard_weight, self.soft_weight = hard_weight, soft_weight

    def components(self, batch: ClassBatch) -> list[Component]:
        logits_NV = self.student(batch.inputs)
        parts = []
        if self.soft_weight != 0:
            signal = self.teacher_signal(batch)
            if not isinstance(signal, DenseLogits):
                kind = type(signal).__name__
                raise ConfigError(f"method=logit_matching needs every class's logit, the teacher gives {kind}")
            soft = logit_matching(logits_NV, signal.logits_NV)
            parts.append(Component("soft", soft, self.soft_weight, batch.step_rows))
        if self.hard_weight != 0:
            hard = cross_entropy(logits_NV, batch.label_B)
            parts.append(Component("hard", hard, self.hard_weight, batch.step_rows))
        return parts


def checked_divergence(**options: Any) -> dict[str, Any]:
    """Options of ``losses.soft_target``, tried once, so that what no step could use is refused before the first."""
    check_temperature(options["temperature"])
    uniform_NV = torch.zeros(1, 2)
    with of_the_method():
        soft_target(uniform_NV, DenseLogits(uniform_NV), **options)
    return options


@contextmanager
def of_the_method() -> Iterator[None]:
    """What a loss refuses, as the ConfigError of a key of the method."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"method.{error}") from error


def check_temperature(temperature: float) -> None:
    """Raise ConfigError for a temperature that softens nothing."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"method.temperature is {temperature}; expected a positive, finite number such as 4")


def check_weights(**weights: float) -> None:
    """Raise ConfigError for weights of a loss's terms that are negative, not finite, or all 0."""
    for key, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"method.{key} is {weight}; expected a finite number, 0 or more")
    if not any(weights.values()):
        every = "both" if len(weights) == 2 else "all"
        names = " and ".join(f"method.{key}" for key in weights)
        raise ConfigError(f"{names} are {every} 0; at least one must be positive")
