"""A student's own right solutions as traces: without help and, for what it failed, with the answer as a hint."""

import string
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from research.errors import ConfigError
from research.evaluation.completions import PromptCodec, readable, write_completions
from research.generation.base import AbstractGenerator
from research.generation.cost import GenerationCost
from research.loops.kept_traces import GENERATED, RATIONALISED, origin
from research.records import Completion, Problem, Sampling, Trace
from research.seeding import seed_for
from research.tasks.grading import Grade, Grader
from research.text.document import Document
from research.text.refusals import Refused
from research.traces.manifest import Tally
from research.traces.rows import StoredTrace
from research.traces.store import StoreWriter, TraceStore

SPARE, HINT_REPEATED = "spare", "hint_repeated"


class TraceCodec(PromptCodec, Protocol):
    """What is needed of ``research.text.codec.Codec``: prompts to write, and whether a trace can be trained on."""

    def encode(self, trace: Trace, /) -> Document: ...


@dataclass(frozen=True)
class Hints:
    """Who is shown the answer, and how.

    probability  with which a problem that was failed is posed again with its answer, drawn apart for every problem and
                 iteration
    format       the problem's text with a hint, such as ``{problem}[{answer}]``; every character of it must be one that
                 the tokenizer knows. None where no hint is ever given

    Raises ConfigError for a probability outside [0, 1], a format without exactly these two fields, or one that adds
    nothing of its own to problem and answer.
    """

    probability: float = 0.0
    format: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"hint_probability is {self.probability}; expected a number from 0 to 1")
        if self.format is None:
            if self.probability > 0:
                raise ConfigError("hint_format is null; hints need one, such as '{problem}[{answer}]'")
            return
        try:
            fields = sorted(name for _, name, _, _ in string.Formatter().parse(self.format) if name is not None)
        except ValueError as error:
            raise ConfigError(f"hint_format is {self.format!r}: {error}") from None
        if fields != ["answer", "problem"]:
            raise ConfigError(f"hint_format is {self.format!r}; expected {{problem}} and {{answer}} in it, once each")
        if not self.format.format(problem="", answer="").strip():
            raise ConfigError(f"hint_format is {self.format!r}; write something around the answer, as in [{{answer}}]")

    def text(self, problem: Problem) -> str:
        """The problem's text with its answer."""
        return str(self.format).format(problem=problem.text, answer=problem.answer)

    def mark(self, problem: Problem) -> str:
        """What the hint adds to the problem's text."""
        return str(self.format).format(problem="", answer=problem.answer).strip()

    def is_given(self, seed: int, problem: Problem) -> bool:
        """The coin of one problem under one iteration's seed."""
        return seed_for(seed, "hint", problem.index) / 2**63 < self.probability


class OwnTraces:
    """Collects a student's right solutions of a fixed list of problems.

    One trace per problem at most: the first right sample that can be trained on. Its text never holds the hint: it is
    written under the problem as it was posed first, and a chain that spells the hint out is dropped. ``grader`` is the
    one of evaluation; an answer key alone decides, whatever the steps.

    sampling        of both tries; its seed is replaced by that of the iteration
    block_problems  problems written, graded and stored at once: a killed collection goes on after the last whole block
    refused         indices of the problems whose gold answer cannot be read: never posed, never rewarded

    Raises ValueError where no problem is left, and where hints are given whose text the codec cannot write.
    """

    def __init__(
        self,
        codec: TraceCodec,
        grader: Grader,
        problems: Sequence[Problem],
        *,
        sampling: Sampling,
        hints: Hints,
        block_problems: int = 1024,
    ) -> None:
        if block_problems < 1:
            raise ConfigError(f"block_problems is {block_problems}; expected at least 1")
        self.codec, self.grader, self.sampling, self.hints = codec, grader, sampling, hints
        self.problems, self.refused = readable(grader, problems)
        self.block_problems = block_problems
        if hints.probability > 0:
            self._check_hints()

    def _check_hints(self) -> None:
        for problem in self.problems:
            try:
                self.codec.prompt_ids(self.hints.text(problem))
            except ValueError as error:
                raise ConfigError(f"hint_format is {self.hints.format!r}, which cannot be written: {error}") from error

    def collect(
        self, generator: AbstractGenerator, folder: Path, settings: Mapping[str, Any], seed: int
    ) -> list[StoredTrace]:
        """Every completion of both tries, kept or not with its reason, from a trace store in ``folder``.

        A store that is complete is read; one that was begun goes on after its last whole block, with the same result.
        Kept rows say in ``details`` their ``origin`` and whether they are ``process_valid`` (None: not checked).
        Raises StoreError where the store was begun with other settings.
        """
        with StoreWriter(folder, settings) as writer:
            if not writer.manifest.complete:
                blocks = self._blocks(self.problems)
                for block in blocks[writer.finished :]:
                    self._write(writer, generator, block, GENERATED, seed)
                kept = {row.trace.index for row in writer.rows() if row.kept and origin(row) == GENERATED}
                failed = [problem for problem in self.problems if problem.index not in kept]
                hinted = self._blocks([problem for problem in failed if self.hints.is_given(seed, problem)])
                for block in hinted[writer.finished - len(blocks) :]:
                    self._write(writer, generator, block, RATIONALISED, seed)
                writer.seal()
        return list(TraceStore(folder).rows())

    def _blocks(self, problems: Sequence[Problem]) -> list[Sequence[Problem]]:
        size = self.block_problems
        return [problems[start : start + size] for start in range(0, len(problems), size)]

    def _write(
        self, writer: StoreWriter, generator: AbstractGenerator, block: Sequence[Problem], of: str, seed: int
    ) -> None:
        started, before = time.perf_counter(), _spent(generator)
        texts = {problem.index: self.hints.text(problem) if of == RATIONALISED else problem.text for problem in block}
        sampling = replace(self.sampling, seed=seed_for(seed, of))
        written = write_completions(generator, self.codec, self.grader.template, texts, sampling)
        rows = [row for problem in block for row in self._rows(problem, written[problem.index], of)]
        tally = Tally(
            problems=len(block) if of == GENERATED else 0,  # a second try is not a second problem
            written=len(rows),
            kept=sum(row.kept for row in rows),
            tokens=sum(row.tokens or 0 for row in rows),
            dropped=dict(Counter(str(row.reason) for row in rows if not row.kept)),
            verdicts=dict(Counter(str(row.verdict) for row in rows)),
        )
        after = _spent(generator)
        cost = None if before is None or after is None else after - before
        costs: dict[str, Any] = {} if cost is None else {"flops": cost.flops, "prefill": cost.prefill()}
        writer.write(rows, tally, time.perf_counter() - started, **costs)

    def _rows(self, problem: Problem, completions: Sequence[Completion], of: str) -> list[StoredTrace]:
        rows: list[StoredTrace] = []
        for sample, completion in enumerate(completions):
            grade = self.grader.grade(problem, completion)
            details = {"origin": of, "process_valid": self._process_valid(grade)}
            trace = Trace(problem.text, grade.chain, grade.answer or "", problem.index, sample, details)
            reason = self._reason(problem, trace, grade, of) if completion.was_asked else completion.stop
            if reason is None and any(row.kept for row in rows):
                reason = SPARE
            tokens = len(completion.ids) or None
            rows.append(
                StoredTrace(
                    trace, completion.text, reason is None, reason, grade.verdict, tokens, logprob=completion.logprob
                )
            )
        return rows

    def _reason(self, problem: Problem, trace: Trace, grade: Grade, of: str) -> str | None:
        """Why a completion is no trace; None where it is one."""
        if not grade.correct:
            return grade.verdict.value
        mark = self.hints.mark(problem) if of == RATIONALISED else ""
        if mark and (mark in trace.chain or mark in trace.answer):
            return HINT_REPEATED
        try:
            self.codec.encode(trace)
        except Refused as error:
            return error.reason
        return None

    def _process_valid(self, grade: Grade) -> bool | None:
        if self.grader.layout == "answer_only" or not self.grader.task.checks_steps or grade.outcome == "unchecked":
            return None
        return grade.process_valid


def _spent(generator: AbstractGenerator) -> GenerationCost | None:
    """What the generator has spent so far; None for one that does not know."""
    spent = getattr(generator, "spent", None)
    return spent if isinstance(spent, GenerationCost) else None
