"""Several networks as one teacher, streamed: ten members need the memory of one."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from research.errors import CheckpointError, ConfigError
from research.models.flops import flops_per_row
from research.records import ClassBatch, DenseLogits
from research.teachers.base import AbstractTeacher, TeacherIdentity
from research.teachers.frozen import FrozenTeacher, LoadedNetwork

MEANS = ("arithmetic", "geometric")


class EnsembleTeacher(AbstractTeacher):
    """The mean of the members' distributions.

    loaders      one callable per member that reads it from disk; called once at construction to check and hash the
                 member, and once for every batch where `streamed`
    mean         "arithmetic": p = mean_m softmax(z_m / T); "geometric": log p = mean_m log softmax(z_m / T) + const
    temperature  the T at which distributions are averaged. The signal is scaled back by T, so that softening it at
                 this T gives exactly the mean; for the geometric mean every T gives the same signal
    streamed     read members one at a time (memory of one); False keeps all of them

    Raises ConfigError for no member or an unknown mean, CheckpointError where members differ in classes.
    """

    def __init__(
        self,
        loaders: Sequence[Callable[[], LoadedNetwork]],
        *,
        mean: str = "arithmetic",
        temperature: float = 1.0,
        streamed: bool = True,
    ) -> None:
        if not loaders:
            raise ConfigError("teacher.paths is empty; an ensemble needs at least one member")
        if mean not in MEANS:
            raise ConfigError(f"teacher.mean is {mean!r}; expected one of {', '.join(MEANS)}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"teacher.temperature is {temperature}; expected a positive number")
        self._loaders, self._mean, self._temperature = list(loaders), mean, temperature
        self._device: torch.device | str = "cpu"
        self._kept: list[FrozenTeacher] = []
        hashes, sources, flops, spent = [], [], 0.0, []
        for loader in self._loaders:
            loaded = loader()
            member = FrozenTeacher(loaded)
            if hashes and member.num_classes != self.num_classes:
                raise CheckpointError(
                    f"{loaded.source} predicts {member.num_classes} classes, {sources[0]} predicts {self.num_classes}; "
                    "the members of an ensemble must share their classes"
                )
            self.num_classes = member.num_classes
            hashes.append(member.identity.sha256)
            sources.append(loaded.source)
            flops += flops_per_row(loaded.network, loaded.input_shape, backward=False)
            spent.append(loaded.training_flops)
            if not streamed:
                self._kept.append(member)
        self._flops = flops
        self.identity = TeacherIdentity(
            kind="ensemble",
            sha256=hashlib.sha256("".join(hashes).encode()).hexdigest(),
            source=", ".join(sources),
            details={"mean": mean, "temperature": temperature, "members": len(hashes)},
            training_flops=None if None in spent else sum(s for s in spent if s is not None),
        )

    def signal(self, batch: ClassBatch) -> DenseLogits:
        total: Tensor | None = None
        for position in range(len(self._loaders)):
            member = self._kept[position] if self._kept else FrozenTeacher(self._loaders[position]())
            logprobs = torch.log_softmax(member.to(self._device).signal(batch).logits_NV / self._temperature, dim=-1)
            if total is None:
                total = logprobs
            elif self._mean == "arithmetic":
                total = torch.logaddexp(total, logprobs)
            else:
                total = total + logprobs
        if total is None:
            raise ConfigError("an ensemble needs at least one member")
        count = len(self._loaders)
        mean = total - math.log(count) if self._mean == "arithmetic" else total / count
        return DenseLogits(mean * self._temperature)

    def to(self, device: torch.device | str) -> "EnsembleTeacher":
        self._device = device
        return self

    def flops_per_row(self) -> float:
        return self._flops
