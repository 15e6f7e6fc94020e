"""What the attempts of one iteration amount to: what was kept, why the rest was not, and what a key let pass."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from research.records import Problem, Verdict
from research.traces.rows import StoredTrace
from research.traces.sources import GOLD_UNREADABLE

GENERATED, RATIONALISED = "generated", "rationalised"
ORIGINS = (GENERATED, RATIONALISED)
FATES = (GENERATED, RATIONALISED, "not_hinted", "hint_failed", GOLD_UNREADABLE)
KEPT = "kept"


def origin(row: StoredTrace) -> str:
    """Which try a row comes from, one of ORIGINS."""
    return str(row.trace.details["origin"])


def summary(rows: Sequence[StoredTrace], problems: Sequence[Problem], num_refused: int) -> dict[str, Any]:
    """Counts and rates of one iteration; ``problems`` are those that were posed, the refused ones apart.

    num_problems     problems given; fates: FATES -> what became of each, adding up to them
    first_try, hinted_try    "kept", or why the problem's first sample was not -> problems posed in that try
    false_positives  origin -> of the kept traces those whose steps were ``checked``, of these the ``invalid`` ones, and
                     their ``rate``, null where none was checked
    writer_accuracy  share of the first try's completions that are right
    by_level         level -> problems, accuracy in the first try, kept by origin
    tokens           origin -> tokens written in that try, EOS included
    """
    tries = {name: [row for row in rows if origin(row) == name] for name in ORIGINS}
    right = [row.verdict is Verdict.CORRECT for row in tries[GENERATED]]
    return {
        "num_problems": len(problems) + num_refused,
        "fates": fates(rows, problems, num_refused),
        "first_try": _reasons(tries[GENERATED]),
        "hinted_try": _reasons(tries[RATIONALISED]),
        "false_positives": {name: _false_positives(tried) for name, tried in tries.items()},
        "writer_accuracy": sum(right) / len(right),
        "by_level": _by_level(rows, problems),
        "tokens": {name: sum(row.tokens or 0 for row in tried) for name, tried in tries.items()},
    }


def fates(rows: Iterable[StoredTrace], problems: Sequence[Problem], num_refused: int) -> dict[str, int]:
    """FATES -> number of problems: kept from either try, failed without or with a hint, or never posed."""
    kept: dict[int, str] = {}
    hinted: set[int] = set()
    for row in rows:
        if row.kept:
            kept[row.trace.index] = origin(row)
        if origin(row) == RATIONALISED:
            hinted.add(row.trace.index)
    counts = dict.fromkeys(FATES, 0)
    counts[GOLD_UNREADABLE] = num_refused
    for problem in problems:
        failed = "hint_failed" if problem.index in hinted else "not_hinted"
        counts[kept.get(problem.index, failed)] += 1
    return counts


def _reasons(rows: Iterable[StoredTrace]) -> dict[str, int]:
    told: dict[int, str] = {}
    for row in rows:
        if row.kept:
            told[row.trace.index] = KEPT
        else:
            told.setdefault(row.trace.index, str(row.reason))
    counts: dict[str, int] = defaultdict(int)
    for reason in told.values():
        counts[reason] += 1
    return dict(sorted(counts.items()))


def _false_positives(rows: Iterable[StoredTrace]) -> dict[str, float | None]:
    valid = [row.trace.details["process_valid"] for row in rows if row.kept]
    checked = [bool(value) for value in valid if value is not None]
    invalid = checked.count(False)
    return {"checked": len(checked), "invalid": invalid, "rate": invalid / len(checked) if checked else None}


def _by_level(rows: Sequence[StoredTrace], problems: Sequence[Problem]) -> dict[str, dict[str, float]]:
    level_of = {problem.index: problem.level for problem in problems if problem.level is not None}
    found = {}
    for level in sorted(set(level_of.values())):
        own = [row for row in rows if level_of.get(row.trace.index) == level]
        right = [row.verdict is Verdict.CORRECT for row in own if origin(row) == GENERATED]
        kept = {name: sum(row.kept and origin(row) == name for row in own) for name in ORIGINS}
        num_problems = list(level_of.values()).count(level)
        found[str(level)] = {"problems": num_problems, "accuracy": sum(right) / len(right), **kept}
    return found
