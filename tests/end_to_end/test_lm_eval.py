"""docs/lm_eval.md as it stands: its commands run, and the harness gives the scores and texts of our own evaluator."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from research.results.items import read_items
from research.results.record import read_record

PAGE = Path(__file__).parents[2] / "docs" / "lm_eval.md"
SMALL = {
    "train": ("task.num_terms=3", "student.hidden_size=32", "student.num_layers=2", "data.num_train=320",
              "data.num_val=16", "data.num_test=50", "data.batch_size=32", "trainer.max_epochs=12", "logger=none",
              "trainer.enable_progress_bar=false", "threads=1"),
    "traces": ("task.num_terms=3", "data.num_problems=50", "threads=1"),
}  # fmt: skip


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install '.[eval]'")
def test_lm_eval_reads_an_exported_student(distill: Callable[..., Any], tmp_path: Path) -> None:
    """On a student that is right now and then, so that right and wrong answers are compared."""
    train, traces, harness = (shlex.split(line) for line in block("bash").splitlines())
    for line in (train, traces):
        done = distill(*line[1:], *SMALL[line[1]], cwd=tmp_path)
        assert done.code == 0, done.err
    (tmp_path / "sum8.yaml").write_text(block("yaml"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *harness[1:]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "outputs" / "lm_eval").rglob("results_*.json")
    (samples,) = (tmp_path / "outputs" / "lm_eval").rglob("samples_*.jsonl")
    run = tmp_path / "outputs" / "sum8"
    accuracy = read_record(run / "run.json").metrics["test/accuracy"]
    assert 0 < accuracy < 1
    assert json.loads(results.read_text())["results"]["sum8"]["exact_match,answer"] == pytest.approx(accuracy)
    items = read_items(run / "items_test.parquet")
    told = {row["doc"]["index"]: row for row in map(json.loads, samples.read_text().splitlines())}
    assert sorted(told) == items["index"].tolist() == list(range(50))
    for index, text, right in zip(items["index"], items["completion"], items["prediction"], strict=True):
        assert told[int(index)]["resps"] == [[text]] and told[int(index)]["exact_match"] == right
