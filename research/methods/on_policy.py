"""On-policy distillation: the student writes, and the teacher's distribution corrects every token it wrote."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from research.errors import ConfigError
from research.losses.policy import check_clip, clipped_surrogate, group_advantage, teacher_advantage
from research.losses.soft_target import soft_target
from research.losses.supervised import cross_entropy
from research.methods.base import AbstractMethod, Component, Training
from research.methods.own_words import OwnStep, OwnWords
from research.methods.rollouts import StepCounts, stored_as_batch
from research.methods.sampled_places import check_reduction, component, denominator
from research.methods.soft_target import check_temperature, check_weights
from research.methods.token_validation import METRICS as TOKEN_METRICS
from research.methods.token_validation import log_token_validation
from research.records import (
    Batch,
    DenseLogits,
    HiddenProjection,
    LossSum,
    PromptBatch,
    Sampling,
    TeacherSignal,
    TokenBatch,
)
from research.seeding import rng_for
from research.teachers.base import AbstractTeacher
from research.teachers.top_k import keep_top_k, spread_tail

REDUCTIONS_OF = {"divergence": ("token", "fixed"), "sampled_token": ("token", "sequence", "fixed")}
OBJECTIVES = tuple(REDUCTIONS_OF)


class OnPolicy(AbstractMethod):
    """A divergence between student and teacher, at the places that the student itself wrote.

    The student samples (eval mode, no gradient, a stream of its own), the teacher reads the very same token ids behind
    *its own* prompt, and a fresh forward pass of the student is pulled towards the teacher's distribution there
    (arXiv:2306.13649, arXiv:2505.09388 section 4.5).

    objective     divergence      ``divergence(teacher, student)`` over the whole vocabulary, at every place; prefixes
                                  are held fixed
                  sampled_token   the reverse KL from the drawn token alone: its log-ratio is an advantage, without
                                  gradient, in a clipped policy gradient. Another estimator of another cost, by its name
    divergence, temperature, teacher_mixture_weight, skew_weight, scale_by_temperature_squared   as for
                  :class:`SoftTarget`; for objective=divergence
    teacher_top_k the teacher's K largest probabilities and one bucket for the rest, instead of all; None: all
    credit, advantage_bound, clip_low, clip_high   for objective=sampled_token, see ``losses.policy``
    soft_weight   of that objective
    hard_weight   of the cross-entropy with a *stored* trace's tokens, in a step that is taken off policy; the student's
                  own samples are never a label
    reward_weight of a policy gradient on the verifier's reward for the same rollouts; 0: none. Needs num_samples >= 2
    reduction     token or fixed (and sequence for sampled_token), see ``sampled_places``
    on_policy_fraction   share of the blocks whose student writes; the others take stored traces (data.num_stored), with
                  the same divergence. A coin of (seed, block), the same on every rank
    num_samples, sampling_temperature, top_p, max_new_tokens   of the rollouts; neutral by default
    max_sampler_kl  nats per token by which the student may have left the policy that the rollouts were drawn from,
                  where ``data.steps_per_rollout`` is above 1; beyond it the run stops
    max_truncated_share, patience   see :class:`RolloutHealth`
    """

    needs_teacher = True
    needs_prompts = True
    validation_metrics = (*TOKEN_METRICS, "val/errors", "val/accuracy")

    def __init__(
        self,
        training: Training,
        teacher: AbstractTeacher | None = None,
        *,
        objective: str = "divergence",
        divergence: str = "reverse_kl",
        temperature: float = 1.0,
        teacher_mixture_weight: float | None = None,
        skew_weight: float | None = None,
        scale_by_temperature_squared: bool = True,
        teacher_top_k: int | None = None,
        credit: str = "token",
        advantage_bound: float = float("inf"),
        clip_low: float = 1.0,
        clip_high: float = float("inf"),
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        reward_weight: float = 0.0,
        step_reward: float = 0.0,
        reduction: str = "token",
        fixed_length: int | None = None,
        on_policy_fraction: float = 1.0,
        num_samples: int = 1,
        sampling_temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        max_sampler_kl: float = 1.0,
        max_truncated_share: float = 1.0,
        patience: int = 50,
    ) -> None:
        super().__init__(training, teacher)
        check_temperature(temperature)
        check_weights(soft_weight=soft_weight, hard_weight=hard_weight, reward_weight=reward_weight)
        if objective not in OBJECTIVES:
            raise ConfigError(f"method.objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}")
        if not 0 <= on_policy_fraction <= 1:
            raise ConfigError(f"method.on_policy_fraction is {on_policy_fraction}; expected a share from 0 to 1")
        if reward_weight and num_samples < 2:
            raise ConfigError(
                f"method.reward_weight is {reward_weight} with num_samples={num_samples}; rewards are compared within "
                "the samples of one problem, give at least 2"
            )
        if objective == "sampled_token" or reward_weight:
            check_policy_sampling(sampling_temperature, top_p)
        if teacher_top_k is not None and teacher_top_k < 1:
            raise ConfigError(f"method.teacher_top_k is {teacher_top_k}; expected at least 1, or null for all classes")
        check_reduction(reduction, fixed_length, REDUCTIONS_OF[objective])
        check_clip(clip_low, clip_high)
        self.objective, self.temperature, self.teacher_top_k = objective, temperature, teacher_top_k
        self.credit, self.advantage_bound = credit, advantage_bound
        self.clip = {"clip_low": clip_low, "clip_high": clip_high}
        self.soft_weight, self.hard_weight, self.reward_weight = soft_weight, hard_weight, reward_weight
        self.reduction, self.fixed_length = reduction, fixed_length
        self.on_policy_fraction = on_policy_fraction
        self._options: dict[str, Any] = {
            "divergence": divergence,
            "temperature": temperature,
            "teacher_mixture_weight": teacher_mixture_weight,
            "skew_weight": skew_weight,
            "scale_by_temperature_squared": scale_by_temperature_squared,
        }
        uniform_NV = torch.zeros(1, 2)
        soft_target(uniform_NV, DenseLogits(uniform_NV), **self._options)  # refuses what no step could use
        ones_BT = torch.ones(1, 1)
        teacher_advantage(ones_BT, ones_BT, ones_BT > 0, credit=credit, bound=advantage_bound)
        self._own_words = OwnWords(
            Sampling(num_samples, sampling_temperature, top_p, max_new_tokens),
            step_reward=step_reward,
            max_sampler_kl=max_sampler_kl,
            max_truncated_share=max_truncated_share,
            patience=patience,
        )
        self._trained: TokenBatch | None = None

    # -- set up -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        trainer: Any = self.trainer
        data = trainer.datamodule
        if self.on_policy_fraction < 1 and not data.num_stored:
            raise ConfigError(
                f"method.on_policy_fraction is {self.on_policy_fraction}, so that some steps take stored traces; "
                "data.num_stored is 0, give the number of them per step"
            )
        if self.hard_weight and self.on_policy_fraction == 1:
            raise ConfigError(
                f"method.hard_weight is {self.hard_weight} with on_policy_fraction=1; the cross-entropy belongs to "
                "stored traces, and none is ever taken"
            )
        self._pad_id, self._vocab_size, self._seed = data.codec.pad_id, data.codec.vocab_size, data.seed
        self._own_words.connect(self.student, data)

    # -- one micro-batch ----------------------------------------------------------------------------------------------

    def components(self, batch: PromptBatch) -> list[Component]:
        return self._on_own_words(batch) if self.is_on_policy(batch.block) else self._on_stored(batch)

    def trained(self, batch: Any) -> Batch:
        if self._trained is None:
            raise RuntimeError("trained() was asked for before components()")
        return self._trained

    def is_on_policy(self, block: int) -> bool:
        """The coin of one block of prompts, the same on every rank and after every resume."""
        if self.on_policy_fraction in (0.0, 1.0):
            return self.on_policy_fraction == 1.0
        return float(torch.rand((), generator=rng_for(self._seed, "on_policy", block))) < self.on_policy_fraction

    def _on_own_words(self, batch: PromptBatch) -> list[Component]:
        step = self._own_words.of(batch, self.device)
        self.rollout_cost, self._trained = self._own_words.cost, step.tokens
        signal = self._signal(self._own_words.as_the_teacher_reads(step)) if self.soft_weight else None
        student = self._student_at(step.tokens, hidden=isinstance(signal, HiddenProjection))
        parts = []
        if signal is not None and self.objective == "divergence":
            parts.append(self._divergence("soft", student, signal, step.counts))
        if isinstance(student, Tensor):
            logprob_N, sampler_N = self._own_words.policy(student, step, batch)
            if signal is not None and self.objective == "sampled_token":
                parts.append(self._sampled_token(logprob_N, sampler_N, signal, step))
            if self.reward_weight:
                parts.append(self._reward(logprob_N, sampler_N, step))
        elif self.objective == "sampled_token" or self.reward_weight:
            raise ConfigError(
                "teacher.signal=hidden writes no logits out, and objective=sampled_token and reward_weight need those "
                "of the drawn tokens; give teacher.signal=dense"
            )
        if self._is_logged_step():
            self.log_dict(step.health, batch_size=len(batch), rank_zero_only=True)
        return parts

    def _on_stored(self, batch: PromptBatch) -> list[Component]:
        tokens = stored_as_batch(batch, pad_id=self._pad_id).to(self.device)
        self._trained = tokens
        counts = StepCounts(batch.step_stored_tokens, batch.step_stored_rows)
        signal = None
        if self.soft_weight:
            signal = self._signal(stored_as_batch(batch, pad_id=self._pad_id, for_teacher=True).to(self.device))
        student = self._student_at(tokens, hidden=isinstance(signal, HiddenProjection))
        parts = []
        if signal is not None:
            parts.append(self._divergence("soft_stored", student, signal, counts))
        if self.hard_weight:
            hard = self._cross_entropy(student, tokens)
            parts.append(Component("hard", hard, self.hard_weight, counts.tokens))
        if not parts:
            raise ConfigError(
                "a step with stored traces has nothing to learn: method.soft_weight and method.hard_weight are both 0; "
                "raise one of them, or give on_policy_fraction=1"
            )
        return parts

    # -- the terms ----------------------------------------------------------------------------------------------------

    def _signal(self, tokens: TokenBatch) -> TeacherSignal:
        """The teacher's signal at the completion's places, flat, over the classes that the tokenizer has."""
        signal = self.teacher_signal(tokens).at(tokens.completion_BT)
        if isinstance(signal, DenseLogits):
            signal = DenseLogits(signal.logits_NV[:, : self._vocab_size])
            top_k = self.teacher_top_k
            return signal if top_k is None else keep_top_k(signal, min(top_k, signal.num_classes))
        return _first_classes(signal, self._vocab_size) if isinstance(signal, HiddenProjection) else signal

    def _student_at(self, tokens: TokenBatch, *, hidden: bool) -> Tensor | HiddenProjection:
        """The student's logits [N, V] at the completion's places, or what makes them where they are never written."""
        if hidden:
            network: Any = self.student
            projection = network.hidden_projection(*tokens.network_inputs())
            return _first_classes(projection.at(tokens.completion_BT), self._vocab_size)
        logits_BTV: Tensor = self.student(*tokens.network_inputs())
        return logits_BTV[tokens.completion_BT][:, : self._vocab_size]

    def _divergence(
        self, name: str, student: Tensor | HiddenProjection, signal: TeacherSignal, counts: StepCounts
    ) -> Component:
        loss = soft_target(student, signal, **self._options)
        return Component(name, loss, self.soft_weight, denominator(self.reduction, counts, self.fixed_length))

    def _cross_entropy(self, student: Tensor | HiddenProjection, tokens: TokenBatch) -> LossSum:
        label_N = tokens.label_BT[tokens.completion_BT]
        if isinstance(student, HiddenProjection):
            from research.losses.linear import linear_cross_entropy

            return linear_cross_entropy(student, label_N)
        return cross_entropy(student, label_N)

    def _sampled_token(self, logprob_N: Tensor, sampler_N: Tensor, signal: TeacherSignal, step: OwnStep) -> Component:
        mask_BT = step.tokens.completion_BT
        teacher_N = teacher_logprobs(signal, step.label_N)
        advantage_BT = teacher_advantage(
            step.placed(sampler_N), step.placed(teacher_N), mask_BT, credit=self.credit, bound=self.advantage_bound
        )
        per_place_N = clipped_surrogate(logprob_N, sampler_N, advantage_BT[mask_BT], **self.clip)
        return self._per_place("soft", per_place_N, step, self.soft_weight)

    def _reward(self, logprob_N: Tensor, sampler_N: Tensor, step: OwnStep) -> Component:
        reward_R = torch.tensor([one.reward for one in step.graded], device=logprob_N.device)
        advantage_PG = group_advantage(reward_R.view(-1, self._own_words.sampling.num_samples), normalise=True)
        per_place_N = clipped_surrogate(logprob_N, sampler_N, step.spread(advantage_PG.flatten()), **self.clip)
        return self._per_place("reward", per_place_N, step, self.reward_weight)

    def _per_place(self, name: str, per_place_N: Tensor, step: OwnStep, weight: float) -> Component:
        options: dict[str, Any] = {"reduction": self.reduction, "fixed_length": self.fixed_length}
        return component(name, per_place_N, step.lengths, weight, counts=step.counts, **options)

    # -- between runs -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["own_words"] = self._own_words.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "own_words" in checkpoint:
            self._own_words.load_state_dict(checkpoint["own_words"])

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Cross-entropy and accuracy at the completion's places, means over tokens."""
        log_token_validation(self, self.student, batch)


def teacher_logprobs(signal: TeacherSignal, label_N: Tensor) -> Tensor:
    """The teacher's natural-log probability of each drawn token; outside its top K an equal part of the rest."""
    if isinstance(signal, HiddenProjection):
        raise ConfigError("objective=sampled_token needs the drawn tokens' logits; give teacher.signal=dense")
    if isinstance(signal, DenseLogits):
        logprobs_NV = torch.log_softmax(signal.logits_NV.float(), dim=-1)
    else:
        logprobs_NV = spread_tail(signal).float()
    return logprobs_NV.gather(-1, label_N.unsqueeze(-1)).squeeze(-1)


def check_policy_sampling(sampling_temperature: float, top_p: float) -> None:
    """Raise ConfigError for samples that are not the policy's own: a policy gradient would follow another policy's."""
    if top_p < 1 or sampling_temperature == 0:
        raise ConfigError(
            f"method.top_p is {top_p} and method.sampling_temperature {sampling_temperature}; a policy gradient needs "
            "samples of the policy itself: top_p=1 and a temperature above 0"
        )


def _first_classes(projection: HiddenProjection, num_classes: int) -> HiddenProjection:
    """The same over the first classes alone: heads are padded to round sizes, by other amounts for other models."""
    if projection.num_classes <= num_classes:
        return projection
    bias_V = None if projection.bias_V is None else projection.bias_V[:num_classes]
    return replace(projection, weight_VD=projection.weight_VD[:num_classes], bias_V=bias_V)
