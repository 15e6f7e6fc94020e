"""Addition of two numbers with a scratchpad: one step per column, units first, every one checkable."""

import re
from dataclasses import dataclass

from research.records import Problem, Verdict
from research.tasks.base import AbstractTask, Split, StepReport
from research.tasks.drawing import check_request, of_levels, problems_of, take
from research.tasks.steps import STEP_SEPARATOR, split_steps, verify_written, walk

PROBLEM = re.compile(r"([0-9]+)\+([0-9]+)")
TERSE = re.compile(r"([0-9]) ([0-9])>([0-9])")
VERBOSE = re.compile(r"([0-9]) ([0-9]) ([01])>([0-9]) ([01])")


class Addition(AbstractTask):
    """``57+68``: the columns ``7 8 0>5 1;5 6 1>2 1;0 0 1>1 0``, and the sum ``125``.

    Both numbers have as many digits as the level says, without leading zeros. Levels are drawn with equal probability;
    one that has run out (there are 81 problems of one digit, zero left out) is no longer drawn from. A step is digit,
    digit, carry from the right, ``>``, the digit that comes out, carry to the left; there are as many steps as the sum
    has digits, so that those that come out, read backwards, are the sum. Sums are compared as they are written.

    min_digits, max_digits  the levels: digits of each number
    verbose                 carries are written, and judged as the step before wrote them. Else a step is
                            ``7 8>5``, and judged on the carry that truly comes from the right

    Source: the scratchpads of STaR (arXiv:2203.14465), in fewer characters.
    """

    checks_steps = True
    step_separator = STEP_SEPARATOR

    def __init__(self, min_digits: int = 1, max_digits: int = 5, verbose: bool = True) -> None:
        if not 1 <= min_digits <= max_digits:
            raise ValueError(
                f"min_digits={min_digits!r}, max_digits={max_digits!r}: give 1 <= min_digits <= max_digits"
            )
        self.min_digits = min_digits
        self.max_digits = max_digits
        self.verbose = verbose
        self.name = f"addition_{min_digits}_to_{max_digits}" + ("" if verbose else "_terse")
        self.alphabet = "0123456789+> " + STEP_SEPARATOR

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        check_request(self.name, split, num, needed=True)
        levels = {
            digits: problems_of((9 * 10 ** (digits - 1)) ** 2, self._maker(digits), split, seed, f"addition/{digits}")
            for digits in range(self.min_digits, self.max_digits + 1)
        }
        return take(of_levels(levels, seed, f"addition/{split}"), self.name, split, num or 0)

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return verify_written(problem.answer, answer)

    def verify_steps(self, problem: Problem, chain: str) -> StepReport | None:
        steps = split_steps(chain)
        rule = _Columns.of(problem.text, self.verbose)
        return walk(steps, len(rule.columns), 0, rule, rule.result(steps))

    def _maker(self, digits: int) -> "_Maker":
        return _Maker(digits, self.verbose)


@dataclass(frozen=True)
class _Maker:
    """Problem number so and so of all with so many digits."""

    digits: int
    verbose: bool

    def __call__(self, number: int) -> Problem:
        low = 10 ** (self.digits - 1)
        left, right = (low + part for part in divmod(number, 9 * low))
        text = f"{left}+{right}"
        rule = _Columns.of(text, self.verbose)
        chain = STEP_SEPARATOR.join(rule.written(place, rule.carries[place]) for place in range(len(rule.columns)))
        return Problem(0, text, str(left + right), chain, self.digits, {"carries": sum(rule.carries)})


@dataclass(frozen=True)
class _Columns:
    """The rule of columns. A state is the carry into a place, as the step before it wrote it."""

    columns: tuple[tuple[int, int], ...]  # digits of both numbers, from the units up, one pair per digit of the sum
    carries: tuple[int, ...]  # that truly come into each column from the right
    verbose: bool

    @classmethod
    def of(cls, text: str, verbose: bool) -> "_Columns":
        found = PROBLEM.fullmatch(text)
        if not found:
            raise ValueError(f"problem {text!r}: expected two whole numbers joined by +")
        left, right = int(found[1]), int(found[2])
        columns, carries, carry = [], [], 0
        for place in range(len(str(left + right))):
            pair = (left // 10**place % 10, right // 10**place % 10)
            columns.append(pair)
            carries.append(carry)
            carry = int(sum(pair) + carry > 9)
        return cls(tuple(columns), tuple(carries), verbose)

    def written(self, place: int, carry: int) -> str:
        """The step at a place, with so much from the right."""
        left, right = self.columns[place]
        to_left, out = divmod(left + right + carry, 10)
        return f"{left} {right} {carry}>{out} {to_left}" if self.verbose else f"{left} {right}>{out}"

    def follows(self, state: int | None, place: int, jump: int, step: str) -> bool:
        if state is None or place + jump >= len(self.columns):
            return False
        place += jump
        carry = state if self.verbose and jump == 0 else self.carries[place]
        return step == self.written(place, carry)

    def after(self, state: int | None, place: int, step: str) -> int | None:
        if not self.verbose:
            return 0
        found = VERBOSE.fullmatch(step)
        return int(found[5]) if found else None

    def result(self, steps: list[str]) -> str | None:
        """The digits that the steps bring out, read backwards; None where one cannot be read."""
        form, place = (VERBOSE, 4) if self.verbose else (TERSE, 3)
        found = [form.fullmatch(step) for step in steps]
        digits = [match[place] for match in found if match]
        return "".join(reversed(digits)) if digits and len(digits) == len(found) else None
