"""What the figure shows, as plain numbers: small enough to hash, so that an unchanged figure is not drawn again."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from research.results.comparison_spec import ComparisonSpec, number_of
from research.results.panel import Panel
from research.results.statistics import ArmSummary, summarise
from research.results.study import Study

Plot = dict[str, Any]
_METRIC_TITLES = {
    "nll": "negative log-likelihood (nats)",
    "ece": "expected calibration error",
    "brier": "Brier score",
    "agreement": "agreement with the teacher",
}


def summaries(panel: Panel, metric: str) -> dict[str, ArmSummary | None]:
    """Group (``arm`` or ``arm/factor=level,...``) -> the metric over its completed seeds; None without one.

    An arm that was not measured so at all, as one that others go on from, has none; raises StudyError where some of its
    runs have the metric and others have not, and where no run has it.
    """
    groups: dict[str, list[str]] = {}
    for cell in panel.cells:
        groups.setdefault(cell.key.rpartition("/")[0], []).extend([cell.key] if cell.key in panel.records else [])
    measured = {name for name, keys in groups.items() for key in keys if metric in panel.records[key]["metrics"]}
    values = {
        name: [panel.metric(key, metric) for key in keys] if name in measured or not measured else []
        for name, keys in groups.items()
    }
    return {name: summarise(found) if found else None for name, found in values.items()}


def plot_of(study: Study, panel: Panel, verdict: str, sentence: str) -> Plot:
    """A strip plot (a row of dots per arm); with three or more numeric levels of a factor, lines over that factor.

    Drawn is the metric that the verdict is about, the primary comparison's, which need not be the study's own.
    """
    spec = study.comparison
    axis = next(iter(_by_length(study, panel)), None)
    return {
        "question": study.question,
        "verdict": verdict,
        "sentence": sentence,
        "metric": metric_title(spec.metric),
        "better": _better(spec),
        "references": _references(study, panel),
        **(_lines(study, panel, axis) if axis else _strip(study, panel)),
    }


def metric_title(metric: str) -> str:
    """As an axis names it: split and metric, or what a search has found."""
    split, _, name = metric.partition("/")
    if split == "search":
        return "best value that the search found" if name == "best" else f"{name} that the search found"
    return f"{split} {_METRIC_TITLES.get(name, name.replace('_', ' '))}"


def _better(spec: ComparisonSpec) -> str:
    """Which way is better; empty for a setting that a search has found."""
    if spec.metric.startswith("search/") and spec.metric != "search/best":
        return ""
    return "lower is better" if spec.lower_is_better else "higher is better"


def _roles(study: Study) -> dict[str, str]:
    """arm -> 'reference' or 'treatment' where it plays that part in the primary comparison."""
    parts = {"baseline": "reference", "worst": "reference", "before": "reference", "treatment": "treatment",
             "treated": "treatment", "after": "treatment", "arm": "treatment"}  # fmt: skip
    return {operand.arm: parts[role] for role, operand in study.comparison.operands if role in parts and operand.arm}


def _by_length(study: Study, panel: Panel) -> list[str]:
    """Factors with at least three numeric levels in use, the one with most levels first."""
    used = {name: {cell.factors[name] for cell in panel.cells if name in cell.factors} for name in study.factors}
    numeric = [name for name, labels in used.items() if len(labels) >= 3 and None not in map(number_of, labels)]
    return sorted(numeric, key=lambda name: -len(used[name]))


def _references(study: Study, panel: Panel) -> list[Plot]:
    found = []
    for name in study.requires:
        key = f"requires/{name}"
        if key in panel.records and study.comparison.metric in panel.records[key]["metrics"]:
            found.append({"label": name, "value": panel.metric(key, study.comparison.metric)})
    return found


def _published(study: Study) -> Mapping[str, Any]:
    """Published numbers of arms, which are of the study's own metric."""
    given = study.published.get("arms")
    return given if isinstance(given, Mapping) and study.comparison.metric == study.metric else {}


def _strip(study: Study, panel: Panel) -> Plot:
    roles, published = _roles(study), _published(study)
    rows = []
    for key, summary in summaries(panel, study.comparison.metric).items():
        arm, _, levels = key.partition("/")
        given = published.get(key, published.get(arm) if not levels else None)
        number = float(given) if isinstance(given, int | float) else None
        shown = asdict(summary) if summary else None
        label = f"{arm}, {levels.replace('=', ' ').replace(',', ', ')}" if levels else arm
        rows.append({"label": label, "role": roles.get(arm, "other"), "summary": shown, "published": number})
    return {"kind": "strip", "rows": rows}


def _lines(study: Study, panel: Panel, axis: str) -> Plot:
    """One panel per combination of the other factors, one line per arm; an arm without the factor is a level line."""
    roles = _roles(study)
    panels: dict[str, dict[str, dict[str | None, list[str]]]] = {}
    for cell in panel.cells:
        others = ", ".join(f"{name} {label}" for name, label in sorted(cell.factors.items()) if name != axis)
        lines = panels.setdefault(others, {})
        points = lines.setdefault(cell.arm, {})
        points.setdefault(cell.factors.get(axis), []).append(cell.key)
    shown = []
    for title, lines in panels.items():
        drawn = []
        for arm, points in lines.items():
            drawn.append({"label": arm, "role": roles.get(arm, "other"), "points": _points(study, panel, points)})
        shown.append({"title": title, "lines": drawn})
    return {"kind": "lines", "axis": axis, "panels": shown}


def _points(study: Study, panel: Panel, points: Mapping[str | None, list[str]]) -> list[Plot]:
    found = []
    for label, keys in points.items():
        ran = [key for key in keys if key in panel.records]
        is_measured = any(study.comparison.metric in panel.records[key]["metrics"] for key in ran)
        values = [panel.metric(key, study.comparison.metric) for key in ran] if is_measured else []
        if values:
            found.append(
                {"x": None if label is None else float(label), "label": label, "summary": asdict(summarise(values))}
            )
    return sorted(found, key=lambda point: (point["x"] is None, point["x"] or 0.0))
