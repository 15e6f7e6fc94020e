"""Trials that run out of memory: recognised, and where it is asked for infeasible, so that samplers keep away."""

import math
import os
import pickle
import signal
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from research.errors import ConfigError
from research.sweeps.engines import build_sampler
from research.sweeps.memory_errors import is_out_of_memory, kills_for_memory, was_killed_for_memory
from research.sweeps.search_space import SearchSpace
from research.sweeps.space_parser import parse_space
from research.sweeps.storages import StorageSpec
from research.sweeps.sweep_plan import SweepLimits
from research.sweeps.sweep_points import copy_trials
from research.sweeps.sweep_report import build_sweep_report, trial_row
from research.sweeps.sweep_study import open_study
from research.sweeps.sweep_terms import SweepTerms
from research.sweeps.trial_runs import RunPlan, TrialFailed, TrialRuns
from research.sweeps.trial_store import TrialStore
from research.sweeps.trial_work import TrialWork

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:.*set_constraint.*:UserWarning"),
]
TPE = {"name": "tpe", "n_startup_trials": 8, "n_ei_candidates": 24, "multivariate": True, "constant_liar": True}
NSGAII = {"name": "nsgaii", "population_size": 8, "mutation_prob": 0.3}  # of one parameter else every child is random
GP = {"name": "gp", "n_startup_trials": 6, "deterministic_objective": True, "warn_independent_sampling": False}


def store_of(folder: Path, name: str = "sweep", kind: str = "memory", **terms: Any) -> TrialStore:
    specs = {
        "memory": StorageSpec("memory", path=f"memory of process {os.getpid()}"),
        "journal": StorageSpec("journal", path=str(folder / "study.journal")),
        "rdb": StorageSpec("rdb", url=f"sqlite:///{folder}/sweep.db"),
    }
    store = TrialStore(SweepTerms(storage=specs[kind], name=name, **{"out_of_memory": "constraint", **terms}))
    open_study(store, {"space": {}}, resume="auto", on_change="refuse")
    return store


def space_of(searched: str = "interval(0.0,1.0)") -> SearchSpace:
    return parse_space({"x": searched}, [])[0]


def take(store: TrialStore, seed: int | None = 0) -> Any:
    trial = store.take(space_of(), seed)
    assert trial is not None
    return trial


# -- what is recognised ------------------------------------------------------------------------------------------------


def raised_by(cause: Any) -> BaseException:
    try:
        cause()
    except Exception as error:
        return error
    raise AssertionError("it had memory enough")


def from_another() -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    except torch.OutOfMemoryError as error:
        raise ValueError("the model could not be made") from error


@pytest.mark.parametrize(
    "cause",
    [lambda: bytearray(2**60), lambda: np.zeros(2**58), lambda: torch.zeros(2**58), from_another],
    ids=["python", "numpy", "torch", "as the cause of another"],
)
def test_real_errors_of_memory_are_recognised(cause: Any) -> None:
    assert is_out_of_memory(raised_by(cause))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (TrialFailed.of("_ArrayMemoryError: Unable to allocate", "", out_of_memory=True), True),
        (TrialFailed.of("ValueError: no", ""), False),
        (RuntimeError("unable to open shared memory object"), False),
        (ValueError("out of memory is a text here"), False),
        (OSError(2, "No such file"), False),
        (KeyError("memory"), False),
    ],
)
def test_what_is_told_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    assert is_out_of_memory(pickle.loads(pickle.dumps(error))) is expected


def test_a_kill_counts_where_the_system_has_killed_for_memory(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 7\noom_kill 3\noom_kill_other 9\n")
    assert kills_for_memory(counters) == 3 and kills_for_memory(tmp_path / "absent") == 0
    assert was_killed_for_memory(-signal.SIGKILL, 2, counters) and was_killed_for_memory(137, 2, counters)
    assert not was_killed_for_memory(-signal.SIGKILL, 3, counters), "a user's kill -9"
    assert not was_killed_for_memory(1, 2, counters), "its own end, while another process was killed"


# -- what becomes of such a trial --------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "journal", "rdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TrialStore:
    return store_of(tmp_path, f"sweep of {request.node.name}", request.param, retries=2)


def test_it_is_infeasible_and_neither_best_nor_failed_nor_tried_again(store: TrialStore) -> None:
    store.add_tickets([None] * 3)
    for _ in range(3):
        take(store)
    store.out_of_memory(0, "out of memory: MemoryError", "line 1\nline 2")
    store.complete(1, 2.0)
    store.complete(2, 1.0)
    counts = store.counts()
    assert (counts.out_of_memory, counts.complete, counts.failed, counts.waiting, counts.finished) == (1, 2, 0, 0, 3)
    first = store.trial(0)
    assert first.constraints == {"out_of_memory": 1.0} and first.values == [math.inf]
    assert store.trial(1).constraints == {"out_of_memory": -1.0}
    assert first.user_attrs["reason"] == "out of memory: MemoryError" and "line 2" in first.user_attrs["traceback"]
    assert [trial.number for trial in store.best_trials()] == [2]
    assert store.study().best_trial.number == 2, "for Optuna's own readers too"
    SweepLimits(max_failures=0, max_failure_rate=0.0).reason(store, 0.0)


def test_what_is_told_afterwards_changes_nothing(store: TrialStore) -> None:
    store.add_tickets([None])
    take(store)
    store.out_of_memory(0, "no memory", "")
    store.complete(0, 1.0)
    store.out_of_memory(0, "again", "")
    store.failed(0, "late", "")
    assert store.trial(0).values == [math.inf] and store.trial(0).user_attrs["reason"] == "no memory"


def test_a_failure_is_the_default(tmp_path: Path) -> None:
    store = store_of(tmp_path, "plain", out_of_memory="fail", retries=1)
    store.add_tickets([None])
    take(store)
    store.out_of_memory(0, "no memory", "")
    assert store.trial(0).state is TrialState.FAIL and store.counts().waiting == 1
    take(store)
    store.complete(1, 1.0)
    assert store.trial(1).constraints == {}


def test_values_are_infinite_in_the_wrong_direction_and_every_trial_has_all_constraints(tmp_path: Path) -> None:
    terms: dict[str, Any] = {
        "objectives": ("accuracy", "cost"), "directions": ("maximize", "minimize"), "constraints": {"s": 9.0, "b": 1.0},
    }  # fmt: skip
    store = store_of(tmp_path, "two", **terms)
    store.add_tickets([None] * 3)
    for _ in range(3):
        take(store)
    store.out_of_memory(0, "no memory", "")
    store.complete(1, {"accuracy": 0.5, "cost": 3.0, "s": 4.0, "b": 3.0})
    store.complete(2, {"accuracy": 0.4, "cost": 3.0, "s": 4.0, "b": 1.0})
    assert store.trial(0).values == [-math.inf, math.inf]
    assert list(store.trial(0).constraints.items()) == [("b", math.inf), ("s", math.inf), ("out_of_memory", 1.0)]
    assert list(store.trial(1).constraints.items()) == [("b", 2.0), ("s", -5.0), ("out_of_memory", -1.0)]
    assert [trial.number for trial in store.best_trials()] == [2]


def test_a_point_that_fits_after_a_kill_is_no_longer_infeasible(store: TrialStore) -> None:
    """Killed after the constraint was written and before the trial was told, it runs again, on a larger machine."""
    store.add_tickets([None])
    take(store)
    store.storage.set_trial_system_attr(store.trial(0)._trial_id, "constraints:out_of_memory", 1.0)
    store.interrupted(0, "killed")
    take(store)
    store.complete(0, 1.0)
    assert store.trial(0).constraints == {"out_of_memory": -1.0} and len(store.best_trials()) == 1


@pytest.mark.parametrize("kind", ["fail", "constraint"])
def test_work_tells_what_its_run_raised(kind: str, tmp_path: Path) -> None:
    store = store_of(tmp_path, f"work {kind}", out_of_memory=kind)
    store.add_tickets([None])
    take(store)
    work = TrialWork(store, space_of(), TrialRuns(lambda cfg: None, cast(Any, None), RunPlan()), str(tmp_path))
    with pytest.raises(MemoryError):
        work.work_on(0, [], lambda: bytearray(2**60))
    row = trial_row(store.trial(0), store.terms)
    assert row["state"] == {"fail": "failed", "constraint": "out_of_memory"}[kind]
    assert row["reason"].startswith("out of memory: MemoryError") and row["seconds"] is not None
    assert row["value"] is None, "an infinite value is none for the table"
    assert row["feasible"] == {"fail": None, "constraint": False}[kind]


def test_patience_looks_at_feasible_values_alone(tmp_path: Path) -> None:
    """What cannot be used is nothing to improve upon, and what did not fit tells nothing."""
    store = store_of(
        tmp_path, "patience", objectives=("v",), constraints={"s": 1.0}, directions=("minimize",), sampler=TPE
    )
    results: list[Any] = [{"v": 0.0, "s": 2.0}, {"v": 5.0, "s": 1.0}, {"v": 4.0, "s": 1.0}, None, None, None]
    store.add_tickets([None] * 9)
    for number, result in enumerate(results):
        take(store)
        if result is None:
            store.out_of_memory(number, "no memory", "")
        else:
            store.complete(number, result)
    assert SweepLimits(patience=2).reason(store, 0.0) is None, "4 is better than 5"
    for number, value in ((6, 4.5), (7, 4.4)):
        take(store)
        store.complete(number, {"v": value, "s": 1.0})
    assert SweepLimits(patience=2).reason(store, 0.0) == "2 trials in a row were no better"


def test_the_report_shows_them_and_figures_leave_them_out(tmp_path: Path) -> None:
    store = store_of(tmp_path, "shown", "journal")
    store.add_tickets([None] * 6)
    for number in range(6):
        trial = take(store)
        if number % 2:
            store.out_of_memory(number, "no memory", "")
        else:
            store.complete(number, trial.params["x"])
    told = build_sweep_report(store, tmp_path, None)
    assert "3 complete, 3 out of memory" in told and "history.png" in told, told
    lines = (tmp_path / "trials.csv").read_text()
    assert lines.count("out_of_memory") == 3 and "inf" not in lines.replace("infeasible", "")


# -- what samplers make of it ------------------------------------------------------------------------------------------


def share_beyond(folder: Path, sampler: dict[str, Any], kind: str, trials: int, seeds: range) -> float:
    """Of the later half of the trials the share that did not fit: all with x > 0.5, where the best value would be."""
    beyond, counted = 0, 0
    for seed in seeds:
        store = store_of(folder, f"{sampler['name']} {kind} {seed}", sampler=sampler, out_of_memory=kind)
        store.add_tickets([None] * trials)
        for number in range(trials):
            trial = take(store, seed)
            x = float(trial.params["x"])
            if x > 0.5:
                store.out_of_memory(number, "no memory", "")
            else:
                store.complete(number, (x - 0.8) ** 2)
            beyond, counted = beyond + (x > 0.5) * (number >= trials // 2), counted + (number >= trials // 2)
    return beyond / counted


@pytest.mark.parametrize(("sampler", "trials", "seeds"), [(TPE, 32, range(2)), (GP, 14, range(1))], ids=["tpe", "gp"])
def test_samplers_keep_away_from_what_does_not_fit(
    sampler: dict[str, Any], trials: int, seeds: range, tmp_path: Path
) -> None:
    """As a failure they do not see it, and go on towards it."""
    unseen = share_beyond(tmp_path, sampler, "fail", trials, seeds)
    seen = share_beyond(tmp_path, sampler, "constraint", trials, seeds)
    assert unseen > 0.7 and seen < 0.5, (seen, unseen)


@pytest.mark.parametrize("name", ["nsgaii", "nsgaiii"])
def test_generations_descend_from_what_fits(name: str, tmp_path: Path) -> None:
    """Of failed trials none would be a parent either; these have their place in a generation and are beaten by all."""
    sampler = {**NSGAII, "name": name}
    assert share_beyond(tmp_path, sampler, "constraint", 64, range(2)) < 0.3, "of random points it is half of them"
    store = store_of(tmp_path, f"{name} constraint 0", sampler=sampler)
    parents = cast(Any, build_sampler(sampler, 0)).get_parent_population(store.study(), 3)
    assert len(parents) == 8 and all(trial.params["x"] <= 0.5 for trial in parents)


@pytest.mark.parametrize("outcome", ["all", "some", "none"])
@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sampler",
    [TPE, GP, NSGAII, {**NSGAII, "name": "nsgaiii"}, {"name": "cmaes", "with_margin": True}, {"name": "random"},
     {"name": "qmc"}, {"name": "brute_force"}],
    ids=lambda sampler: str(sampler["name"]),
)  # fmt: skip
def test_every_sampler_goes_on_beside_infinite_values(
    sampler: dict[str, Any], several: bool, outcome: str, tmp_path: Path
) -> None:
    """Without a warning, which these tests would take for an error; with another constraint beside."""
    if several and sampler["name"] == "cmaes":
        return
    terms: dict[str, Any] = {"objectives": ("v", "w") if several else ("v",), "constraints": {"s": 0.8}}
    terms["directions"] = ("minimize", "maximize") if several else ("maximize",)
    count = 10 if sampler["name"] == "gp" else 24
    store = store_of(tmp_path, f"{sampler['name']} {several} {outcome}", sampler=sampler, **terms)
    store.add_tickets([None] * count)
    space = space_of("range(0,200)" if sampler["name"] == "brute_force" else "interval(0.0,1.0)")
    for number in range(count):
        trial = store.take(space, 1)
        assert trial is not None
        x = float(trial.params["x"])
        if outcome == "all" or (outcome == "some" and number % 3 == 0):
            store.out_of_memory(number, "no memory", "")
        else:
            store.complete(number, {"v": x, "w": (x - 0.3) ** 2, "s": x})
    assert store.counts().finished == count


# -- resumed, changed, copied ------------------------------------------------------------------------------------------


def test_another_rule_under_the_same_name_is_refused(tmp_path: Path) -> None:
    plain = {"space": {}}
    store = TrialStore(SweepTerms(StorageSpec("journal", path=str(tmp_path / "a.journal")), "sweep"))
    open_study(store, plain, resume="auto", on_change="refuse")
    with pytest.raises(ConfigError, match="out_of_memory is new: constraint"):
        open_study(store, {**plain, "out_of_memory": "constraint"}, resume="auto", on_change="refuse")
    store.add_tickets([None])
    take(store)
    store.complete(0, 1.0)
    changed = {**plain, "out_of_memory": "constraint"}
    gp = TrialStore(SweepTerms(store.terms.storage, "sweep", sampler=GP, out_of_memory="constraint"))
    with pytest.raises(ConfigError, match="the same constraints on all trials: trial 0"):
        open_study(gp, changed, resume="auto", on_change="allow")
    tpe = TrialStore(SweepTerms(store.terms.storage, "sweep", sampler=TPE, out_of_memory="constraint"))
    assert open_study(tpe, changed, resume="auto", on_change="allow")


def test_copied_trials_have_the_constraints_of_the_new_search(tmp_path: Path) -> None:
    """They came without any: one that took too long, or did not fit, would have been the best to know of."""
    terms: dict[str, Any] = {"objectives": ("v",), "constraints": {"s": 9.0}}
    old = store_of(tmp_path, "old", **terms)
    old.add_tickets([None] * 3)
    for _ in range(3):
        take(old)
    old.complete(0, {"v": 1.0, "s": 5.0})
    old.out_of_memory(1, "no memory", "")
    old.complete(2, {"v": 1.0})
    copied: dict[str, list[dict[str, float]]] = {}
    for name, more in {
        "same": {**terms, "constraints": {"s": 3.0}}, "failing": {**terms, "out_of_memory": "fail"},
        "free": {"objectives": ("v",), "constraints": {}},
    }.items():  # fmt: skip
        new = store_of(tmp_path, name, **more)
        copy_trials(old.study(), new, space_of())
        copied[name] = [trial.constraints for trial in new.study().get_trials()]
    assert copied["same"] == [{"s": 2.0, "out_of_memory": -1.0}, {"s": math.inf, "out_of_memory": 1.0}]
    assert copied["failing"] == [{"s": -4.0}]
    assert copied["free"] == [{"out_of_memory": -1.0}, {"out_of_memory": 1.0}, {"out_of_memory": -1.0}]


def test_optuna_reads_constraints_where_they_are_written() -> None:
    """The form is Optuna's own: were it another one in a later version, no sampler would see ours."""
    study = optuna.create_study()
    trial = study.ask()
    trial.set_constraint("c", 1.0)
    assert study.trials[0].system_attrs == {"constraints:c": 1.0}
