"""Controls: the teacher's signal with one property taken away, to see which property teaches (claims C05)."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from research.errors import ConfigError
from research.records import ClassBatch, DenseLogits
from research.seeding import rng_for
from research.teachers.base import AbstractTeacher, TeacherIdentity

PERMUTATIONS = ("per_example", "fixed")


class PermutedWrongClasses(AbstractTeacher):
    """The teacher's logits with the wrong classes shuffled: same entropy, same value on the true class, no structure.

    scope  "per_example": each item has its own shuffle, the same in every epoch; "fixed": one map of the wrong classes
           for each true class, the same for all items
    """

    def __init__(self, teacher: AbstractTeacher, *, scope: str = "per_example", seed: int = 0) -> None:
        if scope not in PERMUTATIONS:
            raise ConfigError(f"signal_transform.scope is {scope!r}; expected one of {', '.join(PERMUTATIONS)}")
        self._teacher, self._scope, self._seed = teacher, scope, seed
        self.num_classes = teacher.num_classes
        self.identity = _derived(teacher, "permuted", {"scope": scope, "permutation_seed": seed})
        self._order_PV: Tensor | None = None
        self._device: torch.device | str = "cpu"

    def connect(self, data: Any) -> None:
        self._teacher.connect(data)
        rows = int(data.num_official_rows("train")) if self._scope == "per_example" else self.num_classes
        noise = torch.rand(rows, self.num_classes - 1, generator=rng_for(self._seed, f"permuted/{self._scope}"))
        self._order_PV = noise.argsort(dim=1).to(self._device)

    def signal(self, batch: ClassBatch) -> DenseLogits:
        if self._order_PV is None:
            raise ConfigError("a permuted teacher needs connect(data) before its first signal")
        logits_NV = _dense(self._teacher, batch, "permuted")
        key_N = batch.index_B if self._scope == "per_example" else batch.label_B
        order_NV = self._order_PV[key_N]
        classes_V = torch.arange(self.num_classes, device=logits_NV.device)
        is_wrong_NV = classes_V != batch.label_B[:, None]
        wrong_NV = logits_NV[is_wrong_NV].reshape(-1, self.num_classes - 1)
        permuted_NV = logits_NV.clone()
        permuted_NV[is_wrong_NV] = wrong_NV.gather(1, order_NV).reshape(-1)
        return DenseLogits(permuted_NV)

    def to(self, device: torch.device | str) -> "PermutedWrongClasses":
        self._teacher.to(device)
        self._device = device
        self._order_PV = None if self._order_PV is None else self._order_PV.to(device)
        return self

    def flops_per_row(self) -> float:
        return self._teacher.flops_per_row()

    def spent_flops(self) -> float:
        return self._teacher.spent_flops()


class VirtualTeacher(AbstractTeacher):
    """A hand-made teacher: probability `a` on the true class, the rest spread evenly (arXiv:1909.11723, "Tf-KD").

    true_class_probability  `a` after softening at `temperature`, in (1 / V, 1); None matches the mean entropy of
                            `teacher`'s own softened distribution on the training rows, so that the two arms differ in
                            wrong-class structure alone
    """

    def __init__(
        self, teacher: AbstractTeacher, *, true_class_probability: float | None = None, temperature: float = 1.0
    ) -> None:
        self._teacher, self._temperature = teacher, temperature
        self.num_classes = teacher.num_classes
        if true_class_probability is not None and not 1 / self.num_classes < true_class_probability < 1:
            raise ConfigError(
                f"signal_transform.true_class_probability is {true_class_probability}; "
                f"expected a number between {1 / self.num_classes:.3f} (uniform) and 1, or null to match the teacher"
            )
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"signal_transform.temperature is {temperature}; expected a positive, finite number")
        self._matched = true_class_probability is None
        self._probability = true_class_probability
        self.identity = self._identity()

    def connect(self, data: Any) -> None:
        self._teacher.connect(data)
        if self._probability is None:
            self._probability = probability_with_entropy(self._mean_entropy(data), self.num_classes)
            self.identity = self._identity()

    def _identity(self) -> TeacherIdentity:
        details = {
            "true_class_probability": self._probability,
            "matched": "mean entropy" if self._matched else None,
            "softened_at": self._temperature,
        }
        return _derived(self._teacher, "virtual", details)

    def _mean_entropy(self, data: Any) -> float:
        """Mean entropy in nats of the wrapped teacher's softened distribution over the training rows."""
        total, rows = 0.0, 0
        for batch in data.loader("train", batch_size=4096):
            logits_NV = _dense(self._teacher, batch, "virtual").double() / self._temperature
            entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
            total, rows = total + float(entropy_N.sum()), rows + len(entropy_N)
        return total / rows

    def signal(self, batch: ClassBatch) -> DenseLogits:
        if self._probability is None:
            raise ConfigError("a virtual teacher that matches entropy needs connect(data) before its first signal")
        rest = (1 - self._probability) / (self.num_classes - 1)
        gap = self._temperature * math.log(self._probability / rest)
        logits_NV = torch.zeros(len(batch), self.num_classes, device=batch.label_B.device)
        return DenseLogits(logits_NV.scatter(1, batch.label_B[:, None], gap))

    def to(self, device: torch.device | str) -> "VirtualTeacher":
        self._teacher.to(device)
        return self


def probability_with_entropy(entropy: float, num_classes: int) -> float:
    """The `a` for which a distribution with `a` on one class and the rest spread evenly has this entropy (nats).

    Bisection on the falling branch a in (1 / V, 1). Raises ConfigError outside (0, log V).
    """

    def entropy_of(a: float) -> float:
        probs = torch.tensor([a] + [(1 - a) / (num_classes - 1)] * (num_classes - 1), dtype=torch.float64)
        return float(torch.special.entr(probs).sum())

    low, high = 1 / num_classes, 1.0
    if not 0 < entropy < entropy_of(low):
        raise ConfigError(f"no distribution over {num_classes} classes of this shape has an entropy of {entropy} nats")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_of(middle) > entropy else (low, middle)
    return (low + high) / 2


def _dense(teacher: AbstractTeacher, batch: ClassBatch, name: str) -> Tensor:
    signal = teacher.signal(batch)
    if not isinstance(signal, DenseLogits):
        raise ConfigError(
            f"signal_transform={name} needs every class's logit, the teacher gives {type(signal).__name__}; "
            "use a dense cache (top_k=null) or a live teacher"
        )
    return signal.logits_NV


def _derived(teacher: AbstractTeacher, transform: str, details: dict[str, Any]) -> TeacherIdentity:
    return dataclasses.replace(
        teacher.identity, details={**teacher.identity.details, "transform": transform, **details}
    )
