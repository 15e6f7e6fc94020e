"""Ends a fit after the optimizer step at which its budget is used up, and says what was spent."""

import logging
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from research.errors import ConfigError
from research.methods.base import AbstractMethod
from research.methods.budget import Budget

log = logging.getLogger(__name__)


class BudgetStop(Callback):
    """Stops at the first step after which ``budget`` is spent; ``max_epochs`` and ``max_steps`` stay upper limits.

    reason   which limit ended the run, with figures; None where none has
    metrics  ``budget/fraction`` (1 or a little more where it was used up), ``budget/steps``, and what was spent of
             every limit

    A run that ended so and is gone on with takes no further step. Raises ConfigError where a resumed run has spent more
    than another budget than its own allows, and where one step costs more than all of it; warns where something else
    ended the run first.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.reason: str | None = None
        self.metrics: dict[str, float] = {}
        self._ended: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"budget": asdict(self.budget), "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ended = state_dict if state_dict["reason"] is not None else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a checkpoint brought has been read by now, the trainer's own state has not."""
        method = _method(pl_module)
        spent = method.spent()
        if self.budget.fraction(spent) < 1:
            self.reason = None
            return
        if self._ended is None or self._ended["budget"] != asdict(self.budget):
            raise ConfigError(
                f"{self.budget.described(spent)} by the checkpoint that is gone on from; raise the budget, or begin a "
                "new run"
            )
        self.reason = self._ended["reason"]
        trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        method = _method(pl_module)
        fraction = method.budget_fraction()
        if fraction < 1:
            return
        told = self.budget.described(method.spent())
        if trainer.global_step == 1 and fraction > 1:
            raise ConfigError(f"{told} by the first optimizer step; raise it, or take smaller batches")
        self.reason = f"{told} after step {trainer.global_step}"
        trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.reason is None:
            log.warning(
                "%s after step %s, where trainer.max_epochs=%s, trainer.max_steps=%s or early_stopping ended the run: "
                "the budget is not used up; trainer.max_epochs=-1 leaves the end to it",
                self.budget.described(_method(pl_module).spent()), trainer.global_step, trainer.max_epochs,
                trainer.max_steps,
            )  # fmt: skip

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        spent = _method(pl_module).spent()
        self.metrics = {"budget/fraction": self.budget.fraction(spent), "budget/steps": float(trainer.global_step)}
        self.metrics |= {f"budget/{name}": float(getattr(spent, name)) for name in self.budget.limits}


def _method(module: L.LightningModule) -> AbstractMethod:
    if not isinstance(module, AbstractMethod):
        raise TypeError(f"a budget is counted by a method of this package; given a {type(module).__name__}")
    return module
