"""Walking along a chain: which of its written steps follow, and which needed ones it leaves out."""

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

from research.records import Verdict
from research.tasks.base import StepReport

STEP_SEPARATOR = ";"
WHOLE = re.compile(r"-?[0-9]{1,60}")  # a number in a chain; Python refuses to read thousands of digits

State = TypeVar("State")


class Rule(Protocol[State]):
    """What a task knows of its steps.

    A place is the number of a needed step, from 0. A state is what a chain has established before a place; None after
    a step that could not be read.
    """

    def follows(self, state: State | None, place: int, jump: int, step: str) -> bool:
        """Whether ``step`` says what comes out at ``place + jump``, from ``state`` before ``place``."""

    def after(self, state: State | None, place: int, step: str) -> State | None:
        """What the chain has established once ``step`` is written at ``place``: as written, right or wrong."""


def verify_written(gold: str, answer: str | None) -> Verdict:
    """The verdict on a whole number that must be written exactly as the gold answer is, padding included."""
    if answer is None or not WHOLE.fullmatch(answer.strip()) or not WHOLE.fullmatch(gold):
        return Verdict.UNPARSED
    return Verdict.CORRECT if answer.strip() == gold else Verdict.WRONG


def split_steps(chain: str, separator: str = STEP_SEPARATOR) -> list[str]:
    """The steps of a chain, without the blanks around them; none where it is blank."""
    return [step.strip() for step in chain.split(separator)] if chain.strip() else []


def walk(
    steps: Sequence[str], num_needed: int, start: State, rule: Rule[State], result: str | None, partial: bool = False
) -> StepReport:
    """The report on ``steps`` against the ``num_needed`` steps of a problem.

    Each written step is judged on the steps before it *as they were written*: an error that a later step repairs makes
    two invalid steps, an error that is carried along makes one. Where fewer steps are written than needed, a step may
    jump over as many as are missing: it follows, and ``skipped`` is set. Steps beyond the last needed one never follow.
    ``partial`` sets ``skipped`` where a caller knows that a step leaves out a part of itself.
    """
    state: State | None = start
    place, missing, wrong, skipped = 0, max(0, num_needed - len(steps)), [], partial
    for number, step in enumerate(steps):
        room = min(missing, num_needed - place - 1)
        jump = next((jump for jump in range(room + 1) if rule.follows(state, place, jump, step)), None)
        if place >= num_needed or jump is None:
            wrong.append(number)
        jump = jump or 0
        missing -= jump
        skipped = skipped or jump > 0
        place += jump
        state = rule.after(state, place, step)
        place += 1
    return StepReport(
        num_steps=len(steps),
        num_valid=len(steps) - len(wrong),
        first_wrong=wrong[0] if wrong else None,
        skipped=skipped or place < num_needed,
        result=result,
    )
