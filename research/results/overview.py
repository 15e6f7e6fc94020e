"""The tables on the project's front: one line per study, and whole tables of single studies.

Built from what is committed beside the studies, verdict.json and README.md, alone.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.results.fields import StudyError
from research.results.readme import number
from research.results.record import write_changed

BEGIN, END = "<!-- verdicts:begin -->", "<!-- verdicts:end -->"
ONE_STUDY = re.compile(r"(<!-- table (\w+):begin -->\n).*?(<!-- table \2:end -->)", re.DOTALL)
NOT_COMMITTED = ("demo", "demo_traces", "demo_methods")  # made again on every machine


def overview_table(experiments: str | Path) -> str:
    """A Markdown table of the studies below `experiments` that have a verdict, in order of name.

    The effect is the primary comparison's estimate with its interval, in the unit it was declared in; where that is not
    of 95 %, it says so.
    """
    lines = ["| study | claims | verdict | effect | interval | runs |", "|---|---|---|--:|--:|--:|"]
    for path in sorted(Path(experiments).glob("*/verdict.json")):
        if path.parent.name in NOT_COMMITTED:
            continue
        verdict = json.loads(path.read_text(encoding="utf-8"))
        runs = sum(arm["n"] for arm in verdict["arms"].values())
        name = f"[{verdict['study']}]({path.parent.parent.name}/{path.parent.name}/README.md)"
        effect, interval = _effect(verdict["comparison"])
        lines.append(f"| {name} | {verdict['claim']} | **{verdict['verdict']}** | {effect} | {interval} | {runs} |")
    return "\n".join(lines)


def arms_table(study: Path) -> str:
    """The table of arms in a study's README, and the verdict above it; a line that says so where there is none yet."""
    path = study / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^(\*\*\w+\*\* \(.*?)\n\n(\| arm \|.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    if not found:
        return f"{study.name} has no results yet: `distill study {study.parent.name}/{study.name}`."
    return f"{found[2]}\n\n[{study.name}]({study.parent.name}/{study.name}/README.md): {found[1]}"


def write_overview(readme: Path, experiments: str | Path) -> bool:
    """Put the tables between the markers of `readme`; False where it has none. Raises StudyError for a lone marker.

    ``<!-- verdicts:begin -->`` takes the table of all studies, ``<!-- table NAME:begin -->`` that of one study's arms.
    """
    given = readme.read_text(encoding="utf-8")
    text = ONE_STUDY.sub(lambda mark: f"{mark[1]}{arms_table(Path(experiments) / mark[2])}\n{mark[3]}", given)
    counts = text.count(BEGIN), text.count(END)
    if counts == (1, 1) and text.index(BEGIN) < text.index(END):
        head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        text = f"{head}\n{overview_table(experiments)}\n{tail}"
    elif counts != (0, 0):
        raise StudyError(f"{readme}: expected one {BEGIN} before one {END}; found {counts[0]} and {counts[1]}")
    elif not ONE_STUDY.search(given):
        return False
    write_changed(readme, text.encode())
    return True


def _effect(comparison: Mapping[str, Any]) -> tuple[str, str]:
    unit = comparison["unit"] or ""
    confidence = comparison.get("level", 0.95)  # a verdict of before says none
    level = "" if confidence == 0.95 else f" ({100 * confidence:.0f} %)"
    interval = f"{number(comparison['low'])} to {number(comparison['high'])}{level}"
    return f"{number(comparison['estimate'])} {unit}".strip(), interval
