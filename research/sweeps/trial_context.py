"""What a trial knows of the sweep that it belongs to, while it runs: handed on in the environment, to child ranks too.

Imports no Optuna: whatever asks whether it is a trial gets its answer at once.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "RESEARCH_SWEEP_TRIAL"


@dataclass(frozen=True)
class TrialContext:
    """A running trial.

    number       of the trial, which is also its job's and its folder's
    study        name of the sweep's study
    storage      keywords of a `StorageSpec`
    pruner       settings of the pruner
    objectives   names of the metrics that the task has to return; empty: the value itself
    overrides    of the run, in Hydra's grammar
    folder       of the run
    prunes       whether the run reports while it trains; not where the reports are one for every seed
    prune_on     the metric that it reports; None: the objective
    prune_step   what its reports count: step or epoch
    """

    number: int
    study: str
    storage: dict[str, Any]
    pruner: dict[str, Any]
    objectives: tuple[str, ...]
    overrides: tuple[str, ...]
    folder: str
    prunes: bool
    prune_on: str | None = None
    prune_step: str = "step"


def current_trial() -> TrialContext | None:
    """The trial that this process works on, or helps to as one of its ranks; None outside a sweep."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    read: Mapping[str, Any] = json.loads(text)
    sequences = {name: tuple(read[name]) for name in ("objectives", "overrides")}
    return TrialContext(**{**read, **sequences})


@contextmanager
def within_trial(context: TrialContext) -> Iterator[None]:
    """Make this process the trial's, and every process that it starts inside."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps(asdict(context))
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


Check = Callable[[Any, tuple[str, ...]], None]
_program: tuple[str, ...] = ()
_check: Check | None = None


def application_program() -> tuple[str, ...]:
    """What starts this application's current command again, as it told; empty: it told nothing."""
    return _program


def application_check() -> Check | None:
    """What the application refuses of a trial before a sweep begins, as it told; None: it told nothing."""
    return _check


def set_application_program(program: tuple[str, ...], check: Check | None = None) -> None:
    """Tell what starts this command in a process of its own, such as [python, script.py, train].

    check   told a trial's composed config and the names of the objectives; raises ConfigError for what no trial may be
    """
    global _program, _check
    _program, _check = program, check
