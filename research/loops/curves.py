"""A run's curve: what every validation measured, and what had been spent by then."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from research.methods.base import AbstractMethod
from research.results.curves import CURVE_FILE, read_curve, write_curve


class CurveWriter(Callback):
    """Keeps ``curve.csv`` in the run folder: one row per validation, and one for the end of the fit.

    step, spent_flops, spent_tokens, spent_seconds   optimizer steps and what the run had cost before this validation,
                                                     see :meth:`AbstractMethod.spent`; blank where not known
    val/...                                          what it measured; blank at an end that no validation stands at

    A resumed run drops the rows of steps after its checkpoint and writes them again. Of several ranks the first writes.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / CURVE_FILE
        self._rows: dict[int, dict[str, float | None]] = {}
        self._spent: dict[str, float | None] = {}

    @property
    def measured(self) -> dict[str, float]:
        """What the last validation measured: also of a fit that is gone on with and has nothing left to do."""
        for step in sorted(self._rows, reverse=True):
            values = {name: value for name, value in self._rows[step].items() if name.startswith("val/")}
            found = {name: value for name, value in values.items() if value is not None}
            if found:
                return found
        return {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self._path.exists():
            self._rows = {int(row["step"] or 0): row for row in read_curve(self._path)}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The trainer's step is that of the checkpoint now; a fit that has nothing left to do does not come here."""
        self._rows = {step: row for step, row in self._rows.items() if 0 < step <= trainer.global_step}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._spent = _spent(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        measured: dict[str, Any] = dict(trainer.callback_metrics)
        values = {name: float(value) for name, value in measured.items() if name.startswith("val/")}
        self._add(trainer, {**self._spent, **values})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step not in self._rows:
            self._add(trainer, _spent(pl_module))

    def _add(self, trainer: L.Trainer, row: dict[str, float | None]) -> None:
        self._rows[trainer.global_step] = {"step": float(trainer.global_step), **row}
        if trainer.is_global_zero:
            write_curve(self._path, [self._rows[step] for step in sorted(self._rows)])


def _spent(module: L.LightningModule) -> dict[str, float | None]:
    if not isinstance(module, AbstractMethod):
        raise TypeError(f"a curve is counted by a method of this package; given a {type(module).__name__}")
    spent = module.spent()
    return {"spent_flops": spent.flops, "spent_tokens": float(spent.tokens), "spent_seconds": spent.seconds}
