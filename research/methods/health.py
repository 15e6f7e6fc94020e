"""How the student's own writing fares while it is trained on it: lengths, stops, agreement of rewards, and bounds."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from research.errors import ConfigError, RolloutError
from research.methods.reward import Graded
from research.methods.rollouts import Rollout, sum_over_ranks

log = logging.getLogger(__name__)

COLLAPSED_ENTROPY = 1e-3  # nats per token: the student has stopped choosing
OFTEN_TRUNCATED = 0.5  # share of rollouts


@dataclass
class Streaks:
    """For how many blocks in a row something has been so, up to and with block ``last``."""

    last: int = -1
    truncated: int = 0
    beyond_bound: int = 0
    equal_rewards: int = 0
    low_entropy: int = 0


class RolloutHealth:
    """Watches the rollouts of every block; warns once a streak is ``patience`` blocks long, and again at each multiple.

    A block is what is drawn at once: it serves for ``data.steps_per_rollout`` optimizer steps.

    max_truncated_share   a block in which a larger share of rollouts never stops counts as bad; after ``patience`` such
                          blocks in a row the run stops. 1: never; above a half it is warned of in any case
    compares_rewards      whether the method learns from differences of rewards, and learns nothing without any

    Raises ConfigError for bounds without meaning, RolloutError where the run should stop.
    """

    def __init__(
        self, max_truncated_share: float = 0.98, patience: int = 50, *, compares_rewards: bool = False
    ) -> None:
        if not 0 < max_truncated_share <= 1:
            raise ConfigError(f"method.max_truncated_share is {max_truncated_share}; expected above 0 and at most 1")
        if patience < 1:
            raise ConfigError(f"method.patience is {patience}; expected at least 1 block of rollouts")
        self._bound, self._patience, self._compares_rewards = max_truncated_share, patience, compares_rewards
        self.streaks = Streaks()

    def note(self, block: int, health: dict[str, float]) -> None:
        """Count a block's figures into the streaks, once: a block that comes again after a resume is known."""
        if block <= self.streaks.last:
            return
        truncated, streaks = health["rollout/truncated"], self.streaks
        self.streaks = Streaks(
            last=block,
            truncated=streaks.truncated + 1 if truncated > OFTEN_TRUNCATED else 0,
            beyond_bound=streaks.beyond_bound + 1 if truncated > self._bound else 0,
            equal_rewards=streaks.equal_rewards + 1 if health["rollout/equal_rewards"] == 1 else 0,
            low_entropy=streaks.low_entropy + 1 if health["rollout/sampled_entropy"] < COLLAPSED_ENTROPY else 0,
        )
        self._warn(health)
        if self.streaks.beyond_bound >= self._patience:
            raise RolloutError(
                f"{truncated:.0%} of the student's rollouts reached the length limit without stopping, more than "
                f"method.max_truncated_share={self._bound:g} for {self._patience} blocks in a row. Start from a "
                "student that ends its answers (init_from=FOLDER), or raise method.max_new_tokens"
            )

    def _warn(self, health: dict[str, float]) -> None:
        streaks = self.streaks
        if self._is_due(streaks.truncated):
            log.warning(
                "more than half of the student's rollouts reached the length limit without stopping, %d blocks in a "
                "row (%.0f%% in the last). Start from a student that ends its answers (init_from=FOLDER), raise "
                "method.max_new_tokens, or let the run stop (method.max_truncated_share)",
                streaks.truncated,
                100 * health["rollout/truncated"],
            )
        if self._compares_rewards and self._is_due(streaks.equal_rewards):
            log.warning(
                "all rewards of every problem were equal, %d blocks in a row: nothing is learnt from them. Give easier "
                "or harder problems, more samples per problem (method.num_samples), or a higher "
                "method.sampling_temperature",
                streaks.equal_rewards,
            )
        if self._is_due(streaks.low_entropy):
            log.warning(
                "the student's entropy is %.2g nats per token, %d blocks in a row below %g: it has stopped choosing, "
                "and its samples are all alike. Lower optimizer.lr, or raise method.sampling_temperature",
                health["rollout/sampled_entropy"],
                streaks.low_entropy,
                COLLAPSED_ENTROPY,
            )

    def _is_due(self, streak: int) -> bool:
        return streak > 0 and streak % self._patience == 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.streaks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.streaks = Streaks(**state)


def health_of(rollouts: Sequence[Rollout], graded: Sequence[Graded], num_samples: int) -> dict[str, float]:
    """What a block's rollouts say, over all ranks, under the names that are logged; those given are this rank's.

    ``rollout/length`` tokens, mean; ``truncated``, ``correct`` shares of rollouts; ``reward`` mean;
    ``sampled_entropy`` mean of ``-logprob`` over the drawn tokens, nats: an unbiased estimate of the entropy of the
    policy they were drawn from, unless they are greedy; ``all_right``, ``all_wrong`` shares of problems all of whose
    samples are right, wrong, and ``equal_rewards`` of those with one reward for all; ``unreadable_gold`` of problems
    whose answer key cannot be read.
    """
    right = [grade.grade.correct for grade in graded]
    groups = [slice(start, start + num_samples) for start in range(0, len(rollouts), num_samples)]
    counted = {
        "length": sum(rollout.tokens for rollout in rollouts),
        "truncated": sum(rollout.completion.stop == "length" for rollout in rollouts),
        "correct": sum(right),
        "reward": sum(one.reward for one in graded),
        "unreadable_gold": sum(not one.readable for one in graded),
        "all_right": sum(all(right[group]) for group in groups),
        "all_wrong": sum(not any(right[group]) for group in groups),
        "equal_rewards": sum(len({one.reward for one in graded[group]}) == 1 for group in groups),
        "sampled_entropy": sum(-logprob for rollout in rollouts for logprob in rollout.completion.logprobs),
    }
    *sums, rows, problems = sum_over_ranks([*counted.values(), len(rollouts), len(groups)])
    total = dict(zip(counted, sums, strict=True))
    out_of = dict.fromkeys(counted, rows)
    out_of |= dict.fromkeys(("all_right", "all_wrong", "equal_rewards"), problems)
    out_of["sampled_entropy"] = total["length"]
    return {f"rollout/{name}": total[name] / out_of[name] for name in counted}
