"""From run directories to the two files a study commits: ``records.jsonl`` and ``items.parquet``."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from research.results.curves import CURVES_FILE, CurveRow, read_curve, write_study_curves
from research.results.exposure import EXPOSURE_FILE, write_study_exposure
from research.results.fields import StudyError
from research.results.items import pack_items, read_items, write_study_items
from research.results.record import RunRecord, json_ready, read_record, write_atomic
from research.results.study import Cell, Study, cells, requirements

log = logging.getLogger(__name__)
REQUIREMENTS = "requires"
RECORDS_FILE, ITEMS_FILE = "records.jsonl", "items.parquet"
NOT_RUN = "not run"
EXPOSURE = "exposure/test"  # the artifact of runs with evaluation.exposure=true
TRIMMED_KEYS = (
    "schema", "command", "experiment", "status", "reason", "seed", "config_hash", "overrides", "versions",
    "revision", "hardware", "started_at", "wall_s", "metrics", "ledger", "data", "student", "teacher",
)  # fmt: skip
# an absolute path inside a text; not the slash of test/errors, not that of a URL
_ABSOLUTE = re.compile(r"(?<![\w./>}])/(?:[^\s/,;'\"=\[\]{}()]+/)*([^\s/,;'\"=\[\]{}()]+)")


@dataclass(frozen=True)
class Collected:
    """What :func:`collect` found: keys of completed runs, and for every other declared run why it is not there."""

    completed: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def count_by_reason(self) -> dict[str, int]:
        """How many runs are missing for each status or reason, most frequent first."""
        counts: dict[str, int] = {}
        for reason in self.missing.values():
            status = reason.partition(":")[0]
            counts[status] = counts.get(status, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def results_folder(study: Study, preset: str | None = None) -> Path:
    """Where the results of a study lie: its own folder, or a folder of the preset's name below it."""
    return study.path.parent / preset if preset else study.path.parent


def collect(
    study: Study,
    runs_dir: str | Path,
    preset: str | None = None,
    requirement_dirs: Mapping[str, str | Path] | None = None,
) -> Collected:
    """Gathers ``runs_dir/<cell key>/run.json`` and items of every declared run into the study's results folder.

    Requirements are looked for in ``requirement_dirs[name]``, else in ``runs_dir/requires/<name>``. Completed runs
    leave a trimmed record without machine paths; failed and preempted ones leave only their status, reason and wall
    time, so that a later report can count them. Lines stand in declared order, so the same runs give the same bytes.
    Raises StudyError where a run directory holds the run of another seed.
    """
    places = _places(study, Path(runs_dir), preset, requirement_dirs or {})
    known = _known(Path(runs_dir), places)
    lines: list[str] = []
    completed: list[str] = []
    missing: dict[str, str] = {}
    items: dict[str, dict[str, np.ndarray]] = {}
    curves: list[tuple[Cell, Sequence[CurveRow]]] = []
    exposures: list[tuple[Cell, Mapping[str, Any]]] = []
    split = study.metric.partition("/")[0]
    for cell, folder in places:
        record, reason = _look(folder)
        if record is None:
            missing[cell.key] = reason
            continue
        if cell.seed >= 0 and record.seed != cell.seed:
            raise StudyError(f"{folder}: holds a run with seed {record.seed}; the cell {cell.key} is seed {cell.seed}")
        lines.append(_line(cell, record, known))
        if record.status != "completed":
            missing[cell.key] = portable(f"{record.status}: {record.reason}", known)
            continue
        completed.append(cell.key)
        columns = _items(folder, record, split)
        if columns is not None:
            items[cell.key] = columns
        if study.curves and cell.seed >= 0:
            curves.append((cell, _curve(study, cell, folder, record)))
        if EXPOSURE in record.artifacts and cell.seed >= 0:
            exposures.append((cell, read_items(folder / record.artifacts[EXPOSURE])))
    if study.curves:
        results_folder(study, preset).mkdir(parents=True, exist_ok=True)
        write_study_curves(results_folder(study, preset) / CURVES_FILE, study, curves)
    _write(results_folder(study, preset), lines, split, _comparable(study, items))
    write_study_exposure(results_folder(study, preset) / EXPOSURE_FILE, study, exposures)
    return Collected(tuple(completed), missing)


def _places(
    study: Study, runs_dir: Path, preset: str | None, requirement_dirs: Mapping[str, str | Path]
) -> list[tuple[Cell, Path]]:
    """Every declared run and its directory; a requirement is a cell with seed -1: it may have been run with any."""
    places = []
    for requirement in requirements(study, preset):
        cell = Cell(requirement.name, {}, -1, (), requirement.key)
        places.append((cell, Path(requirement_dirs.get(requirement.name, runs_dir / requirement.key))))
    return places + [(cell, runs_dir / cell.key) for cell in cells(study, preset)]


def _known(runs_dir: Path, places: list[tuple[Cell, Path]]) -> dict[str, str]:
    """Absolute directory -> the placeholder that stands for it in a committed record."""
    pairs = [(runs_dir, "{runs}")]
    pairs += [(folder, f"{{requires.{cell.arm}}}") for cell, folder in places if cell.seed < 0]
    return {str(path): name for folder, name in pairs for path in (folder.absolute(), folder.resolve())}


def _comparable(study: Study, items: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Mapping[str, np.ndarray]]:
    """The items of all runs, but for requirements that no comparison names and that were scored on other ones."""
    operands = [operand for spec in (study.comparison, *study.secondary.values()) for _, operand in spec.operands]
    named = {f"{REQUIREMENTS}/{operand.requirement}" for operand in operands if operand.requirement}
    of_arms = next((columns["index"] for key, columns in items.items() if not key.startswith(f"{REQUIREMENTS}/")), None)
    kept: dict[str, Mapping[str, np.ndarray]] = {}
    for key, columns in items.items():
        is_free = key.startswith(f"{REQUIREMENTS}/") and key not in named and of_arms is not None
        if is_free and set(columns["index"].tolist()) != set(np.asarray(of_arms).tolist()):
            log.warning(
                "%s was scored on other items than the arms and is in no comparison: its items are left out", key
            )
        else:
            kept[key] = columns
    return kept


def _write(folder: Path, lines: list[str], split: str, items: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if items:
        write_study_items(folder / ITEMS_FILE, pack_items(split, items))
    else:
        (folder / ITEMS_FILE).unlink(missing_ok=True)
    write_atomic(folder / RECORDS_FILE, "".join(lines).encode())


def _look(folder: Path) -> tuple[RunRecord | None, str]:
    path = folder / "run.json"
    if not path.is_file():
        return None, "stopped before its record was written" if folder.is_dir() else NOT_RUN
    try:
        return read_record(path), ""
    except (ValueError, TypeError) as error:
        return None, f"unreadable record: {portable(str(error), {str(folder): '{run}'})}"


def _line(cell: Cell, record: RunRecord, known: Mapping[str, str]) -> str:
    place = {"arm": cell.arm, "factors": dict(cell.factors), "seed": record.seed, "key": cell.key}
    keys = TRIMMED_KEYS if record.status == "completed" else ("status", "reason", "wall_s")
    trimmed = {key: portable(getattr(record, key), known) for key in keys}
    return json.dumps({"cell": place, "record": json_ready(trimmed)}, allow_nan=False) + "\n"


def portable(value: Any, known: Mapping[str, str]) -> Any:
    """A copy without machine paths: known directories as their placeholder, other absolute ones as ``<path>/name``."""
    if isinstance(value, str):
        for directory in sorted(known, key=len, reverse=True):
            value = re.sub(re.escape(directory) + r"(?![\w.-])", known[directory], value)
        return _ABSOLUTE.sub(r"<path>/\1", value)
    if isinstance(value, Mapping):
        return {key: portable(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item, known) for item in value]
    return value


def _curve(study: Study, cell: Cell, folder: Path, record: RunRecord) -> Sequence[CurveRow]:
    name = record.artifacts.get("curve")
    if name is None:
        raise StudyError(
            f"{study.path}: curves: {cell.key} left no curve; run it again, it was made before there were any"
        )
    return read_curve(folder / name)


def _items(folder: Path, record: RunRecord, split: str) -> dict[str, np.ndarray] | None:
    name = record.artifacts.get(f"items/{split}")
    return read_items(folder / name) if name else None


@dataclass(frozen=True)
class CommittedRuns:
    """The content of ``records.jsonl``: completed records by key, and status and reason of the others."""

    records: Mapping[str, Mapping[str, Any]]
    missing: Mapping[str, str]
    seconds: float


def read_committed(study: Study, preset: str | None = None) -> CommittedRuns:
    """Raises StudyError where the file is absent or malformed, or holds a run that the study does not declare."""
    path = results_folder(study, preset) / RECORDS_FILE
    if not path.is_file():
        raise StudyError(f"{path}: no such file; run the study first, then report on it")
    declared = [requirement.key for requirement in requirements(study, preset)] + [c.key for c in cells(study, preset)]
    records: dict[str, Mapping[str, Any]] = {}
    missing: dict[str, str] = dict.fromkeys(declared, NOT_RUN)
    seconds, seen = 0.0, set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            key, record = content["cell"]["key"], content["record"]
            status, wall_s = record["status"], float(record["wall_s"])
            if status == "completed":
                metrics = {name: float(value) for name, value in record["metrics"].items()}
                record = {**record, "metrics": metrics}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(
                f"{path}: line {number} is not a run's record ({error!r}); collect the runs again"
            ) from error
        if key not in declared or key in seen:
            raise StudyError(
                f"{path}: line {number} is {key!r}, which study.yaml does not declare or which stands there twice; "
                "collect the runs again"
            )
        seen.add(key)
        seconds += wall_s
        if status == "completed":
            records[key] = record
            del missing[key]
        else:
            missing[key] = f"{status}: {record.get('reason')}"
    return CommittedRuns(records, missing, seconds)
