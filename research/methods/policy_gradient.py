"""Policy gradient with an answer key: GRPO and its de-biased form, the baseline for distillation."""

import copy
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from research.errors import CheckpointError, ConfigError
from research.losses.policy import (
    KL_ESTIMATORS,
    check_clip,
    clipped_share,
    clipped_surrogate,
    group_advantage,
    kl_penalty,
)
from research.methods.base import AbstractMethod, Component, Training
from research.methods.own_words import OwnStep, OwnWords
from research.methods.rollouts import StepCounts, sum_over_ranks
from research.methods.sampled_places import check_policy_sampling, check_reduction, component
from research.methods.soft_target import check_weights, of_the_method
from research.methods.student_form import StudentForm
from research.methods.token_validation import METRICS as TOKEN_METRICS
from research.methods.token_validation import log_token_validation
from research.models.flops import BatchFlops
from research.models.weights import weights_sha256
from research.records import Batch, PromptBatch, Sampling, TokenBatch
from research.teachers.base import AbstractTeacher


class PolicyGradient(AbstractMethod):
    """Raise the probability of samples that earn more than the other samples of their problem, lower that of the rest.

    As configured by default GRPO (arXiv:2402.03300): groups of ``num_samples``, advantages divided by the group's
    standard deviation, each rollout's mean over its own tokens. ``normalise=false reduction=fixed`` is its de-biased
    form (Dr. GRPO, arXiv:2503.20783), ``reduction=token clip_high=0.28 filter_groups=true`` is DAPO's loss
    (arXiv:2503.14476).

    num_samples       G >= 2 samples of each problem; sampling_temperature > 0
    step_reward       see :class:`VerifierReward`: 0 pays right answers alone
    normalise         divide by the group's standard deviation
    filter_groups     leave problems whose samples all earned the same out of the mean, not only out of the gradient
    clip_low, clip_high   bounds of the probability ratio, for ``data.steps_per_rollout`` above 1
    reduction         sequence, token or fixed (by ``fixed_length`` tokens), see ``sampled_places``
    kl_weight         of a penalty for leaving the student that the run began with; 0: none
    kl_estimator      k2 or k3, see ``losses.policy.kl_penalty``
    max_sampler_kl, max_truncated_share, patience   see :class:`OwnWords`
    chunk_rows, float32_head_gradient   see :class:`StudentForm`
    """

    needs_prompts = True
    validation_metrics = (*TOKEN_METRICS, "val/errors", "val/accuracy")

    def __init__(
        self,
        training: Training,
        teacher: AbstractTeacher | None = None,
        *,
        num_samples: int = 8,
        sampling_temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        step_reward: float = 0.0,
        normalise: bool = True,
        filter_groups: bool = False,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        reduction: str = "sequence",
        fixed_length: int | None = None,
        kl_weight: float = 0.0,
        kl_estimator: str = "k3",
        max_sampler_kl: float = 1.0,
        max_truncated_share: float = 0.98,
        patience: int = 50,
        chunk_rows: int | None = None,
        float32_head_gradient: bool = False,
    ) -> None:
        if teacher is not None:
            raise ConfigError("method=policy_gradient learns from an answer key and asks no teacher; give teacher=none")
        super().__init__(training)
        if num_samples < 2:
            raise ConfigError(
                f"method.num_samples is {num_samples}; rewards are compared within the samples of one problem, give "
                "at least 2 (8 is usual)"
            )
        if kl_estimator not in KL_ESTIMATORS:
            raise ConfigError(f"method.kl_estimator is {kl_estimator!r}; expected one of {', '.join(KL_ESTIMATORS)}")
        check_weights(policy_weight=1.0, kl_weight=kl_weight)
        check_policy_sampling(sampling_temperature, top_p)
        check_reduction(reduction, fixed_length)
        with of_the_method():
            check_clip(clip_low, clip_high)
        self.normalise, self.filter_groups = normalise, filter_groups
        self._clip = {"clip_low": clip_low, "clip_high": clip_high}
        self.reduction, self.fixed_length = reduction, fixed_length
        self.kl_weight, self.kl_estimator = kl_weight, kl_estimator
        chunks: dict[str, Any] = {"chunk_rows": chunk_rows, "float32_head_gradient": float32_head_gradient}
        self._form = StudentForm(training.student, **chunks)
        self._own_words = OwnWords(
            self._form,
            Sampling(num_samples, sampling_temperature, top_p, max_new_tokens),
            step_reward=step_reward,
            compares_rewards=True,
            max_sampler_kl=max_sampler_kl,
            max_truncated_share=max_truncated_share,
            patience=patience,
        )
        self.kept_in_checkpoint["own_words"] = self._own_words
        # A copy of the student as it was built: a resume builds it from the same start before it loads the checkpoint.
        start = copy.deepcopy(self.student).eval().requires_grad_(False) if kl_weight else None
        self._start_box = (start,)  # in a tuple: nothing may register it
        self._start_sha256 = None if start is None else weights_sha256(start)
        self._trained: TokenBatch | None = None
        self._kept_counts: tuple[int, StepCounts] = (-1, StepCounts(0, 0))
        self._start_flops = None if start is None else BatchFlops(start, backward=False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        trainer: Any = self.trainer
        if trainer.datamodule.num_stored:
            raise ConfigError(
                f"data.num_stored is {trainer.datamodule.num_stored}, and method=policy_gradient trains on what the "
                "student writes alone; give data.num_stored=0"
            )
        self._vocab_size = trainer.datamodule.codec.vocab_size
        self._own_words.connect(self.student, trainer.datamodule)
        if self._start_box[0] is not None:
            self._start_box[0].to(trainer.strategy.root_device)

    def components(self, batch: PromptBatch) -> list[Component]:
        step = self._own_words.of(batch, self.device)
        self._trained, self.rollout_cost = step.tokens, self.rollout_cost + step.cost
        student = self._form.at(self.student, step.tokens, self._vocab_size)
        logprob_N = self._own_words.logprobs(student, step)
        sampler_N = self._own_words.compare(logprob_N, step, batch)
        reward_PG = self._by_problem(logprob_N.new_tensor(step.rewards))
        advantage_N = step.spread(group_advantage(reward_PG, normalise=self.normalise).flatten())
        surrogate_N = clipped_surrogate(logprob_N, sampler_N, advantage_N, **self._clip)
        kept_R, counts = self._kept(reward_PG), self._counts(batch, step)
        parts = [self._component("policy", surrogate_N, step, 1.0, kept_R, counts)]
        if self.kl_weight:
            penalty_N = self._kl_to_start(step, logprob_N)
            everyone_R = torch.ones_like(kept_R)
            parts.append(self._component("kl_to_start", penalty_N, step, self.kl_weight, everyone_R, step.counts))
        if self._is_logged_step():
            step.health["rollout/entropy"] = self._form.mean_entropy(student)
            step.health["rollout/clipped"] = clipped_share(logprob_N, sampler_N, advantage_N, **self._clip)
            self.log_dict(step.health, batch_size=len(batch), rank_zero_only=True)
        return parts

    def trained(self, batch: Any) -> Batch:
        if self._trained is None:
            raise RuntimeError("trained() was asked for before components()")
        return self._trained

    # -- parts --------------------------------------------------------------------------------------------------------

    def _by_problem(self, value_R: Tensor) -> Tensor:
        return value_R.view(-1, self._own_words.sampling.num_samples)

    def _kl_to_start(self, step: OwnStep, logprob_N: Tensor) -> Tensor:
        """The penalty at every place; the start's forward pass is charged with the student's update."""
        with torch.no_grad():
            start = self._form.at(self._start_box[0], step.tokens, self._vocab_size)
            start_N = self._own_words.logprobs(start, step)
        if self._start_flops is not None:
            self._step_flops += self._start_flops.of(step.tokens)
        return kl_penalty(self.kl_estimator, logprob_N, start_N)

    def _kept(self, reward_PG: Tensor) -> Tensor:
        """Which rollouts count in the mean, [R]: all of them, or those of groups that differ in their rewards."""
        differs_P = (reward_PG != reward_PG[:, :1]).any(dim=-1)
        kept_P = differs_P if self.filter_groups else torch.ones_like(differs_P)
        return kept_P.repeat_interleave(reward_PG.shape[-1])

    def _counts(self, batch: PromptBatch, step: OwnStep) -> StepCounts:
        """Of the rollouts that count, over the whole step and all ranks."""
        if not self.filter_groups:
            return step.counts
        if self._kept_counts[0] != batch.block:
            rewards = [one.reward for one in self._own_words.graded(batch.step_prompts)]
            kept = self._kept(self._by_problem(torch.tensor(rewards))).tolist()
            lengths = compress(self._own_words.lengths(batch.step_prompts), kept)
            tokens, rows = sum_over_ranks([sum(lengths), sum(kept)])
            self._kept_counts = batch.block, StepCounts(int(tokens), int(rows))
        return self._kept_counts[1]

    def _component(
        self, name: str, per_place_N: Tensor, step: OwnStep, weight: float, kept_R: Tensor, counts: StepCounts
    ) -> Component:
        lengths = list(compress(step.lengths, kept_R.tolist()))
        options: dict[str, Any] = {"reduction": self.reduction, "fixed_length": self.fixed_length}
        return component(name, per_place_N[step.spread(kept_R)], lengths, weight, counts=counts, **options)

    # -- between runs -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["start_sha256"] = self._start_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._start_sha256 != checkpoint.get("start_sha256", self._start_sha256):
            raise CheckpointError(
                "method.kl_weight holds the student to the weights that its run began with, and this run begins with "
                "others than the checkpoint's: resume with the same seed, student, init_from and kl_weight"
            )

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Cross-entropy and accuracy of the reference completions, means over tokens."""
        log_token_validation(self, self.student, batch)
