"""What a run writes down while it trains is what it says it is."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from research.data.digits import Digits
from research.evaluation.evaluate import evaluate
from research.methods.soft_target import SoftTarget

pytestmark = pytest.mark.filterwarnings("ignore")


def data(**changes: Any) -> Digits:
    return Digits(**{"batch_size": 8, "num_train": 37, "holdout": 61, "seed": 3, **changes})


class Losses(L.Callback):
    """The loss of every step, taken where it is returned."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.steps.append(float(outputs["loss"]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_validation_metrics_are_the_evaluator_s(kit: SimpleNamespace, precision: str) -> None:
    method = kit.make_method("soft")
    trainer = kit.fit(method, data(), max_epochs=3, precision=precision)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "32-true"):
        found = evaluate(method.student, data().loader("val"), split="val", num_classes=10).metrics
    assert float(trainer.callback_metrics["val/errors"]) == found["val/errors"] > 0
    assert float(trainer.callback_metrics["val/nll"]) == pytest.approx(found["val/nll"], rel=1e-6)
    assert set(method.validation_metrics) <= set(trainer.callback_metrics)


def logged(kit: SimpleNamespace, folder: Path, every: int) -> tuple[list[dict[str, str]], list[float]]:
    losses = Losses()
    logger = CSVLogger(folder, name="", version="")
    method = SoftTarget(kit.make_training(), kit.make_teacher(), temperature=2.0, hard_weight=0.5, soft_weight=2.0)
    kit.fit(method, data(), max_epochs=2, logger=logger, log_every_n_steps=every, callbacks=[losses])
    path = folder / "metrics.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    return [row for row in rows if row.get("train/loss")], losses.steps


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_logged_loss_is_that_of_its_own_step(kit: SimpleNamespace, tmp_path: Path, every: int) -> None:
    rows, losses = logged(kit, tmp_path, every)
    assert [int(row["step"]) for row in rows] == list(range(every - 1, 10, every))
    for row in rows:
        assert float(row["train/loss"]) == pytest.approx(losses[int(row["step"])], rel=1e-6)
        parts = 2.0 * float(row["train/soft"]) + 0.5 * float(row["train/hard"])
        assert parts == pytest.approx(float(row["train/loss"]), rel=1e-5)


def test_logging_can_be_turned_off(kit: SimpleNamespace, tmp_path: Path) -> None:
    rows, losses = logged(kit, tmp_path, every=0)
    assert rows == [] and len(losses) == 10


def test_p49_the_loss_on_held_out_rows_is_the_training_loss_on_them(kit: SimpleNamespace) -> None:
    """val/nll against the hard term, computed as in training, on the same rows; no dropout."""
    method = SoftTarget(kit.make_training(), kit.make_teacher(), hard_weight=1.0, soft_weight=1.0)
    trainer = kit.fit(method, data(), max_epochs=1)
    (whole,) = data().loader("val", batch_size=61)
    hard = {part.name: part for part in method.components(whole)}["hard"]
    assert float(trainer.callback_metrics["val/nll"]) == pytest.approx(float(hard.loss.mean()), rel=1e-6)
