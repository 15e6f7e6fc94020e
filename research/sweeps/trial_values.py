"""What a trial told: its values, checked; whether it is feasible; its words, cut to what any storage holds."""

import math
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from research.errors import ConfigError
from research.sweeps.sweep_terms import SweepTerms

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

NO_NUMBER = "expected a number for each objective"


def values_of(terms: SweepTerms, returned: Any) -> list[float]:
    """The objectives' values in what a task returned. Raises ConfigError where there are others, or none."""
    names, count = terms.objectives, len(terms.directions)
    if names:
        if not isinstance(returned, Mapping):
            raise ConfigError(f"the task returned {short(returned)}; the objectives {', '.join(names)} need a mapping")
        absent = [name for name in names if returned.get(name) is None]
        if absent:
            known = ", ".join(sorted(str(key) for key in returned)) or "nothing"
            raise ConfigError(f"the task returned no {', '.join(absent)}; it returned {known}")
        returned = [returned[name] for name in names]
    values = list(returned) if isinstance(returned, list | tuple) else [returned]
    if len(values) != count:
        raise ConfigError(f"the task returned {len(values)} values; the study has {count} objectives")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ConfigError(f"the task returned {short(returned)}; {NO_NUMBER}") from None
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"the task returned {numbers}, which is not finite")
    return numbers


def refuse_test_monitor(cfg: Any, objectives: Sequence[str]) -> None:
    """Raise ConfigError where `monitor`, by which a sweep without named objectives selects, is a metric of test."""
    if not objectives and str(cfg.monitor).startswith("test"):
        raise ConfigError(
            f"monitor is {cfg.monitor}, by which the sweep would select, and the test split is reported once; give a "
            "metric of validation, such as monitor=val/errors"
        )


def dominated_share(terms: SweepTerms, best: "Sequence[FrozenTrial]") -> float | None:
    """The share of the box from worst to best of two objectives that the trials dominate; None without a box."""
    names = terms.objectives
    if len(names) != 2 or set(terms.box) != set(names):
        return None
    points = []
    for trial in best:
        (x, y) = (_scaled(value, *terms.box[name]) for name, value in zip(names, trial.values, strict=True))
        points.append((x, y))
    area, reached = 0.0, 0.0
    for x, y in sorted(points, reverse=True):  # from the best of the first objective on
        area += x * max(0.0, y - reached)
        reached = max(reached, y)
    return area


def _scaled(value: float, worst: float, best: float) -> float:
    """Where a value lies between worst (0) and best (1), whichever of them is greater."""
    return min(1.0, max(0.0, (value - worst) / (best - worst)))


def is_retried(trial: "FrozenTrial") -> bool:
    """Whether a trial has failed and its point is another trial's by now: it counts no more.

    One that was marked and never told has not failed: its process died, and it waits again.
    """
    return trial.state.name == "FAIL" and "retried" in trial.user_attrs


def cut(text: str, length: int) -> str:
    """A text short enough for any storage, without what no file can hold: lone surrogates and NUL."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= length else f"{text[: length - 3]}..."


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def trace_of(error: BaseException) -> str:
    """The traceback of an error as text."""
    return "".join(traceback.format_exception(error))
