"""One student, two ways of answering: the mark decides, and without marks nothing does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from research.results.items import read_items
from research.results.record import RunRecord, read_record

pytestmark = pytest.mark.filterwarnings("ignore")
RUN = (
    "experiment=sum8_trace", "task.num_terms=3", "student.hidden_size=32", "student.num_layers=2", "data.num_train=320",
    "data.num_val=16", "data.num_test=40", "data.batch_size=32", "evaluation.max_new_tokens=16", "threads=1",
    "trainer.enable_progress_bar=false", "logger=none", "trainer.max_epochs=6",
    "+evaluation.variants.think.mode=think", "+evaluation.variants.no_think.mode=no_think",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modes")


@pytest.fixture(scope="module")
def records(distill: Callable[..., Any], folder: Path) -> dict[str, RunRecord]:
    for modes in ("two", "unmarked"):
        done = distill("train", *RUN, f"data.modes={modes}", f"hydra.run.dir={modes}", cwd=folder)
        assert done.code == 0, done.err
    return {modes: read_record(folder / modes / "run.json") for modes in ("two", "unmarked")}


def test_the_mark_decides_whether_the_student_thinks(records: dict[str, RunRecord]) -> None:
    metrics = records["two"].metrics
    assert metrics["test_think/obedience"] > 0.9 and metrics["test_no_think/obedience"] > 0.9
    assert metrics["test_think/tokens_per_answer"] > metrics["test_no_think/tokens_per_answer"] + 2
    assert metrics["test/obedience"] == metrics["test_think/obedience"], "problems are posed to think unless said"
    for mode in ("think", "no_think"):
        assert {f"test_{mode}/accuracy", f"test_{mode}/nll", f"test_{mode}/tokens_per_answer"} <= metrics.keys()
    # a chain and an answer, or an answer alone: the loss is that of the mode's own text
    assert metrics["test_think/completion_tokens"] == 40 * len("3;5#5.")
    assert metrics["test_no_think/completion_tokens"] == 40 * len("#5.")


def test_p90_evaluate_poses_the_mode_that_is_asked(
    records: dict[str, RunRecord], folder: Path, distill: Callable[..., Any]
) -> None:
    """And obedience is what the completions show: a blank before the # or not."""
    done = distill("evaluate", "two", "+data.mode=no_think", cwd=folder)
    assert done.code == 0, done.err
    items = read_items(next((folder / "two").glob("evaluation_test_*/items_test.parquet")))
    without_chain = [text.partition("#")[0] == "" for text in items["completion"]]
    metrics = json.loads(next((folder / "two").glob("evaluation_test_*.json")).read_text())["metrics"]
    assert metrics["test/obedience"] == sum(without_chain) / 40 == records["two"].metrics["test_no_think/obedience"]


def test_without_marks_the_student_cannot_obey(records: dict[str, RunRecord]) -> None:
    """The same prompts in either mode, so the same completions: what is obedient in one is not in the other."""
    metrics = records["unmarked"].metrics
    assert metrics["test_think/obedience"] + metrics["test_no_think/obedience"] == pytest.approx(1.0)
    assert metrics["test_think/accuracy"] == metrics["test_no_think/accuracy"]
    sizes = [record.student["parameters"] for record in records.values()]
    assert sizes[0] == sizes[1]
