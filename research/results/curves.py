"""Any metric against any cost: a run's rows in ``curve.csv``, a study's in ``curves.csv``, and its figures' numbers."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from research.results.fields import StudyError, nearest
from research.results.plot import Plot, metric_title
from research.results.record import write_atomic
from research.results.statistics import summarise
from research.results.study import Cell, CurveSpec, Study

CURVE_FILE, CURVES_FILE = "curve.csv", "curves.csv"
COST_COLUMNS = ("step", "spent_flops", "spent_tokens", "spent_seconds")
AGAINST = {"steps": "step", "flops": "spent_flops", "tokens": "spent_tokens", "seconds": "spent_seconds"}
CurveRow = Mapping[str, float | None]
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_GRID_POINTS = 200


def write_curve(path: Path, rows: Sequence[CurveRow]) -> None:
    """Replaces a run's curve: the costs, then every metric that any row has; blank where a row has none."""
    metrics = sorted({name for row in rows for name in row} - set(COST_COLUMNS))
    write_atomic(path, _csv([*COST_COLUMNS, *metrics], rows))


def read_curve(path: Path) -> list[dict[str, float | None]]:
    """A run's curve; raises StudyError where the file is not one."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        found = [{name: float(text) if text else None for name, text in row.items()} for row in rows]
    except (ValueError, TypeError) as error:
        raise StudyError(f"{path}: not a run's curve ({error}); remove it") from None
    if any(row.get("step") is None for row in found):
        raise StudyError(f"{path}: not a run's curve: a row has no step; remove it")
    return found


def joined_curves(curves: Iterable[Sequence[CurveRow]]) -> list[dict[str, float | None]]:
    """The curves of runs that go on from each other as one: each begins where the one before ended."""
    found: list[dict[str, float | None]] = []
    spent: dict[str, float | None] = dict.fromkeys(COST_COLUMNS, 0.0)
    for rows in curves:
        here = [{**row, **{name: _added(spent[name], row.get(name)) for name in COST_COLUMNS}} for row in rows]
        spent = {name: here[-1][name] for name in COST_COLUMNS} if here else spent
        found += here
    return found


def write_study_curves(path: Path, study: Study, curves: Sequence[tuple[Cell, Sequence[CurveRow]]]) -> None:
    """Replaces a study's curves: one line per run and row, of its metrics those that the study draws.

    An arm may leave a metric blank in all of its runs, as a base that the others go on from. Raises StudyError where
    some runs of an arm have a metric that is to be drawn and others have not, and where no arm has it.
    """
    metrics = list(dict.fromkeys(spec.metric for spec in study.curves))
    measured = [(cell, _measured(rows)) for cell, rows in curves]
    drawn = {(cell.arm, name) for cell, known in measured for name in known}
    named = {name for _, name in drawn}
    for cell, known in measured:
        for metric in metrics:
            if metric not in known and (metric not in named or (cell.arm, metric) in drawn):
                raise StudyError(f"{study.path}: curves: {cell.key} measured no {metric!r}; {nearest(metric, known)}")
    lines: list[dict[str, Any]] = []
    for cell, rows in curves:
        place = {"arm": cell.arm, **cell.factors, "seed": cell.seed}
        lines += [{**place, **{name: row.get(name) for name in (*COST_COLUMNS, *metrics)}} for row in rows]
    write_atomic(path, _csv(["arm", *study.factors, "seed", *COST_COLUMNS, *metrics], lines))


def read_study_curves(path: Path, study: Study) -> dict[str, dict[int, list[dict[str, float | None]]]]:
    """Group (``arm`` or ``arm, factor level, ...``) -> seed -> rows, in declared order.

    Raises StudyError where there is no such file.
    """
    if not path.is_file():
        raise StudyError(f"{path}: no such file; {study.path} draws curves: run the study first, then report on it")
    groups: dict[str, dict[int, list[dict[str, float | None]]]] = {}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        levels = [f"{name} {row[name]}" for name in study.factors if row.get(name)]
        group = groups.setdefault(", ".join([row["arm"], *levels]), {})
        numbers = {name: text for name, text in row.items() if name not in ("arm", "seed", *study.factors)}
        group.setdefault(int(row["seed"]), []).append(
            {name: float(text) if text else None for name, text in numbers.items()}
        )
    return groups


def curve_name(spec: CurveSpec) -> str:
    """The name of a curve's figure, without ending: ``curve_val_accuracy_flops``."""
    return f"curve_{spec.metric.replace('/', '_').replace('@', '_')}_{spec.against}"


def steps_of(study: Study) -> str:
    """What a step of a study's curves is: of a run an optimizer's, of a whole search a trial."""
    return "trials" if study.command == "sweep" else "steps"


def curve_plot(study: Study, spec: CurveSpec, groups: Mapping[str, Mapping[int, Sequence[CurveRow]]]) -> Plot:
    """What a curve's figure shows: every seed's own line and, where all seeds of an arm have been, their mean.

    Between two measurements a line is straight. The mean's band is Student's 95 % interval over seeds. Costs are
    divided by a unit that stands in the axis' name. Rows in which the metric or the cost was not measured are left out;
    groups without any other row are named under ``unmeasured``.
    """
    column = AGAINST[spec.against]
    lines: list[dict[str, Any]] = []
    unmeasured = []
    for label, by_seed in groups.items():
        seeds = [points for rows in by_seed.values() if (points := points_of(rows, column, spec.metric))]
        if seeds:
            lines.append({"label": f"{label} (n = {len(seeds)})", "seeds": seeds, "mean": _mean(seeds)})
        else:
            unmeasured.append(label)
    largest = max((x for line in lines for points in line["seeds"] for x, _ in points), default=0.0)
    unit, prefix = next(((unit, name) for unit, name in _UNITS if largest >= unit), (1.0, ""))
    for line in lines:
        line["seeds"] = [[[x / unit, y] for x, y in points] for points in line["seeds"]]
        line["mean"] = [{**point, "x": point["x"] / unit} for point in line["mean"]]
    name = {"flops": f"{prefix}FLOP", "tokens": f"{prefix} tokens", "steps": f"{prefix} {steps_of(study)}"}
    return {
        "kind": "curves",
        "question": study.question,
        "metric": metric_title(spec.metric),
        "against": name.get(spec.against, f"{prefix}s").strip(),
        "lines": lines,
        "unmeasured": unmeasured,
    }


def _measured(rows: Iterable[CurveRow]) -> set[str]:
    """The metrics that some row has."""
    return {name for row in rows for name, value in row.items() if value is not None} - set(COST_COLUMNS)


def points_of(rows: Sequence[CurveRow], column: str, metric: str) -> list[tuple[float, float]]:
    """(cost, metric) wherever both were measured and the metric is finite, by cost."""
    pairs = [(row.get(column), row.get(metric)) for row in rows]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(y))


def _mean(seeds: Sequence[Sequence[tuple[float, float]]]) -> list[dict[str, Any]]:
    """The mean over seeds at every cost that one of them was measured at and all of them have passed."""
    if not seeds:
        return []
    low, high = max(points[0][0] for points in seeds), min(points[-1][0] for points in seeds)
    places = sorted({x for points in seeds for x, _ in points if low <= x <= high})
    if len(places) > _GRID_POINTS:
        places = [float(x) for x in np.linspace(low, high, _GRID_POINTS)]
    columns = [np.interp(places, [x for x, _ in points], [y for _, y in points]) for points in seeds]
    found = []
    for place, values in zip(places, zip(*columns, strict=True), strict=True):
        summary = asdict(summarise([float(value) for value in values]))
        found.append({"x": place, **{name: summary[name] for name in ("mean", "low", "high")}})
    return found


def _added(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Numbers so that they are read back to the last bit; blank for what is not there."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_text(row.get(name)) for name in columns] for row in rows)
    return stream.getvalue().encode()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
