"""On-policy distillation: the student writes, and the teacher's distribution corrects every token it wrote."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from research.errors import ConfigError
from research.losses.policy import check_clip, clipped_surrogate, group_advantage, teacher_advantage
from research.methods.base import AbstractMethod, Component, Training
from research.methods.completion_places import over_tokens
from research.methods.own_words import OwnStep, OwnWords
from research.methods.rollouts import StepCounts, stored_as_batch
from research.methods.sampled_places import check_policy_sampling, check_reduction, component, denominator
from research.methods.soft_target import check_weights, checked_divergence, of_the_method
from research.methods.student_form import Student, StudentForm
from research.methods.token_validation import METRICS as TOKEN_METRICS
from research.methods.token_validation import log_token_validation
from research.records import Batch, PromptBatch, Sampling, TeacherSignal, TokenBatch
from research.seeding import rng_for
from research.teachers.base import AbstractTeacher

OBJECTIVES = ("divergence", "sampled_token")


class OnPolicy(AbstractMethod):
    """A divergence between student and teacher, at the places that the student itself wrote.

    The student samples (eval mode, no gradient, a stream of its own), the teacher reads the very same token ids behind
    *its own* prompt, and a fresh forward pass of the student is pulled towards the teacher's distribution there
    (arXiv:2306.13649, arXiv:2505.09388 section 4.5).

    objective     divergence      ``divergence(teacher, student)`` over the whole vocabulary, at every place; prefixes
                                  are held fixed
                  sampled_token   the reverse KL from the drawn token alone: its log-ratio, both sides at the sampling
                                  temperature, is an advantage, without gradient, in a clipped policy gradient. Another
                                  estimator, by its name; ``divergence`` stays reverse_kl and ``temperature`` 1
    divergence, temperature, teacher_mixture_weight, skew_weight, scale_by_temperature_squared   as for
                  :class:`SoftTarget`
    teacher_top_k the teacher's K largest probabilities and one bucket for the rest, instead of all; None: what it gives
    credit, advantage_bound   for objective=sampled_token, see ``losses.policy.teacher_advantage``
    clip_low, clip_high       for it and the reward, see ``losses.policy.clipped_surrogate``
    soft_weight   of that objective, and of the divergence at the places of stored traces
    hard_weight   of the cross-entropy with a *stored* trace's tokens, in a step that is taken off policy; the student's
                  own samples are never a label
    reward_weight of a policy gradient on the verifier's reward for the same rollouts, as GRPO has it; 0: none. Needs
                  num_samples >= 2
    step_reward   of that reward, see :class:`VerifierReward`
    reduction     token, or fixed with ``fixed_length``; also sequence where nothing but sampled tokens is trained on,
                  see ``sampled_places``
    on_policy_fraction   share of the blocks whose student writes; the others take stored traces (data.num_stored), with
                  the same divergence. A coin of (seed, block), the same on every rank
    num_samples, sampling_temperature, top_p, max_new_tokens   of the rollouts; neutral by default
    max_sampler_kl  nats per token by which the student may have left the policy that the rollouts were drawn from,
                  where ``data.steps_per_rollout`` is above 1; beyond it the run stops
    max_truncated_share, patience   see :class:`RolloutHealth`
    chunk_rows, float32_head_gradient, compiled   see :class:`StudentForm`

    Raises ConfigError, naming the key, for options that cannot be, or that would change nothing.
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
        max_truncated_share: float = 0.98,
        patience: int = 50,
        chunk_rows: int | None = None,
        float32_head_gradient: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(training, teacher)
        self.objective, self.temperature, self.teacher_top_k = objective, temperature, teacher_top_k
        self.soft_weight, self.hard_weight, self.reward_weight = soft_weight, hard_weight, reward_weight
        self.reduction, self.fixed_length = reduction, fixed_length
        self.on_policy_fraction = on_policy_fraction
        self._divergence_options = checked_divergence(
            divergence=divergence,
            temperature=temperature,
            teacher_mixture_weight=teacher_mixture_weight,
            skew_weight=skew_weight,
            scale_by_temperature_squared=scale_by_temperature_squared,
        )
        self._advantage_options: dict[str, Any] = {"credit": credit, "bound": advantage_bound}
        self._clip = {"clip_low": clip_low, "clip_high": clip_high}
        self._check_weights(num_samples, step_reward)
        self._check_losses()
        if self._needs_logprobs:
            check_policy_sampling(sampling_temperature, top_p)
        always_sampled = objective == "sampled_token" and on_policy_fraction == 1
        self._form = StudentForm(
            training.student,
            teacher,
            chunk_rows=chunk_rows,
            float32_head_gradient=float32_head_gradient,
            compiled=compiled,
            divergence=self._divergence_options if soft_weight and not always_sampled else None,
        )
        self._own_words = OwnWords(
            self._form,
            Sampling(num_samples, sampling_temperature, top_p, max_new_tokens),
            step_reward=step_reward,
            compares_rewards=reward_weight > 0,
            max_sampler_kl=max_sampler_kl,
            max_truncated_share=max_truncated_share,
            patience=patience,
        )
        self.kept_in_checkpoint["own_words"] = self._own_words
        self._trained: TokenBatch | None = None

    # -- options ------------------------------------------------------------------------------------------------------

    @property
    def _needs_logprobs(self) -> bool:
        """Whether the drawn tokens' own probabilities are trained on."""
        return self.objective == "sampled_token" or self.reward_weight > 0

    def _check_weights(self, num_samples: int, step_reward: float) -> None:
        soft, hard, reward, fraction = self.soft_weight, self.hard_weight, self.reward_weight, self.on_policy_fraction
        check_weights(soft_weight=soft, hard_weight=hard, reward_weight=reward)
        if not 0 <= fraction <= 1:
            raise ConfigError(f"method.on_policy_fraction is {fraction}; expected a share from 0 to 1")
        if fraction > 0 and not soft + reward:
            raise ConfigError(
                "method.soft_weight and method.reward_weight are both 0, and the student's own samples are never a "
                "label: they would teach nothing; raise one of them"
            )
        if fraction < 1 and not soft + hard:
            raise ConfigError(
                f"method.on_policy_fraction is {fraction}, and stored traces would teach nothing: method.soft_weight "
                "and method.hard_weight are both 0; raise one of them"
            )
        if hard and fraction == 1:
            raise ConfigError(
                f"method.hard_weight is {hard} with on_policy_fraction=1; the cross-entropy belongs to stored traces, "
                "and none is ever taken"
            )
        if reward and num_samples < 2:
            raise ConfigError(
                f"method.reward_weight is {reward} with num_samples={num_samples}; rewards are compared within the "
                "samples of one problem, give at least 2"
            )
        if step_reward and not reward:
            raise ConfigError(f"method.step_reward is {step_reward} with reward_weight=0, which pays nothing")

    def _check_losses(self) -> None:
        """Try every loss once: what no step could use is refused here."""
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"method.objective is {self.objective!r}; expected one of {', '.join(OBJECTIVES)}")
        ones_BT = torch.ones(1, 1)
        if not self._advantage_options["bound"] > 0:
            bound = self._advantage_options["bound"]
            raise ConfigError(f"method.advantage_bound is {bound}; expected a positive number of nats, or inf for none")
        with of_the_method():
            teacher_advantage(ones_BT, ones_BT, ones_BT > 0, **self._advantage_options)
            check_clip(**self._clip)
        samples_alone = self._needs_logprobs and not (self.objective == "divergence" and self.soft_weight)
        with_sequence = samples_alone and self.on_policy_fraction == 1
        check_reduction(self.reduction, self.fixed_length, ("token", "fixed", *["sequence"] * with_sequence))
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            raise ConfigError(f"method.teacher_top_k is {self.teacher_top_k}; expected at least 1, or null")
        name, untouched = self._divergence_options["divergence"], {"credit": "token", "bound": float("inf")}
        if self.objective == "sampled_token" and (name != "reverse_kl" or self.temperature != 1):
            raise ConfigError(
                f"method.divergence is {name} and method.temperature {self.temperature} with objective=sampled_token, "
                "which estimates the reverse KL at the sampling temperature; give reverse_kl and 1"
            )
        if not self._needs_logprobs and self._clip != {"clip_low": 1.0, "clip_high": float("inf")}:
            raise ConfigError(
                "method.clip_low and method.clip_high belong to objective=sampled_token and to a reward; leave them"
            )
        if self.objective == "divergence" and self._advantage_options != untouched:
            raise ConfigError("method.credit and method.advantage_bound belong to objective=sampled_token; leave them")

    @property
    def takes_stored_traces(self) -> bool:
        return self.on_policy_fraction < 1

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
        self._pad_id, self._vocab_size, self._seed = data.codec.pad_id, data.codec.vocab_size, data.seed
        positions = None if self.teacher is None or not self.soft_weight else self.teacher.max_positions
        self._own_words.connect(self.student, data, positions)
        if self.on_policy_fraction < 1:
            rows = data.stored_rows()
            own = [len(row.ids) for row in rows]
            its = [len(row.teacher_prompt_ids) + len(row.ids) - row.prompt_length for row in rows]
            _check_stored("student", own, getattr(self.student, "max_positions", None))
            _check_stored("teacher", its, positions)

    # -- one micro-batch ----------------------------------------------------------------------------------------------

    def components(self, batch: PromptBatch) -> list[Component]:
        return self._on_own_words(batch) if self.is_on_policy(batch.block) else self._on_stored(batch)

    def trained(self, batch: Any) -> Batch:
        if self._trained is None:
            raise RuntimeError("trained() was asked for before components()")
        return self._trained

    def is_on_policy(self, block: int) -> bool:
        """The coin of one block of prompts, the same on every rank and after every resume."""
        return float(torch.rand((), generator=rng_for(self._seed, "on_policy", block))) < self.on_policy_fraction

    def _on_own_words(self, batch: PromptBatch) -> list[Component]:
        step = self._own_words.of(batch, self.device)
        self._trained, self.rollout_cost = step.tokens, self.rollout_cost + step.cost
        signal = self._signal(self._own_words.as_the_teacher_reads(step)) if self.soft_weight else None
        student = self._form.at(self.student, step.tokens, self._vocab_size)
        with torch.set_grad_enabled(self._needs_logprobs):
            logprob_N = self._own_words.logprobs(student, step)
        sampler_N = self._own_words.compare(logprob_N, step, batch)
        parts = []
        if signal is not None and self.objective == "divergence":
            parts.append(self._divergence("soft", student, signal, step.counts))
        elif signal is not None:
            parts.append(self._sampled_token(logprob_N, sampler_N, signal, step))
        if self.reward_weight:
            parts.append(self._reward(logprob_N, sampler_N, step))
        if self._is_logged_step():
            step.health["rollout/entropy"] = self._form.mean_entropy(student)
            self.log_dict(step.health, batch_size=len(batch), rank_zero_only=True)
        return parts

    def _on_stored(self, batch: PromptBatch) -> list[Component]:
        tokens = stored_as_batch(batch, pad_id=self._pad_id).to(self.device)
        self._trained, signal, parts = tokens, None, []
        counts = StepCounts(batch.step_stored_tokens, batch.step_stored_rows)
        if self.soft_weight:
            signal = self._signal(stored_as_batch(batch, pad_id=self._pad_id, for_teacher=True).to(self.device))
        student = self._form.at(self.student, tokens, self._vocab_size)
        if signal is not None:
            parts.append(self._divergence("soft_stored", student, signal, counts))
        if self.hard_weight:
            label_N = tokens.label_BT[tokens.completion_BT]
            loss = self._form.cross_entropy(student, label_N)
            parts.append(Component("hard", loss, self.hard_weight, self._denominator(counts)))
        return parts

    # -- the terms ----------------------------------------------------------------------------------------------------

    def _signal(self, tokens: TokenBatch) -> TeacherSignal:
        signal = self.teacher_signal(tokens, tokens.completion_BT)
        return over_tokens(signal, self._vocab_size, self.teacher_top_k, self._form.chunk_rows)

    def _divergence(self, name: str, student: Student, signal: TeacherSignal, counts: StepCounts) -> Component:
        loss = self._form.soft_target(student, signal, **self._divergence_options)
        return Component(name, loss, self.soft_weight, self._denominator(counts))

    def _sampled_token(self, logprob_N: Tensor, sampler_N: Tensor, signal: TeacherSignal, step: OwnStep) -> Component:
        teacher_N = self._own_words.teacher_logprobs(signal, step).to(logprob_N)
        mask_BT, placed = step.tokens.completion_BT, (step.placed(logprob_N.detach()), step.placed(teacher_N))
        advantage_N = teacher_advantage(*placed, mask_BT, **self._advantage_options)[mask_BT]
        return self._per_place("soft", clipped_surrogate(logprob_N, sampler_N, advantage_N, **self._clip), step)

    def _reward(self, logprob_N: Tensor, sampler_N: Tensor, step: OwnStep) -> Component:
        reward_PG = logprob_N.new_tensor(step.rewards).view(-1, self._own_words.sampling.num_samples)
        advantage_N = step.spread(group_advantage(reward_PG, normalise=True).flatten())
        return self._per_place("reward", clipped_surrogate(logprob_N, sampler_N, advantage_N, **self._clip), step)

    def _per_place(self, name: str, per_place_N: Tensor, step: OwnStep) -> Component:
        weight = {"soft": self.soft_weight, "reward": self.reward_weight}[name]
        options: dict[str, Any] = {"reduction": self.reduction, "fixed_length": self.fixed_length}
        return component(name, per_place_N, step.lengths, weight, counts=step.counts, **options)

    def _denominator(self, counts: StepCounts) -> float:
        return denominator(self.reduction, counts, self.fixed_length)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Cross-entropy and accuracy at the completion's places, means over tokens."""
        log_token_validation(self, self.student, batch)


def _check_stored(side: str, lengths: Sequence[int], positions: int | None) -> None:
    """Refuse stored traces that are too long for the student or the teacher, before one of them comes."""
    too_long = 0 if positions is None else sum(length > positions for length in lengths)
    if too_long:
        raise ConfigError(
            f"{too_long} of {len(lengths)} stored traces are longer than the {side}'s {positions} positions as it "
            f"reads them, up to {max(lengths)} tokens; lower data.max_tokens, or take a {side} with more positions"
        )
