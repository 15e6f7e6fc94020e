"""The real problem sets: counts, forms, what a verifier says of them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from research.errors import ConfigError
from research.records import Problem, Verdict
from research.tasks.commonsense import CommonsenseQa
from research.tasks.drawing import SPLITS
from research.tasks.word_problems import Gsm8k, Gsm8kR1, Svamp, equation_text, number_text


def sizes(task: Gsm8k | Gsm8kR1 | Svamp | CommonsenseQa) -> dict[str, int]:
    return {split: len(task.problems(split)) for split in SPLITS}


def test_gsm8k(require_data: Callable[..., Path]) -> None:
    require_data("gsm8k")
    task = Gsm8k()
    assert sizes(task) == {"train": 6696, "val": 777, "test": 1319} and task.official.dropped == {}
    problem = task.problems("test", 1)[0]
    assert problem.text.startswith("Janet") and problem.answer == "18" and problem.level == 2
    assert problem.chain.startswith("Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 2 = $18")
    report = task.verify_steps(problem, problem.chain)
    assert report is not None and report.valid and (report.num_steps, report.result) == (2, "18")
    report = task.verify_steps(problem, problem.chain.replace("= 9 duck", "= 8 duck"))
    assert report is not None and report.first_wrong == 0
    assert all(problem.answer.lstrip("-").isdigit() for split in SPLITS for problem in task.problems(split))


def test_gsm8k_r1_is_split_by_question(require_data: Callable[..., Path]) -> None:
    require_data("traces")
    task = Gsm8kR1()
    assert sizes(task) == {"train": 1069, "val": 126, "test": 124}
    official = {problem.text for problem in Gsm8k().problems("test")}
    assert {problem.text for split in SPLITS for problem in task.problems(split)} == official


def test_svamp(require_data: Callable[..., Path]) -> None:
    require_data("traces")
    task = Svamp()
    assert sizes(task) == {"train": 731, "val": 69, "test": 200}
    problem = task.problems("test", 2)[1]
    assert (problem.answer, problem.chain, problem.level) == ("1", "10 - (6 + 3) = 1", 2)
    assert problem.details["teacher_correct"] is True and "emails" in problem.details["rationale"]
    everything = [problem for split in SPLITS for problem in task.problems(split)]
    assert all(task.verify(problem, problem.answer) is Verdict.CORRECT for problem in everything)
    told = [task.verify_steps(problem, problem.chain) for problem in everything]
    # one equation uses a number that its question no longer holds, one is a number alone
    assert Counter(report.valid for report in told if report) == {True: 998, False: 2}
    foreign = problem.chain.replace("6", "7").replace("= 1", "= 0")
    assert not task.verify_steps(problem, foreign).valid  # type: ignore[union-attr]
    assert Svamp(need_support=False).verify_steps(problem, foreign).valid  # type: ignore[union-attr]
    assert Svamp(chain="none").problems("test", 1)[0].chain == ""


def test_commonsense_qa(require_data: Callable[..., Path]) -> None:
    require_data("traces")
    task = CommonsenseQa()
    assert sizes(task) == {"train": 8782, "val": 959, "test": 1221}
    problem = task.problems("test", 1)[0]
    assert problem.text.splitlines()[1:] == [
        "(a) british columbia",
        "(b) body of water",
        "(c) wooded area",
        "(d) pay debts",
        "(e) zoo",
    ]
    assert problem.answer == "wooded area" and task.verify_steps(problem, "any") is None


CHOICE = Problem(0, "Where?", "wooded area", details={"choices": ["zoo", "body of water", "wooded area", "area"]})


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("wooded area", Verdict.CORRECT),
        ("  Wooded   Area. ", Verdict.CORRECT),
        ("(c) wooded area", Verdict.CORRECT),
        ("(b) wooded area", Verdict.UNPARSED),  # label and text contradict each other
        ("zoo", Verdict.WRONG),
        ("(a) zoo", Verdict.WRONG),
        ("area", Verdict.WRONG),  # P70: contained
        ("wooded", Verdict.UNPARSED),
        ("the wooded area", Verdict.UNPARSED),
        ("zoo or (c) wooded area", Verdict.UNPARSED),
        ("c", Verdict.UNPARSED),
        ("", Verdict.UNPARSED),
        (None, Verdict.UNPARSED),
    ],
)
def test_p70_a_choice_is_a_whole_choice(answer: str | None, verdict: Verdict) -> None:
    assert CommonsenseQa().verify(CHOICE, answer) is verdict


def test_p66_a_gold_answer_that_is_no_choice_is_unparsed() -> None:
    assert CommonsenseQa().verify(Problem(0, "Where?", "sky", details=CHOICE.details), "sky") is Verdict.UNPARSED


@pytest.mark.parametrize(
    ("equation", "text"),
    [
        ("( 10.0 * 45.0 )", "10 * 45"),
        ("( 10.0 - ( 6.0 + 3.0 ) )", "10 - (6 + 3)"),
        ("( ( 17.0 + 15.0 ) + 2.0 )", "(17 + 15) + 2"),
        ("( 1.5 + 2.0 )", "1.5 + 2"),
        ("8.0", "8"),
        ("(1 + 2) * (3 + 4)", "(1 + 2) * (3 + 4)"),
    ],
)
def test_equations_are_shortened_without_changing_their_value(equation: str, text: str) -> None:
    assert equation_text(equation) == text


def test_an_equation_without_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'some - 8' cannot be worked out"):
        equation_text("some - 8")


@pytest.mark.parametrize(
    ("text", "number"), [("1,000", "1000"), (" 18.0", "18"), ("42.50", "42.5"), ("50%", "50%"), ("??", "??")]
)
def test_gold_numbers_in_their_shortest_form(text: str, number: str) -> None:
    assert number_text(text) == number


def test_svamp_takes_two_kinds_of_chain() -> None:
    with pytest.raises(ValueError, match="give 'equation' or 'none'"):
        Svamp(chain="all")  # type: ignore[arg-type]
