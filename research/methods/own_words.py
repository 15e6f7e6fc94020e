"""The part that every method shares whose student writes while it is trained: draw, grade, watch, and lay out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from research.data.traces import TraceData
from research.errors import ConfigError, RolloutError
from research.generation.cost import GenerationCost
from research.methods.health import RolloutHealth, health_of
from research.methods.reward import Graded, VerifierReward
from research.methods.rollouts import (
    Rollout,
    RolloutBuffer,
    StepCounts,
    as_batch,
    sampler_logprobs,
    sum_over_ranks,
)
from research.methods.student_form import Student, StudentForm
from research.models.modes import eval_mode
from research.records import PromptBatch, PromptRow, Sampling, TeacherSignal, TokenBatch
from research.tasks.grading import Grader

log = logging.getLogger(__name__)

# Nats per token, mean, by which the sampler may differ from the network that is trained: rounding alone.
MOST_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3}
MOST_ROUNDING_OF_HALF = 0.1


@dataclass(frozen=True)
class OwnStep:
    """One micro-batch of the student's own words.

    tokens   the rollouts as a token batch, one a row
    counts   rollouts of the whole step
    health   what is logged of the step's rollouts; :meth:`OwnWords.compare` adds to it
    cost     of drawing them, over all ranks; nothing where they were at hand
    """

    rollouts: Sequence[Rollout]
    graded: Sequence[Graded]
    counts: StepCounts
    tokens: TokenBatch
    health: dict[str, float]
    cost: GenerationCost

    @property
    def lengths(self) -> list[int]:
        """Drawn tokens of each rollout."""
        return [rollout.tokens for rollout in self.rollouts]

    @property
    def rewards(self) -> list[float]:
        """What the verifier pays for each rollout."""
        return [one.reward for one in self.graded]

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
        return value_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, value_N)


class OwnWords:
    """Rollouts of a block of prompts, graded once, with what is known of their health.

    form            in which the method has the student's logits
    sampling        of the rollouts; the seed is the run's
    step_reward     see :class:`VerifierReward`
    compares_rewards   whether the method learns from differences of rewards
    max_sampler_kl  nats per token by which the student may have left the policy that its rollouts were drawn from
    max_truncated_share, patience   see :class:`RolloutHealth`
    """

    def __init__(
        self,
        form: StudentForm,
        sampling: Sampling,
        *,
        step_reward: float,
        compares_rewards: bool,
        max_sampler_kl: float,
        max_truncated_share: float,
        patience: int,
    ) -> None:
        if not max_sampler_kl > 0:
            raise ConfigError(f"method.max_sampler_kl is {max_sampler_kl}; expected a positive number of nats")
        self._max_sampler_kl, self._step_reward = max_sampler_kl, step_reward
        self._form, self._buffer = form, RolloutBuffer(sampling)
        self._watching = RolloutHealth(max_truncated_share, patience, compares_rewards=compares_rewards)
        self._graded_block: int | None = None
        self._graded: dict[int, list[Graded]] = {}
        self._health: dict[str, float] = {}
        self._is_neutral = False

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn, ``max_new_tokens`` cut to the room there is."""
        return self._buffer.sampling

    def connect(self, network: nn.Module, data: TraceData, teacher_positions: int | None = None) -> None:
        """Sample from this network the problems of these data, graded by their own verifier.

        teacher_positions  see :meth:`RolloutBuffer.connect`
        """
        codec = data.codec
        self._network, self._pad_id, self._vocab_size = network, codec.pad_id, codec.vocab_size
        if data.steps_per_rollout > 1 and not self._draws_the_policy:
            log.warning(
                "data.steps_per_rollout is %s with top_p=%s and sampling_temperature=%s: how far the student has left "
                "its own samples is logged, but method.max_sampler_kl cannot bound it, since they are not drawn from "
                "its whole distribution", data.steps_per_rollout, self.sampling.top_p, self.sampling.temperature,
            )  # fmt: skip
        self._reward = VerifierReward(Grader(data.task, codec.template, codec.layout), self._step_reward)
        self._buffer.connect(network, data, teacher_positions)

    def of(self, batch: PromptBatch, device: torch.device) -> OwnStep:
        """The rollouts of a micro-batch, drawn with the first of its block.

        Raises RolloutError where the student has stopped ending its answers, or where the sampler does not draw from
        the network that is trained.
        """
        cost = self._buffer.ready(batch)
        if self._graded_block != batch.block:
            self._grade(batch)
        rollouts, counts = self._buffer.of(batch.prompts), self._buffer.counts()
        tokens = as_batch(rollouts, counts, pad_id=self._pad_id).to(device)
        step = OwnStep(rollouts, self.graded(batch.prompts), counts, tokens, dict(self._health), cost)
        if cost.tokens:
            self._check_sampler(step)
        return step

    def graded(self, rows: Sequence[PromptRow]) -> list[Graded]:
        """The grades of the rollouts of these problems, of the block that is at hand."""
        return [one for row in rows for one in self._graded[row.problem.index]]

    def lengths(self, rows: Sequence[PromptRow]) -> list[int]:
        """Drawn tokens of the same rollouts."""
        return [rollout.tokens for rollout in self._buffer.of(rows)]

    def as_the_teacher_reads(self, step: OwnStep) -> TokenBatch:
        """The same completions, id for id, behind the teacher's own prompts."""
        return as_batch(step.rollouts, step.counts, pad_id=self._pad_id, for_teacher=True).to(step.tokens.ids_BT.device)

    def logprobs(self, student: Student, step: OwnStep) -> Tensor:
        """Log-probabilities of the drawn tokens under a student's logits [N, V], at the sampling temperature, [N]."""
        return self._form.logprobs(student, step.label_N, self.sampling.temperature)

    def teacher_logprobs(self, signal: TeacherSignal, step: OwnStep) -> Tensor:
        """The same under a teacher's signal."""
        return self._form.teacher_logprobs(signal, step.label_N, self.sampling.temperature)

    def compare(self, logprob_N: Tensor, step: OwnStep, batch: PromptBatch) -> Tensor:
        """Log-probabilities of the drawn tokens when they were drawn, [N], held against those of the student now.

        Adds to the step's health: ``rollout/sampler_kl`` an unbiased estimate of KL(sampler || student) per token, the
        mean of ``r - 1 - log r``, ``r = exp(logprob - sampler_logprob)``: 0 up to rounding and dropout in the first
        step of a block, and over all ranks from the second; ``rollout/staleness`` steps since the rollouts were drawn.

        Raises RolloutError where the student has gone further than ``max_sampler_kl`` from its own samples.
        """
        sampler_N = sampler_logprobs(step.rollouts, logprob_N)
        change_N = logprob_N.detach() - sampler_N
        total, places = float((change_N.expm1() - change_N).sum()), float(len(sampler_N))
        if batch.repeat:  # a bound that stops the run has to stop every rank
            total, places = sum_over_ranks([total, places])
        gap = total / places
        step.health.update({"rollout/sampler_kl": gap, "rollout/staleness": float(batch.repeat)})
        if self._draws_the_policy and batch.repeat and gap > self._max_sampler_kl:
            raise RolloutError(
                f"the student is {gap:.3g} nats per token away from the policy that its rollouts were drawn from, "
                f"{batch.repeat} steps ago, more than method.max_sampler_kl={self._max_sampler_kl:g}. Lower "
                "optimizer.lr or data.steps_per_rollout, or clip tighter (method.clip_low, method.clip_high)"
            )
        return sampler_N

    @property
    def _draws_the_policy(self) -> bool:
        """Whether the sampler's probabilities are those of the student at the sampling temperature."""
        return self.sampling.top_p == 1 and self.sampling.temperature > 0

    def _grade(self, batch: PromptBatch) -> None:
        """Grade what this rank drew of a block, once, and watch it."""
        rollouts = self._buffer.of(batch.step_prompts)
        graded = self._reward(rollouts)
        self._graded = {}
        for rollout, one in zip(rollouts, graded, strict=True):
            self._graded.setdefault(rollout.row.problem.index, []).append(one)
        self._graded_block = batch.block
        self._health = health_of(rollouts, graded, self.sampling.num_samples)
        self._watching.note(batch.block, self._health)

    @torch.no_grad()
    def _check_sampler(self, step: OwnStep) -> None:
        """Once a run: what the sampler drew from is what is trained, token by token, to rounding."""
        if self._is_neutral or self.sampling.top_p < 1:
            return
        with eval_mode(self._network):
            student = self._form.at(self._network, step.tokens, self._vocab_size)
        logprob_N = self.logprobs(student, step)
        gaps_N = (sampler_logprobs(step.rollouts, logprob_N) - logprob_N).abs()
        total, places = sum_over_ranks([float(gaps_N.sum()), float(len(gaps_N))])  # what stops one rank stops all
        gap = total / places
        bound = MOST_ROUNDING.get(self._form.dtype_of(student), MOST_ROUNDING_OF_HALF)
        if not gap <= bound:
            raise RolloutError(
                f"the sampler's log-probabilities differ from the student's own by {gap:.3g} nats per token, more than "
                f"rounding ({bound:g}): it does not sample the policy that is trained. This network cannot be sampled "
                "by research.generation.in_process: its logits depend on more than ids, positions and attention mask"
            )
        self._is_neutral = True

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self._buffer.state_dict(), "streaks": self._watching.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffer.load_state_dict(state["rollouts"])
        self._watching.load_state_dict(state["streaks"])
