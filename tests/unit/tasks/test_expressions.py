"""The arithmetic parser against Python's own arithmetic, and what it refuses."""

import ast
import contextlib
import operator
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.tasks.expressions import NotArithmetic, evaluate

OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def by_syntax_tree(node: ast.expr) -> Fraction:
    """Python's grammar and exact fractions: precedence and brackets by another parser."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](by_syntax_tree(node.left), by_syntax_tree(node.right))
    if isinstance(node, ast.UnaryOp):
        return -by_syntax_tree(node.operand)
    assert isinstance(node, ast.Constant)
    return Fraction(str(node.value))


EXPRESSIONS = st.recursive(
    st.integers(1, 99).map(str) | st.decimals(1, 9, places=2).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"{parts[0]} {parts[1]} {parts[2]}")
        | inner.map(lambda text: f"({text})")
        | inner.map(lambda text: f"-({text})")
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_values_are_those_of_pythons_grammar(text: str) -> None:
    try:
        expected = by_syntax_tree(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(NotArithmetic, match="zero"):
            evaluate(text)
        return
    assert evaluate(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( 10.0 - ( 6.0 + 3.0 ) )", 1),
        ("20 x 50%", 10),
        ("3 \u00d7 4 \u00f7 6", 2),
        ("$1,000/4", 250),
        (".5*10", 5),
        ("560//10", 56),
        ("7//2", 3),
        ("2 - -3", 5),
        ("10 \u2212 4", 6),
        ("8/2/2", 2),
        ("(1+1)%", Fraction(1, 50)),
    ],
)
def test_values_by_hand(text: str, value: object) -> None:
    assert evaluate(text) == value


REFUSED = (
    "__import__('os')",
    "1e3",
    "1_000",
    "1,00",
    "1;2",
    "7 = 7",
    "(" * 30 + "1" + ")" * 30,
    "-" * 30 + "1",
    "1" * 301,
)


@pytest.mark.parametrize(
    "text",
    (*"+()", "", "  ", "1 +", "1 2", "(1", "1)", "()", "1/0", "1/(2-2)", "2**3", "2^3", "some - 8", "25 + x", *REFUSED),
)
def test_p73_anything_else_is_refused(text: str) -> None:
    with pytest.raises(NotArithmetic):
        evaluate(text)


@given(st.text(max_size=40))
def test_no_text_does_anything_but_give_a_value_or_be_refused(text: str) -> None:
    with contextlib.suppress(NotArithmetic):
        assert isinstance(evaluate(text), Fraction)
