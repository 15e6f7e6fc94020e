"""A small made-up study: its folder, its run directories, and the knobs the tests turn."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from research.results.items import write_items
from research.results.record import LEDGER_PARTS, RunRecord, write_record
from research.results.study import Cell, Study, cells, requirements
from research.results.study_file import read_study

STUDY_TEXT = """
study: digits
claim: C04
question: Do soft targets help?
base: [experiment=digits]
requires:
  teacher: {command: train, overrides: [experiment=digits_teacher]}
arms:
  hard: [method=supervised]
  soft: [method=soft_target, "teacher={requires.teacher}"]
seeds: [0, 1, 2, 3, 4, 5]
metric: test/errors
lower_is_better: true
comparison: {kind: difference, baseline: hard, treatment: soft}
secondary:
  gap_closed: {kind: share, worst: hard, treated: soft, best: teacher}
published: {source: a paper, arms: {hard: 14, soft: 7}}
budget: {minutes: 1}
presets:
  smoke: {base: [trainer=smoke], seeds: [7]}
"""


@dataclasses.dataclass
class Workshop:
    """Makes a study folder and fills run directories with runs of a given number of wrong items."""

    root: Path
    num_items: int = 300

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def study(self, text: str = STUDY_TEXT, name: str = "digits") -> Study:
        folder = self.root / "experiments" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.yaml").write_text(textwrap.dedent(text))
        return read_study(folder)

    def run(self, key: str, seed: int, errors: int, with_items: bool = True, **changes: object) -> Path:
        folder = self.runs / key
        folder.mkdir(parents=True, exist_ok=True)
        label = np.arange(self.num_items) % 10
        wrong = np.zeros(self.num_items, dtype=bool)
        wrong[np.random.default_rng([seed, errors]).choice(self.num_items, errors, replace=False)] = True
        prediction = np.where(wrong, (label + 1) % 10, label)
        if with_items:
            write_items(
                folder / "items.parquet",
                {"index": np.arange(self.num_items), "label": label, "prediction": prediction},
            )
        record = RunRecord(
            command=f"distill train seed={seed}",
            experiment="digits",
            status="completed",
            seed=seed,
            config={"seed": seed, "paths": {"root": str(folder)}},
            metrics={"test/errors": float(errors), "test/nll": 0.1 * errors},
            started_at="2026-01-02T03:04:05+00:00",
            wall_s=2.5,
            overrides=[f"teacher={self.runs / 'requires' / 'teacher'}", "data.root=/somewhere/else/mnist"],
            revision={"commit": "abc", "dirty": False},
            ledger={part: {"flops": 1e12, "tokens": 10.0, "seconds": 1.0} for part in LEDGER_PARTS},
            artifacts={"items/test": "items.parquet"} if with_items else {},
        )
        write_record(folder / "run.json", dataclasses.replace(record, **changes))  # type: ignore[arg-type]
        return folder

    def fill(
        self, study: Study, errors: Callable[[Cell], int] | Mapping[str, int], teacher: int = 4, with_items: bool = True
    ) -> None:
        for requirement in requirements(study):
            self.run(requirement.key, 0, teacher, with_items)
        for cell in cells(study):
            count = errors[cell.arm] + cell.seed % 3 if isinstance(errors, Mapping) else errors(cell)
            self.run(cell.key, cell.seed, count, with_items)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def study_text() -> str:
    return STUDY_TEXT
