"""How the student's own writing fares while it is trained on it: lengths, stops, agreement of rewards, and bounds."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from research.errors import ConfigError, RolloutError
from research.methods.reward import Graded
from research.methods.rollouts import Rollout

log = logging.getLogger(__name__)

COLLAPSED_ENTROPY = 1e-3  # nats per token: the student has stopped choosing


@dataclass
class Streaks:
    """For how many optimizer steps in a row something has been so."""

    truncated: int = 0
    equal_rewards: int = 0
    low_entropy: int = 0


class RolloutHealth:
    """Watches the rollouts of every step; warns once a streak is ``patience`` steps long, and again at each multiple.

    max_truncated_share   a step in which a larger share of rollouts never stops counts as bad; after ``patience`` such
                          steps in a row the run stops. 1: never
    patience              optimizer steps

    Raises ConfigError for bounds without meaning, RolloutError where the run should stop.
    """

    def __init__(self, max_truncated_share: float = 1.0, patience: int = 50) -> None:
        if not 0 < max_truncated_share <= 1:
            raise ConfigError(f"method.max_truncated_share is {max_truncated_share}; expected above 0 and at most 1")
        if patience < 1:
            raise ConfigError(f"method.patience is {patience}; expected at least 1 step")
        self._bound, self._patience = max_truncated_share, patience
        self.streaks = Streaks()

    def watch(self, rollouts: Sequence[Rollout], graded: Sequence[Graded], num_samples: int) -> dict[str, float]:
        """What a step's rollouts on this rank say, under the names that are logged.

        ``rollout/length`` tokens, mean; ``truncated``, ``correct`` shares of rollouts; ``reward`` mean; ``all_right``,
        ``all_wrong`` shares of problems all of whose samples are right, wrong, and ``equal_rewards`` of those with
        one reward for all; ``unreadable_gold`` of problems whose answer key cannot be read.
        """
        rows = len(rollouts)
        truncated = sum(rollout.completion.stop == "length" for rollout in rollouts) / rows
        right = [grade.grade.correct for grade in graded]
        groups = [slice(start, start + num_samples) for start in range(0, rows, num_samples)]
        rewards = [[one.reward for one in graded[group]] for group in groups]
        equal = sum(len(set(group)) == 1 for group in rewards) / len(groups)
        self._note_truncated(truncated)
        return {
            "rollout/length": sum(rollout.tokens for rollout in rollouts) / rows,
            "rollout/truncated": truncated,
            "rollout/correct": sum(right) / rows,
            "rollout/reward": sum(one.reward for one in graded) / rows,
            "rollout/all_right": sum(all(right[group]) for group in groups) / len(groups),
            "rollout/all_wrong": sum(not any(right[group]) for group in groups) / len(groups),
            "rollout/equal_rewards": equal,
            "rollout/unreadable_gold": sum(not one.readable for one in graded) / rows,
        }

    def note_rewards(self, equal_share: float) -> None:
        """For a method that learns from differences of rewards: without any, a step teaches nothing."""
        self.streaks.equal_rewards = self.streaks.equal_rewards + 1 if equal_share == 1 else 0
        if self._is_due(self.streaks.equal_rewards):
            log.warning(
                "all rewards of every problem were equal for %d steps: nothing is learnt. Give easier or harder "
                "problems, more samples per problem (method.num_samples), or a higher method.sampling_temperature",
                self.streaks.equal_rewards,
            )

    def note_entropy(self, entropy: float) -> None:
        """Mean entropy of the student's next token, nats."""
        low = math.isfinite(entropy) and entropy < COLLAPSED_ENTROPY
        self.streaks.low_entropy = self.streaks.low_entropy + 1 if low else 0
        if self._is_due(self.streaks.low_entropy):
            log.warning(
                "the student's entropy is %.2g nats per token for %d steps: it has stopped choosing, and its samples "
                "are all alike. Lower optimizer.lr, or raise method.sampling_temperature",
                entropy,
                self.streaks.low_entropy,
            )

    def _note_truncated(self, share: float) -> None:
        self.streaks.truncated = self.streaks.truncated + 1 if share > self._bound else 0
        if self.streaks.truncated >= self._patience:
            raise RolloutError(
                f"{share:.0%} of the student's rollouts reached the length limit without stopping, more than "
                f"method.max_truncated_share={self._bound:g} for {self._patience} steps in a row. Start from a student "
                "that ends its answers (init_from=FOLDER), or raise method.max_new_tokens"
            )

    def _is_due(self, streak: int) -> bool:
        return streak > 0 and streak % self._patience == 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.streaks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.streaks = Streaks(**state)
