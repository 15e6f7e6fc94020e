"""The one place where a loss meets an optimizer.

A method says which loss components a batch has (`components`); this module takes their means, weighs, adds and logs
them, and gives the optimizer. The mean of a component runs over the rows of the whole optimizer step, so that
accumulation, ragged micro-batches and data parallelism all give the gradient of one large batch.
"""

import inspect
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from research.data.resume import rewind_to_last_step
from research.errors import CheckpointError, ConfigError, NonFiniteLoss
from research.models.weights import check_state
from research.records import ClassBatch, LossSum, TeacherSignal
from research.teachers.base import AbstractTeacher

OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]
TOTAL_STEPS_NAMES = ("total_steps", "T_max", "total_iters", "num_training_steps")


@dataclass(frozen=True)
class Component:
    """One weighted term of a loss: its sum and count, the weight it enters with, and the name it is logged under."""

    name: str
    loss: LossSum
    weight: float


@dataclass(frozen=True)
class Training:
    """What every method is built from, whatever its loss.

    architecture  plain description of the student, written into checkpoints so that they can be loaded alone
    """

    student: nn.Module
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    architecture: dict[str, Any]


class AbstractMethod(L.LightningModule, ABC):
    """A LightningModule around one student and, held as a plain object, at most one teacher."""

    needs_teacher = False

    def __init__(self, training: Training, teacher: AbstractTeacher | None = None) -> None:
        super().__init__()
        if self.needs_teacher and teacher is None:
            raise ConfigError(f"the method {type(self).__name__} needs a teacher; choose one with teacher=frozen or teacher=cached")
        self.student = training.student
        self._optimizer_factory, self._scheduler_factory = training.optimizer, training.scheduler
        self._architecture = training.architecture
        self._teacher_box = (teacher,)  # in a tuple: nothing may register it
        self._rng_state: dict[str, Tensor] | None = None
        self.rows_seen = 0
        self.teacher_seconds = 0.0

    @property
    def teacher(self) -> AbstractTeacher | None:
        return self._teacher_box[0]

    def teacher_signal(self, batch: ClassBatch) -> TeacherSignal:
        """The teacher's signal for a batch, its wall time added to the ledger."""
        if self.teacher is None:
            raise ConfigError(f"the method {type(self).__name__} has no teacher")
        started = time.perf_counter()
        signal = self.teacher.signal(batch)
        self.teacher_seconds += time.perf_counter() - started
        return signal

    @abstractmethod
    def components(self, batch: ClassBatch) -> list[Component]:
        """The loss components of one micro-batch, before any mean."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.student(inputs)

    def setup(self, stage: str) -> None:
        if self.teacher is not None:
            self.teacher.to(self.trainer.strategy.root_device)
            if stage == "fit":
                self.teacher.connect(self.trainer.datamodule)

    def training_step(self, batch: ClassBatch, batch_idx: int) -> Tensor:
        components = self.components(batch)
        # Lightning divides by the micro-batches of a step and averages over ranks; both are undone here because the
        # sum is divided by the rows of the whole step instead.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch.step_rows
        terms = [component.weight * component.loss.total * scale for component in components if component.weight != 0]
        loss = torch.stack(terms).sum()
        if not bool(torch.isfinite(loss)):
            self._stop_non_finite(components, batch)
        self.rows_seen += len(batch) * self.trainer.world_size
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            self._log_components("train", components, batch, loss=loss)
        return loss

    def validation_step(self, batch: ClassBatch, batch_idx: int) -> None:
        logits_NV = self.student(batch.inputs)
        wrong = (logits_NV.argmax(dim=-1) != batch.label_B).sum()
        nll = nn.functional.cross_entropy(logits_NV.float(), batch.label_B, reduction="none").mean()
        self.log("val/errors", wrong.float(), on_epoch=True, on_step=False, reduce_fx="sum", sync_dist=True, batch_size=1)
        self.log("val/nll", nll, on_epoch=True, on_step=False, sync_dist=True, batch_size=len(batch))

    def _log_components(self, stage: str, components: list[Component], batch: ClassBatch, loss: Tensor) -> None:
        values = {f"{stage}/{component.name}": component.loss.mean().detach() for component in components}
        self.log_dict({f"{stage}/loss": loss.detach(), **values}, batch_size=len(batch), rank_zero_only=True)

    def _stop_non_finite(self, components: list[Component], batch: ClassBatch) -> None:
        """Stop before the step spoils the weights: they are still those of the last finite step."""
        values = ", ".join(f"{component.name}={float(component.loss.mean()):g}" for component in components)
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
            late[length] = int(self.trainer.estimated_stepping_batches)
        scheduler = self._scheduler_factory(optimizer, **late)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rewind_to_last_step(checkpoint, self.trainer.accumulate_grad_batches)
        checkpoint["architecture"] = json.dumps(self._architecture)
        checkpoint["spent"] = {"rows": self.rows_seen, "teacher_seconds": self.teacher_seconds}
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {name.removeprefix("student."): tensor for name, tensor in checkpoint["state_dict"].items()}
        check_state(self.student, state, "the checkpoint")
        if "rng" not in checkpoint:
            raise CheckpointError("the checkpoint holds no random state; it was not written by `distill train`")
        self._rng_state = checkpoint["rng"]
        self.rows_seen = int(checkpoint["spent"]["rows"])
        self.teacher_seconds = float(checkpoint["spent"]["teacher_seconds"])

    def on_train_start(self) -> None:
        """Go on with the random numbers of the interrupted run; nothing between here and the first step draws any."""
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state["cpu"].cpu())
            if "cuda" in self._rng_state:
                torch.cuda.set_rng_state(self._rng_state["cuda"].cpu(), self.device)

