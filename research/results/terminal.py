"""The few lines a study leaves on the terminal: one row per arm, with intervals, and the verdict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.results.collect import read_committed, results_folder
from research.results.fields import StudyError
from research.results.readme import number
from research.results.statistics import summarise
from research.results.study import cells
from research.results.study_file import read_study

HEADS = {
    "errors": "errors",
    "step_validity": "valid steps",
    "chain_answer_agreement": "chain gives answer",
    "agreement_at_1": "agreement",
    "ece": "calibration error",
    "nll": "NLL",
}


def study_table(study_dir: str | Path, preset: str | None = None) -> str:
    """Mean and 95 % interval (Student's t over seeds) of the usual metrics per arm and level, and the mean seconds.

    Metrics are those of the split of the study's own metric that any run has; a dash where an arm has none. Raises
    StudyError where the study has no records yet.
    """
    study = read_study(study_dir)
    runs = read_committed(study, preset)
    split = study.metric.partition("/")[0]
    groups: dict[str, list[Mapping[str, Any]]] = {
        name: [runs.records[item.key]] for name, item in study.requires.items() if item.key in runs.records
    }
    for cell in cells(study, preset):
        if cell.key in runs.records:
            name = "/".join((cell.arm, *(f"{factor}={level}" for factor, level in cell.factors.items())))
            groups.setdefault(name, []).append(runs.records[cell.key])
    measured = {name for records in groups.values() for record in records for name in record["metrics"]}
    columns = [column for column in HEADS if f"{split}/{column}" in measured]
    rows = [["", "runs", *(HEADS[column] for column in columns), "seconds"]]
    for name, records in groups.items():
        values = [_interval([record["metrics"].get(f"{split}/{column}") for record in records]) for column in columns]
        rows.append([name, str(len(records)), *values, number(sum(r["wall_s"] for r in records) / len(records))])
    return _aligned(rows)


def verdict_line(study_dir: str | Path, preset: str | None = None) -> str:
    """The verdict and its sentence as they stand in the study's README. Raises StudyError where it has none."""
    path = results_folder(read_study(study_dir), preset) / "README.md"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("**") and "(" in line:
            return line.replace("**", "")
    raise StudyError(f"{path}: holds no verdict; run `distill report` first")


def _interval(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    found = summarise(known)
    return (
        number(found.mean) if found.low is None else f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
