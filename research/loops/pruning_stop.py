"""Ends a fit that a sweep's pruner has given up, at the end of a validation, on all ranks together."""

import logging
from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import Callback

from research.errors import ConfigError

log = logging.getLogger(__name__)
STEPS = ("step", "epoch")


class PruningStop(Callback):
    """Reports a validation metric after every validation and stops the fit where the answer is to prune.

    monitor  the metric, which begins with val/: what selects is never measured on test
    report   told value and step by the first rank; whether to prune. Its answer goes to every rank
    unit     what the steps of the reports count: optimizer steps, or epochs
    reason   why the fit was stopped; None where it was not

    A fit that ends before any validation is warned of: nothing could have pruned it.
    """

    def __init__(self, monitor: str, report: Callable[[float, int], bool], unit: str = "step") -> None:
        if not monitor.startswith("val/"):
            raise ConfigError(
                f"the pruner would be told {monitor}; only metrics of validation select: give one of val/..."
            )
        if unit not in STEPS:
            raise ConfigError(f"hydra.sweeper.prune_step is {unit!r}; expected one of {', '.join(STEPS)}")
        self.monitor, self._report, self._unit = monitor, report, unit
        self.reason: str | None = None
        self._has_reported = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ConfigError(f"the pruner is to be told {self.monitor}, which was not measured; there is {known}")
        step = trainer.global_step if self._unit == "step" else trainer.current_epoch + 1
        self._has_reported = True
        prunes = self._report(float(value), step) if trainer.is_global_zero else False
        if trainer.strategy.broadcast(prunes, src=0):
            self.reason = f"pruned at {self._unit} {step} with {self.monitor} {float(value):.6g}"
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._has_reported:
            log.warning(
                "the pruner was told nothing: the run ended at step %s, before its first validation; validate sooner "
                "with a smaller trainer.check_val_every_n_epoch or trainer.val_check_interval",
                trainer.global_step,
            )
