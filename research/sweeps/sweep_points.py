"""Which trials a sweep is to have: its target, points given by hand, a grid's points, and another study's trials."""

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.errors import ConfigError
from research.sweeps.search_space import SearchSpace
from research.sweeps.storages import storage_spec
from research.sweeps.sweep_plan import SweepPlan
from research.sweeps.sweep_terms import SweepTerms
from research.sweeps.trial_constraints import overstepped, overstepped_without_memory, ran_out_of_memory
from research.sweeps.trial_store import TrialStore

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)


def trial_target(plan: SweepPlan, store: TrialStore, space: SearchSpace) -> int:
    """How many trials there are to be: a space that can be counted is tried once."""
    sampler, wanted, held = store.terms.sampler["name"], plan.n_trials, store.terms.fixed
    if sampler not in ("grid", "brute_force"):
        return wanted
    endless = [p.name for p in space.parameters if p.name not in held and not p.is_countable]
    if endless:
        raise ConfigError(
            f"sampler {sampler} tries every point, and {', '.join(endless)} has no end "
            "of values; give choice(...) or range(...), or another sampler"
        )
    size = sum(1 for _ in islice(space.points(held), wanted + 1))  # of a vast space no more than needed
    if size < wanted:
        log.info("the search has %s points: the target of %s trials is cut to it", size, wanted)
    elif size > wanted:
        log.info("the search has more points than hydra.sweeper.n_trials=%s: the others are left out", wanted)
    return min(size, wanted)


def points_by_hand(plan: SweepPlan, space: SearchSpace) -> list[dict[str, Any]]:
    """The points that shall be tried first, checked. Raises ConfigError for one that is not in the space."""
    return [space.check_point(point, f"enqueue[{number}]") for number, point in enumerate(plan.enqueue)]


def top_up(store: TrialStore, space: SearchSpace, target: int, given: Sequence[Mapping[str, Any]]) -> None:
    """Add the trials that the target lacks: points given by hand first, a grid's in its order.

    Under a lock where the storage has one: of two commands the second sees the points that the first has added.
    """
    with store.exclusively():
        _top_up(store, space, target, given)


def _top_up(store: TrialStore, space: SearchSpace, target: int, given: Sequence[Mapping[str, Any]]) -> None:
    store.enqueue_lost_retries()
    missing = target - store.counts().total
    if missing < 0:
        store.take_back_surplus(target)
    if missing <= 0:
        return
    known = {_key(point) for trial in store.trials() for point in _points_of(trial)}
    first = [point for point in given if _key(point) not in known]
    points: list[Mapping[str, Any] | None] = [*first[:missing]]
    if store.terms.sampler["name"] == "grid":
        known |= {_key(point) for point in given}
        untried = (p for p in space.points(store.terms.fixed) if _key(p) not in known)
        points += islice(untried, missing - len(points))
    else:
        points += [None] * (missing - len(points))
    store.add_tickets(points, target)


def study_to_copy(plan: SweepPlan, terms: SweepTerms, sweep_dir: Path) -> "optuna.Study | None":
    """The other study whose trials the sampler shall know. Raises ConfigError for one that is not there or differs."""
    if not plan.copy_from:
        return None
    import optuna

    source = dict(plan.copy_from)
    name = source.pop("study_name", None)
    spec = storage_spec(source.get("storage", source), sweep_dir)
    storage = spec.open()
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise ConfigError(f"copy_from.study_name is {name!r}; {spec.described()} holds {', '.join(names) or 'none'}")
    other = optuna.load_study(study_name=name, storage=storage)
    directions = [direction.name.lower() for direction in other.directions]
    if directions != list(terms.directions):
        raise ConfigError(
            f"copy_from.study_name {name!r} goes {directions}, this study {list(terms.directions)}; its values mean "
            "something else"
        )
    return other


def copy_trials(other: "optuna.Study", store: TrialStore, space: SearchSpace) -> None:
    """Add the finished trials of another study, each once; they are known to the sampler and count nowhere."""
    import optuna

    study, by_name = store.study(), {parameter.name: parameter for parameter in space.parameters}
    there = {trial.user_attrs.get("copied_from") for trial in study.get_trials(deepcopy=False)}
    copied, left_out = 0, 0
    for trial in other.get_trials(deepcopy=True):
        point, mark = trial.params, f"{other.study_name}/{trial.number}"
        constraints = _constraints_here(trial, store.terms)
        is_known = set(point) <= space.names and trial.state is optuna.trial.TrialState.COMPLETE
        if not is_known or constraints is None or not all(by_name[key].contains(value) for key, value in point.items()):
            left_out += 1
        elif mark not in there:
            study.add_trial(
                optuna.trial.create_trial(
                    values=trial.values, params=point, distributions=trial.distributions,
                    user_attrs={"copied_from": mark}, constraints=constraints,
                )
            )  # fmt: skip
            copied += 1
    log.info(
        "copied %s trials of %s; %s left out: not complete, outside this search, or without a metric that it bounds",
        copied,
        other.study_name,
        left_out,
    )


def _constraints_here(trial: "FrozenTrial", terms: SweepTerms) -> dict[str, float] | None:
    """How far another study's trial oversteps this search's constraints; None: it cannot be known."""
    if ran_out_of_memory(trial):
        return overstepped_without_memory(terms) if terms.out_of_memory == "constraint" else None
    metrics = trial.user_attrs.get("metrics", {})
    return overstepped(terms, metrics) if set(terms.constraints) <= set(metrics) else None


def _points_of(trial: Any) -> list[Mapping[str, Any]]:
    """The point of a trial, and what of it was given by hand."""
    return [trial.params, trial.system_attrs.get("fixed_params", {})]


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps({key: point[key] for key in sorted(point)}, default=str)
