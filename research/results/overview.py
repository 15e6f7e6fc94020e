"""The table of all verdicts: one line per study, built from the committed verdict.json files alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.results.fields import StudyError
from research.results.readme import number
from research.results.record import write_changed

BEGIN, END = "<!-- verdicts:begin -->", "<!-- verdicts:end -->"
NOT_COMMITTED = ("demo", "demo_traces", "demo_methods")  # made again on every machine


def overview_table(experiments: str | Path) -> str:
    """A Markdown table of the studies below `experiments` that have a verdict, in order of name.

    The effect is the primary comparison's estimate with its interval, in the unit it was declared in.
    """
    lines = ["| study | claims | verdict | effect | 95 % interval | runs |", "|---|---|---|--:|--:|--:|"]
    for path in sorted(Path(experiments).glob("*/verdict.json")):
        if path.parent.name in NOT_COMMITTED:
            continue
        verdict = json.loads(path.read_text(encoding="utf-8"))
        runs = sum(arm["n"] for arm in verdict["arms"].values())
        name = f"[{verdict['study']}]({path.parent.parent.name}/{path.parent.name}/README.md)"
        effect, interval = _effect(verdict["comparison"])
        lines.append(f"| {name} | {verdict['claim']} | **{verdict['verdict']}** | {effect} | {interval} | {runs} |")
    return "\n".join(lines)


def write_overview(readme: Path, experiments: str | Path) -> bool:
    """Put the table between the markers of `readme`; False where it has none. Raises StudyError for a lone marker."""
    text = readme.read_text(encoding="utf-8")
    counts = text.count(BEGIN), text.count(END)
    if counts == (0, 0):
        return False
    if counts != (1, 1) or text.index(END) < text.index(BEGIN):
        raise StudyError(f"{readme}: expected one {BEGIN} before one {END}; found {counts[0]} and {counts[1]}")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_changed(readme, f"{head}\n{overview_table(experiments)}\n{tail}".encode())
    return True


def _effect(comparison: Mapping[str, Any]) -> tuple[str, str]:
    unit = comparison["unit"] or ""
    interval = f"{number(comparison['low'])} to {number(comparison['high'])}"
    return f"{number(comparison['estimate'])} {unit}".strip(), interval
