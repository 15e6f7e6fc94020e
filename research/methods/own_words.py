"""The part that every method shares whose student writes while it is trained: draw, grade, watch, and lay out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from research.data.traces import TraceData
from research.errors import ConfigError, RolloutError
from research.generation.cost import GenerationCost
from research.losses.policy import entropy
from research.methods.health import RolloutHealth
from research.methods.reward import Graded, VerifierReward
from research.methods.rollouts import Rollout, RolloutBuffer, StepCounts, as_batch, drawn_logprobs, sampler_logprobs
from research.records import PromptBatch, Sampling, TokenBatch
from research.tasks.grading import Grader


@dataclass(frozen=True)
class OwnStep:
    """One micro-batch of the student's own words.

    tokens   the rollouts as a token batch, one a row
    counts   rollouts of the whole step
    health   what is logged of the step's rollouts; :meth:`OwnWords.policy` adds to it
    """

    rollouts: Sequence[Rollout]
    graded: Sequence[Graded]
    counts: StepCounts
    tokens: TokenBatch
    health: dict[str, float] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Drawn tokens of each rollout."""
        return [rollout.tokens for rollout in self.rollouts]

    @property
    def label_N(self) -> Tensor:
        """The drawn tokens, row by row."""
        return self.tokens.label_BT[self.tokens.completion_BT]

    def spread(self, value_R: Tensor) -> Tensor:
        """A value of every rollout at each of its places, [N]."""
        return value_R.repeat_interleave(torch.tensor(self.lengths, device=value_R.device))

    def placed(self, value_N: Tensor) -> Tensor:
        """Values of the drawn tokens at their places, [B, T]; 0 elsewhere."""
        mask_BT = self.tokens.completion_BT
        return torch.zeros(mask_BT.shape, dtype=value_N.dtype, device=value_N.device).masked_scatter(mask_BT, value_N)


class OwnWords:
    """Rollouts of a block of prompts, graded once, with what is known of their health.

    sampling        of the rollouts; the seed is the run's
    step_reward     see :class:`VerifierReward`
    max_sampler_kl  nats per token by which the student may have left the policy that its rollouts were drawn from
    max_truncated_share, patience   see :class:`RolloutHealth`
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        step_reward: float = 0.0,
        max_sampler_kl: float = 1.0,
        max_truncated_share: float = 1.0,
        patience: int = 50,
    ) -> None:
        if not max_sampler_kl > 0:
            raise ConfigError(f"method.max_sampler_kl is {max_sampler_kl}; expected a positive number of nats")
        self._max_sampler_kl, self._step_reward = max_sampler_kl, step_reward
        self._buffer, self.watching = RolloutBuffer(sampling), RolloutHealth(max_truncated_share, patience)
        self._graded_block: int | None = None
        self._graded: dict[int, list[Graded]] = {}
        self._health: dict[str, float] = {}
        self._reward: VerifierReward | None = None
        self._pad_id = 0

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn, ``max_new_tokens`` cut to the room there is."""
        return self._buffer.sampling

    @property
    def cost(self) -> GenerationCost:
        """Of all rollouts so far, over all ranks."""
        return self._buffer.cost

    def connect(self, network: nn.Module, data: TraceData) -> None:
        """Sample from this network the problems of these data, graded by their own verifier."""
        codec = data.codec
        self._pad_id = codec.pad_id
        self._reward = VerifierReward(Grader(data.task, codec.template, codec.layout), self._step_reward)
        self._buffer.connect(network, data)

    def of(self, batch: PromptBatch, device: torch.device) -> OwnStep:
        """The rollouts of a micro-batch. Raises RolloutError where the student has stopped ending its answers."""
        rollouts = self._buffer.of(batch)
        if self._graded_block != batch.block:
            self._grade(batch)
        graded = [one for row in batch.prompts for one in self._graded[row.problem.index]]
        counts = self._buffer.counts(batch)
        tokens = as_batch(rollouts, counts, pad_id=self._pad_id).to(device)
        return OwnStep(rollouts, graded, counts, tokens, dict(self._health))

    def as_the_teacher_reads(self, step: OwnStep) -> TokenBatch:
        """The same completions, id for id, behind the teacher's own prompts."""
        return as_batch(step.rollouts, step.counts, pad_id=self._pad_id, for_teacher=True).to(step.tokens.ids_BT.device)

    def policy(self, logits_NV: Tensor, step: OwnStep, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the drawn tokens under the student now, with gradient, and when they were drawn.

        Adds to the step's health: ``rollout/entropy`` nats per token; ``rollout/sampler_kl`` the mean of
        ``sampler_logprob - logprob``, an estimate of KL(sampler || student) that is 0 up to rounding and dropout in
        the first step of a block; ``rollout/staleness`` steps since the rollouts were drawn.

        Raises RolloutError where the student has gone further than ``max_sampler_kl`` from its own samples.
        """
        logprob_N = drawn_logprobs(logits_NV, step.label_N, self.sampling.temperature)
        sampler_N = sampler_logprobs(step.rollouts, logprob_N.device)
        with torch.no_grad():
            gap = float((sampler_N - logprob_N).mean())
            mean_entropy = float(entropy(logits_NV).mean())
        step.health.update(
            {
                "rollout/entropy": mean_entropy,
                "rollout/sampler_kl": gap,
                "rollout/staleness": float(batch.repeat),
            }
        )
        self.watching.note_entropy(mean_entropy)
        if self.sampling.temperature and self.sampling.top_p == 1 and batch.repeat and gap > self._max_sampler_kl:
            raise RolloutError(
                f"the student is {gap:.3g} nats per token away from the policy that its rollouts were drawn from, "
                f"{batch.repeat} steps ago, more than method.max_sampler_kl={self._max_sampler_kl:g}. Lower "
                "optimizer.lr or data.steps_per_rollout, or clip tighter (method.clip_low, method.clip_high)"
            )
        return logprob_N, sampler_N

    def _grade(self, batch: PromptBatch) -> None:
        """Grade a whole block once; a block that a checkpoint brought back was watched before it was saved."""
        if self._reward is None:
            raise RuntimeError("rollouts were asked for before the method was set up by a trainer")
        rollouts = self._buffer.of_step(batch)
        graded = self._reward(rollouts)
        self._graded = {}
        for rollout, one in zip(rollouts, graded, strict=True):
            self._graded.setdefault(rollout.row.problem.index, []).append(one)
        self._graded_block = batch.block
        self._health = self.watching.watch(rollouts, graded, self.sampling.num_samples)

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self._buffer.state_dict(), "streaks": self.watching.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffer.load_state_dict(state["rollouts"])
        self.watching.load_state_dict(state["streaks"])
