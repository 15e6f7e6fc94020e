"""Equations in free text: which are read, which hold, where their numbers come from."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.tasks.files import read_rows
from research.tasks.statements import report_on, statements_in

READ = [  # text, (expression, claimed, holds) of each statement
    ("7 * 36 is 252. 5 + 3 is 9", [("7 * 36", 252, True), ("5 + 3", 9, False)]),
    ("then he received 10 - (3 + 6) = 1 emails", [("10 - (3 + 6)", 1, True)]),
    ("16 eggs - 7 eggs = 9 eggs", [("16 - 7", 9, True)]),
    ("4 pillow cases + 8 towels = 12 pieces", [("4 + 8", 12, True)]),
    ("He pays 48/2 = $24, so", [("48/2", 24, True)]),
    ("12 divided by 4", []),
    ("5 + 3 = 8 + 2 = 10", [("5 + 3", 8, True), ("8 + 2", 10, True)]),
    ("2 + 2 = 2 * 2", [("2 + 2", 4, True)]),
    ("-3 + 14 = 11", [("-3 + 14", 11, True)]),
    ("he had -12 + 8 = -4", [("-12 + 8", -4, True)]),
    ("10/3 = 3.33", [("10/3", 3.33, True)]),  # rounded to the decimals written
    ("10/3 = 3", [("10/3", 3, False)]),  # but a whole number is not rounded to
    ("20 x 50% = 10", [("20 x 50%", 10, True)]),
    ("1/4 + 1/2 = 3/4", [("1/4 + 1/2", 0.75, True)]),
    ("5 - 1 - 1/2 = 3 1/2", [("5 - 1 - 1/2", 3.5, True)]),
    ("because 20 + (80/2)= 60", [("20 + (80/2)", 60, True)]),
    ("<<48/2=24>>24 and <<24+48=71>>71, 1 + 1 = 3", [("48/2", 24, True), ("24+48", 71, False)]),
    # what only looks like one: unknowns, words within, nothing on a side
    ("2x + 3 = 11", []),
    ("x - 3 + 5 = 9", []),
    ("3r + 5w = 42", []),
    ("(2x + 2) + (x + 2) = 28", []),
    ("4s + 16 = 2(s + 16)", []),
    ("25 classmates + his 1 teacher + 1 = 27", []),
    ("x = 5", []),
    ("5 = 5", []),
    ("In 2010 there were 5", []),
    ("1 + = 3", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "expected"), READ)
def test_what_is_read(text: str, expected: list[tuple[str, float, bool]]) -> None:
    read = [(re.sub(" +", " ", one.expression), float(one.claimed), one.holds) for one in statements_in(text)]
    assert read == expected


def test_numbers_come_from_the_problem_or_from_before() -> None:
    problem = "Tom has 12 eggs and eats three. He buys two dozen."
    chain = "12 - 3 = 9. 9 + 24 = 33. 2 * 12 = 24. 9 + 24 = 33. 33 + 7 = 40."
    assert [one.supported for one in statements_in(chain, problem)] == [True, False, True, True, False]
    strict, loose = report_on(chain, problem, need_support=True), report_on(chain, problem)
    assert (strict.num_valid, strict.first_wrong, strict.valid) == (3, 1, False)
    assert (loose.num_valid, loose.first_wrong, loose.valid) == (5, None, True)


@pytest.mark.parametrize(
    ("chain", "result"),
    [
        ("7 * 36 is 252.", "252"),
        ("5 + 3 = 8. He has 1,200 left", "1,200"),
        ("4 - 16 = -12", "-12"),
        ("none", None),
        ("He pays 5-3 = $2.50 today", "2.50"),
        ("<<5+3=8>>8", "8"),
    ],
)
def test_a_chain_ends_in_its_last_number(chain: str, result: str | None) -> None:
    assert report_on(chain, "").result == result


def test_a_text_without_equations_is_not_valid_and_not_wrong() -> None:
    report = report_on("He simply knows it.", "")
    assert (report.num_steps, report.first_wrong, report.valid, report.result) == (0, None, False, None)


@settings(deadline=None)
@given(st.text(max_size=80) | st.text(alphabet="0123456789+-*/()= .,$%x<>isabo\n", max_size=80))
def test_no_text_makes_it_raise(text: str) -> None:
    report = report_on(text, text)
    assert report.num_valid <= report.num_steps


@pytest.mark.parametrize("text", ["1+" * 30_000 + "1=2", "(" * 30_000, "<<" * 30_000, "1=" * 30_000, "9" * 30_000])
def test_long_text_ends(text: str) -> None:
    assert report_on(text, text).num_steps <= 2000


def test_the_annotations_of_gsm8k_re_evaluate(require_data: Callable[..., Path]) -> None:
    """The whole of it, 27,998 annotations; a chain of people's own words is rarely called wrong."""
    folder = require_data("gsm8k")
    rows = [row for split in ("train", "test") for row in read_rows(folder / f"{split}.jsonl.gz", ("answer",))]
    marked = [statement for row in rows for statement in statements_in(row["answer"])]
    assert sum(row["answer"].count("<<") for row in rows) == 27_998
    assert len(marked) > 27_000 and sum(not one.holds for one in marked) <= 5
    plain = [re.sub("<<.*?>>", "", row["answer"].partition("####")[0]) for row in rows[:1500]]
    wrong = [chain for chain in plain if report_on(chain, "").first_wrong is not None]
    assert len(wrong) < 0.015 * len(plain)
