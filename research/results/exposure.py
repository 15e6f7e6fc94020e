"""``exposure.csv`` of a study: how far students are from their teacher at every place of a completion."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from research.results.fields import StudyError
from research.results.record import write_atomic
from research.results.statistics import summarise
from research.results.study import Cell, Study

EXPOSURE_FILE = "exposure.csv"
DISTANCES = ("forward_kl", "reverse_kl")
COLUMNS = ("writer", "place", "tokens", *DISTANCES)
LEAST_SHARE = 0.1
ByWriter = dict[str, list[dict[str, Any]]]


def write_study_exposure(path: Path, study: Study, runs: Sequence[tuple[Cell, Mapping[str, Sequence[Any]]]]) -> None:
    """Replaces the file: one line per run, writer and place, as the run measured it; nats in eight digits.

    The columns are those of ``research.evaluation.exposure.Exposure.places``. Where no run measured it there is no
    file.
    """
    if not runs:
        path.unlink(missing_ok=True)
        return
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", *study.factors, "seed", *COLUMNS])
    for cell, columns in runs:
        place = [cell.arm, *(cell.factors.get(name, "") for name in study.factors), cell.seed]
        for row in zip(*(columns[name] for name in COLUMNS), strict=True):
            named = dict(zip(COLUMNS, row, strict=True))
            writer.writerow([*place, *(f"{v:.8g}" if name in DISTANCES else v for name, v in named.items())])
    write_atomic(path, stream.getvalue().encode())


def exposure_by_place(
    path: Path, study: Study, distance: str = "forward_kl", least_share: float = LEAST_SHARE
) -> dict[str, ByWriter]:
    """Group (``arm`` or ``arm, factor level, ...``) -> who wrote the prefix -> one point per place, from 0.

    A point holds place, and mean, low and high of the distance over seeds: Student's 95 % interval, None for one seed.

    distance     forward_kl, KL(teacher || student), or reverse_kl, KL(student || teacher), of the next token; nats
    least_share  places that a smaller share of the completions reaches in some seed are left out: few words, all long

    Raises StudyError where there is no such file, ValueError for another distance.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r}: expected one of {', '.join(DISTANCES)}")
    if not path.is_file():
        raise StudyError(f"{path}: no such file; it is written for runs with evaluation.exposure=true, run the study")
    groups: dict[str, dict[str, dict[int, dict[int, tuple[int, float]]]]] = {}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        levels = [f"{name} {row[name]}" for name in study.factors if row.get(name)]
        by_writer = groups.setdefault(", ".join([row["arm"], *levels]), {})
        places = by_writer.setdefault(row["writer"], {}).setdefault(int(row["place"]), {})
        places[int(row["seed"])] = int(row["tokens"]), float(row[distance])
    return {
        group: {writer: _points(places, least_share) for writer, places in by_writer.items()}
        for group, by_writer in groups.items()
    }


def _points(places: Mapping[int, Mapping[int, tuple[int, float]]], least_share: float) -> list[dict[str, Any]]:
    """place -> seed -> (tokens, distance), as points; every completion has a first place."""
    written = {seed: tokens for seed, (tokens, _) in places[0].items()}
    points = []
    for place, by_seed in sorted(places.items()):
        if any(by_seed.get(seed, (0, 0.0))[0] < least_share * total for seed, total in written.items()):
            continue
        summary = asdict(summarise([distance for _, distance in by_seed.values()]))
        points.append({"place": place, **{name: summary[name] for name in ("mean", "low", "high")}})
    return points
