"""Chained sums: terms joined by + and -, solved by running totals, every step checkable."""

import re
from dataclasses import dataclass
from itertools import pairwise

from research.records import Problem, Verdict
from research.tasks.base import AbstractTask, Split, StepReport
from research.tasks.drawing import check_request, problems_of, take
from research.tasks.steps import STEP_SEPARATOR, WHOLE, split_steps, verify_written, walk

TERM = re.compile(r"[+-]?[0-9]+")


class ChainedSums(AbstractTask):
    """``17+32+31-60-06``: the totals after each term, ``49;80;20;14``, and the last of them, ``14``.

    The totals are independent and uniform in 0..highest, the first of them being the first term; the terms are their
    differences. So every problem is equally likely, the answer is uniform, and the best constant guess is right with
    probability 1 / (highest + 1). Numbers are zero-padded to the digits of ``highest``. Answers and totals are compared
    as they are written: ``7`` is not ``07``.

    num_terms  numbers in a problem: its level
    highest    greatest term and total
    verbose    each step shows its columns, units first, before the total: ``0-7-0>3,1 8-6-1>1,0 13`` is 80-67: digit,
               digit, carry (borrow) from the right, then the digit that comes out and the carry to the left. Such
               columns are checked in chains of either kind; only where ``verbose`` are they needed

    A problem's ``details``: ``carries``, how many columns of its steps carry or borrow.
    """

    checks_steps = True
    step_separator = STEP_SEPARATOR

    def __init__(self, num_terms: int = 5, highest: int = 99, verbose: bool = False) -> None:
        if num_terms < 2:
            raise ValueError(f"num_terms={num_terms!r}: give at least 2, the numbers of a sum")
        if highest < 1:
            raise ValueError(f"highest={highest!r}: give at least 1, the greatest total")
        self.num_terms = num_terms
        self.highest = highest
        self.verbose = verbose
        self.width = len(str(highest))
        self.name = f"sum{num_terms}" + (f"_to_{highest}" if highest != 99 else "") + ("_verbose" if verbose else "")
        self.alphabet = "0123456789+-" + STEP_SEPARATOR + (" >," if verbose else "")
        self.chance = 1 / (highest + 1)

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        check_request(self.name, split, num, needed=True)
        stream = f"chained_sums/{self.num_terms}/{self.highest}"
        space = (self.highest + 1) ** self.num_terms
        return take(problems_of(space, self._problem, split, seed, stream), self.name, split, num or 0)

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return verify_written(problem.answer, answer)

    def verify_steps(self, problem: Problem, chain: str) -> StepReport | None:
        terms = tuple(int(term) for term in TERM.findall(problem.text))
        steps = split_steps(chain)
        last = steps[-1].split(" ")[-1] if steps else ""
        partial = self.verbose and any(" " not in step for step in steps)
        result = last if WHOLE.fullmatch(last) else None
        return walk(steps, len(terms) - 1, terms[0], _Totals(terms[1:], self.width), result, partial)

    def _problem(self, number: int) -> Problem:
        totals = []
        for _ in range(self.num_terms):
            number, total = divmod(number, self.highest + 1)
            totals.append(total)
        width, pairs = self.width, list(pairwise(totals))
        text = f"{totals[0]:0{width}d}" + "".join(
            f"{'+' if after >= before else '-'}{abs(after - before):0{width}d}" for before, after in pairs
        )
        written = [f"{total:0{width}d}" for total in totals[1:]]
        if self.verbose:
            written = [
                f"{columns_of(before, after - before, width)} {total}"
                for (before, after), total in zip(pairs, written, strict=True)
            ]
        details = {"carries": sum(num_carries(before, after - before) for before, after in pairs)}
        return Problem(0, text, f"{totals[-1]:0{width}d}", STEP_SEPARATOR.join(written), self.num_terms, details)


@dataclass(frozen=True)
class _Totals:
    """The rule of running totals: each is the one before it, as written, and the next term."""

    terms: tuple[int, ...]
    width: int

    def follows(self, state: int | None, place: int, jump: int, step: str) -> bool:
        if state is None or place + jump >= len(self.terms):
            return False
        columns, _, total = step.rpartition(" ")
        expected = state + sum(self.terms[place : place + jump + 1])
        if total != f"{expected:0{self.width}d}":
            return False
        return not columns or (jump == 0 and columns == columns_of(state, self.terms[place], self.width))

    def after(self, state: int | None, place: int, step: str) -> int | None:
        total = step.rpartition(" ")[2]
        return int(total) if WHOLE.fullmatch(total) else None


def _columns(total: int, term: int) -> list[tuple[int, int, int, int, int]]:
    """From the units up, of ``total + term``: digit, digit, carry from the right, digit out, carry to the left."""
    sign, rest, carry = (1 if term >= 0 else -1), abs(term), 0
    found: list[tuple[int, int, int, int, int]] = []
    while total or rest or carry or not found:
        (total, left), (rest, right) = divmod(total, 10), divmod(rest, 10)
        value = left + sign * (right + carry)
        found.append((left, right, carry, value % 10, int(not 0 <= value <= 9)))
        carry = found[-1][-1]
    return found


def columns_of(total: int, term: int, width: int) -> str:
    """The columns of one step as they are written, at least ``width`` of them; "" where the total is below 0."""
    if total < 0 or total + term < 0:
        return ""
    found = _columns(total, term)
    found += [(0, 0, 0, 0, 0)] * (width - len(found))
    sign = "+" if term >= 0 else "-"
    return " ".join(f"{left}{sign}{right}{sign}{carry}>{out},{next_}" for left, right, carry, out, next_ in found)


def num_carries(total: int, term: int) -> int:
    """Columns of ``total + term`` that carry, or borrow where ``term`` is below 0."""
    return sum(column[-1] for column in _columns(total, term))
