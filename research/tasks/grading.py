"""One grader for filters, rewards and evaluation: what a completion earns, and how its chain came to its answer."""

from dataclasses import dataclass, replace

from research.records import Completion, Problem, Verdict
from research.tasks.base import AbstractTask, StepReport
from research.text.template import LAYOUTS, AbstractTemplate, Parsed

OUTCOMES = (
    "no_chain",
    "unchecked",
    "valid_right",
    "lucky_answer",
    "unused_chain",
    "wrong_step",
    "skipped_step",
    "valid_wrong",
)


@dataclass(frozen=True)
class Grade:
    """What one completion is worth.

    verdict       TRUNCATED wherever the length limit came first, whatever had been written until then; else the task's
    chain         what was read as chain; "" where there is none
    answer        what was read as answer; None where none was found
    steps         the task's report on the chain; None where it checks none, or there is no chain
    outcome       one of OUTCOMES, see :func:`outcome_of`
    chain_agrees  whether the value that the chain ends in is the answer given; None where either is missing or unread
    """

    verdict: Verdict
    chain: str
    answer: str | None
    steps: StepReport | None
    outcome: str
    chain_agrees: bool | None

    @property
    def correct(self) -> bool:
        """Whether the answer earns anything."""
        return self.verdict is Verdict.CORRECT

    @property
    def process_valid(self) -> bool:
        """Whether the answer is right and a checked chain leads to it."""
        return self.outcome == "valid_right"


class Grader:
    """Reads completions by a template and layout, and has a task judge them.

    Raises ValueError where ``layout`` is not one of LAYOUTS.
    """

    def __init__(self, task: AbstractTask, template: AbstractTemplate, layout: str) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r}: give one of {', '.join(LAYOUTS)}")
        self.task = task
        self.template = template
        self.layout = layout

    def grade(self, problem: Problem, completion: Completion) -> Grade:
        """The grade of what a model wrote; the same with and without an EOS at the end of its ids."""
        parsed = self.template.parse(completion.text, self.layout)
        return grade_parts(self.task, problem, parsed, truncated=completion.stop == "length")


def grade_parts(task: AbstractTask, problem: Problem, parsed: Parsed, truncated: bool = False) -> Grade:
    """The grade of a chain and an answer that are at hand already, such as those of a stored trace."""
    chain, answer = parsed.chain, parsed.answer
    verdict = Verdict.TRUNCATED if truncated else task.verify(problem, answer)
    steps = task.verify_steps(problem, chain) if task.checks_steps and chain.strip() else None
    agrees = _agrees(task, problem, steps, answer)
    return Grade(verdict, chain, answer, steps, outcome_of(verdict, chain, steps, agrees), agrees)


def outcome_of(verdict: Verdict, chain: str, steps: StepReport | None, chain_agrees: bool | None) -> str:
    """How a chain and a verdict go together: exactly one of OUTCOMES, the first that applies.

    no_chain      the chain is blank
    unchecked     nothing in the chain could be checked
    valid_right   the answer is right, the chain valid and not in contradiction to it
    lucky_answer  the answer is right, the chain is not valid: errors that cancel, a guess, a step left out
    unused_chain  an answer is given and the chain ends in another value: right or wrong, the chain did not lead to it
    wrong_step    the answer is not right, some step of the chain does not follow
    skipped_step  the answer is not right, every written step follows, some needed one is missing (cut off, perhaps)
    valid_wrong   the answer is not right (missing, cut off or wrong), nothing is wrong with the chain: a check of steps
                  that sees arithmetic alone passes a sum that is worked out well and was the wrong one
    """
    if not chain.strip():
        return "no_chain"
    if steps is None or steps.num_steps == 0:
        return "unchecked"
    if verdict is Verdict.CORRECT and not steps.valid:
        return "lucky_answer"
    if chain_agrees is False:
        return "unused_chain"
    if verdict is Verdict.CORRECT:
        return "valid_right"
    if steps.first_wrong is not None:
        return "wrong_step"
    return "skipped_step" if steps.skipped else "valid_wrong"


def _agrees(task: AbstractTask, problem: Problem, steps: StepReport | None, answer: str | None) -> bool | None:
    """The task's own equality of answers, asked with the chain's result in the place of the gold answer."""
    if steps is None or steps.result is None or answer is None:
        return None
    verdict = task.verify(replace(problem, answer=steps.result), answer)
    return {Verdict.CORRECT: True, Verdict.WRONG: False}.get(verdict)
