"""Traces that others released as a source: graded anew by the task's own verifier and step verifier."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from research.records import Problem, Trace
from research.tasks.base import Split
from research.tasks.grading import grade_parts
from research.tasks.released import Released
from research.text.template import Parsed
from research.traces.candidates import Candidate
from research.traces.journal import Cost, Journal
from research.traces.sources import AbstractSource, Block, Watch


class ReleasedSource(AbstractSource):
    """The traces of a release, see ``research.tasks.released``; rows that make no trace count as quarantined.

    splits   whose traces are given, one split after the other
    problems of those splits, in the same order
    """

    def __init__(self, released: Released, splits: Sequence[Split], *, block_rows: int = 1024) -> None:
        self._task, self._block_rows = released.task, block_rows
        self.problems: list[Problem] = []
        self._rows: list[tuple[Problem, Trace]] = []
        self._first: set[int] = set()  # rows that are the first of their problem
        self._skipped: Counter[str] = Counter()
        for split in splits:
            problems = released.task.problems(split)
            firsts = {trace.index: row for row, trace in reversed([*enumerate(released.traces[split])])}
            self._first |= {len(self._rows) + row for row in firsts.values()}
            self._rows += [(problems[trace.index], trace) for trace in released.traces[split]]
            self._skipped.update({reason.replace(" ", "_"): n for reason, n in released.skipped[split].items()})
            self.problems += problems
        self.total = len(self._rows)
        self.gives = frozenset({"verdict", *({"steps"} if released.task.checks_steps else ())})

    def blocks(self, start: int, journal: Journal, watch: Watch) -> Iterator[Block]:
        for number, first in enumerate(range(0, len(self._rows), self._block_rows)):
            if number < start:
                continue
            started = time.perf_counter()
            rows = self._rows[first : first + self._block_rows]
            candidates = [self._candidate(problem, trace) for problem, trace in rows]
            watch.advance(len(rows), 0)
            skipped = self._skipped if number == 0 else Counter[str]()
            problems = sum(row in self._first for row in range(first, first + len(rows)))
            yield Block(candidates, problems, Cost(seconds=time.perf_counter() - started), skipped)

    def _candidate(self, problem: Problem, trace: Trace) -> Candidate:
        grade = grade_parts(self._task, problem, Parsed(trace.chain, trace.answer))
        details = {**trace.details, "gold": problem.answer, "outcome": grade.outcome}
        if grade.steps is not None:
            details["steps"] = asdict(grade.steps)
        text = f"{trace.chain}\n\n{trace.answer}"
        return Candidate(replace(trace, details=details), text, grade.verdict, grade.steps)
