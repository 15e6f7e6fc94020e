"""Where the traces to train on come from: the task's own solutions, a store, a release, or a mixture of stores."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.data.splits import DataError
from research.errors import ConfigError
from research.records import Problem, Trace, Verdict
from research.tasks.base import AbstractTask, Split
from research.tasks.released import Released, read_released
from research.traces.mixture import Mixture, training_mixture
from research.traces.reading import stream_traces

RELEASED_PREFIX = "released:"
WRONG_ANSWER = "wrong_answer"  # a trace of a release of which only the right ones are asked for


class TrainTraces:
    """The source of train traces. It keeps none of them: every pass reads them again, and gives the same.

    task    whose problems they solve
    store, mixture, mixture_seed, num   as of ``TraceData``, whose ``num_train`` is ``num``; None of the first two: the
            task's own solutions
    answers_alone   whether rows of a file without a chain are good ones

    unread      rows that the last pass left out, by reason: traces of a release, or bad rows of a file
    quarantine  where a pass lists a file's bad rows, with line number and reason; None: nowhere

    Raises ConfigError, naming the key, for a store and a mixture at once, or an empty mixture.
    """

    def __init__(
        self,
        task: AbstractTask,
        store: str | None = None,
        mixture: Sequence[Mapping[str, Any]] | None = None,
        mixture_seed: int = 0,
        num: int | None = None,
        *,
        answers_alone: bool = False,
    ) -> None:
        if mixture is not None and store is not None:
            raise ConfigError(f"data.store is {store!r} and data.mixture is set; give one of them")
        if mixture is not None and not mixture:
            raise ConfigError("data.mixture is empty; give [{store: FOLDER, weight: W}, ..], or null for none")
        self._task, self._store, self._parts, self._seed = task, store, mixture, mixture_seed
        self._num, self._answers_alone = num, answers_alone
        self._mixture: Mixture | None = None
        self._part_of = array("H")  # of each trace of a mixture, in the order of the last pass
        self._was_read = False
        self._released: Released | None = None
        self.unread: Counter[str] = Counter()
        self.quarantine: Path | None = None

    @property
    def store_name(self) -> str | None:
        """Of the one store, without its place on this machine; None where there is none."""
        return None if self._store is None else Path(self._store).name

    @property
    def folders(self) -> tuple[Path, ...]:
        """The stores that were read; none before :meth:`stream`, and none for a release."""
        return store_folders(self._store, self._parts) if self._was_read else ()

    def stream(self, own_problems: Callable[[], Sequence[Problem]]) -> Iterator[Trace]:
        """The traces as they are stored, in one pass; the solutions of ``own_problems`` where nothing is.

        Raises DataError where there is none.
        """
        self.unread.clear()
        if self._parts is not None:
            traces: Iterable[Trace] = self._mix()
        elif self._store:
            traces = self._stored(self._store)
        else:
            traces = (reference_trace(problem) for problem in own_problems())
        found = False
        for trace in traces:
            found = True
            yield trace
        self._was_read = True
        if not found:
            raise DataError(f"no trace to train on in {self._store or self._task.name}")

    def mixed(self, places: Iterable[int]) -> dict[str, dict[str, dict[str, int]]]:
        """``mixture``: name of each store -> traces taken from it, and how many documents were made of them.

        places  of the traces, in the last pass, that the documents were made of
        Empty where there is no mixture, or none was read.
        """
        if self._mixture is None:
            return {}
        names = [part.name for part in self._mixture.parts]
        used = Counter(names[self._part_of[place]] for place in places)
        taken = self._mixture.summary()
        return {"mixture": {name: {"traces": count, "documents": used[name]} for name, count in taken.items()}}

    def references(self, split: Split, problems: Sequence[Problem]) -> list[Trace]:
        """The solutions of a held-out split: the task's own; where it has none, the first of each in a release."""
        references = [reference_trace(problem) for problem in problems]
        if not str(self._store).startswith(RELEASED_PREFIX) or any(trace.chain for trace in references):
            return references
        released: dict[int, Trace] = {}
        for trace in self._read_release()[0].traces[split]:
            released.setdefault(trace.index, trace)
        return [released.get(trace.index, trace) for trace in references]

    def _mix(self) -> Iterator[Trace]:
        self._mixture = training_mixture(self._parts or (), self._num, self._seed)
        numbers = {part.name: number for number, part in enumerate(self._mixture.parts)}
        del self._part_of[:]
        for trace in self._mixture:
            self._part_of.append(numbers[trace.details["source"]])
            yield trace

    def _stored(self, store: str) -> Iterable[Trace]:
        if not store.startswith(RELEASED_PREFIX):
            return stream_traces(
                Path(store),
                self._num,
                allow_empty_chain=self._answers_alone,
                quarantine=self.quarantine,
                unread=self.unread,
                quiet=self._was_read,
            )
        released, which = self._read_release()
        self.unread.update(released.skipped["train"])
        traces = [t for t in released.traces["train"] if not which or t.details["verdict"] == Verdict.CORRECT]
        self.unread[WRONG_ANSWER] += len(released.traces["train"]) - len(traces)
        return traces[: self._num]

    def _read_release(self) -> tuple[Released, str]:
        """The release that the store names, and which of its traces are asked for: "" (all) or "correct"."""
        name, _, which = str(self._store).removeprefix(RELEASED_PREFIX).partition(":")
        if which not in ("", "correct"):
            raise ConfigError(f"data.store is {self._store!r}; expected released:NAME or released:NAME:correct")
        if self._released is None:
            self._released = read_released(name)
        if self._released.task.name != self._task.name:
            told = f"traces of {self._released.task.name}; the task is {self._task.name}"
            raise ConfigError(f"data.store is {self._store!r}, {told}")
        return self._released, which


def store_folders(store: str | None, mixture: Sequence[Mapping[str, Any]] | None) -> tuple[Path, ...]:
    """The folders of trace stores that ``data.store`` or ``data.mixture`` name; a release is none."""
    named = [str(part["store"]) for part in mixture] if mixture else [store] if store else []
    return tuple(Path(name) for name in named if not name.startswith(RELEASED_PREFIX))


def reference_trace(problem: Problem) -> Trace:
    """The task's own solution of a problem, as a trace."""
    return Trace(problem.text, problem.chain, problem.answer, problem.index, details={"origin": "reference"})
