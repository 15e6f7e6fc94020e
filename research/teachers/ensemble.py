"""Several networks as one teacher, streamed: ten members need the memory of one."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from research.errors import CheckpointError, ConfigError
from research.losses.signal_divergence import teacher_logits
from research.records import Batch, DenseLogits
from research.teachers.base import AbstractTeacher, TeacherIdentity
from research.teachers.frozen import FrozenTeacher, LoadedNetwork

MEANS = ("arithmetic", "geometric")


@dataclass(frozen=True)
class _MemberFacts:
    num_classes: int
    identity: TeacherIdentity
    flops: float | None  # of a row; None for language models, whose rows have any length
    max_positions: int | None


class EnsembleTeacher(AbstractTeacher):
    """The mean of the members' distributions.

    loaders      one callable per member that reads it from disk; called once at construction to check and hash the
                 member, and once for every batch where `streamed`
    mean         "arithmetic": p = mean_m softmax(z_m / T); "geometric": log p = mean_m log softmax(z_m / T) + const
    temperature  the T at which distributions are averaged. The signal is scaled back by T, so that softening it at
                 this T gives exactly the mean; for the geometric mean every T gives the same signal
    streamed     read members one at a time (memory of one); False keeps all of them

    Raises ConfigError for no member or an unknown mean, CheckpointError where members differ in classes or where one
    that is streamed has changed since construction.
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
        self._loaders, self._mean, self._temperature, self._streamed = list(loaders), mean, temperature, streamed
        self._device: torch.device | str = "cpu"
        self._kept: list[FrozenTeacher] = []
        facts = [self._read(loader) for loader in self._loaders]
        self.num_classes = facts[0].num_classes
        for fact in facts:
            if fact.num_classes != self.num_classes:
                raise CheckpointError(
                    f"{fact.identity.source} predicts {fact.num_classes} classes, {facts[0].identity.source} predicts "
                    f"{self.num_classes}; the members of an ensemble must share their classes"
                )
        self.max_positions = min((fact.max_positions for fact in facts if fact.max_positions is not None), default=None)
        self._hashes = [fact.identity.sha256 for fact in facts]
        self._flops = None if facts[0].flops is None else sum(fact.flops or 0.0 for fact in facts)
        self._flops_of_shape: dict[tuple[int, ...], float] = {}
        self.identity = TeacherIdentity(
            kind="ensemble",
            sha256=hashlib.sha256("".join(self._hashes).encode()).hexdigest(),
            source=", ".join(fact.identity.source for fact in facts),
            details={"mean": mean, "temperature": temperature, "members": len(facts)},
            training_flops=_sum(fact.identity.training_flops for fact in facts),
            training_tokens=_sum(fact.identity.training_tokens for fact in facts),
            training_seconds=_sum(fact.identity.training_seconds for fact in facts),
        )

    def _read(self, loader: Callable[[], LoadedNetwork]) -> _MemberFacts:
        """What is known of a member, which itself is kept only where nothing is streamed."""
        member = FrozenTeacher(loader())
        if not self._streamed:
            self._kept.append(member)
        flops = None if member.is_language_model else member.flops_per_row()
        return _MemberFacts(member.num_classes, member.identity, flops, member.max_positions)

    def signal(self, batch: Batch) -> DenseLogits:
        total = self._logprobs(0, batch)
        for position in range(1, len(self._loaders)):
            logprobs = self._logprobs(position, batch)
            total = torch.logaddexp(total, logprobs) if self._mean == "arithmetic" else total + logprobs
        count = len(self._loaders)
        mean = total - math.log(count) if self._mean == "arithmetic" else total / count
        return DenseLogits(mean * self._temperature)

    def _logprobs(self, position: int, batch: Batch) -> Tensor:
        """One member's softened logprobs; a member read for this batch is gone on return, before the next is read."""
        member = self._member(position)
        logits_NV = teacher_logits(member.to(self._device).signal(batch))
        return torch.log_softmax(logits_NV / self._temperature, dim=-1)

    def _member(self, position: int) -> FrozenTeacher:
        member = FrozenTeacher(self._loaders[position]()) if self._streamed else self._kept[position]
        if member.identity.sha256 != self._hashes[position]:
            raise CheckpointError(f"{member.identity.source} has changed on disk since the ensemble was made of it")
        return member

    def to(self, device: torch.device | str) -> "EnsembleTeacher":
        self._device = device
        return self

    def flops_per_row(self) -> float:
        if self._flops is None:
            raise TypeError("an ensemble of language models has no FLOPs of a row, but of a batch: flops_of")
        return self._flops

    def flops_of(self, batch: Batch) -> float:
        inputs = batch.network_inputs()
        shape = tuple(inputs[0].shape[1:])
        if shape not in self._flops_of_shape:
            rows = int(inputs[0].shape[0])
            members = (self._member(position) for position in range(len(self._loaders)))
            self._flops_of_shape[shape] = sum(member.flops_of(batch) for member in members) / rows
        return self._flops_of_shape[shape] * int(inputs[0].shape[0])


def _sum(costs: Iterable[float | None]) -> float | None:
    """None where one of them is not known."""
    given = list(costs)
    return None if None in given else sum(cost for cost in given if cost is not None)
