"""Opening a sweep's study: made once, found again by the next command, refused where it is another search."""

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.errors import ConfigError
from research.sweeps.owners import Beats, is_same_machine, is_this_process, this_process
from research.sweeps.trial_constraints import constraint_names
from research.sweeps.trial_store import TrialStore

TERMS, CONTROLLER, TICKETS = "sweep", "controller", "tickets"
RESUME = ("auto", "must", "never")
ON_CHANGE = ("refuse", "allow")
READY_S = 30.0


def open_study(store: TrialStore, terms: Mapping[str, Any], *, resume: str, on_change: str) -> bool:
    """Make the study or find it; returns whether it was there before.

    A study without trials and terms, as a kill right after its making leaves it, is made to the end here.

    terms      what must be the same when a sweep goes on: space, fixed overrides, objectives, directions, seeds,
               constraints
    resume     auto: go on where there is something; must: there must be; never: there must not
    on_change  refuse terms that differ from the study's, with the differences, or allow them
    Raises ConfigError for what does not agree.
    """
    import optuna
    from optuna.exceptions import DuplicatedStudyError

    _expect(resume, RESUME, "resume")
    _expect(on_change, ON_CHANGE, "on_change")
    name, where = store.terms.name, store.terms.storage.described()
    directions: Any = list(store.terms.directions)
    if resume == "must" and name not in optuna.get_all_study_names(store.storage):
        raise ConfigError(
            f"hydra.sweeper.resume is must, but {where} holds no study {name!r}; give resume=auto to begin it"
        )
    try:
        study = optuna.create_study(storage=store.storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        if resume == "never":
            raise ConfigError(
                f"hydra.sweeper.resume is never, but {where} holds a study {name!r}; choose another study_name"
            ) from None
        if not _is_blank(store):
            _compare(store, terms, on_change)
            return True
        study = store.study()
        _refuse_directions(store)
    if store.terms.objectives:
        with warnings.catch_warnings():  # Optuna calls the names that its dashboard shows experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(store.terms.objectives))
    study.set_user_attr(TERMS, dict(terms))
    return False


def refuse_foreign_runs(store: TrialStore, folder: Path) -> None:
    """Raise ConfigError where the sweep's folder holds numbered runs that are none of the study's trials.

    They would be written over, and gone on with from their checkpoints. Not asked of a study in memory.
    """
    import optuna

    found = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())
    if not found or store.terms.storage.name == "memory":
        return
    known: set[str] = set()
    if store.terms.name in optuna.get_all_study_names(store.storage):
        trials = store.study().get_trials(deepcopy=False)
        known = {Path(str(trial.user_attrs.get("folder"))).name for trial in trials}
    foreign = [str(number) for number in found if str(number) not in known]
    if foreign:
        told = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise ConfigError(
            f"{folder} holds runs ({told}) that are no trials of the study {store.terms.name!r}, and would be written "
            "over; choose another hydra.sweep.dir, or move them away"
        )


def await_tickets(store: TrialStore) -> bool:
    """Wait until a study's maker has added its trials, or for as long as it would take if it lived; whether it has."""
    deadline = time.monotonic() + READY_S
    while not (is_told := TICKETS in store.study().user_attrs) and time.monotonic() < deadline:
        time.sleep(0.2)
    return is_told


def tell_tickets(store: TrialStore) -> None:
    """Tell that the trials of a study are there."""
    store.study().set_user_attr(TICKETS, True)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What differs between two trees of plain values, one line for each place."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            here = f"{prefix}{key}"
            if key not in new:
                lines.append(f"{here} is gone (was {old[key]})")
            elif key not in old:
                lines.append(f"{here} is new: {new[key]}")
            else:
                lines += differences(old[key], new[key], f"{here}: ")
        return lines
    return [] if old == new else [f"{prefix.rstrip(': ')} was {old}, is {new}"]


def claim_control(store: TrialStore, stale_s: float) -> None:
    """Become the one controller of a sweep in batches. Raises ConfigError where another one lives.

    One on another machine is waited for, until it gives a sign of life or has been silent for `stale_s`.
    """
    beats, first = Beats(stale_s), store.study().user_attrs.get(CONTROLLER) or {}
    while True:
        with store.exclusively():  # two that look at the same moment must not both find nobody
            held = store.study().user_attrs.get(CONTROLLER) or {}
            if not held or is_this_process(held) or beats.is_stale(0, held):
                beat_control(store, 0)
                return
        if is_same_machine(held) or held["beat"] != first.get("beat"):  # alive here, or a sign of life from elsewhere
            raise ConfigError(
                f"another command (process {held['pid']} on {str(held['host']).split()[0]}) controls the study "
                f"{store.terms.name!r}; wait for it, or join it with hydra.sweeper.mode=workers in both commands"
            )
        time.sleep(1.0)


def beat_control(store: TrialStore, beat: int | None) -> None:
    """A controller's sign of life; None: it is done."""
    study_id = store.storage.get_study_id_from_name(store.terms.name)
    held = {**this_process(), "beat": beat} if beat is not None else None
    store.storage.set_study_user_attr(study_id, CONTROLLER, held)


def _is_blank(store: TrialStore) -> bool:
    """Whether a study holds nothing, and its maker, if it lives, has written nothing for as long as it would take."""
    deadline = time.monotonic() + READY_S
    while not (study := store.study()).user_attrs and not study.get_trials(deepcopy=False):
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.2)
    return False


def _refuse_directions(store: TrialStore) -> None:
    found = [direction.name.lower() for direction in store.study().directions]
    if found != list(store.terms.directions):
        raise ConfigError(
            f"the study {store.terms.name!r} in {store.terms.storage.described()} goes {found}, not "
            f"{list(store.terms.directions)}: give another study_name"
        )


def _refuse_mixed_constraints(store: TrialStore) -> None:
    """The Gaussian process reads the constraints of all complete trials as one table."""
    if store.terms.sampler["name"] != "gp":
        return
    wanted = set(constraint_names(store.terms))
    for trial in store.study().get_trials(deepcopy=False):
        if trial.state.name == "COMPLETE" and set(trial.constraints) != wanted:
            raise ConfigError(
                f"sampler gp needs the same constraints on all trials: trial {trial.number} has "
                f"{sorted(trial.constraints)}, this search {sorted(wanted)}; give another study_name, or sampler tpe"
            )


def _compare(store: TrialStore, terms: Mapping[str, Any], on_change: str) -> None:
    old = store.study().user_attrs.get(TERMS)
    where = f"{store.terms.name!r} in {store.terms.storage.described()}"
    if old is None:
        raise ConfigError(f"the study {where} was not made by this sweeper; choose another study_name or storage")
    lines = differences(old, _as_stored(terms))
    if lines and on_change == "refuse":
        raise ConfigError(
            f"the study {where} is another search: {'; '.join(lines)}. Choose another study_name, or go on with "
            "hydra.sweeper.on_change=allow: finished trials are kept, and must fit the new space"
        )
    never = _unchangeable(old.get("space", {}), _as_stored(terms).get("space", {}))
    if never:
        raise ConfigError(
            f"the study {where} cannot go on with other choices, another scale or another type of {', '.join(never)}: "
            "Optuna keeps them for the whole study. Choose another study_name; copy_from takes over what fits"
        )
    _refuse_directions(store)
    _refuse_mixed_constraints(store)
    if lines:
        store.study().set_user_attr(TERMS, dict(terms))


def _unchangeable(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The parameters of both spaces in which differs what Optuna compares: choices, log, integer or not."""

    def kept(parameter: Any) -> Any:
        if not isinstance(parameter, Mapping):
            return None
        choices = [[text.lstrip("+") for text in choice] for choice in parameter.get("choices", [])]
        return choices, parameter.get("log"), parameter.get("type")

    return [name for name in new if name in old and kept(old[name]) != kept(new[name])]


def _as_stored(terms: Mapping[str, Any]) -> Any:
    """As the terms come back from a storage: tuples as lists, keys as text."""
    return json.loads(json.dumps(terms))


def _expect(given: str, valid: Sequence[str], key: str) -> None:
    if given not in valid:
        raise ConfigError(f"hydra.sweeper.{key} is {given!r}; expected one of {', '.join(valid)}")
