"""What the processes of one sweep share: its terms, and how many of its trials came how far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from research.sweeps.storages import StorageSpec


@dataclass(frozen=True)
class SweepTerms:
    """What every process of a sweep must know; small, and pickled to workers.

    objectives     names of the metrics that a task returns in a mapping; empty: it returns the values themselves
    directions     minimize or maximize, one for each objective
    constraints    name of a returned metric -> the greatest value with which a trial is feasible
    box            name of an objective -> its worst and best value that matter; see :meth:`TrialStore.hypervolume`
    lease_s        seconds between the signs of life of a running trial
    stale_s        seconds without one after which a trial of another machine counts as interrupted
    max_attempts   how often an interrupted trial is begun before it has failed
    retries        how often a failed trial's point is tried again, as a trial of its own
    out_of_memory  fail: a trial that ran out of memory has failed; constraint: it is infeasible
    """

    storage: StorageSpec
    name: str
    directions: tuple[str, ...] = ("minimize",)
    objectives: tuple[str, ...] = ()
    constraints: Mapping[str, float] = field(default_factory=dict)
    box: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "random"})
    pruner: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    lease_s: float = 10.0
    stale_s: float = 60.0
    max_attempts: int = 5
    retries: int = 0
    out_of_memory: str = "fail"


@dataclass(frozen=True)
class Counts:
    """The trials of a sweep by what became of them. Failed ones that were retried, and copied ones, are left out.

    out_of_memory  those that are infeasible because of it; where it is a failure they are among the failed
    """

    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    waiting: int = 0
    out_of_memory: int = 0

    @property
    def finished(self) -> int:
        """Trials that count towards the target."""
        return self.complete + self.pruned + self.failed + self.out_of_memory

    @property
    def under_way(self) -> int:
        """Trials that are finished, or will be."""
        return self.finished + self.running

    @property
    def total(self) -> int:
        """All of them."""
        return self.finished + self.running + self.waiting
