"""A run's curve: its rows against the trainer's own numbers, and one row per validation whatever interrupted it."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from research.data.digits import Digits
from research.loops.curves import CurveWriter
from research.loops.fit import KeepLast
from research.methods.base import Training
from research.methods.supervised import Supervised
from research.models.build import build_network, describe
from research.results.curves import read_curve

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}
MLP: dict[str, Any] = {"_target_": "research.models.classifiers.Mlp", "hidden": [12], "dropout": 0.5}
UPDATE = 3 * 2 * (64 * 12 + 12 * 10) - 2 * 64 * 12
ROWS = 37  # five steps an epoch


class Boom(Exception):
    """As sudden as a kill."""


class Watch(L.Callback):
    """What every validation gave; an error when step ``boom`` begins."""

    def __init__(self, boom: int | None = None) -> None:
        self.boom = boom
        self.seen: dict[int, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.boom:
            raise Boom

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen[trainer.global_step] = float(trainer.callback_metrics["val/nll"])


class KeepNoException(KeepLast):
    """Leaves what a SIGKILL leaves."""

    def on_exception(self, *_: Any) -> None:
        pass


def fit(folder: Path, watch: Watch, ckpt_path: Path | None = None, **options: Any) -> Supervised:
    torch.manual_seed(0)
    training = Training(build_network(MLP, **FACTS), partial(torch.optim.Adam, lr=0.02), None, describe(MLP, **FACTS))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    plain: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 3, "num_sanity_val_steps": 2, **quiet, **options}
    callbacks = [CurveWriter(folder), KeepNoException(folder, every_n_steps=2), watch]
    trainer, method = L.Trainer(**plain, callbacks=callbacks), Supervised(training)
    data = Digits(batch_size=8, num_train=ROWS, holdout=20, seed=3)
    torch.manual_seed(1)
    with contextlib.suppress(Boom):
        trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return method


def test_every_validation_leaves_a_row(tmp_path: Path) -> None:
    watch = Watch()
    method = fit(tmp_path, watch)
    rows = read_curve(tmp_path / "curve.csv")
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert [row["spent_tokens"] for row in rows] == [ROWS, 2 * ROWS, 3 * ROWS]
    assert [row["spent_flops"] for row in rows] == [UPDATE * ROWS * epoch for epoch in (1, 2, 3)]
    assert {int(row["step"] or 0): row["val/nll"] for row in rows} == {k: v for k, v in watch.seen.items() if k}
    seconds = [row["spent_seconds"] or 0.0 for row in rows]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < method.spent().seconds


def test_the_end_of_a_fit_has_a_row_of_its_own(tmp_path: Path) -> None:
    fit(tmp_path, Watch(), max_steps=7)
    assert [(row["step"], row["val/nll"] is None) for row in read_curve(tmp_path / "curve.csv")] == [
        (5, False),
        (7, True),
    ]
    fit(tmp_path / "none", Watch(), max_steps=7, limit_val_batches=0)
    (row,) = read_curve(tmp_path / "none" / "curve.csv")
    assert row["step"] == 7 and row["spent_tokens"] == ROWS + 16


def test_a_new_run_in_an_old_folder_leaves_its_own_rows_alone(tmp_path: Path) -> None:
    fit(tmp_path, Watch())
    fit(tmp_path, Watch(), max_epochs=1)
    assert [row["step"] for row in read_curve(tmp_path / "curve.csv")] == [5]


@pytest.mark.parametrize("boom", [1, 5, 6, 7, 10, 13])
def test_a_resumed_run_has_the_rows_of_one_that_was_not_killed(tmp_path: Path, boom: int) -> None:
    """Validations within epochs too, so that a kill can fall between one and the next checkpoint."""
    options = {"val_check_interval": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, Watch(), **options)
    fit(cut, Watch(boom), **options)
    last = cut / "last.ckpt"
    fit(cut, Watch(), last if last.exists() else None, **options)
    rows = [
        [
            {name: value for name, value in row.items() if name != "spent_seconds"}
            for row in read_curve(one / "curve.csv")
        ]
        for one in (whole, cut)
    ]
    assert len(rows[0]) >= 3 and rows[0] == rows[1]
