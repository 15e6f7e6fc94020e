"""``build_report``: everything a reader sees of a study, rebuilt from its committed records alone, byte for byte."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from research.results.collect import ITEMS_FILE, RECORDS_FILE, CommittedRuns, read_committed, results_folder
from research.results.comparison import (
    HOLDS,
    INCONCLUSIVE,
    LEVEL,
    TWO_SIDED,
    Comparison,
    compare,
    level_of,
    resampled_operands,
    verdict_for,
)
from research.results.comparison_spec import ComparisonSpec
from research.results.curve_figure import curve_files, write_curve_figures
from research.results.curves import CURVES_FILE
from research.results.figure import write_figure
from research.results.items import read_study_items
from research.results.panel import Panel
from research.results.plot import plot_of, summaries
from research.results.readme import new_readme, results_block, sentence_for, with_results
from research.results.record import json_ready, write_changed
from research.results.statistics import ArmSummary, holm, summarise
from research.results.study import Study, cells
from research.results.study_file import read_study
from research.results.table import csv_bytes, table_columns, tidy_rows

OUTPUT_FILES = ("figure.svg", "figure.png", "results.csv", "verdict.json", "README.md")
STAMP_FILE = "report.sha256"
VERDICT_KEYS = (
    "study", "claim", "verdict", "reason", "metric", "arms", "requires", "comparison", "secondary", "published",
    "command", "revision", "seconds", "missing",
)  # fmt: skip


def study_command(study: Study, preset: str | None = None) -> str:
    """The command line that runs the study, given where ``experiments/`` lies, or what else its folder lies in."""
    folder = study.path.parent.resolve()
    return f"distill study {folder.parent.name}/{folder.name}" + (f" preset={preset}" if preset else "")


def build_report(study_dir: str | Path, preset: str | None = None) -> dict[str, Path]:
    """Writes results.csv, verdict.json, figure.svg, figure.png and the results block of README.md; returns their paths.

    Where nothing changed since, files, code and results alike (their hash is in report.sha256), nothing is made again.

    Reads study.yaml, records.jsonl, items.parquet and, where the study draws curves, curves.csv, and nothing else: no
    clock, no machine, no run directory. Raises StudyError for a study or records that cannot be used.
    """
    study = read_study(study_dir)
    folder = results_folder(study, preset)
    paths = {name: folder / name for name in (*OUTPUT_FILES, *curve_files(study))}
    stamp = folder / STAMP_FILE
    committed = [folder / name for name in (RECORDS_FILE, ITEMS_FILE, *([CURVES_FILE] if study.curves else []))]
    inputs = [study.path, *committed, *sorted(Path(__file__).parent.glob("*.py"))]
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == _stamp([*inputs, *paths.values()]):
        return paths
    _rebuild(study, folder, preset)
    write_changed(stamp, _stamp([*inputs, *paths.values()]).encode())
    return paths


def _stamp(files: Iterable[Path]) -> str:
    """One sha256 over what a report is made from, what makes it, and what it left; absent files count as absent."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else b"absent"
        digest.update(f"{file.name}:{hashlib.sha256(content).hexdigest()};".encode())
    return digest.hexdigest() + "\n"


def _rebuild(study: Study, folder: Path, preset: str | None) -> None:
    runs = read_committed(study, preset)
    panel = _panel(study, runs, folder / ITEMS_FILE, preset)
    arms = summaries(panel, study.metric)
    rows = tidy_rows(study, panel.cells, runs.records, runs.missing, preset)
    primary = compare(study.comparison, panel)
    others = {name: compare(spec, panel) for name, spec in study.secondary.items()}
    held = {name: judge(spec, others[name])[0] == HOLDS for name, spec in study.secondary.items()}
    verdict, reason = judge(study.comparison, primary, held=held)
    secondary, lines = _secondary(study, others, held)
    sentence = sentence_for(study.comparison, primary, verdict, reason)
    content = {
        "study": study.name,
        "claim": study.claim,
        "verdict": verdict,
        "reason": reason,
        "metric": study.metric,
        "arms": {name: arm_entry(summary) for name, summary in arms.items()},
        "comparison": comparison_entry(primary) | {"level": level_of(study.comparison.kind)},
        "secondary": secondary,
        **_provenance(study, runs, preset),
    }
    write_figure(folder, plot_of(study, panel, verdict, sentence))
    write_curve_figures(folder, study)
    write_changed(folder / "results.csv", csv_bytes(table_columns(study, rows), rows))
    write_changed(folder / "verdict.json", verdict_bytes(content))
    block = results_block(study, content, sentence, lines, arms, rows)
    _write_readme(folder / "README.md", study, study_command(study, preset), block)


def _panel(study: Study, runs: CommittedRuns, items_path: Path, preset: str | None) -> Panel:
    items = read_study_items(items_path) if items_path.is_file() else None
    panel = Panel(cells(study, preset), runs.records, items)
    panel.resample_only(resampled_operands([study.comparison, *study.secondary.values()], panel))
    return panel


def _provenance(study: Study, runs: CommittedRuns, preset: str | None) -> dict[str, Any]:
    """What the numbers stand on; ``seconds`` is the wall time of all runs that left a record, requirements included."""
    return {
        "requires": _requires(study, runs),
        "published": dict(study.published),
        "command": study_command(study, preset),
        "revision": revision_of(runs.records.values()),
        "seconds": rounded(runs.seconds),
        "missing": [{"cell": key, "reason": reason} for key, reason in runs.missing.items()],
    }


def judge(
    spec: ComparisonSpec, result: Comparison, p_value: float | None = None, held: Mapping[str, bool] | None = None
) -> tuple[str, str]:
    """The verdict on a comparison and its reason.

    p_value  Holm's: what holds by a p of its own, and not by this one, does not hold
    held     name of a secondary comparison -> whether it holds by itself: one that must and does not leaves this
             comparison without a verdict
    """
    if spec.only_if and held is not None and not held[spec.only_if]:
        return INCONCLUSIVE, f"it counts only where {spec.only_if} holds, and that does not"
    verdict, reason = verdict_for(
        spec.kind,
        low=result.low,
        high=result.high,
        p_value=result.p_value,
        n=result.n,
        threshold=spec.threshold,
        margin=spec.margin,
        missing=len(result.missing),
    )
    if verdict == HOLDS and p_value is not None and p_value >= LEVEL and spec.kind in (*TWO_SIDED, "best_level"):
        return INCONCLUSIVE, "Holm p is not below .05"
    return verdict, reason


def _secondary(
    study: Study, results: Mapping[str, Comparison], held: Mapping[str, bool]
) -> tuple[dict[str, Any], list[str]]:
    """The secondary comparisons for verdict.json, judged by Holm-adjusted p, and a line of text for each."""
    adjusted = holm({name: result.p_value for name, result in results.items()})
    entries, lines = {}, []
    conditions = {spec.only_if for spec in (study.comparison, *study.secondary.values())}
    for name, spec in study.secondary.items():
        verdict, reason = judge(spec, results[name], adjusted[name], held)
        head = {"verdict": verdict, "reason": reason, "metric": spec.metric, "kind": spec.kind}
        entries[name] = head | comparison_entry(results[name]) | {"p_holm": rounded(adjusted[name])}
        holm_text = f" Holm p = {adjusted[name]:.3g}." if adjusted[name] is not None else ""
        if held[name] and verdict != HOLDS and name in conditions:
            holm_text += " As a condition of another comparison it is judged by itself, and holds."
        lines.append(f"{name}: **{verdict}**. {sentence_for(spec, results[name], verdict, reason)}{holm_text}")
    return entries, lines


def arm_entry(summary: ArmSummary | None) -> dict[str, Any]:
    """{mean, sd, n, values}: sample SD, None for a single seed; values in seed order."""
    if summary is None:
        return {"mean": None, "sd": None, "n": 0, "values": []}
    values = [rounded(value) for value in summary.values]
    return {"mean": rounded(summary.mean), "sd": rounded(summary.sd), "n": summary.n, "values": values}


def comparison_entry(result: Comparison) -> dict[str, Any]:
    """{estimate, low, high, p_value, test}, and what is needed to read them: n, smallest_p, unit."""
    return {
        "estimate": rounded(result.estimate),
        "low": rounded(result.low),
        "high": rounded(result.high),
        "p_value": rounded(result.p_value),
        "test": result.test,
        "n": result.n,
        "smallest_p": rounded(result.smallest_p),
        "unit": result.unit,
    }


def _requires(study: Study, runs: CommittedRuns) -> dict[str, Any]:
    found = {}
    for name in study.requires:
        metrics = runs.records.get(f"requires/{name}", {}).get("metrics", {})
        if study.metric in metrics:
            found[name] = arm_entry(summarise([metrics[study.metric]]))
    return found


def revision_of(records: Iterable[Mapping[str, Any]]) -> str:
    """The commit the runs were made at, ``+dirty`` where files differed from it; several are joined by commas."""
    names = set()
    for record in records:
        revision = record.get("revision") or {}
        names.add(f"{revision.get('commit') or 'unknown'}{'+dirty' if revision.get('dirty') else ''}")
    return ", ".join(sorted(names)) or "unknown"


def rounded(value: float | None) -> float | None:
    """Eight significant digits, so that a last bit that differs between machines is not written."""
    return None if value is None else float(f"{value:.8g}")


def verdict_bytes(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(
        json_ready({key: content[key] for key in VERDICT_KEYS}), indent=1, ensure_ascii=False, allow_nan=False
    )
    return f"{text}\n".encode()


def _write_readme(path: Path, study: Study, command: str, block: str) -> None:
    text = path.read_text(encoding="utf-8") if path.is_file() else new_readme(study, command)
    write_changed(path, with_results(text, block, path).encode())
