"""One display for a sweep: done, running, pruned, failed, the best so far with its overrides, and the time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from research.sweeps.progress import RunBars
from research.sweeps.repeating import repeating
from research.sweeps.sweep_terms import Counts
from research.sweeps.trial_store import TrialStore

EVERY_S = 1.0


@contextmanager
def watching_sweep(store: TrialStore, target: int) -> Iterator[None]:
    """Show how far the sweep is, from a thread, while the caller's launcher works.

    Where the output is no terminal, one line is printed for each tenth of the sweep instead.
    """
    display = SweepDisplay(store.terms.name, target)
    # an Optuna storage is not made for two threads; memory cannot be opened twice
    watched = store if store.terms.storage.name == "memory" else TrialStore(store.terms)
    with display:
        try:
            with repeating(lambda: display.show(watched), EVERY_S, "sweep display"):
                yield
        finally:
            display.show(watched)


class SweepDisplay:
    """A bar for the sweep, a line for the best trial, and a bar for every run that tells its steps."""

    def __init__(self, name: str, target: int) -> None:
        self._console = Console(stderr=True)
        self._is_live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self._console, disable=not self._is_live,
        )  # fmt: skip
        self._name, self._target, self._told = name, target, -1
        self._sweep = self._progress.add_task(name, total=target)
        self._runs = RunBars(self._progress)
        self._best = Text("")
        self._live = Live(Group(self._progress, self._best), console=self._console, refresh_per_second=2)

    def __enter__(self) -> "SweepDisplay":
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_live:
            self._live.stop()

    def show(self, store: TrialStore) -> None:
        """Read the storage once and show it."""
        counts, best = store.counts(), best_line(store)
        line = told(counts)
        if self._is_live:
            self._progress.update(self._sweep, completed=counts.finished, description=f"{self._name}: {line}")
            self._runs.show([str(t.user_attrs.get("folder")) for t in store.trials() if t.state.name == "RUNNING"])
            self._best.plain = best
        tenth = 10 * counts.finished // max(1, self._target)
        if not self._is_live and tenth != self._told:
            self._told = tenth
            stamp = time.strftime("%H:%M:%S")
            self._console.print(
                f"{stamp} {self._name}: {counts.finished} of {self._target} trials ({line}) {best}", soft_wrap=True
            )


def told(counts: Counts) -> str:
    """The counts in words, those that are nought left out."""
    named: dict[str, int] = {
        "complete": counts.complete, "pruned": counts.pruned, "failed": counts.failed,
        "out of memory": counts.out_of_memory, "running": counts.running,
    }  # fmt: skip
    return ", ".join(f"{number} {name}" for name, number in named.items() if number) or "none yet"


def best_line(store: TrialStore) -> str:
    """The best trial so far, its value and its searched values; of several objectives how many none beats."""
    found: list[Any] = store.best_trials()
    if not found:
        return ""
    if len(store.terms.directions) > 1:
        return f"{len(found)} trials that no other beats in everything"
    best = found[0]
    names = store.terms.objectives or ("value",)
    searched = " ".join(
        f"{name}={value:.5g}" if isinstance(value, float) else f"{name}={value}" for name, value in best.params.items()
    )
    return f"best: trial {best.number}, {names[0]} {best.values[0]:.6g} with {searched}"
