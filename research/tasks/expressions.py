"""Sums, products and brackets of numbers, worked out exactly by a parser of our own: text never becomes code."""

import re
from fractions import Fraction

from research.tasks.numbers import DIGITS

LONGEST = 300  # characters
DEEPEST = 20  # brackets and signs within each other
TOKEN = re.compile(rf"\s*(?P<number>{DIGITS}(?:\.[0-9]{{1,60}})?|\.[0-9]{{1,60}})|\s*(?P<sign>//|[-+*/()%])")
SIGNS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00f7": "/", "\u00b7": "*", "x": "*", "X": "*"}
    | dict.fromkeys("$€£")
)


class NotArithmetic(ValueError):
    """Text that is no expression of numbers, ``+ - * / //``, brackets and ``%``, or divides by zero."""


def evaluate(text: str) -> Fraction:
    """The exact value of an expression such as ``10 - (3 + 6)``, ``20 x 50%`` or ``$1,000/4``.

    Raises NotArithmetic for anything else, for a division by zero, and beyond LONGEST characters or DEEPEST brackets.
    """
    if len(text) > LONGEST:
        raise NotArithmetic(f"{len(text)} characters, expected at most {LONGEST}")
    parser = _Parser(_tokens(text.translate(SIGNS)))
    value = parser.sum(0)
    if parser.place < len(parser.tokens):
        raise NotArithmetic(f"{text!r}: {parser.tokens[parser.place]!r} was not expected there")
    return value


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    while text[place:].strip():
        found = TOKEN.match(text, place)
        if not found:
            raise NotArithmetic(f"{text!r}: {text[place:].strip()[0]!r} is no number and none of + - * / ( ) %")
        tokens.append(found["number"] or found["sign"])
        place = found.end()
    return tokens


class _Parser:
    """Recursive descent over a list of tokens; each rule leaves ``place`` after what it has read."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.place = 0

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while (sign := self.next("+", "-")) is not None:
            right = self.product(depth)
            value = value + right if sign == "+" else value - right
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while (sign := self.next("*", "/", "//")) is not None:
            right = self.factor(depth)
            if sign != "*" and right == 0:
                raise NotArithmetic("division by zero")
            value = value * right if sign == "*" else value / right if sign == "/" else Fraction(value // right)
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise NotArithmetic(f"more than {DEEPEST} brackets or signs within each other")
        if (sign := self.next("+", "-")) is not None:
            value = self.factor(depth + 1)
            return -value if sign == "-" else value
        if self.next("(") is not None:
            value = self.sum(depth + 1)
            if self.next(")") is None:
                raise NotArithmetic("a bracket is not closed")
        else:
            value = self.number()
        return value / 100 if self.next("%") is not None else value

    def number(self) -> Fraction:
        token = self.tokens[self.place] if self.place < len(self.tokens) else ""
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise NotArithmetic(f"a number was expected, not {token!r}")
        self.place += 1
        return Fraction(token.replace(",", ""))

    def next(self, *signs: str) -> str | None:
        """The next token where it is one of ``signs``, and past it; None where it is not."""
        if self.place < len(self.tokens) and self.tokens[self.place] in signs:
            self.place += 1
            return self.tokens[self.place - 1]
        return None
