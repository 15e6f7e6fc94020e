"""The words of a result: one sentence for the verdict, and the block between the markers of a study's README."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.results.bootstrap import DRAWS
from research.results.comparison import INCONCLUSIVE, Comparison, level_of
from research.results.comparison_spec import ComparisonSpec
from research.results.curves import curve_name, steps_of
from research.results.fields import StudyError
from research.results.statistics import ArmSummary
from research.results.study import Study
from research.results.table import Row

SIZED = ("difference", "equivalence", "interaction")  # told as a size above 0: above or below, better or worse
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def sentence_for(spec: ComparisonSpec, result: Comparison, verdict: str, reason: str) -> str:
    """What was found, with its interval, p, number of seeds and, where it matters, the smallest p they can give."""
    if result.estimate is None:
        lacking = "the baseline gains nothing" if spec.kind == "gain_ratio" else "the gap to be shared is not above 0"
        found = "nothing to compare" if not result.n else lacking
        return f"{found} ({reason})." if reason else f"{found}."
    interval = ""
    if result.low is not None or result.high is not None:
        show = (lambda x: "-" if x is None else f"{x:.0%}") if spec.kind == "share" else number
        low, high = result.low, result.high
        if spec.kind in SIZED and result.estimate < 0:  # the sentence tells the size, and the direction in a word
            low, high = (None if end is None else -end for end in (high, low))
        interval = f" ({100 * level_of(spec.kind):.0f} % interval {show(low)} to {show(high)})"
    what = "share of resamples against it" if spec.kind == "best_level" else "p"
    tail = f"{p_text(result, what)}, {result.n} paired seed{'s' if result.n != 1 else ''}"
    ending = f"; {reason}" if verdict == INCONCLUSIVE and reason else ""
    return f"{_finding(spec, result.estimate)}{interval}, {tail}{ending}."


def _finding(spec: ComparisonSpec, estimate: float) -> str:
    name = {role: operand.name for role, operand in spec.operands}
    own = {role: operand.metric or spec.metric for role, operand in spec.operands}
    if spec.kind != "ratio" and len(set(own.values())) > 1:  # splits of one name, or two names
        usual = spec.metric if spec.kind == "share" else None
        name = {role: name[role] + (f" ({own[role]})" if own[role] != usual else "") for role in name}
    where = {role: "".join(f", {k} {v}" for k, v in operand.where) for role, operand in spec.operands}
    metric = _words(spec.metric)
    if spec.kind in ("difference", "equivalence"):
        metric = _words(own["treatment"])
        fewer = (estimate >= 0) == spec.lower_is_better
        place = where["treatment"] if where["treatment"] == where["baseline"] else ""
        mine, other = name["treatment"], name["baseline"]
        if not place and where["treatment"] != where["baseline"]:
            mine, other = mine + where["treatment"], other + where["baseline"]
        return f"{metric} of {mine} {number(abs(estimate))} {'below' if fewer else 'above'} {other}{place}"
    if spec.kind == "interaction":
        more = f"{spec.group} {spec.high_group} than at {spec.group} {spec.low_group}"
        gain = f"{'better' if estimate >= 0 else 'worse'} than {name['baseline']} by {number(abs(estimate))} more"
        return f"in {metric}, {name['treatment']} is {gain} at {more}"
    if spec.kind == "share":
        return f"{name['treated']} closes {estimate:.0%} of the gap in {metric} from {name['worst']} to {name['best']}"
    if spec.kind == "gain_ratio":
        gain = f"the gain of {name['treatment']} over {name['start']} in {metric}"
        return f"{gain} is {number(estimate)} times that of {name['baseline']}"
    if spec.kind == "ratio":
        if own["before"] == own["after"]:
            return f"{metric} of {name['before']} {number(estimate)} times those of {name['after']}"
        return f"{own['before']} of {name['before']} {number(estimate)} times {own['after']} of {name['after']}"
    if spec.kind == "best_level":
        return (
            f"best {spec.factor} at {spec.group} {spec.high_group} minus best at {spec.group} {spec.low_group}: "
            f"{number(estimate)}"
        )
    per = f"doubling of {spec.factor}" if spec.scale == "log2" else f"unit of {spec.factor}"
    return f"{metric} of {name['arm']} {spec.expected} by {number(estimate)} per {per}"


def _words(metric: str) -> str:
    """A metric's name without its split, as it is read."""
    return metric.partition("/")[2].replace("_", " ")


def p_text(result: Comparison, what: str = "p") -> str:
    """``p = 0.0312 (smallest possible 0.0312)``; without the bracket where no smallest p is defined."""
    if result.p_value is None:
        return "no p"
    smallest = f" (smallest possible {result.smallest_p:.3g})" if result.smallest_p is not None else ""
    if result.p_value == 0:  # a share of resamples can be 0; what it stands for cannot
        return f"{what} < {1 / DRAWS:.3g}"
    return f"{what} = {result.p_value:.3g}{smallest}"


def number(value: float | None) -> str:
    """Four significant digits; a dash for what does not exist."""
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def results_block(
    study: Study,
    verdict: Mapping[str, Any],
    sentence: str,
    secondary: Sequence[str],
    arms: Mapping[str, ArmSummary | None],
    rows: Sequence[Row],
) -> str:
    """The text between the markers: figure, verdict, table, secondary comparisons, published numbers, missing runs."""
    lines = [f"![{study.question}](figure.svg)", "", f"**{verdict['verdict']}** ({study.claim}): {sentence}", ""]
    lines += [*_arms_table(study, arms, rows), ""]
    if secondary:
        lines += ["Secondary comparisons (p by Holm over this family):", "", *(f"* {line}" for line in secondary), ""]
    if study.published:
        lines += ["Published:", "", *(f"* {name}: {_plain(value)}" for name, value in study.published.items()), ""]
    missing = verdict["missing"]
    if missing:
        lines += [f"Missing runs ({len(missing)}):", ""]
        lines += [f"* `{entry['cell']}`: {entry['reason']}" for entry in missing] + [""]
    for spec in study.curves:
        against = steps_of(study) if spec.against == "steps" else spec.against
        lines += [f"![{spec.metric} against {against}]({curve_name(spec)}.svg)", ""]
    completed = sum(row["status"] == "completed" for row in rows)
    lines.append(
        f"{completed} runs, {verdict['seconds'] / 60:.1f} minutes in all, revision {verdict['revision']}. "
        f"Made by `{verdict['command']}`; rebuilt from the committed records by `distill report`."
    )
    return "\n".join(lines)


def _arms_table(study: Study, arms: Mapping[str, ArmSummary | None], rows: Sequence[Row]) -> list[str]:
    """One line per arm; a cost is blank unless every one of its completed runs measured it."""
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "completed":
            by_group.setdefault(_group(study, row), []).append(row)
    head = (
        "arm",
        "seeds",
        study.metric,
        "95 % interval",
        "SD",
        "seconds per run",
        "TFLOP per run",
        "TFLOP with teacher",
    )
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for key, summary in arms.items():
        found = by_group.get(key, [])
        if summary is None:
            costs = _cost_cells(found) if found else " |  | "
            lines.append(f"| {key} | {len(found)} |  |  |  | {costs} |")
            continue
        interval = f"[{number(summary.low)}, {number(summary.high)}]" if summary.low is not None else ""
        sd = number(summary.sd) if summary.sd is not None else ""
        lines.append(f"| {key} | {summary.n} | {number(summary.mean)} | {interval} | {sd} | {_cost_cells(found)} |")
    for row in rows:
        if row["role"] == "requirement" and row.get(study.metric) is not None:
            lines.append(
                f"| *{row['arm']}* (required) | 1 | {number(row[study.metric])} |  |  | {_cost_cells([row])} |"
            )
    return lines


def _cost_cells(rows: Sequence[Row]) -> str:
    columns = (("seconds", 1.0), ("run_flops", 1e12), ("charged_flops", 1e12))
    return " | ".join(_mean(rows, column, unit) for column, unit in columns)


def _group(study: Study, row: Row) -> str:
    levels = ",".join(f"{name}={row[name]}" for name in sorted(study.factors) if row.get(name) is not None)
    return f"{row['arm']}/{levels}" if levels else str(row["arm"])


def _mean(rows: Sequence[Row], column: str, unit: float) -> str:
    values = [row[column] for row in rows]
    if not values or any(value is None for value in values):
        return ""
    return f"{sum(values) / len(values) / unit:.3g}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def with_results(text: str, block: str, path: Path) -> str:
    """``text`` with the block between its markers; appended with markers where it has none.

    Raises StudyError naming ``path`` where the markers do not stand once each, in order.
    """
    counts = text.count(BEGIN), text.count(END)
    if counts == (0, 0):
        return f"{text.rstrip()}\n\n{BEGIN}\n{block}\n{END}\n"
    start, stop = text.find(BEGIN), text.find(END)
    if counts != (1, 1) or stop < start:
        raise StudyError(f"{path}: expected one {BEGIN} before one {END}; found {counts[0]} and {counts[1]}")
    return f"{text[: start + len(BEGIN)]}\n{block}\n{text[stop:]}"


def new_readme(study: Study, command: str) -> str:
    """The start of a README for a study that has none."""
    arms = "\n".join(
        f"* `{arm.name}`: {arm.note or ' '.join(arm.overrides) or 'as the base'}" for arm in study.arms.values()
    )
    return (
        f"# {study.name}\n\n{study.question}\n\nClaim {study.claim}. The arms, seeds, metric and the rule for the "
        f"verdict were fixed in [study.yaml](study.yaml).\n\n{arms}\n\n```\n{command}\n```\n"
    )
