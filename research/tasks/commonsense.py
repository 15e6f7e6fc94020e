"""CommonsenseQA: a question with five choices, where a chain is no serial computation."""

import re
from functools import cached_property

from research.records import Problem, Verdict
from research.tasks.base import AbstractTask
from research.tasks.files import FromFiles, Hub, Official, Row, official_rows, with_hold_out
from research.tasks.word_problems import DataDir

FILES = {"train": "traces/cqa_palm540b_train.jsonl.gz", "test": "traces/cqa_palm540b_test.jsonl.gz"}
DETAILS = ("id", "rationale", "teacher_answer", "teacher_correct")
LABELLED = re.compile(r"\(([a-e])\) (.*)", re.DOTALL)


def _from_hub(row: Row) -> Row:
    choices = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return {"question": row["question"], "choices": list(choices.values()), "answer": choices[row["answerKey"]]}


HUB = Hub("tau/commonsense_qa", None, {"train": "train", "test": "validation"}, _from_hub)


class CommonsenseQa(FromFiles, AbstractTask):
    """CommonsenseQA, 9,741 / 1,221: the question, then its choices as ``(a) ..``, one per line; the answer is the
    text of a choice.

    Test is the official development set, whose answers are public; about a tenth of official train, by a hash of the
    text, is val. An answer is right where it is exactly the right choice, up to case, blanks, a full stop at the end
    and its own label before it; what is none of the choices ("ocean or (b) sea", "b") is UNPARSED. Steps cannot be
    checked. ``details``: choices and, in the local files, a teacher's rationale, teacher_answer and teacher_correct.

    data_dir  folder with ``traces/cqa_palm540b_{train,test}.jsonl.gz``; null: RESEARCH_DATA_DIR, else Hugging Face
    """

    name = "commonsense_qa"
    chance = 0.2
    step_separator = ". "

    def __init__(self, data_dir: DataDir = None) -> None:
        self.data_dir = data_dir

    @cached_property
    def official(self) -> Official:
        """All problems, read at the first need."""
        rows = official_rows(self.data_dir, FILES, ("question", "choices", "answer"), HUB)
        return with_hold_out(map(_problem, rows["train"]), map(_problem, rows["test"]))

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        choices = [_normalised(choice) for choice in problem.details.get("choices", ())]
        gold, given = _normalised(problem.answer), "" if answer is None else _choice(answer, choices)
        if gold not in choices or given not in choices:
            return Verdict.UNPARSED
        return Verdict.CORRECT if given == gold else Verdict.WRONG


def _problem(row: Row) -> Problem:
    lines = [
        row["question"].strip(),
        *(f"({label}) {text}" for label, text in zip("abcde", row["choices"], strict=False)),
    ]
    details = {"choices": list(row["choices"])} | {name: row[name] for name in DETAILS if name in row}
    return Problem(0, "\n".join(lines), row["answer"], details=details)


def _normalised(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def _choice(answer: str, choices: list[str]) -> str:
    """The answer without the label before it, where that is the label of this very choice."""
    given = _normalised(answer)
    found = LABELLED.fullmatch(given)
    if found and given not in choices:
        place = "abcde".index(found[1])
        return found[2] if place < len(choices) and choices[place] == found[2] else ""
    return given
