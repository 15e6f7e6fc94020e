"""The tidy table: one row per declared run, written as ``results.csv``."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from research.results.record import LEDGER_FIELDS, LEDGER_PARTS, SCHEMA_VERSION, ledger_total
from research.results.study import Cell, Study, requirements

# What one run costs on its own; with the training of its teacher charged in full it is all of LEDGER_PARTS.
RUN_PARTS = ("student_update", "teacher_scoring", "rollout", "prompt_prefill")
PREFILL_COLUMNS = tuple(f"prompt_prefill_{name}" for name in LEDGER_FIELDS)
Row = dict[str, Any]


def tidy_rows(
    study: Study,
    declared: Sequence[Cell],
    records: Mapping[str, Mapping[str, Any]],
    missing: Mapping[str, str],
    preset: str | None = None,
) -> list[Row]:
    """One row per requirement, then one per cell, in declared order; a missing run has a status and no numbers.

    Columns: role, arm, the factors, seed, status, the metrics by name, ``<ledger part>_<field>``, ``run_<field>``
    (student update + teacher scoring + rollouts + their prompts), ``charged_<field>`` (the same + teacher training),
    seconds (wall time). A cost that was not measured is blank, and so is every total that would need it. Records of
    schema 1 have the prompts' passes in their rollouts and no column for them.
    """
    places = [Cell(requirement.name, {}, -1, (), requirement.key) for requirement in requirements(study, preset)]
    rows = []
    for cell in [*places, *declared]:
        record = records.get(cell.key)
        row: Row = {"role": "requirement" if cell.seed < 0 else "arm", "arm": cell.arm}
        row |= {name: cell.factors.get(name) for name in study.factors}
        row["seed"] = record["seed"] if record and cell.seed < 0 else cell.seed if cell.seed >= 0 else None
        row["status"] = "completed" if record else missing[cell.key]
        if record:
            row |= dict(sorted(record["metrics"].items()))
            row |= _costs(record["ledger"], int(record.get("schema", 1)))
            row["seconds"] = record["wall_s"]
        rows.append(row)
    return rows


def _costs(ledger: Mapping[str, Mapping[str, Any]], schema: int) -> Row:
    absent = ("prompt_prefill",) if schema == 1 else ()
    parts, of_run = ([part for part in group if part not in absent] for group in (LEDGER_PARTS, RUN_PARTS))
    costs: Row = {f"{part}_{name}": ledger_total(ledger, name, [part]) for part in parts for name in LEDGER_FIELDS}
    costs |= {f"run_{name}": ledger_total(ledger, name, of_run) for name in LEDGER_FIELDS}
    return costs | {f"charged_{name}": ledger_total(ledger, name, parts) for name in LEDGER_FIELDS}


def table_columns(study: Study, rows: Sequence[Row]) -> list[str]:
    """The column order: place, status, metrics in alphabetical order, costs, seconds."""
    place = ["role", "arm", *study.factors, "seed", "status"]
    schema = SCHEMA_VERSION if any(PREFILL_COLUMNS[0] in row for row in rows) else 1
    costs = [*_costs({}, schema), "seconds"]
    metrics = {name for row in rows for name in row} - {*place, *costs}
    return [*place, *sorted(metrics), *costs]


def csv_bytes(columns: Sequence[str], rows: Sequence[Row]) -> bytes:
    """The table as UTF-8 CSV: ten significant digits, blank for what is not there; equal rows give equal bytes."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_text(row.get(name)) for name in columns] for row in rows)
    return stream.getvalue().encode()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
