"""Arithmetic statements in free text: ``7 * 36 is 252``, ``10 - (3 + 6) = 1``, ``<<48/2=24>>``; which of them hold."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from research.tasks.base import StepReport
from research.tasks.expressions import NotArithmetic, evaluate
from research.tasks.numbers import DIGITS

ANNOTATION = re.compile(r"<<([^<>]*)>>")
PIECE = re.compile(
    rf"(?P<number>[$€£]?(?:{DIGITS}(?:\.[0-9]+)?|\.[0-9]+)%?)(?![0-9])"
    r"|(?P<sign>[-+*/()\u00d7\u00f7\u00b7\u2212\u2013]|(?<=[0-9\s)])[xX](?=[\s0-9$(]))"
    r"|(?P<equals>=|\b(?:is|equals)\b)|(?P<blank>[ \t]+)|(?P<word>[A-Za-z]+)|(?P<other>.)",
    re.DOTALL,
)
NUMBER = re.compile(rf"(?:{DIGITS}(?:\.[0-9]+)?|\.[0-9]+)")
SIGNS = tuple("+-*/(\u00d7\u00f7\u00b7\u2212\u2013")
BINARY = re.compile(r"[0-9)%]\s*[-+*/xX\u00d7\u00f7\u00b7\u2212\u2013]\s*[-(0-9.$€£]")
LEADING = re.compile(rf"\s*\(?[$€£]?(?P<minus>[-\u2212\u2013]?)\s?[$€£]?(?P<number>{NUMBER.pattern})(?P<percent>%?)")
SIGNED = re.compile(rf"(?<![0-9)])-?\$?{DIGITS}(?:\.[0-9]+)?|{NUMBER.pattern}")
MIXED = re.compile(r"(?<![0-9/.,])([0-9]{1,30}) +([0-9]{1,30}/[0-9]{1,30})(?![0-9])")
FRACTION = re.compile(r"[0-9]+/[0-9]+|\([0-9]+\+[0-9]+/[0-9]+\)")
MOST_CHARACTERS = 600  # of an unbroken run, two sides of a statement at most; a longer one is not read
MOST_STATEMENTS = 2000  # in one chain; what stands behind is not read
_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: value for value, word in enumerate(_ONES.split())}
WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
WORDS |= {"dozen": 12, "couple": 2, "pair": 2, "both": 2, "twice": 2, "double": 2, "half": 2, "thrice": 3, "triple": 3}
WORDS |= {
    "third": 3,
    "quarter": 4,
    "hundred": 100,
    "thousand": 1000,
    "once": 1,
    "first": 1,
    "second": 2,
    "percent": 100,
}


@dataclass(frozen=True)
class Statement:
    """One written equation.

    expression  its left side, which has at least one sign of arithmetic
    claimed     the value on its right side, as written
    holds       whether the left side has that value, exactly or rounded to the decimals written (one at least)
    supported   whether every number of the left side comes from the problem or from an earlier statement
    """

    expression: str
    claimed: Fraction
    holds: bool
    supported: bool


def statements_in(chain: str, problem: str = "") -> list[Statement]:
    """The statements of a chain, in order; numbers of ``problem``, in digits or words, count as given.

    Where there are annotations (``<<..=..>>``), they alone are read. Else every unbroken run of numbers, signs and
    ``=``, ``is`` or ``equals`` is: words end it, except units between a number and a sign (``16 eggs - 7 eggs = 9``).
    In ``5 + 3 = 8 + 2 = 10`` each ``=`` is about the number right behind it.
    """
    known = _given(problem) | {Fraction(0)}
    found = []
    for expression, right in _equations(chain):
        statement = _judge(expression, right, known)
        if statement is not None:
            found.append(statement)
            known |= {statement.claimed, abs(statement.claimed)}
        if len(found) == MOST_STATEMENTS:
            break
    return found


def report_on(chain: str, problem: str, need_support: bool = False) -> StepReport:
    """The statements as steps: one is valid where it holds and, where ``need_support``, takes its numbers from before.

    What a free text leaves out cannot be known: ``skipped`` is False. ``result`` is the last number of the chain,
    whether a statement claims it or not.
    """
    statements = statements_in(chain, problem)
    wrong = [number for number, one in enumerate(statements) if not one.holds or (need_support and not one.supported)]
    numbers = SIGNED.findall(ANNOTATION.sub("", chain))
    return StepReport(
        num_steps=len(statements),
        num_valid=len(statements) - len(wrong),
        first_wrong=wrong[0] if wrong else None,
        skipped=False,
        result=numbers[-1].replace("$", "") if numbers else None,
    )


def _given(problem: str) -> set[Fraction]:
    numbers = {Fraction(number.replace(",", "")) for number in NUMBER.findall(problem)}
    words = re.findall(r"[a-z]+", problem.lower())
    return numbers | {Fraction(WORDS[word]) for word in words if word in WORDS}


def _equations(chain: str) -> Iterator[tuple[str, str]]:
    """Pairs of left side and right side, as written."""
    annotations = ANNOTATION.findall(chain)
    for run in annotations if annotations else _runs(chain):
        yield from pairwise(MIXED.sub(r"(\1+\2)", run).split("="))


def _runs(text: str) -> Iterator[str]:
    """Stretches of numbers, signs and equals signs; each equals word is turned into ``=``.

    Up to two words behind a number are a unit, dropped where a sign follows. ``?`` stands where something unread
    belongs to the arithmetic: a letter at a number (``2x``), a word between signs, a sign with nothing before it.
    """
    run, unit = "", 0
    for piece in PIECE.finditer(text):
        if len(run) > MOST_CHARACTERS:
            run = "?"
        kind, written, end = piece.lastgroup, piece[0], run.rstrip()[-1:]
        if kind == "blank":
            run += " "
        elif kind == "word" and unit < 2 and len(written) > 1 and (end.isdigit() or end == "%"):
            unit += 1
        elif kind in ("word", "other"):
            attached = kind == "word" and run[-1:].isdigit()
            yield run + ("?" if attached else "")
            run, unit = "?" if attached or (kind == "word" and end in SIGNS) else "", 0
        elif unit and written != "=" and (kind != "sign" or written == "("):
            yield run
            run, unit = "" if kind == "equals" else written, 0
        else:
            cut_off = kind == "sign" and written != "(" and not end and not _is_minus(text, piece)
            run, unit = run + ("?" if cut_off else "") + ("=" if kind == "equals" else written), 0
    yield run


def _is_minus(text: str, piece: re.Match[str]) -> bool:
    """Whether a sign at the start of a run belongs to the number behind it."""
    before, behind = text[max(0, piece.start() - 1) : piece.start()], text[piece.end() : piece.end() + 1]
    return piece[0] in "-\u2212\u2013" and behind.isdigit() and not (before.isalnum() or before == ")")


def _judge(expression: str, right: str, known: set[Fraction]) -> Statement | None:
    """None where there is no statement: no sign between two numbers, no number behind, or anything unread in it."""
    leading = LEADING.match(right)
    if not leading or "?" in expression or right.startswith("?") or not BINARY.search(expression):
        return None
    value, whole = _value_of(expression), _value_of(right)
    if value is None or right[leading.end() :].lstrip()[:1] in ("?", "("):
        return None
    first = Fraction(leading["number"].replace(",", "")) * (-1 if leading["minus"] else 1)
    decimals = len(leading["number"].partition(".")[2])
    scaled = value * 100 if leading["percent"] else value
    near = decimals > 0 and min(abs(value - first), abs(scaled - first)) <= Fraction(1, 2 * 10**decimals)
    holds = near or value in (first, whole)
    written_whole = whole is not None and (value == whole or FRACTION.fullmatch(right.strip()) is not None)
    claimed = whole if whole is not None and written_whole and not near and value != first else first
    numbers = {Fraction(number.replace(",", "")) for number in NUMBER.findall(expression)}
    return Statement(expression.strip(), claimed, holds, numbers <= known)


def _value_of(text: str) -> Fraction | None:
    try:
        return evaluate(text)
    except NotArithmetic:
        return None
