"""The whole teacher API: `signal(batch) -> TeacherSignal`, and `signal_at` for the places of text that are asked for.

A teacher is a plain object, never a registered submodule of a method: it enters no checkpoint and no optimizer. Live,
cached, ensemble and transformed teachers are interchangeable because a loss sees only the signal.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from research.records import Batch, TeacherSignal, TokenBatch


@dataclass(frozen=True)
class TeacherIdentity:
    """Who is teaching, as it stands in records and manifests.

    kind             frozen | ensemble | cached | virtual | ...
    sha256           hash of the weights behind the signal (of the members' hashes for an ensemble)
    source           file or folder it came from, as given
    details          plain values that change the signal (averaging, transform, ...)
    training_flops, training_tokens, training_seconds   once spent on training it: updates, and what of rollouts and of
                     its own teacher's scoring that took; None where no record says so
    """

    kind: str
    sha256: str
    source: str
    details: dict[str, Any]
    training_flops: float | None = None
    training_tokens: float | None = None
    training_seconds: float | None = None


class AbstractTeacher(ABC):
    """What supplies the signal. Subclasses are final."""

    num_classes: int
    identity: TeacherIdentity
    max_positions: int | None = None  # tokens of the longest document that a teacher of text can read; None: any
    gives_hidden: bool = False  # whether its signals are hidden states and head: the student then gives its own so

    @abstractmethod
    def signal(self, batch: Any) -> TeacherSignal:
        """The teacher's distribution for every row of `batch` (every place of text), without gradient, on its device.

        A subclass says which kind of `research.records.Batch` it takes.
        """

    def signal_at(self, batch: TokenBatch, place_BT: Tensor) -> TeacherSignal:
        """The signal of text at the places where the mask is True alone, [N, ...], row by row."""
        return self.signal(batch).at(place_BT)

    def to(self, device: torch.device | str) -> "AbstractTeacher":
        """Move whatever lives on a device there; returns self."""
        return self

    def connect(self, data: Any) -> None:  # noqa: B027 - most teachers need nothing of the data
        """Late facts from the datamodule, once it is set up: refuse data the signal was not made for, or calibrate.

        `data` is a `research.data.base.AbstractClassData` after `setup`; the default needs nothing from it.
        """

    def flops_per_row(self) -> float:
        """FLOPs of one row's signal: 0 where it is read rather than computed."""
        return 0.0

    def flops_of(self, batch: Batch) -> float:
        """FLOPs of one batch's signal, padding included; NaN where nobody knows them."""
        return self.flops_per_row() * len(batch)

    def spent_flops(self) -> float:
        """FLOPs spent once, before this run, to have the signal at all: the scoring behind a cache."""
        return 0.0
