"""Which part of a written answer is graded, and that a reader of whole texts hands that part over."""

import pytest

from research.records import Completion, Problem, Verdict
from research.tasks.answers import boxed, unboxed, unwrapped, value_part
from research.tasks.grading import Grader
from research.tasks.word_problems import Gsm8k
from research.text.templates import Think


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        (r"so \boxed{18}", "18"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{{a}{b}}", "{a}{b}"),
        (r"\boxed {18}", "18"),
        (r"\boxed{}", ""),
        (r"\boxed{18", None),
        (r"\boxed{18} and \boxed{{7}", None),
        (r"\boxed{18} and \boxed 7", None),
        ("18", None),
    ],
)
def test_the_last_box_brackets_balanced(text: str, inner: str | None) -> None:
    assert boxed(text) == inner
    assert unboxed(text) == (text if "boxed" not in text else inner or "")


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("$18$", "18"),
        ("$$18$$", "18"),
        (r"\(x\)", "x"),
        (r"\[x\]", "x"),
        (r"\boxed{x}", "x"),
        (r"$\boxed{x}$.", "x"),
        (r"\boxed{$x$}", "x"),
        (r"\boxed{1} or \boxed{2}", "2"),
        ("$1$ or $2$", "$1$ or $2$"),
        ("$5", "$5"),
    ],
)
def test_wrappings(text: str, inner: str) -> None:
    assert unwrapped(text) == inner


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("x = 18", "18"),
        ("$n=18$.", "18"),
        (r"\boxed{x = 18}", "18"),
        ("x = y = 18", "y = 18"),
        ("xy = 18", "xy = 18"),
        ("18 = x", "18 = x"),
        ("3x = 18", "3x = 18"),
    ],
)
def test_one_leading_letter_is_left_out(text: str, inner: str) -> None:
    assert value_part(text) == inner


@pytest.mark.parametrize(
    ("behind", "verdict"),
    [
        ("Nine and nine make eighteen, 18.\n\n**Answer:** $\\boxed{18}$", Verdict.CORRECT),
        ("First I had \\boxed{8}. It is \\boxed{\\$18.00}.", Verdict.CORRECT),
        ("It is 18, that is \\boxed{8}.", Verdict.WRONG),
        ("It is 18, that is \\boxed{118}.", Verdict.WRONG),
        ("It is \\boxed{18 or 8}.", Verdict.UNPARSED),
        ("It is 18: \\boxed{}", Verdict.UNPARSED),
        ("It is 18: \\boxed{18", Verdict.UNPARSED),
        ("It is 18.", Verdict.UNPARSED),
    ],
)
def test_prose_behind_the_thinking_is_graded_by_its_box(behind: str, verdict: Verdict) -> None:
    problem = Problem(0, "What is 9 + 9?", "18")
    completion = Completion((), f"<think>\nPerhaps \\boxed{{18}}.\n9 + 9 = 18\n</think>\n\n{behind}", "eos")
    assert Grader(Gsm8k(), Think(), "chain_then_answer").grade(problem, completion).verdict is verdict
