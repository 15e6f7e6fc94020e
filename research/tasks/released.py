"""Real traces that others released, as traces of our tasks: every row is taken, or counted under a reason."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from research.errors import ConfigError
from research.records import Problem, Trace
from research.tasks.answers import boxed
from research.tasks.base import AbstractTask, Split
from research.tasks.commonsense import CommonsenseQa
from research.tasks.drawing import SPLITS
from research.tasks.expressions import NotArithmetic, evaluate
from research.tasks.grading import grade_parts
from research.tasks.numbers import canonical, parse_number
from research.tasks.word_problems import DataDir, Gsm8kR1, Svamp
from research.text.template import Parsed

THINKING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class Skipped(Exception):
    """A released row that makes no trace; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Released:
    """What a release holds.

    task     the problems that the traces answer: ``trace.index`` is the problem's index in the same split
    traces   per split, in the order of the file. ``details``: origin; teacher_correct, the release's own judgement;
             verdict and outcome, those of our grader; raw_answer, the answer as the teacher wrote it
    skipped  rows that make no trace, by split and reason
    """

    task: AbstractTask
    traces: Mapping[Split, list[Trace]]
    skipped: Mapping[Split, Mapping[str, int]]


Reader = Callable[[DataDir], tuple[AbstractTask, Iterator[tuple[Split, Problem, "_Row"]]]]


@dataclass(frozen=True)
class _Row:
    """One released attempt: how to read it, or raise Skipped; and what the release says of it."""

    read: Callable[[], Parsed]
    raw_answer: str
    teacher_correct: bool
    sample: int = 0


def read_released(name: str, data_dir: DataDir = None) -> Released:
    """The released traces ``name``, one of RELEASED; ConfigError where it is none of them or its files are absent.

    svamp_palm540b   PaLM-540B on SVAMP: the rationale, and the value of the equation that the teacher gave
    cqa_palm540b     PaLM-540B on CommonsenseQA: the rationale, and the teacher's answer as it stands
    gsm8k_r1distill  DeepSeek-R1-Distill-Qwen-7B on the GSM8K test questions, three samples each: what it thought, and
                     the last number in a box behind it
    """
    if name not in _READERS:
        raise ConfigError(f"released traces {name!r}: give one of {', '.join(_READERS)}")
    task, rows = _READERS[name](data_dir)
    traces: dict[Split, list[Trace]] = {split: [] for split in SPLITS}
    skipped: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}
    for split, problem, row in rows:
        try:
            traces[split].append(_trace(name, task, problem, row))
        except Skipped as reason:
            skipped[split][str(reason)] += 1
    return Released(task, traces, {split: dict(counts) for split, counts in skipped.items()})


def _trace(name: str, task: AbstractTask, problem: Problem, row: _Row) -> Trace:
    parsed = row.read()
    if not parsed.chain.strip():
        raise Skipped("empty chain")
    if parsed.answer is None:
        raise Skipped("answer cannot be read")
    grade = grade_parts(task, problem, parsed)
    details = {
        "origin": name,
        "teacher_correct": row.teacher_correct,
        "verdict": grade.verdict.value,
        "outcome": grade.outcome,
        "raw_answer": row.raw_answer,
    }
    return Trace(problem.text, parsed.chain.strip(), parsed.answer, problem.index, row.sample, details)


def _svamp(data_dir: DataDir) -> tuple[AbstractTask, Iterator[tuple[Split, Problem, _Row]]]:
    task = Svamp(data_dir)

    def rows() -> Iterator[tuple[Split, Problem, _Row]]:
        for split, problem in _with_rationale(task):
            equation = problem.details["teacher_equation"]
            rationale = problem.details["rationale"]

            def read(rationale: str = rationale, equation: str = equation) -> Parsed:
                return Parsed(rationale, _value(equation))

            yield split, problem, _Row(read, equation, problem.details["teacher_correct"])

    return task, rows()


def _cqa(data_dir: DataDir) -> tuple[AbstractTask, Iterator[tuple[Split, Problem, _Row]]]:
    task = CommonsenseQa(data_dir)

    def rows() -> Iterator[tuple[Split, Problem, _Row]]:
        for split, problem in _with_rationale(task):
            answer, rationale = problem.details["teacher_answer"], problem.details["rationale"]

            def read(rationale: str = rationale, answer: str = answer) -> Parsed:
                return Parsed(rationale, answer.strip() or None)

            yield split, problem, _Row(read, answer, problem.details["teacher_correct"])

    return task, rows()


def _r1(data_dir: DataDir) -> tuple[AbstractTask, Iterator[tuple[Split, Problem, _Row]]]:
    task = Gsm8kR1(data_dir)

    def rows() -> Iterator[tuple[Split, Problem, _Row]]:
        home = {problem.text: (split, problem) for split in SPLITS for problem in task.problems(split)}
        for row in task.rows:
            split, problem = home[row["question"].strip()]
            written = row["rationale"]

            def read(written: str = written) -> Parsed:
                return _thought(written)

            box = boxed(written.rpartition("</think>")[2])
            yield split, problem, _Row(read, box or "", row["teacher_correct"], row["sample"])

    return task, rows()


_READERS: Mapping[str, Reader] = {"svamp_palm540b": _svamp, "cqa_palm540b": _cqa, "gsm8k_r1distill": _r1}
RELEASED = tuple(_READERS)


def _with_rationale(task: Svamp | CommonsenseQa) -> Iterator[tuple[Split, Problem]]:
    for split in SPLITS:
        for problem in task.problems(split):
            if "rationale" not in problem.details:
                raise ConfigError(f"{task.name}: its rows have no rationale; set task.data_dir to the released files")
            yield split, problem


def _value(equation: str) -> str | None:
    if not equation.strip():
        raise Skipped("no teacher equation")
    try:
        return canonical(evaluate(equation))
    except NotArithmetic:
        raise Skipped("teacher equation has no value") from None


def _thought(written: str) -> Parsed:
    found = THINKING.fullmatch(written)
    if not found:
        raise Skipped("thinking was not closed")
    box = boxed(found[2])
    if box is None:
        raise Skipped("no boxed answer")
    number = parse_number(box)
    if number is None:
        raise Skipped("boxed answer is no number")
    return Parsed(found[1], canonical(number.value))
