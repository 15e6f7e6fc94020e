"""The grader: verdicts, the limit of length, and how a chain and an answer go together."""

import itertools

import pytest

from research.records import Completion, Problem, Verdict
from research.tasks.arithmetic import ChainedSums
from research.tasks.base import AbstractTask, Split, StepReport
from research.tasks.grading import OUTCOMES, Grader, grade_parts, outcome_of
from research.text.template import LAYOUTS, AbstractTemplate, Parsed

PROBLEM = Problem(0, "17+32+31-60-06", "14", "49;80;20;14", 5)
EOS = 99


class Hash(AbstractTemplate):
    """``chain#answer``: as little as a template can be."""

    alphabet, step_separator = "#", ";"

    def prompt(self, problem: str) -> str:
        return f"{problem}="

    def completion(self, chain: str, answer: str, layout: str) -> str:
        return f"{chain}#{answer}"

    def parse(self, text: str, layout: str) -> Parsed:
        chain, mark, answer = text.partition("#")
        return Parsed(chain, answer if mark else None)


class Unchecked(AbstractTask):
    """Answers alone."""

    name = "unchecked"

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        return [PROBLEM]

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return Verdict.UNPARSED if answer is None else Verdict.CORRECT if answer == problem.answer else Verdict.WRONG


def grade(text: str, stop: str = "eos", ids: tuple[int, ...] = ()) -> object:
    return Grader(ChainedSums(), Hash(), "chain_then_answer").grade(PROBLEM, Completion(ids, text, stop))


CASES = [  # text, verdict, outcome, whether the chain ends in the answer
    ("49;80;20;14#14", Verdict.CORRECT, "valid_right", True),
    ("49;80;30;14#14", Verdict.CORRECT, "lucky_answer", True),  # two errors that cancel
    ("49;80;20;13#14", Verdict.CORRECT, "lucky_answer", False),
    ("49;20;14#14", Verdict.CORRECT, "lucky_answer", True),  # a step is left out
    ("49;80;20;14#15", Verdict.WRONG, "unused_chain", False),
    ("49;80;30;24#13", Verdict.WRONG, "unused_chain", False),
    ("49;80;30;24#24", Verdict.WRONG, "wrong_step", True),
    ("49;80;30;24", Verdict.UNPARSED, "wrong_step", None),
    ("49;80;20#20", Verdict.WRONG, "skipped_step", True),
    ("49;80", Verdict.UNPARSED, "skipped_step", None),
    ("49;80;20;14", Verdict.UNPARSED, "valid_wrong", None),  # nothing wrong but the missing answer
    ("49;80;20;14#??", Verdict.UNPARSED, "valid_wrong", None),
    ("#14", Verdict.CORRECT, "no_chain", None),
    ("  #15", Verdict.WRONG, "no_chain", None),
    ("", Verdict.UNPARSED, "no_chain", None),
]


@pytest.mark.parametrize(("text", "verdict", "outcome", "agrees"), CASES)
def test_how_chain_and_answer_go_together(text: str, verdict: Verdict, outcome: str, agrees: bool | None) -> None:
    graded = Grader(ChainedSums(), Hash(), "chain_then_answer").grade(PROBLEM, Completion((), text, "eos"))
    assert (graded.verdict, graded.outcome, graded.chain_agrees) == (verdict, outcome, agrees)
    assert graded.correct == (verdict is Verdict.CORRECT) and graded.process_valid == (outcome == "valid_right")


def test_p72_the_end_of_sequence_changes_no_verdict() -> None:
    for text, *_ in CASES:
        assert grade(text, ids=(1, 2, EOS)) == grade(text, ids=(1, 2))


@pytest.mark.parametrize("text", [text for text, *_ in CASES])
def test_p72_truncated_is_what_met_the_limit_whatever_it_says(text: str) -> None:
    graded = Grader(ChainedSums(), Hash(), "chain_then_answer").grade(PROBLEM, Completion((), text, "length"))
    assert graded.verdict is Verdict.TRUNCATED and not graded.correct and not graded.process_valid
    assert graded.outcome not in ("valid_right", "lucky_answer")


def test_outcomes_are_one_of_the_list_for_every_state_of_affairs() -> None:
    reports = [None] + [
        StepReport(num, num - wrong, 0 if wrong else None, skipped, result)
        for num, wrong, skipped, result in itertools.product((0, 1, 2), (0, 1), (True, False), (None, "14"))
        if wrong <= num
    ]
    seen = set()
    for verdict, chain, report, agrees in itertools.product(Verdict, ("", "49"), reports, (None, True, False)):
        outcome = outcome_of(verdict, chain, report, agrees)
        seen.add(outcome)
        right = verdict is Verdict.CORRECT
        assert outcome not in ("valid_right", "lucky_answer") or right
        assert outcome not in ("wrong_step", "skipped_step", "valid_wrong") or not right
        assert outcome != "valid_right" or (report is not None and report.valid)
    assert seen == set(OUTCOMES)


def test_where_steps_are_not_checked_nothing_is_said_of_them() -> None:
    graded = grade_parts(Unchecked(), PROBLEM, Parsed("some chain", "14"))
    assert (graded.verdict, graded.steps, graded.outcome, graded.chain_agrees) == (
        Verdict.CORRECT,
        None,
        "unchecked",
        None,
    )
    assert grade_parts(Unchecked(), PROBLEM, Parsed("", "14")).outcome == "no_chain"


def test_a_layout_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layout='chain': give one of chain_then_answer"):
        Grader(ChainedSums(), Hash(), "chain")
    assert all(Grader(ChainedSums(), Hash(), layout).layout == layout for layout in LAYOUTS)
