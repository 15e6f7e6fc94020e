"""What a verifier pays for a completion."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from research.errors import ConfigError
from research.methods.rollouts import Rollout
from research.records import Problem
from research.tasks.grading import Grade, Grader


@dataclass(frozen=True)
class Graded:
    """A rollout's grade and its reward; ``readable`` is False where the gold answer itself cannot be read."""

    grade: Grade
    reward: float
    readable: bool


class VerifierReward:
    """1 for a right answer, 0 for everything else, and where asked a part for steps that follow.

    step_reward  what a chain earns beside, times the share of its steps that are valid; nothing where a needed step is
                 missing, so that a chain is not paid for being short. 0: the answer alone counts

    A problem whose gold answer cannot be read earns nothing, whatever is written. Raises ConfigError for a step_reward
    that is negative, or above 0 where the task cannot check steps.
    """

    def __init__(self, grader: Grader, step_reward: float = 0.0) -> None:
        if not (math.isfinite(step_reward) and step_reward >= 0):
            raise ConfigError(f"method.step_reward is {step_reward}; expected a finite number, 0 or more")
        if step_reward and not grader.task.checks_steps:
            raise ConfigError(f"method.step_reward is {step_reward}, and {grader.task.name} cannot check steps; give 0")
        self._grader, self._step_reward = grader, step_reward
        self._readable: dict[int, bool] = {}

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """The grade and reward of each rollout, in order."""
        return [self._graded(rollout) for rollout in rollouts]

    def _graded(self, rollout: Rollout) -> Graded:
        problem = rollout.row.problem
        grade = self._grader.grade(problem, rollout.completion)
        if not self._is_readable(problem):
            return Graded(grade, 0.0, False)
        reward = float(grade.correct)
        steps = grade.steps
        if self._step_reward and steps is not None and steps.num_steps and not steps.skipped:
            reward += self._step_reward * steps.num_valid / steps.num_steps
        return Graded(grade, reward, True)

    def _is_readable(self, problem: Problem) -> bool:
        """Whether the gold answer is right by its own verifier."""
        if problem.index not in self._readable:
            self._readable[problem.index] = self._grader.task.is_readable(problem)
        return self._readable[problem.index]
