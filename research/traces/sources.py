"""Where candidates come from: a teacher that writes, the task's own solutions, or a file."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

from research.errors import ConfigError
from research.generation.base import AbstractGenerator, Prompt, Written
from research.records import Problem, Sampling, Trace, Verdict
from research.tasks.grading import Grader
from research.text.codec import Codec
from research.text.refusals import Refused, refuse_overlong
from research.traces.candidates import Candidate
from research.traces.corruptions import Corruption
from research.traces.files import FILES
from research.traces.importing import TraceImport
from research.traces.journal import Cost, Journal
from research.traces.reader import Reader, about, count_tokens

GOLD_UNREADABLE = "gold_unreadable"


class Watch(Protocol):
    """Told how far a run is, for a progress bar."""

    def advance(self, problems: int, tokens: int) -> None:
        """So many more problems were answered, with so many tokens."""

    def judged(self, written: int, kept: int) -> None:
        """So many more traces went through the filters, so many of them were kept."""


class Unwatched:
    """A run that nobody looks at."""

    def advance(self, problems: int, tokens: int) -> None:
        pass

    def judged(self, written: int, kept: int) -> None:
        pass


@dataclass
class Block:
    """What becomes one shard: candidates in order of (problem, sample), and what they cost.

    quarantined  rows of a file that were no traces, by reason
    """

    candidates: list[Candidate]
    problems: int = 0
    cost: Cost = field(default_factory=Cost)
    quarantined: Counter[str] = field(default_factory=Counter)


class AbstractSource(ABC):
    """Gives candidates block by block. Subclasses are final.

    gives       what its candidates have: "verdict", "steps", "tokens"
    total       problems (rows of a file) in all; None where it is not known before the end
    """

    gives: frozenset[str]
    total: int | None

    @abstractmethod
    def blocks(self, start: int, journal: Journal, watch: Watch) -> Iterator[Block]:
        """The blocks from number ``start`` on, the same ones every time, each complete."""


class TeacherSource(AbstractSource):
    """A generator asked for ``sampling.num_samples`` completions of each problem, read and graded.

    problems        in order of their index, each once
    generator       in this process or behind a server
    grader          reads and judges the completions
    codec           the teacher's own tokenizer and template; None for a server that is sent text and counts for itself
    sampling        how completions are drawn
    corruption      an error channel between the teacher and everybody else; None: none
    block_problems  problems of one shard

    Prompts have no template where the server's chat endpoint writes its own. A problem that the codec cannot write, or
    whose prompt leaves the generator no room for an answer, is one candidate without text, barred by the reason. So is
    one whose own answer cannot be read (``gold_unreadable``): nobody is paid to answer it.

    Raises ValueError where the generator gives completions of a problem twice, not at all, or another number than asked
    for.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        generator: AbstractGenerator,
        grader: Grader,
        sampling: Sampling,
        *,
        codec: Codec | None = None,
        corruption: Corruption | None = None,
        block_problems: int = 256,
    ) -> None:
        self.problems, self.generator, self.sampling = problems, generator, sampling
        self.total = len(problems)
        self._block_problems = block_problems
        self._codec, self._reader = codec, Reader(grader, codec, corruption)
        counts = {"tokens"} if codec is not None else set()
        self.gives = frozenset({"verdict", *counts, *({"steps"} if grader.task.checks_steps else ())})

    def blocks(self, start: int, journal: Journal, watch: Watch) -> Iterator[Block]:
        watch.advance(min(start * self._block_problems, len(self.problems)), 0)
        for number, problems in enumerate(_batched(self.problems, self._block_problems)):
            if number >= start:
                yield self._block(number, problems, journal, watch)

    def _block(self, number: int, problems: Sequence[Problem], journal: Journal, watch: Watch) -> Block:
        found, cost = journal.open(number)
        barred: dict[int, Candidate] = {}
        prompts = []
        for problem in problems:
            prompt = self._prompt(problem)
            if isinstance(prompt, Candidate):
                barred[problem.index] = prompt
            elif problem.index not in found:
                prompts.append(prompt)
        watch.advance(len(found) + len(barred), 0)
        for written, further in self._written(prompts):
            journal.append(written, further)
            cost += further
            found[written.index] = written
            watch.advance(1, int(further.tokens or 0))
        started = time.perf_counter()
        candidates = []
        for problem in problems:
            if problem.index in barred:
                candidates.append(barred[problem.index])
                continue
            completions = enumerate(found[problem.index].completions)
            candidates += [self._reader.written(problem, completion, sample) for sample, completion in completions]
        cost += Cost(seconds=time.perf_counter() - started)
        return Block(candidates, len(problems), cost)

    def _prompt(self, problem: Problem) -> Prompt | Candidate:
        if not self._reader.grader.task.is_readable(problem):
            trace = Trace(problem.text, "", "", problem.index, details=about(problem, "teacher"))
            return Candidate(trace, "", barred=GOLD_UNREADABLE)
        bare = self.generator.identity.get("endpoint") == "chat"
        text = problem.text if bare else self._reader.grader.template.prompt(problem.text)
        try:
            ids = () if self._codec is None or bare else tuple(self._codec.prompt_ids(problem.text))
            refuse_overlong(f"problem {problem.index}", len(ids), self.generator.longest_prompt)
        except Refused as error:
            trace = Trace(problem.text, "", "", problem.index, details=about(problem, "teacher"))
            return Candidate(trace, "", barred=error.reason)
        return Prompt(problem.index, text, ids)

    def _written(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Written, Cost]]:
        """Each prompt's completions with the cost since the one before."""
        asked = {prompt.index for prompt in prompts}
        if not prompts:
            return
        before, started = self._spent(), time.perf_counter()
        for written in self.generator.generate(prompts, self.sampling):
            if written.index not in asked:
                raise ValueError(f"the generator gave problem {written.index}, which was not asked for or came before")
            if len(written.completions) != self.sampling.num_samples:
                raise ValueError(
                    f"the generator gave {len(written.completions)} completions of problem {written.index}; "
                    f"expected {self.sampling.num_samples}"
                )
            asked.discard(written.index)
            now, clock = self._spent(), time.perf_counter()
            tokens, flops = (None if None in pair else pair[1] - pair[0] for pair in zip(before, now, strict=True))
            yield written, Cost(tokens, flops, clock - started)
            before, started = now, clock
        if asked:
            raise ValueError(f"the generator ended without {len(asked)} of {len(prompts)} problems, {min(asked)} first")

    def _spent(self) -> tuple[Any, Any]:
        """Tokens and FLOPs of the generator so far; None where it does not count them."""
        spent = getattr(self.generator, "spent", None)
        return getattr(spent, "tokens", None), getattr(spent, "flops", None)


class ReferenceSource(AbstractSource):
    """The task's own solutions as traces: the control without any teacher, and what error channels are studied on.

    corruption  spoils a share of them; each is then read and graded as if a teacher had written it
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        grader: Grader,
        *,
        codec: Codec | None = None,
        corruption: Corruption | None = None,
        block_problems: int = 1024,
    ) -> None:
        self.problems, self.total = problems, len(problems)
        self._block_problems = block_problems
        self._reader = Reader(grader, codec, corruption)
        counts = {"tokens"} if codec is not None else set()
        self.gives = frozenset({"verdict", *counts, *({"steps"} if grader.task.checks_steps else ())})

    def blocks(self, start: int, journal: Journal, watch: Watch) -> Iterator[Block]:
        watch.advance(min(start * self._block_problems, len(self.problems)), 0)
        for number, problems in enumerate(_batched(self.problems, self._block_problems)):
            if number < start:
                continue
            started = time.perf_counter()
            candidates = [self._reader.reference(problem) for problem in problems]
            watch.advance(len(problems), sum(candidate.tokens or 0 for candidate in candidates))
            yield Block(candidates, len(problems), Cost(seconds=time.perf_counter() - started))


class FileSource(AbstractSource):
    """The rows of a file; a verdict where every row brings one is taken at its word.

    Whether rows have verdicts is read off the first good one; a later row without counts as not verified. Raises
    ConfigError where no row is a trace.
    """

    total = None

    def __init__(self, rows: TraceImport, *, codec: Codec | None = None, block_rows: int = 4096) -> None:
        self._rows, self._codec, self._block_rows = rows, codec, block_rows
        first = next(iter(rows), None)
        if first is None:
            raise ConfigError(_nothing(rows))
        verdict = {"verdict"} if "verdict" in first.details else set()
        self.gives = frozenset({*verdict, *({"tokens"} if codec is not None else ())})

    def blocks(self, start: int, journal: Journal, watch: Watch) -> Iterator[Block]:
        rows, number, before = iter(self._rows), 0, Counter[str]()
        while True:
            started = time.perf_counter()
            traces = list(islice(rows, self._block_rows))
            aside = Counter(self._rows.report.quarantined)
            new, before = aside - before, aside
            if not traces and not new:
                return
            if number >= start:
                candidates = [self._candidate(trace) for trace in traces]
                tokens = sum(candidate.tokens or 0 for candidate in candidates)
                yield Block(candidates, 0, Cost(seconds=time.perf_counter() - started), new)
                watch.advance(len(traces), tokens)
            number += 1

    def _candidate(self, trace: Trace) -> Candidate:
        verdict = trace.details.get("verdict")
        text = f"{trace.chain}\n\n{trace.answer}" if trace.chain else trace.answer
        trace = replace(trace, details={**trace.details, "origin": "file"})
        candidate = Candidate(trace, text, None if verdict is None else Verdict(verdict))
        count_tokens(candidate, self._codec)
        return candidate


def _nothing(rows: TraceImport) -> str:
    """What is told of a file without any trace."""
    report = rows.report
    told = ", ".join(f"{count} {reason}" for reason, count in report.quarantined.most_common())
    alone = "; data.allow_empty_chain=true takes rows with an answer alone" if report.quarantined["empty_chain"] else ""
    listed = f", which {rows.quarantine} lists" if rows.quarantine is not None and told else ""
    return (
        f"none of the {report.rows} rows of {rows.path} is a trace ({told or 'the file is empty'}{listed}{alone}); "
        f"expected {', '.join(FILES)} with problem, chain and answer in each row"
    )


def _batched(problems: Sequence[Problem], size: int) -> Iterable[Sequence[Problem]]:
    return (problems[start : start + size] for start in range(0, len(problems), size))
