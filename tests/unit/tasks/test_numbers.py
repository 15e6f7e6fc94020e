"""Numbers as people write them: one table of forms, with fixed verdicts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.records import Verdict
from research.tasks.numbers import canonical, parse_number, verify_number

CORRECT, WRONG, UNPARSED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSED

TABLE = [  # gold, answer, verdict
    ("18", "18", CORRECT),
    ("18", "18.0", CORRECT),
    ("18", "18.", CORRECT),
    ("18", "$18", CORRECT),
    ("18", "\\$18.00", CORRECT),
    ("18", "$18$", CORRECT),
    ("18", " 18 dollars ", CORRECT),
    ("18", "18 \\text{ miles per hour}", CORRECT),
    ("18", "\\text{18}", CORRECT),
    ("49", "49^\\circ \\text{F}", CORRECT),
    ("1000", "1,000", CORRECT),
    ("1,000", "1000", CORRECT),
    ("70000", "\\$70,\\!000", CORRECT),
    ("1600", "1{,}600", CORRECT),
    ("-3", "\u22123", CORRECT),
    ("-5", "-$5", CORRECT),
    ("0.5", ".5", CORRECT),
    ("0.5", "1/2", CORRECT),
    ("1/2", "\\frac{1}{2}", CORRECT),
    ("3.5", "3 1/2", CORRECT),
    ("50", "50%", CORRECT),
    (".5", "50%", CORRECT),  # P69
    ("50%", ".5", CORRECT),
    ("50%", "50 percent", CORRECT),
    ("8", "18", WRONG),  # P70
    ("18", "8", WRONG),
    ("18", "180", WRONG),
    ("18", "1.8", WRONG),
    ("18", "17.999999999", WRONG),
    ("18", "18%%", UNPARSED),
    ("0.3333", "1/3", WRONG),
    ("50", "0.5", WRONG),
    ("50%", "0.05", WRONG),
    ("1000", "1,00", UNPARSED),
    ("1000", "1.000,00", UNPARSED),
    ("1000", "1e3", UNPARSED),
    ("5000", "5 thousand", UNPARSED),
    ("5000", "5k", UNPARSED),
    *(
        ("5", f"5 {word}", UNPARSED)
        for word in ("k", "bn", "millions", "dozens", "tenths", "Thousands", "grand", "tens")
    ),
    ("5", "5 twenty-one", UNPARSED),
    ("5", "5 two-litre bottles", CORRECT),
    ("18", "18 is wrong", UNPARSED),
    ("18", "18 incorrect", UNPARSED),
    ("18", "18 but 8", UNPARSED),
    ("18", "18 or 8", UNPARSED),
    ("18", "18 or eight", UNPARSED),
    ("18", "18 8", UNPARSED),
    ("18", "about 18", UNPARSED),
    ("18", "x = 18", CORRECT),
    ("18", "$x = 18$", CORRECT),
    ("18", "x = 8", WRONG),
    ("18", "x = y = 18", UNPARSED),
    ("18", "sum = 18", UNPARSED),
    ("18", "\\boxed{18}", CORRECT),
    ("18", "$\\boxed{18}$", CORRECT),
    ("18", "\\(\\boxed{18}\\)", CORRECT),
    ("18", "\\boxed{x = 18 \\text{ dollars}}", CORRECT),
    ("1234", "The answer is \\boxed{1{,}234}.", CORRECT),
    ("18", "\\boxed{8} no, \\boxed{18}", CORRECT),
    ("18", "\\boxed{18} no, \\boxed{8}", WRONG),
    ("8", "\\boxed{18}", WRONG),
    ("18", "18 \\boxed{}", UNPARSED),
    ("18", "\\boxed{18", UNPARSED),
    ("18", "\\boxed{about 18}", UNPARSED),
    ("18", "the answer is 18", UNPARSED),
    ("18", "not 18", UNPARSED),
    ("18", "18 minus 3", UNPARSED),
    ("18", "--18", UNPARSED),
    ("18", "-$-18", UNPARSED),
    ("18", "\u0661\u0668", UNPARSED),
    ("18", "1/0", UNPARSED),
    ("18", "", UNPARSED),
    ("18", None, UNPARSED),
    ("", "", UNPARSED),  # P66
    ("??", "18", UNPARSED),
    ("??", "??", UNPARSED),
]


@pytest.mark.parametrize(("gold", "answer", "verdict"), TABLE)
def test_p69_the_table_of_forms(gold: str, answer: str | None, verdict: Verdict) -> None:
    assert verify_number(gold, answer) is verdict


@given(st.integers(-(10**12), 10**12), st.integers(1, 400))
def test_canonical_text_reads_back_as_the_same_value(above: int, below: int) -> None:
    value = Fraction(above, below)
    number = parse_number(canonical(value))
    assert number is not None and number.value == value and not number.percent


@pytest.mark.parametrize(
    ("value", "text"),
    [("450/1", "450"), ("-1/2", "-0.5"), ("1/3", "1/3"), ("1/8", "0.125"), ("-7/20", "-0.35"), ("123/100", "1.23")],
)
def test_canonical_by_hand(value: str, text: str) -> None:
    assert canonical(Fraction(value)) == text


@given(st.decimals(min_value=0, max_value=10**9, places=2))
def test_commas_currency_and_zeros_change_nothing(value: object) -> None:
    assert verify_number(str(value), f"${value:,.2f}") is CORRECT
    assert verify_number(str(value), f"{value}00 apples") is CORRECT
