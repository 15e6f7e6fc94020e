"""The task contract: problems that carry their verifier."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from research.errors import ConfigError
from research.records import Problem, Verdict

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class StepReport:
    """What a step verifier found in one chain.

    num_steps    steps that the chain writes
    num_valid    of these, the steps that follow from the problem and the steps before them, as they were written
    first_wrong  number of the first step that does not, from 0; None where all do
    skipped      whether the chain leaves out a step that the problem needs
    result       the value the chain ends in, as text comparable to an answer; None where it ends in none
    """

    num_steps: int
    num_valid: int
    first_wrong: int | None
    skipped: bool
    result: str | None

    @property
    def valid(self) -> bool:
        """Whether every needed step is there and every written step follows."""
        return self.num_steps > 0 and self.first_wrong is None and not self.skipped


class TooFewProblems(ValueError):
    """A split holds fewer problems than were asked for; ``held`` says how many, and of a file why not more."""

    def __init__(self, name: str, num: int, held: str) -> None:
        super().__init__(f"{name}: num={num}: {held}")
        self.held = held


class AbstractTask(ABC):
    """Problems of one kind, and the verifier that judges answers to them. Subclasses are final.

    name           as it stands in records
    alphabet       every character that its problems, chains and answers use; None: open text
    chance         accuracy of the best constant or random guess; None: not known
    checks_steps   whether :meth:`verify_steps` says anything
    """

    name: str
    alphabet: str | None = None
    chance: float | None = None
    checks_steps: bool = False

    @abstractmethod
    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        """``num`` problems of a split, the same on every call and machine, ``index`` rising from 0.

        Generated tasks draw from ``seed`` and have no end: ``num`` is needed. Tasks read from files ignore ``seed``,
        give the official order and, without ``num``, all. A problem's split is a function of its content, or official:
        no problem stands in two splits, under any two seeds. A smaller ``num`` gives a prefix of a larger one.

        Raises TooFewProblems, a ValueError, where the split does not hold ``num`` distinct problems.
        """

    @property
    def left_out(self) -> Mapping[str, int]:
        """Rows of the task's files that are a problem of no split, by reason; none of a task that is generated."""
        return {}

    @abstractmethod
    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        """The verdict on an answer that was read out of a completion; None: none was found.

        CORRECT, WRONG, UNPARSED (no answer, or one of either side that cannot be read) or TIMEOUT; TRUNCATED is the
        grader's to say. Never evaluates text as code; never raises on any text.
        """

    def is_readable(self, problem: Problem) -> bool:
        """Whether the problem's own answer is right by its own verifier: one that cannot be read rewards nothing."""
        return self.verify(problem, problem.answer) is Verdict.CORRECT

    def verify_steps(self, problem: Problem, chain: str) -> StepReport | None:
        """What is right and wrong in a chain, step by step; None where this task cannot check steps."""
        return None


def problems_for(key: str, task: AbstractTask, split: Split, num: int | None, seed: int) -> list[Problem]:
    """``task.problems``, as many as the config's ``key`` says; ConfigError, naming it, where the split holds fewer."""
    try:
        return task.problems(split, num, seed)
    except TooFewProblems as error:
        raise ConfigError(f"{key} is {num}, and of {task.name} the {error.held}") from None
