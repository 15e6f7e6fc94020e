"""Early stopping from the command line, against the curve of a run that was not stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from research.loops.early_stop import EarlyStop
from research.results.curves import CURVE_FILE, read_curve
from research.results.record import read_record

pytestmark = pytest.mark.filterwarnings("ignore")
RUN = (
    "trainer.max_epochs=14", "trainer.enable_progress_bar=false", "student.hidden=[16]", "optimizer.lr=3e-3",
    "evaluation.splits=[val]", "logger=none", "threads=1",
)  # fmt: skip


def errors_of(folder: Path) -> list[tuple[int, float]]:
    """(step, errors) of every validation."""
    rows = read_curve(folder / CURVE_FILE)
    return [(int(row["step"] or 0), float(row["val/errors"] or 0)) for row in rows if row["val/errors"] is not None]


def end_by_hand(errors: list[tuple[int, float]], patience: int, min_delta: float) -> int:
    """The step at which `patience` validations in a row have brought nothing."""
    best, waited = float("inf"), 0
    for step, value in errors:
        best, waited = (value, 0) if value < best - min_delta else (best, waited + 1)
        if waited == patience:
            return step
    return errors[-1][0]


@pytest.fixture(scope="module")
def whole(distill: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """What every validation of the run without a stop measured."""
    folder = tmp_path_factory.mktemp("whole")
    assert distill("train", *RUN, "hydra.run.dir=run", cwd=folder).code == 0
    errors = errors_of(folder / "run")
    assert len(errors) == 14 and len({value for _, value in errors}) > 6
    return errors


def test_a_run_ends_at_the_first_validation_that_is_good_enough(
    distill: Callable[..., Any], whole: list[tuple[int, float]], tmp_path: Path
) -> None:
    """Gone on from with the same settings it stays as it is; with others it is what they make at once."""

    def ended(folder: str, threshold: float, *more: str) -> Any:
        stop = ("early_stopping=threshold", f"early_stopping.threshold={threshold}", f"hydra.run.dir={folder}")
        assert distill("train", *RUN, *stop, *more, cwd=tmp_path).code == 0
        record = read_record(tmp_path / folder / "run.json")
        first = next((step, value) for step, value in whole if value <= threshold)
        assert errors_of(tmp_path / folder) == whole[: whole.index(first) + 1]
        assert record.status == "completed" and record.metrics["val/errors"] == first[1]
        told = f"early_stopping.threshold is {threshold:g}, and val/errors is {first[1]:g} after step {first[0]}"
        assert record.reason == told
        return record.student["sha256"]

    early, late = whole[3][1], min(value for _, value in whole)
    assert late < early
    first = ended("first", early)
    assert ended("first", early, "ckpt_path=last") == first
    assert ended("first", late, "ckpt_path=last") == ended("second", late) != first


@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.0), (2, 5.0)])
def test_a_run_ends_where_no_validation_has_been_better(
    distill: Callable[..., Any], whole: list[tuple[int, float]], tmp_path: Path, patience: int, min_delta: float
) -> None:
    stop = ("early_stopping=patience", f"early_stopping.patience={patience}", f"early_stopping.min_delta={min_delta}")
    assert distill("train", *RUN, *stop, "hydra.run.dir=run", cwd=tmp_path).code == 0
    end = end_by_hand(whole, patience, min_delta)
    assert end < whole[-1][0], "the whole run has a place at which nothing is gained"
    assert errors_of(tmp_path / "run")[-1][0] == end
    assert str(read_record(tmp_path / "run" / "run.json").reason).startswith(f"early_stopping.patience is {patience}")


def test_more_of_an_accuracy_is_better(distill: Callable[..., Any], tmp_path: Path) -> None:
    """Also where the answers are sampled."""
    text = (
        "experiment=sum3_base", "data.trace_format=answer_only", "student.hidden_size=32", "student.num_layers=1",
        "trainer=cpu", "data.num_train=160", "data.num_val=24", "data.num_test=50", "data.batch_size=32",
        "trainer.max_epochs=40", "optimizer.lr=5e-3", "evaluation.val_problems=24",
        "evaluation.val_samples=4",
        "logger=none", "threads=1", "trainer.enable_progress_bar=false", "evaluation.splits=[val]",
    )  # fmt: skip
    stop = ("early_stopping=threshold", "early_stopping.monitor=val/sampled_accuracy", "early_stopping.threshold=0.04")
    done = distill("train", *text, *stop, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    accuracies = [float(row["val/sampled_accuracy"] or 0) for row in read_curve(tmp_path / "run" / CURVE_FILE)]
    assert accuracies[-1] >= 0.04 and all(value < 0.04 for value in accuracies[:-1]) and len(accuracies) > 1
    assert "early_stopping.threshold is 0.04" in str(read_record(tmp_path / "run" / "run.json").reason)


@pytest.mark.parametrize(
    ("monitor", "values", "settings", "told"),
    [
        ("val/accuracy", [0.5, 0.9], {"threshold": 0.9}, "early_stopping.threshold is 0.9, and val/accuracy is 0.9"),
        ("val/nll", [0.3, 0.1], {"threshold": 0.1}, "early_stopping.threshold is 0.1, and val/nll is 0.1"),
        ("val/nll", [0.3, float("nan")], {"threshold": 0.1}, "val/nll is nan after step 2, which is no finite number"),
        ("val/nll", [0.3, 0.3], {"patience": 1}, "early_stopping.patience is 1, val/nll is 0.3"),
    ],
)
def test_the_reason_is_the_one_that_stopped(
    monitor: str, values: list[float], settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Metrics are float32, thresholds are not: 0.9 is reached by 0.9."""

    class Told(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.layer(batch).mean()

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log(monitor, torch.tensor(values[self.current_epoch]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    stop = EarlyStop(monitor, **settings)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=len(values), callbacks=[stop], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    rows = torch.utils.data.DataLoader(torch.ones(1, 1))
    trainer.fit(Told(), rows, rows)
    assert trainer.global_step == 2 and told in str(stop.reason)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["early_stopping=threshold"], "early_stopping.threshold"),
        (["early_stopping=patience", "early_stopping.patience=null"], "neither patience nor threshold"),
        (["early_stopping=patience", "early_stopping.patience=0"], "early_stopping.patience is 0; expected at least 1"),
        (["early_stopping=patience", "early_stopping.min_delta=-1"], "early_stopping.min_delta is -1; expected 0"),
        (["early_stopping=patience", "early_stopping.monitor=test/errors"], "only validation selects"),
        (["early_stopping=patience", "early_stopping.monitor=val/erors"], "on the validation split this"),
        (["early_stopping=patience", "data.holdout=0", "evaluation.splits=[test]"], "there is no validation split"),
        (["early_stopping=patience", "experiment=sum8_trace", "loop=self_taught"], "early_stopping ends one fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    flags: list[str], told: str, distill: Callable[..., Any], tmp_path: Path
) -> None:
    first = () if "experiment=sum8_trace" in flags else RUN
    done = distill("train", *first, *flags, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code != 0 and told in done.error
