"""A ten-item task, a scripted generator and small stores: what the traces room is tested on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from research.generation.base import AbstractGenerator, Prompt, Written
from research.records import Completion, Problem, Sampling, Trace, Verdict
from research.tasks.arithmetic import ChainedSums
from research.tasks.base import AbstractTask, Split, StepReport
from research.text.codec import Codec
from research.text.templates import Plain
from research.text.tokenizer import build_tokenizer
from research.traces.manifest import Tally
from research.traces.rows import StoredTrace
from research.traces.store import store_rows


class TenItems(AbstractTask):
    """``dbl3``: the chain ``3;6``, the answer ``6``; the gold answer of an ``unreadable`` item cannot be read."""

    name = "ten"
    alphabet = "dbl0123456789;?"
    checks_steps = True

    def __init__(self, unreadable: int | None = None) -> None:
        self.unreadable = unreadable

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        golds = ["??" if n == self.unreadable else str(2 * n) for n in range(10)]
        return [Problem(n, f"dbl{n}", gold, f"{n};{2 * n}") for n, gold in enumerate(golds)][:num]

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        if answer is None or not answer.isdigit() or not problem.answer.isdigit():
            return Verdict.UNPARSED
        return Verdict.CORRECT if int(answer) == int(problem.answer) else Verdict.WRONG

    def verify_steps(self, problem: Problem, chain: str) -> StepReport | None:
        steps, right = chain.split(";"), problem.chain.split(";")
        wrong = [place for place, step in enumerate(steps) if place >= len(right) or step != right[place]]
        first = wrong[0] if wrong else None
        return StepReport(len(steps), len(steps) - len(wrong), first, len(steps) < len(right), steps[-1])


class Scripted(AbstractGenerator):
    """Writes what ``script(prompt, sample)`` says, the last prompt first; ``asked`` keeps every index asked for."""

    def __init__(self, script: Callable[[Prompt, int], str], stop_after: int | None = None) -> None:
        self.script, self.stop_after = script, stop_after
        self.asked: list[int] = []
        self.identity: dict[str, Any] = {"kind": "scripted"}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Written]:
        for prompt in reversed(prompts):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise ConnectionError("the server is gone")
            self.asked.append(prompt.index)
            texts = [self.script(prompt, sample) for sample in range(sampling.num_samples)]
            yield Written(prompt.index, tuple(self.completion(text) for text in texts))

    def completion(self, text: str) -> Completion:
        cut = text.endswith("...")
        text = text.removesuffix("...")
        return Completion(tuple(range(len(text) + 1)), text, "length" if cut else "eos", -0.5 * len(text))


@pytest.fixture
def ten() -> TenItems:
    return TenItems()


@pytest.fixture
def ten_but_7() -> TenItems:
    return TenItems(unreadable=7)


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture(scope="session")
def sums() -> ChainedSums:
    return ChainedSums()


@pytest.fixture(scope="session")
def sums_codec(sums: ChainedSums) -> Codec:
    tokenizer = build_tokenizer("characters", alphabet=str(sums.alphabet) + Plain.alphabet)
    return Codec(tokenizer, Plain(), max_tokens=128)


def rows_of(texts: Sequence[str], dropped: Mapping[int, str] | None = None) -> list[StoredTrace]:
    """One row for each text, its number in ``dropped`` giving the reason."""
    reasons = dropped or {}
    return [
        StoredTrace(
            Trace(f"p{number}", text, f"a{number}", number, number % 3, {"n": number}),
            f"{text}#a{number}",
            number not in reasons,
            reasons.get(number),
            Verdict.WRONG if number in reasons else Verdict.CORRECT,
            len(text),
            -0.25 * number,
        )
        for number, text in enumerate(texts)
    ]


def tally_of(rows: Sequence[StoredTrace]) -> Tally:
    dropped: dict[str, int] = {}
    for row in rows:
        if row.reason:
            dropped[row.reason] = dropped.get(row.reason, 0) + 1
    return Tally(written=len(rows), kept=sum(row.kept for row in rows), dropped=dropped)


@pytest.fixture
def make_rows() -> Callable[..., list[StoredTrace]]:
    return rows_of


@pytest.fixture
def make_store() -> Callable[..., Path]:
    """`make_store(folder, rows, block=4)`: a finished store of these rows."""

    def make(folder: Path, rows: Sequence[StoredTrace], block: int = 4, **settings: Any) -> Path:
        blocks = [rows[start : start + block] for start in range(0, len(rows), block)]
        store_rows(folder, {"made": "here", **settings}, [(block, tally_of(block)) for block in blocks])
        return folder

    return make


@pytest.fixture
def count() -> Callable[[Sequence[StoredTrace]], Tally]:
    return tally_of
