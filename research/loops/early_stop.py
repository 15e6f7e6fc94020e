"""Ends a fit that has got where it was to go, or gets no further, by what the validation split says."""

import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason

from research.errors import ConfigError
from research.loops.fit import better_of


class EarlyStop(EarlyStopping):
    """Stops at the validation at which ``monitor`` reaches ``threshold``, or which ends ``patience`` without a gain.

    monitor    a metric of validation; of an accuracy more is better, of anything else less
    patience   validations in a row that are no better than the best by more than ``min_delta``; null: any number
    min_delta  in the units of the metric
    threshold  the value that is enough, itself included; null: none. With it runs are made that are equally good,
               however many steps each of them takes
    reason     why the run was ended, with figures; None where it was not

    ``trainer.max_epochs``, ``trainer.max_steps`` and a budget stay upper limits. A run that ended so and is gone on
    with takes no further step, unless with other settings. A metric that is not finite ends the run too.

    Raises ConfigError for a metric of another split, for numbers without meaning, and where nothing could end the run.
    """

    def __init__(
        self, monitor: str, patience: int | None = None, min_delta: float = 0.0, threshold: float | None = None
    ) -> None:
        if not monitor.startswith("val/"):
            raise ConfigError(f"early_stopping.monitor is {monitor!r}; only validation selects: give one of val/...")
        if patience is None and threshold is None:
            raise ConfigError("early_stopping has neither patience nor threshold; give one, or early_stopping=none")
        if patience is not None and patience < 1:
            raise ConfigError(f"early_stopping.patience is {patience}; expected at least 1 validation, or null")
        if min_delta < 0:
            raise ConfigError(f"early_stopping.min_delta is {min_delta}; expected 0 or more")
        self.settings: dict[str, Any] = {
            "monitor": monitor,
            "patience": patience,
            "min_delta": min_delta,
            "threshold": threshold,
        }
        mode = better_of(monitor)
        worse = -torch.inf if mode == "max" else torch.inf  # Lightning's own threshold is not itself enough
        enough = None if threshold is None else torch.nextafter(torch.tensor(threshold), torch.tensor(worse)).item()
        super().__init__(
            monitor, min_delta, sys.maxsize if patience is None else patience, mode=mode, stopping_threshold=enough,
            check_on_train_epoch_end=False,
        )  # fmt: skip
        self.reason: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "settings": self.settings, "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})
        self.reason = state_dict["reason"] if state_dict["settings"] == self.settings else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.reason is not None:
            trainer.should_stop = True

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        had_stopped = trainer.should_stop
        super()._run_early_stopping_check(trainer)
        if not trainer.should_stop or had_stopped:
            return
        told = f"{self.monitor} is {float(trainer.callback_metrics[self.monitor]):g} after step {trainer.global_step}"
        if self.stopping_reason is EarlyStoppingReason.STOPPING_THRESHOLD:
            self.reason = f"early_stopping.threshold is {self.settings['threshold']:g}, and {told}"
        elif self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED:
            best = float(self.best_score)
            self.reason = f"early_stopping.patience is {self.patience}, {told}, and was {best:g} at its best"
        else:
            self.reason = f"early_stopping: {told}, which is no finite number"
