"""Word problems from files: GSM8K, the GSM8K questions with R1-distilled traces, SVAMP."""

import os
import re
from functools import cached_property
from typing import Literal

from research.errors import ConfigError
from research.records import Problem, Verdict
from research.tasks.base import AbstractTask, StepReport
from research.tasks.expressions import NotArithmetic, evaluate
from research.tasks.files import FromFiles, Hub, Official, Row, official_rows, split_by_text, with_hold_out
from research.tasks.numbers import canonical, parse_number, verify_number
from research.tasks.statements import ANNOTATION, report_on

GSM8K_FILES = {"train": "gsm8k/train.jsonl.gz", "test": "gsm8k/test.jsonl.gz"}
GSM8K_HUB = Hub("openai/gsm8k", "main", {"train": "train", "test": "test"}, lambda row: row)
R1_FILE = {"test": "traces/gsm8k_test_r1distill_qwen7b.jsonl.gz"}
R1_COLUMNS = ("question", "answer", "sample", "rationale", "teacher_correct")
SVAMP_FILES = {"train": "traces/svamp_palm540b_train.jsonl.gz", "test": "traces/svamp_palm540b_test.jsonl.gz"}
SVAMP_DETAILS = ("rationale", "teacher_equation", "teacher_correct")
SVAMP_HUB = Hub(
    "ChilleD/SVAMP",
    None,
    {"train": "train", "test": "test"},
    lambda row: {
        "question": f"{row['Body'].strip()}\n{row['Question'].strip()}",
        "equation": row["Equation"],
        "answer": row["Answer"],
    },
)

DataDir = str | os.PathLike[str] | None


class Gsm8k(FromFiles, AbstractTask):
    """GSM8K: 7,473 / 1,319 grade-school problems with chains written by people.

    Official test; about a tenth of official train, by a hash of the question, is val. Answers are numbers, compared by
    value (:func:`research.tasks.numbers.parse_number`). Steps are the equations that a chain writes, each worked out
    anew: the annotations ``<<48/2=24>>`` where a chain has them, else what stands in the text. A chain whose equations
    all hold can still be the wrong sum. The level is the number of annotated steps.

    data_dir    folder with ``gsm8k/{train,test}.jsonl.gz``; null: RESEARCH_DATA_DIR, else Hugging Face
    keep_marks  leave the annotations in the chains
    """

    name = "gsm8k"
    checks_steps = True
    step_separator = "\n"

    def __init__(self, data_dir: DataDir = None, keep_marks: bool = False) -> None:
        self.data_dir = data_dir
        self.keep_marks = keep_marks

    @cached_property
    def official(self) -> Official:
        """All problems, read at the first need."""
        rows = official_rows(self.data_dir, GSM8K_FILES, ("question", "answer"), GSM8K_HUB)
        return with_hold_out(map(self._problem, rows["train"]), map(self._problem, rows["test"]))

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return verify_number(problem.answer, answer)

    def verify_steps(self, problem: Problem, chain: str) -> StepReport | None:
        return report_on(chain, problem.text)

    def _problem(self, row: Row) -> Problem:
        chain, mark, gold = row["answer"].rpartition("####")
        if not mark:
            raise ConfigError(f"GSM8K, question {row['question'][:60]!r}: its answer has no '####' before the number")
        level = len(ANNOTATION.findall(chain))
        if not self.keep_marks:
            chain = ANNOTATION.sub("", chain)
        return Problem(0, row["question"].strip(), number_text(gold), chain.strip(), level)


class Gsm8kR1(FromFiles, AbstractTask):
    """The 1,319 GSM8K *test* questions that the released R1-distilled traces answer, split anew by question.

    8 tenths train, 1 val, 1 test, by a hash of the question. What was trained here must never be reported on the
    official GSM8K test. There is no reference chain. Answers and steps are judged as in :class:`Gsm8k`.
    """

    name = "gsm8k_r1"
    checks_steps = True
    step_separator = "\n"

    def __init__(self, data_dir: DataDir = None) -> None:
        self.data_dir = data_dir

    @cached_property
    def rows(self) -> list[Row]:
        """Every released trace, several per question."""
        return official_rows(self.data_dir, R1_FILE, R1_COLUMNS, None)["test"]

    @cached_property
    def official(self) -> Official:
        """All questions, once each."""
        gold = {row["question"].strip(): str(row["answer"]) for row in self.rows}
        return split_by_text(Problem(0, question, number_text(answer)) for question, answer in gold.items())

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return verify_number(problem.answer, answer)

    def verify_steps(self, problem: Problem, chain: str) -> StepReport | None:
        return report_on(chain, problem.text)


class Svamp(FromFiles, AbstractTask):
    """SVAMP: 800 / 200 problems of one or two operations, each with its equation.

    Official test; about a tenth of official train, by a hash of the question, is val. The equations of a chain must
    hold and, where ``need_support``, take their numbers from the problem or from an equation before. The level is the
    number of operations. Where the local files hold a teacher's rationale, it stands in ``details`` (rationale,
    teacher_equation, teacher_correct).

    data_dir      folder with ``traces/svamp_palm540b_{train,test}.jsonl.gz``; null: RESEARCH_DATA_DIR, else Hugging
                  Face (another split there, 700 / 300, and no rationales)
    chain         "equation": the reference chain is ``10 * 45 = 450``; "none": there is none
    need_support  whether a number from nowhere makes a step invalid
    """

    name = "svamp"
    checks_steps = True
    step_separator = "\n"

    def __init__(
        self, data_dir: DataDir = None, chain: Literal["equation", "none"] = "equation", need_support: bool = True
    ) -> None:
        if chain not in ("equation", "none"):
            raise ValueError(f"chain={chain!r}: give 'equation' or 'none'")
        self.data_dir = data_dir
        self.chain = chain
        self.need_support = need_support

    @cached_property
    def official(self) -> Official:
        """All problems, read at the first need."""
        rows = official_rows(self.data_dir, SVAMP_FILES, ("question", "equation", "answer"), SVAMP_HUB)
        return with_hold_out(map(self._problem, rows["train"]), map(self._problem, rows["test"]))

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return verify_number(problem.answer, answer)

    def verify_steps(self, problem: Problem, chain: str) -> StepReport | None:
        return report_on(chain, problem.text, self.need_support)

    def _problem(self, row: Row) -> Problem:
        answer, equation = number_text(str(row["answer"])), equation_text(row["equation"])
        details = {name: row[name] for name in SVAMP_DETAILS if name in row}
        chain = f"{equation} = {answer}" if self.chain == "equation" else ""
        level = len(re.findall(r" [-+*/] ", equation))
        return Problem(0, row["question"].strip(), answer, chain, level, details)


def number_text(text: str) -> str:
    """A gold number in its shortest exact form; the text itself where it cannot be read: the verifier says UNPARSED."""
    number = parse_number(text.strip())
    return canonical(number.value) if number is not None and not number.percent else text.strip()


def equation_text(equation: str) -> str:
    """``( 10.0 - ( 6.0 + 3.0 ) )`` as ``10 - (6 + 3)``: the same value, checked; ConfigError where it has none."""
    plain = re.sub(r"\(\s+", "(", re.sub(r"\s+\)", ")", re.sub(r"([0-9])\.0+\b", r"\1", equation.strip())))
    inner = plain[1:-1]
    try:
        value = evaluate(equation)
    except NotArithmetic as error:
        raise ConfigError(f"SVAMP equation {equation!r} cannot be worked out: {error}") from error
    try:
        return inner if plain.startswith("(") and evaluate(inner) == value else plain
    except NotArithmetic:  # the outer brackets are two pairs
        return plain
