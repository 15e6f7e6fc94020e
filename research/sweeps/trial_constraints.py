"""Which trials are feasible: bounds on what a task returns, and, where it is asked for, on memory.

A trial that ran out of memory is told so that Optuna's samplers see it: they look at the constraints of complete trials
(TPE also at those of pruned ones; the Gaussian process, NSGA-II and NSGA-III at no others) and at nothing of failed
ones. So it is complete, with a violated constraint, and since a value must be told and it has none, with the infinite
one that is worst. Nothing finite is made up: tables leave it empty, figures leave it out, samplers rank an infeasible
trial by its constraints, and the Gaussian process and CMA-ES take an infinite value for the worst that was seen.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from research.sweeps.sweep_terms import SweepTerms

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

OUT_OF_MEMORY = "out_of_memory"
ON_OUT_OF_MEMORY = ("fail", "constraint")
FITTED, DID_NOT_FIT = -1.0, 1.0  # on either side of the bound 0, on which a Gaussian process takes half for feasible


def constraint_names(terms: SweepTerms) -> tuple[str, ...]:
    """The constraints that every complete trial has, in this order: samplers compare them by position."""
    return (*sorted(terms.constraints), *((OUT_OF_MEMORY,) if terms.out_of_memory == "constraint" else ()))


def overstepped(terms: SweepTerms, metrics: Mapping[str, float]) -> dict[str, float]:
    """By how much a trial that ran to its end oversteps each constraint; 0 or less: not at all.

    A metric that is absent or no number oversteps its bound without end: the trial is not feasible.
    """
    found = {OUT_OF_MEMORY: FITTED}
    for name, bound in terms.constraints.items():
        value = metrics.get(name, math.inf) - bound
        found[name] = math.inf if math.isnan(value) else value
    return {name: found[name] for name in constraint_names(terms)}


def overstepped_without_memory(terms: SweepTerms) -> dict[str, float]:
    """The same of a trial that ran out of memory, and so has no metric."""
    return {**overstepped(terms, {}), OUT_OF_MEMORY: DID_NOT_FIT}


def worst_values(terms: SweepTerms) -> list[float]:
    """The values of a trial that has none, infinite in the wrong direction."""
    return [-math.inf if direction == "maximize" else math.inf for direction in terms.directions]


def ran_out_of_memory(trial: "FrozenTrial") -> bool:
    """Whether a complete trial is one that ran out of memory, and its values are none."""
    return bool(trial.state.name == "COMPLETE" and trial.constraints.get(OUT_OF_MEMORY, FITTED) > 0)


def is_feasible(trial: "FrozenTrial") -> bool:
    """Whether a trial oversteps no constraint."""
    return all(value <= 0 for value in trial.constraints.values())


def keep_constraints(storage: Any, trial_id: int, found: Mapping[str, float]) -> None:
    """Write constraints as Optuna's `Trial.set_constraint` does.

    That one keeps what is there: of an attempt that was killed before it was told, and whose trial has run again.
    """
    for name, value in found.items():
        storage.set_trial_system_attr(trial_id, f"constraints:{name}", value)


@contextmanager
def drawing_beside_infinite(terms: SweepTerms) -> Iterator[None]:
    """Without the warnings of samplers that trials have infinite values, or that none is feasible yet."""
    with warnings.catch_warnings():
        if terms.out_of_memory == "constraint":
            warnings.filterwarnings("ignore", message="Clip non-finite values")
            warnings.filterwarnings("ignore", message="All-NaN slice|invalid value", category=RuntimeWarning)
        yield
