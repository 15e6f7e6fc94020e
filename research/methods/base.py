"""The one place where a loss meets an optimizer.

A method says which loss components a batch has (`components`); this module takes their means, weighs, adds and logs
them, and gives the optimizer. The mean of a component runs over what it counts in the whole optimizer step, so that
accumulation, packing, ragged micro-batches and data parallelism all give the gradient of one large batch.
"""

import inspect
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from research.data.resume import check_validations_end_steps, forget_interrupted_batch, rewind_to_last_step
from research.errors import CheckpointError, ConfigError, NonFiniteLoss
from research.generation.cost import GenerationCost
from research.methods.budget import SCHEDULE_LENGTH, Budget, Spent, check_schedule, place_schedule
from research.models.flops import BatchFlops
from research.models.weights import check_state, is_finite
from research.records import Batch, LossSum, TeacherSignal, TokenBatch
from research.teachers.base import AbstractTeacher

OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]
RngState = dict[str, Tensor]
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # the others cast the batch, which is the teacher's as well
TOTAL_STEPS_NAMES = ("total_steps", "T_max", "total_iters", "num_training_steps")


@dataclass(frozen=True)
class Component:
    """One weighted term of a loss.

    name        what it is logged under
    loss        sum and count over one micro-batch
    weight      what its mean enters the loss with
    step_count  its count over the whole optimizer step, all micro-batches and ranks: the mean's denominator
    """

    name: str
    loss: LossSum
    weight: float
    step_count: float


@dataclass(frozen=True)
class Training:
    """What every method is built from, whatever its loss.

    architecture  plain description of the student, written into checkpoints so that they can be loaded alone
    budget        what the run may cost: the schedule of learning rates ends where it does; None: steps alone count
    """

    student: nn.Module
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    architecture: dict[str, Any]
    budget: Budget | None = None


class Stateful(Protocol):
    """A part of a method that goes on after a resume where it stood."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AbstractMethod(L.LightningModule, ABC):
    """A LightningModule around one student and, held as a plain object, at most one teacher.

    The ledger of what was spent counts whole optimizer steps over all ranks, and goes on after a resume:
    rows_seen, teacher_rows   rows (documents) trained on, and of these those for which the teacher was asked
    tokens_seen               tokens trained on, padding not counted; rows again where a row has no tokens
    update_flops, teacher_flops   of forward and backward passes of the student, and of the teacher's signals; padding
                              is paid for; on several devices this rank's own, times their number
    teacher_seconds           wall time spent waiting for the teacher
    earlier_seconds           wall time of the fits before this one, up to the checkpoint that was resumed
    validation_seconds        wall time of validations within the fits, which no budget is charged for
    rollout_cost              what the student's own sampling cost: nothing for a method that samples none

    A method names in ``kept_in_checkpoint`` its parts that have a state of their own: name in the checkpoint -> part.
    """

    needs_teacher = False
    needs_prompts = False  # problems to answer itself, rather than rows to learn
    validation_metrics: tuple[str, ...] = ("val/errors", "val/nll")

    def __init__(self, training: Training, teacher: AbstractTeacher | None = None) -> None:
        super().__init__()
        if self.needs_teacher and teacher is None:
            name = type(self).__name__
            is_text = self.needs_prompts or "vocab_size" in training.architecture  # a cache holds signals of classes
            choices = "teacher=frozen or teacher=" + ("served" if is_text else "cached")
            raise ConfigError(f"the method {name} needs a teacher; choose one with {choices}")
        self.student = training.student
        self._optimizer_factory, self._scheduler_factory = training.optimizer, training.scheduler
        self._architecture, self.budget = training.architecture, training.budget
        self._teacher_box = (teacher,)  # in a tuple: nothing may register it
        self._resumed_rng: RngState | None = None
        self._rng_before_step: RngState | None = None
        self._teacher_was_asked = False
        self._fit_started = time.perf_counter()
        self._validation_started = 0.0
        self.rows_seen = self.teacher_rows = self.tokens_seen = self.teacher_tokens = 0
        self.update_flops = self.teacher_flops = self.teacher_seconds = self.earlier_seconds = 0.0
        self.validation_seconds = 0.0
        self.rollout_cost = GenerationCost()
        self.kept_in_checkpoint: dict[str, Stateful] = {}
        self._step_flops = self._step_teacher_flops = 0.0
        self._step_tokens = self._step_teacher_tokens = 0
        self._flops = BatchFlops(self.student, backward=True)

    @property
    def teacher(self) -> AbstractTeacher | None:
        return self._teacher_box[0]

    @property
    def takes_stored_traces(self) -> bool:
        """Whether stored traces are trained on where the data hold any: a run is charged for their writing."""
        return True

    def teacher_signal(self, batch: Any, place_BT: Tensor | None = None) -> TeacherSignal:
        """The teacher's signal for a batch, its wall time added to the ledger; of text, where a mask is given, at its
        places alone, [N, ...]."""
        if self.teacher is None:
            raise ConfigError(f"the method {type(self).__name__} has no teacher")
        started = time.perf_counter()
        signal = self.teacher.signal(batch) if place_BT is None else self.teacher.signal_at(batch, place_BT)
        self.teacher_seconds += time.perf_counter() - started
        self._teacher_was_asked = True
        self._step_teacher_flops += self.teacher.flops_of(batch)
        self._step_teacher_tokens += _num_tokens(batch)
        return signal

    def spent(self) -> Spent:
        """What this run has cost so far: student updates, rollouts and teacher scoring, not the teacher's training.

        Tokens are those that went through a network: trained on, prompted with, generated, and read by the teacher.
        Seconds leave validation out.
        """
        rollout, earlier = self.rollout_cost, self.earlier_seconds
        is_known = rollout.flops is not None and not math.isnan(self.teacher_flops)
        flops = self.update_flops + (rollout.flops or 0.0) + self.teacher_flops if is_known else None
        tokens = self.tokens_seen + rollout.prompt_tokens + rollout.tokens + self.teacher_tokens
        running = time.perf_counter() - self._fit_started
        return Spent(flops, tokens, earlier + running - self.validation_seconds)

    def budget_fraction(self) -> float:
        """The share of the budget that is spent, of the first rank on all of them; 0 without a budget."""
        if self.budget is None:
            return 0.0
        fraction = self.budget.fraction(self.spent())
        return float(self.trainer.strategy.broadcast(fraction)) if self.trainer.world_size > 1 else fraction

    def trained(self, batch: Any) -> Batch:
        """What :meth:`components` trained on for this micro-batch; a method that samples its own text says so here."""
        return batch

    @abstractmethod
    def components(self, batch: Any) -> list[Component]:
        """The loss components of one micro-batch, before any mean; a method says which kind of batch it takes."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.student(inputs)

    def setup(self, stage: str) -> None:
        self._fit_started = time.perf_counter()
        trainer: Any = self.trainer
        if trainer.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision is {trainer.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if stage == "fit":
            self._check_kind_of_batch(trainer.datamodule)
        if self.teacher is not None:
            self.teacher.to(trainer.strategy.root_device)
            if stage == "fit":
                self.teacher.connect(trainer.datamodule)

    def _check_kind_of_batch(self, data: Any) -> None:
        """Raise ConfigError for rows where prompts are needed, and the other way round."""
        name, poses = type(self).__name__, bool(getattr(data, "num_prompts", 0))
        if self.needs_prompts and not poses:
            raise ConfigError(
                f"{name} trains on what the student answers; these data hold no prompts, give data=prompts"
            )
        if poses and not self.needs_prompts:
            raise ConfigError(f"{name} trains on rows, and these data pose prompts: give data.num_prompts=0")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remember the random numbers at the start of a step: one that is interrupted comes again with the same."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._rng_before_step = _rng_state(self.device)
            self._teacher_was_asked = False
            self._step_flops, self._step_tokens = 0.0, 0
            self._step_teacher_flops, self._step_teacher_tokens = 0.0, 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        components = self.components(batch)
        # Lightning divides by the micro-batches of a step and averages over ranks; both are undone here because each
        # sum is divided by the count of the whole step instead.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        terms = [
            component.weight * component.loss.total * (parts / max(component.step_count, 1e-12))
            for component in components
            if component.weight != 0
        ]
        loss = torch.stack(terms).sum()
        if not bool(torch.isfinite(loss)):
            self._stop_non_finite(components, batch)
        trained = self.trained(batch)
        self._step_rows = trained.step_rows
        self._step_flops += self._flops.of(trained)
        self._step_tokens += _num_tokens(trained)
        if self._is_logged_step():
            self._log_components("train", components, batch, loss=loss)
        return loss

    def _is_logged_step(self) -> bool:
        """Whether Lightning writes after this step what is logged in it; 0 is its way to say never."""
        trainer: Any = self.trainer
        every = int(trainer.log_every_n_steps)
        return every > 0 and (trainer.global_step + 1) % every == 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, which runs the last micro-batch first; after it the step is whole and is accounted for."""
        super().optimizer_step(*args, **kwargs)
        self._rng_before_step = None
        ranks = self.trainer.world_size
        self.rows_seen += self._step_rows
        self.tokens_seen += self._step_tokens * ranks
        self.update_flops += self._step_flops * ranks
        self.teacher_rows += self._step_rows if self._teacher_was_asked else 0
        self.teacher_flops += self._step_teacher_flops * ranks
        self.teacher_tokens += self._step_teacher_tokens * ranks

    def on_train_epoch_end(self) -> None:
        """Before the checkpoint of the epoch: a finite loss can have a gradient that is not."""
        if not is_finite(self.student):
            raise NonFiniteLoss(
                f"the student's weights are not finite after step {self.trainer.global_step}. Lower optimizer.lr"
            )

    def on_validation_start(self) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_end(self) -> None:
        self.validation_seconds += time.perf_counter() - self._validation_started

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits_NV = self.student(batch.inputs)
        wrong = (logits_NV.argmax(dim=-1) != batch.label_B).sum()
        nll = nn.functional.cross_entropy(logits_NV.float(), batch.label_B, reduction="none").mean()
        rows = len(batch)
        self.log(
            "val/errors", wrong.float(), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True, batch_size=rows
        )
        weight = rows * self.trainer.world_size  # Lightning averages weights over ranks, and rounds that down
        self.log("val/nll", nll, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)

    def _log_components(self, stage: str, components: list[Component], batch: Batch, loss: Tensor) -> None:
        values = {f"{stage}/{component.name}": component.loss.mean().detach() for component in components}
        self.log_dict({f"{stage}/loss": loss.detach(), **values}, batch_size=len(batch), rank_zero_only=True)

    def _stop_non_finite(self, components: list[Component], batch: Batch) -> None:
        """Stop before the step spoils the weights: they are still those of the last finite step."""
        values = ", ".join(f"{component.name}={float(component.loss.mean().detach()):g}" for component in components)
        indices = batch.index_B[:8].tolist()
        raise NonFiniteLoss(
            f"the loss is not finite at step {self.trainer.global_step} ({values}); batch indices {indices}"
            f"{' ...' if len(batch) > 8 else ''}. Lower optimizer.lr, or look at these rows"
        )

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer_factory(self.student.parameters())
        if self._scheduler_factory is None:
            return optimizer
        parameters = inspect.signature(self._scheduler_factory).parameters
        length = next((name for name in TOTAL_STEPS_NAMES if name in parameters), None)
        given = getattr(self._scheduler_factory, "keywords", {})
        late = {}
        if length is not None and given.get(length) is None:
            late[length] = self._total_steps()
        elif self.budget is not None:
            raise ConfigError(
                "this scheduler counts its own steps, and a run with a budget does not know how many it will take; "
                f"choose one whose length the run sets, and leave {length or 'it'} null"
            )
        scheduler = self._scheduler_factory(optimizer, **late)
        if self.budget is not None:
            check_schedule(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clipped as the trainer asks, a fused optimizer's gradients too: Lightning refuses those under bf16-mixed,
        where no scaler has anything to undo. ConfigError under 16-mixed, where the fused step itself undoes the scale.
        """
        plugin = self.trainer.precision_plugin
        if not gradient_clip_val or not isinstance(plugin, MixedPrecision):
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if plugin.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ConfigError(
                f"trainer.precision={plugin.precision} and trainer.gradient_clip_val={gradient_clip_val:g} need an "
                "optimizer that is not fused: its gradients are scaled until the step. Set optimizer.fused=false, or "
                "trainer.precision=bf16-mixed"
            )
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """The next rate: after one more step or, of a run with a budget, where what is spent of it leads."""
        if self.budget is None:
            super().lr_scheduler_step(scheduler, metric)
        else:
            place_schedule(scheduler, self.budget_fraction())

    def _total_steps(self) -> int:
        if self.budget is not None:
            return SCHEDULE_LENGTH
        steps = float(self.trainer.estimated_stepping_batches)
        if not math.isfinite(steps):
            raise ConfigError(
                "this scheduler needs the length of the run; give trainer.max_epochs or trainer.max_steps"
            )
        return int(steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rewind_to_last_step(checkpoint, self.trainer.accumulate_grad_batches)
        checkpoint["architecture"] = json.dumps(self._architecture)
        checkpoint["spent"] = {
            "rows": self.rows_seen,
            "tokens": self.tokens_seen,
            "flops": self.update_flops,
            "teacher_rows": self.teacher_rows,
            "teacher_tokens": self.teacher_tokens,
            "teacher_flops": self.teacher_flops,
            "rollout": asdict(self.rollout_cost),
            "validation_seconds": self.validation_seconds,
            "teacher_seconds": self.teacher_seconds,
            "seconds": self.earlier_seconds + time.perf_counter() - self._fit_started,
        }
        checkpoint["rng"] = self._rng_before_step or self._resumed_rng or _rng_state(self.device)
        checkpoint |= {name: part.state_dict() for name, part in self.kept_in_checkpoint.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {name.removeprefix("student."): tensor for name, tensor in checkpoint["state_dict"].items()}
        check_state(self.student, state, "the checkpoint")
        if not {"rng", "spent"} <= checkpoint.keys():
            raise CheckpointError("the checkpoint holds no random state; it was not written by `distill train`")
        self._resumed_rng, spent = checkpoint["rng"], checkpoint["spent"]
        self.rows_seen, self.teacher_rows = int(spent["rows"]), int(spent.get("teacher_rows", 0))
        self.tokens_seen, self.update_flops = int(spent.get("tokens", 0)), float(spent.get("flops", 0.0))
        self.teacher_flops = float(spent.get("teacher_flops", 0.0))
        self.teacher_tokens = int(spent.get("teacher_tokens", 0))
        self.rollout_cost = GenerationCost(**spent.get("rollout", {}))
        self.validation_seconds = float(spent.get("validation_seconds", 0.0))
        self.teacher_seconds, self.earlier_seconds = float(spent["teacher_seconds"]), float(spent.get("seconds", 0.0))
        for name in self.kept_in_checkpoint.keys() & checkpoint.keys():
            self.kept_in_checkpoint[name].load_state_dict(checkpoint[name])

    def on_train_start(self) -> None:
        """Go on with the random numbers of the interrupted run; nothing between here and the first step draws any."""
        forget_interrupted_batch(self.trainer)
        check_validations_end_steps(self.trainer)
        if self._resumed_rng is not None:
            torch.set_rng_state(self._resumed_rng["cpu"].cpu())
            if "cuda" in self._resumed_rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._resumed_rng["cuda"].cpu(), self.device)
            self._resumed_rng = None


def _num_tokens(batch: Batch) -> int:
    """Tokens of a micro-batch, padding not counted; its rows where a row has no tokens."""
    return int((batch.segment_BT > 0).sum()) if isinstance(batch, TokenBatch) else len(batch)


def _rng_state(device: torch.device) -> RngState:
    """The state of torch's generators that a step on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
