"""A sweep's trials in a storage: taken once, leased, told once, given back when their process died."""

import gc
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError
from optuna.trial import TrialState

from research.errors import ConfigError
from research.sweeps.engines import build_pruner, build_sampler
from research.sweeps.owners import Beats, is_alive, this_process
from research.sweeps.search_space import SearchSpace
from research.sweeps.space_parser import parse_space
from research.sweeps.storages import FlockOnFile, StorageSpec, storage_spec
from research.sweeps.sweep_plan import SweepLimits
from research.sweeps.sweep_points import top_up
from research.sweeps.sweep_report import trial_row
from research.sweeps.sweep_study import claim_control, differences, open_study, refuse_foreign_runs
from research.sweeps.sweep_terms import SweepTerms
from research.sweeps.trial_runs import RunPlan, TrialRuns, _wait, plain_returned
from research.sweeps.trial_store import TrialStore
from research.sweeps.trial_work import BatchTask, TrialWork, WorkerTask, portable

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
TPE = {"name": "tpe", "n_startup_trials": 10, "n_ei_candidates": 24, "multivariate": True, "constant_liar": True}


def spec_of(kind: str, folder: Path) -> StorageSpec:
    if kind == "rdb":
        return StorageSpec("rdb", url=f"sqlite:///{folder}/sweep.db")
    if kind == "memory":
        return StorageSpec("memory", path=f"memory of process {os.getpid()}")
    return StorageSpec("journal", path=str(folder / "study.journal"))


def store_of(spec: StorageSpec, name: str = "sweep", **terms: Any) -> TrialStore:
    store = TrialStore(SweepTerms(storage=spec, name=name, **terms))
    open_study(store, {"space": {}}, resume="auto", on_change="refuse")
    return store


def space_of(**params: Any) -> SearchSpace:
    return parse_space(params or {"x": "interval(-5,5)", "kind": ["a", "b"]}, [])[0]


@pytest.fixture(params=["journal", "rdb", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TrialStore:
    name = f"sweep of {request.node.name}"
    return store_of(spec_of(request.param, tmp_path), name, max_attempts=2)


def test_trials_wait_are_taken_and_told(store: TrialStore) -> None:
    store.add_tickets([None, {"x": 1.5, "kind": "b"}, None])
    assert store.counts().waiting == 3
    space = space_of()
    first, second, third = (store.take(space, 0) for _ in range(3))
    assert store.take(space, 0) is None
    assert [trial.number for trial in (first, second, third) if trial] == [0, 1, 2]
    assert second is not None and second.params == {"x": 1.5, "kind": "b"}
    store.complete(0, 4.0)
    store.pruned(1, "too slow")
    store.failed(2, "ValueError: no", "line 1\nline 2")
    counts = store.counts()
    assert (counts.complete, counts.pruned, counts.failed, counts.finished, counts.running) == (1, 1, 1, 3, 0)
    assert store.trial(2).user_attrs["reason"] == "ValueError: no"
    assert [trial.number for trial in store.best_trials()] == [0]


def test_an_interrupted_trial_keeps_its_number_and_values(store: TrialStore) -> None:
    store.add_tickets([None])
    taken = store.take(space_of(), 0)
    assert taken is not None
    with store.leased(0):
        pass
    store.interrupted(0, "killed")
    assert store.trial(0).state is TrialState.WAITING
    again = store.take(space_of(), 99)
    assert again is not None and (again.number, again.params) == (0, taken.params)
    with store.leased(0):
        pass
    store.interrupted(0, "killed again")
    assert store.trial(0).state is TrialState.FAIL, "it was begun max_attempts=2 times"
    assert "begun 2 times" in store.trial(0).user_attrs["reason"]


def test_a_stop_that_was_asked_for_counts_as_no_attempt(store: TrialStore) -> None:
    store.add_tickets([None])
    for _ in range(4):
        assert store.take(space_of(), 0) is not None
        with store.leased(0):
            pass
        store.interrupted(0, "Ctrl-C", counts=False)
    assert store.trial(0).state is TrialState.WAITING


def test_what_is_told_twice_counts_once(store: TrialStore) -> None:
    store.add_tickets([None])
    store.take(space_of(), 0)
    store.complete(0, 1.0)
    store.complete(0, 2.0)
    store.failed(0, "late", "")
    store.pruned(0, "late")
    store.interrupted(0, "late")
    assert store.trial(0).state is TrialState.COMPLETE and store.trial(0).values == [1.0]


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (None, "expected a number"),
        ("good", "expected a number"),
        ([1.0, 2.0], "2 values"),
        ({"loss": 1.0}, "expected a number"),
    ],
)
def test_a_value_that_is_none_fails_the_trial_with_the_reason(returned: Any, told: str, tmp_path: Path) -> None:
    store = store_of(spec_of("journal", tmp_path))
    store.add_tickets([None])
    store.take(space_of(), 0)
    store.complete(0, returned)
    assert store.trial(0).state is TrialState.FAIL
    assert told in store.trial(0).user_attrs["reason"]


def test_objectives_are_picked_by_name_and_constraints_are_kept(tmp_path: Path) -> None:
    terms: dict[str, Any] = {
        "objectives": ("val/errors", "cost/flops"), "directions": ("minimize", "minimize"),
        "constraints": {"cost/seconds": 10.0},
    }  # fmt: skip
    store = store_of(spec_of("journal", tmp_path), **terms)
    store.add_tickets([None] * 5)
    results = [(5, 1, 3), (3, 2, 3), (4, 3, 3), (1, 1, 11)]
    for errors, flops, seconds in results:
        trial = store.take(space_of(), 0)
        assert trial is not None
        store.complete(trial.number, {"val/errors": errors, "cost/flops": flops, "cost/seconds": seconds, "note": "x"})
    assert [trial.number for trial in store.best_trials()] == [0, 1], "2 is beaten by 1, 3 took too long"
    assert store.trial(3).constraints == {"cost/seconds": 1.0}
    store.take(space_of(), 0)
    store.complete(4, {"val/errors": 1})
    assert "no cost/flops" in store.trial(4).user_attrs["reason"]


def test_a_hypervolume_is_the_share_of_the_box_that_is_dominated(tmp_path: Path) -> None:
    """By hand: accuracies .5, .8 at costs 20, 60 of 100 dominate .5 x .8 + (.8 - .5) x .4 of the box."""
    terms: dict[str, Any] = {
        "objectives": ("accuracy", "cost"), "directions": ("maximize", "minimize"),
        "box": {"accuracy": (0.0, 1.0), "cost": (100.0, 0.0)},
    }  # fmt: skip
    store = store_of(spec_of("journal", tmp_path), **terms)
    store.add_tickets([None] * 4)
    assert store.hypervolume() == 0.0
    for accuracy, cost in ((0.5, 20), (0.8, 60), (0.4, 70), (0.9, 300)):
        trial = store.take(space_of(), 0)
        assert trial is not None
        store.complete(trial.number, {"accuracy": accuracy, "cost": cost})
    assert store.hypervolume() == pytest.approx(0.5 * 0.8 + 0.3 * 0.4)
    assert TrialStore(SweepTerms(storage=store.terms.storage, name="sweep")).hypervolume() is None


def test_a_failed_point_is_tried_again_as_often_as_allowed(tmp_path: Path) -> None:
    store = store_of(spec_of("journal", tmp_path), retries=2)
    store.add_tickets([None])
    points = []
    while (trial := store.take(space_of(), 0)) is not None:
        points.append(trial.params)
        store.failed(trial.number, "boom", "")
    assert len(points) == 3 and points[0] == points[1] == points[2]
    assert store.counts().finished == 1, "the retried ones count once"
    assert store.trial(2).user_attrs["retry_of"] == 1


def _take_all(spec: StorageSpec, found: Any) -> None:
    store = TrialStore(SweepTerms(storage=spec, name="sweep"))
    while (trial := store.take(space_of(), os.getpid())) is not None:
        found.put(trial.number)
        store.complete(trial.number, 1.0)


@pytest.mark.parametrize("kind", ["journal", "rdb"])
def test_no_trial_is_taken_twice_by_processes_at_once(kind: str, tmp_path: Path) -> None:
    store = store_of(spec_of(kind, tmp_path))
    store.add_tickets([None] * 40)
    context = multiprocessing.get_context("fork")
    found: Any = context.Queue()
    workers = [context.Process(target=_take_all, args=(store.terms.storage, found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    numbers = sorted(found.get(timeout=60) for _ in range(40))
    for worker in workers:
        worker.join(60)
    assert numbers == list(range(40)) and found.empty()
    assert store.counts().complete == 40


@pytest.mark.parametrize("sampler", [TPE, {"name": "random"}, {"name": "cmaes", "with_margin": True}, {"name": "qmc"}])
def test_a_sweep_draws_what_optuna_draws(sampler: dict[str, Any], tmp_path: Path) -> None:
    """200 trials of a cheap function: the same sampler with the same seed has the same trials and the same best."""
    number_of_trials = 200 if sampler["name"] == "tpe" else 60

    def cost(x: float, kind: str) -> float:
        return (x - 2) ** 2 + (kind == "b")

    direct = optuna.create_study(sampler=build_sampler(sampler, 7))
    direct.optimize(
        lambda trial: cost(trial.suggest_float("x", -5, 5), trial.suggest_categorical("kind", ["a", "b"])),
        n_trials=number_of_trials,
    )
    store = store_of(spec_of("memory", tmp_path), f"like {sampler['name']}", sampler=sampler)
    store.add_tickets([None] * number_of_trials)
    while (trial := store.take(space_of(), 7)) is not None:
        store.complete(trial.number, cost(**trial.params))
    assert [trial.params for trial in store.trials()] == [trial.params for trial in direct.trials]
    assert store.best_trials()[0].number == direct.best_trial.number


def test_workers_go_along_one_sequence_of_quasi_random_points(tmp_path: Path) -> None:
    """Two processes with seeds of their own, which begin apart, draw together what one would have drawn."""
    sampler = {"name": "qmc", "scramble": True, "warn_asynchronous_seeding": False}
    direct = optuna.create_study(sampler=build_sampler(sampler, 7))
    direct.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=9)
    first = store_of(spec_of("journal", tmp_path), sampler=sampler)
    first.add_tickets([None] * 9)
    second, space = TrialStore(first.terms), space_of(x="interval(0.0,1.0)")
    begun = [first.take(space, 11, 7), second.take(space, 12, 7)]
    assert begun[0] is not None and begun[1] is not None and begun[0].params != begun[1].params
    first.complete(0, 1.0)
    for number in range(7):
        assert (first, second)[number % 2].take(space, 0, 7) is not None
    assert [t.params for t in first.trials()[1:]] == [t.params for t in direct.trials[1:]]


def _draw_beside_others(spec: StorageSpec, sampler: dict[str, Any], searched: str, begin: Any) -> None:
    store = TrialStore(SweepTerms(storage=spec, name="sweep", sampler=sampler))
    begin.wait(60)
    while store.take(space_of(x=searched), 1, 1) is not None:
        pass


@pytest.mark.parametrize(
    ("name", "searched", "first"), [("brute_force", "range(0,17)", 0), ("qmc", "interval(0.0,1.0)", 0.3)]
)
def test_processes_that_draw_at_once_draw_no_point_twice(
    name: str, searched: str, first: float, tmp_path: Path
) -> None:
    """With the same seed even: each draws knowing what the others have drawn."""
    sampler = {"name": name, **({"warn_asynchronous_seeding": False} if name == "qmc" else {})}
    store = store_of(spec_of("journal", tmp_path), sampler={"name": "random"})
    store.add_tickets([{"x": first}, *[None] * 16])
    assert store.take(space_of(x=searched), 0) is not None
    store.complete(0, 1.0)
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(3)
    given = (store.terms.storage, sampler, searched, begin)
    workers = [context.Process(target=_draw_beside_others, args=given) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    drawn = [trial.params["x"] for trial in store.trials()]
    assert len(drawn) == 17 and len(set(drawn)) == 17, drawn


def _top_up_beside_others(spec: StorageSpec, begin: Any) -> None:
    store = TrialStore(SweepTerms(storage=spec, name="sweep", sampler={"name": "grid"}))
    store.study()
    begin.wait(60)
    top_up(store, space_of(x="range(0,30)"), 30, [])


@pytest.mark.parametrize("kind", ["journal", "rdb"])
def test_commands_that_top_up_a_grid_at_once_add_every_point_once(kind: str, tmp_path: Path) -> None:
    """Were a point there twice, another would be missing when the surplus is taken back."""
    store = store_of(spec_of(kind, tmp_path))
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(3)
    commands = [context.Process(target=_top_up_beside_others, args=(store.terms.storage, begin)) for _ in range(3)]
    for command in commands:
        command.start()
    for command in commands:
        command.join(120)
    points = [trial.system_attrs["fixed_params"]["x"] for trial in store.trials()]
    assert sorted(points) == list(range(30))


def test_a_lease_whose_process_was_killed_is_stale_at_once(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = {**this_process(), "pid": child.pid}
    owner["start"] = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    beats = Beats(stale_s=60.0)
    assert is_alive(owner) and not beats.is_stale(0, owner)
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not beats.is_stale(0, owner) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert beats.is_stale(0, owner), "a zombie is dead too"
    child.wait()
    assert not is_alive({**this_process(), "start": "another"}), "its number was given to another process"


def test_a_job_that_is_started_again_runs_its_trial_if_nobody_else_does(store: TrialStore) -> None:
    """As a cluster starts a preempted job: its trial was left to it, waits, or is another process's by now."""
    store.add_tickets([None])
    assert store.take(space_of(), 0) is not None
    elsewhere = {"host": this_process()["host"], "pid": 1, "start": "another"}
    assert store.holds(0, this_process()) and store.holds(0, elsewhere), "taken by this process itself"
    store.interrupted(0, "preempted", counts=False)
    assert store.trial(0).state is TrialState.WAITING
    assert store.holds(0, elsewhere) and store.trial(0).state is TrialState.RUNNING, "and taken by that"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        began = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        lease = {**this_process(), "pid": other.pid, "start": began, "beat": 0}
        store.storage.set_trial_user_attr(store.trial(0)._trial_id, "lease", lease)
        assert not store.holds(0, elsewhere), "a living process is at work on it"
        assert store.holds(0, {key: lease[key] for key in this_process()}), "the controller holds it for its job"
        other.communicate(b"\n")
    assert store.holds(0, elsewhere), "that process has died"
    store.complete(0, 1.0)
    assert not store.holds(0, this_process())


def test_of_two_that_see_a_dead_process_one_gives_its_trial_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the other's looking and its writing the trial was given back, and taken, and runs."""
    first = store_of(spec_of("journal", tmp_path))
    second = TrialStore(first.terms)
    first.add_tickets([None])
    first.take(space_of(), 0)
    dead = {**this_process(), "start": "another", "beat": 0}
    first.storage.set_trial_user_attr(first.trial(0)._trial_id, "lease", dead)

    def slow(number: int, lease: Any) -> bool:
        assert first.give_back_stale() == [0] and first.take(space_of(), 0) is not None
        return True

    monkeypatch.setattr(second._beats, "is_stale", slow)
    assert second.give_back_stale() == []
    assert first.trial(0).state is TrialState.RUNNING and first.running_here() == [0]


def _holds(spec: StorageSpec, controller: dict[str, Any], told: Any) -> None:
    told.put(TrialStore(SweepTerms(storage=spec, name="sweep")).holds(0, controller))


def test_of_two_jobs_for_one_trial_one_holds_it(tmp_path: Path) -> None:
    """A job that was started again beside one that was thought to be lost."""
    store = store_of(spec_of("journal", tmp_path))
    store.add_tickets([None])
    store.take(space_of(), 0)
    controller = {"host": "elsewhere", "pid": 1, "start": "1"}
    store.storage.set_trial_user_attr(store.trial(0)._trial_id, "lease", {**controller, "beat": 0})
    assert store.holds(0, controller) and store.running_here() == [0]
    context = multiprocessing.get_context("fork")
    told: Any = context.Queue()
    job = context.Process(target=_holds, args=(store.terms.storage, controller, told))
    job.start()
    assert told.get(timeout=60) is False
    job.join(60)


def test_a_kill_while_a_trial_is_taken_back_leaves_none_running(store: TrialStore) -> None:
    store.add_tickets([None] * 2)
    trial_id = store.trial(1)._trial_id
    store.storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
    store.storage.set_trial_user_attr(trial_id, "surplus", True)  # and dies here
    assert store.give_back_stale() == []
    assert [trial.state for trial in store.study().get_trials()] == [TrialState.WAITING, TrialState.FAIL]
    assert store.counts().total == 1


@pytest.mark.parametrize(
    ("answer", "attempts"), [(SystemExit(144), 0), (RuntimeError("timed-out too many times"), 1)], ids=["again", "over"]
)
def test_only_a_job_that_starts_again_costs_a_preempted_trial_nothing(
    answer: BaseException, attempts: int, store: TrialStore, tmp_path: Path
) -> None:
    """What no launcher starts again is begun `max_attempts` times at most, not for ever."""

    def leave(number: int, frame: Any) -> None:
        raise answer

    def task() -> Any:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(5)

    store.add_tickets([None])
    taken = store.take(space_of(), 0)
    assert taken is not None
    work = TrialWork(store, space_of(), TrialRuns(lambda cfg: task(), cast(Any, None), RunPlan()), str(tmp_path))
    before = signal.signal(signal.SIGUSR2, leave)
    try:
        with pytest.raises(type(answer)):
            work.work_on(0, [], task)
    finally:
        signal.signal(signal.SIGUSR2, before)
    trial = store.trial(0)
    assert trial.state is TrialState.WAITING and trial.user_attrs["attempts"] == attempts
    assert "preempted by SIGUSR2" in trial.user_attrs["interrupted"] and work.leaving


def test_a_result_that_cannot_be_told_fails_the_trial(store: TrialStore, tmp_path: Path) -> None:
    """Where it ran and at once: left to its lease it would look as if its process had died."""
    store.add_tickets([None])
    taken = store.take(space_of(), 0)
    assert taken is not None
    work = TrialWork(store, space_of(), TrialRuns(cast(Any, None), cast(Any, None), RunPlan()), str(tmp_path))
    with pytest.raises(InterpolationResolutionError):
        work.work_on(0, [], lambda: OmegaConf.create({"loss": "${nowhere}"}))
    trial = store.trial(0)
    assert trial.state is TrialState.FAIL and "nowhere" in trial.user_attrs["reason"]


def test_a_constraint_whose_metric_is_no_number_is_not_met(tmp_path: Path) -> None:
    terms: dict[str, Any] = {"objectives": ("loss",), "constraints": {"cost": 10.0}}
    store = store_of(spec_of("journal", tmp_path), **terms)
    store.add_tickets([None] * 3)
    for number, cost in enumerate((float("nan"), 3.0, float("inf"))):
        store.take(space_of(), 0)
        store.complete(number, {"loss": float(number), "cost": cost})
    assert [trial.state for trial in store.trials()] == [TrialState.COMPLETE] * 3
    assert store.trial(0).constraints == {"cost": float("inf")}
    assert [trial.number for trial in store.best_trials()] == [1]


def test_an_error_while_telling_leaves_no_trial_running(
    store: TrialStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was told is at fault: the trial has failed, and says so."""
    store.add_tickets([None])
    assert store.take(space_of(), 0) is not None
    work = TrialWork(store, space_of(), TrialRuns(cast(Any, None), cast(Any, None), RunPlan()), str(tmp_path))

    def refuse(number: int, returned: Any) -> None:
        raise ValueError("no such value")

    monkeypatch.setattr(store, "complete", refuse)
    with pytest.raises(ValueError, match="no such value"):
        work.work_on(0, [], lambda: 1.0)
    assert store.trial(0).state is TrialState.FAIL and "no such value" in store.trial(0).user_attrs["reason"]


class Away(RuntimeError):
    """As a database that cannot be reached."""


@pytest.mark.parametrize("where", ["telling", "drawing", "preparing"])
def test_a_worker_whose_storage_is_away_for_a_moment_keeps_no_trial(
    where: str, store: TrialStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may live on, as with the basic launcher: the trial would never be seen to be nobody's."""
    store.add_tickets([None])
    monkeypatch.setattr("research.sweeps.trial_work.AWAY_S", 0.01)
    runs = TrialRuns(cast(Any, None), cast(Any, None), RunPlan())
    monkeypatch.setattr(runs, "run", lambda context, **rest: 1.0)
    work, left = TrialWork(store, space_of(), runs, str(tmp_path)), [3]

    def away(*given: Any, **named: Any) -> Any:
        raise Away("connection refused")

    def flaky(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] > 0:
            raise Away("connection refused")
        return interrupted(*given, **named)

    interrupted = store.interrupted
    monkeypatch.setattr(store, "interrupted", flaky)
    if where == "telling":
        monkeypatch.setattr(store, "complete", away)
    elif where == "drawing":
        monkeypatch.setattr(SearchSpace, "draw", away)
    else:
        monkeypatch.setattr(work, "prepare", away)
    worker = WorkerTask(work, SweepLimits(), time.time())
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"job": {"num": 0}}))
    if where == "drawing":
        with pytest.raises(Away):
            worker(cast(Any, None))
        assert store.trial(0).state is TrialState.WAITING
    else:
        worker(cast(Any, None))
        assert store.trial(0).state is TrialState.FAIL, "begun max_attempts=2 times, or never"
    assert not store.running_here()


@pytest.mark.parametrize("variable", ["SLURM_PROCID", "LOCAL_RANK"])
def test_a_further_task_of_a_job_runs_no_trial(
    variable: str, store: TrialStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a launcher with tasks_per_node=2 starts it: each task would be a worker."""
    store.add_tickets([None])
    work = TrialWork(store, space_of(), TrialRuns(cast(Any, None), cast(Any, None), RunPlan()), str(tmp_path))
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"job": {"num": 0}}))
    monkeypatch.setenv(variable, "1")
    for task in (WorkerTask(work, SweepLimits(), time.time()), BatchTask(work, cast(Any, None))):
        with pytest.raises(ConfigError, match=r"tasks_per_node=1.*subprocess=true"):
            task(cast(Any, None))
    assert store.counts().waiting == 1


def test_a_kill_in_the_midst_of_a_retry_loses_no_point_and_counts_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the failure was told: the trial waits again and counts. After it: the retry is added later."""
    store = store_of(spec_of("journal", tmp_path), retries=1)
    space = space_of(x=[1, 2])
    store.add_tickets([{"x": 1}, {"x": 2}])
    first, second = store.take(space, 0), store.take(space, 0)
    assert first is not None and second is not None
    with monkeypatch.context() as killed:
        killed.setattr(optuna.Study, "tell", lambda *_, **__: None)
        killed.setattr(TrialStore, "_enqueue_retry", lambda *_: None)
        store.failed(0, "boom", "")
    assert store.trial(0).state is TrialState.RUNNING and store.trial(0).user_attrs["retried"]
    assert store.interrupted(0, "its process died") and store.counts().total == 2, "it waits and counts"
    with monkeypatch.context() as killed:
        killed.setattr(TrialStore, "_enqueue_retry", lambda *_: None)
        store.failed(1, "boom", "")
    assert store.counts().total == 1, "its retry is not there"
    top_up(store, space, 2, [])
    (retry,) = (trial for trial in store.trials() if trial.user_attrs.get("retry_of") == 1)
    assert retry.system_attrs["fixed_params"] == second.params and store.counts().total == 2
    top_up(store, space, 2, [])
    assert len(store.trials()) == 3, "and it is added once"


def test_a_trial_is_nine_writes_to_its_storage(tmp_path: Path) -> None:
    """Each waits for the disk or a database: taken, lease, value, overrides, folder, attempt, begun, seconds, told."""
    store = store_of(spec_of("journal", tmp_path))
    store.add_tickets([None])
    journal = tmp_path / "study.journal"
    before = len(journal.read_text().splitlines())
    taken = store.take(space_of(), 0)
    assert taken is not None
    work = TrialWork(store, space_of(), TrialRuns(cast(Any, None), cast(Any, None), RunPlan()), str(tmp_path))
    assert work.work_on(0, work.prepare(taken), lambda: 1.5) == 1.5
    written = [json.loads(line) for line in journal.read_text().splitlines()[before:]]
    assert len(written) == 8 + len(taken.params), written
    assert gc.get_freeze_count() > 0, "what start-up left is out of the collector's rounds"
    row = trial_row(store.trial(0), store.terms)
    assert (row["host"], row["attempts"], row["folder"]) == (os.uname().nodename, 1, str(tmp_path / "0"))
    assert row["started_at"] and row["value"] == 1.5 and row["seconds"] > 0


def test_a_lease_of_another_machine_is_stale_when_it_is_silent() -> None:
    beats = Beats(stale_s=0.05)
    lease = {"host": "elsewhere", "pid": os.getpid(), "start": "1", "beat": 3}
    assert not beats.is_stale(0, lease)
    time.sleep(0.06)
    assert not beats.is_stale(0, {**lease, "beat": 4}), "it gave a sign of life"
    time.sleep(0.06)
    assert beats.is_stale(0, {**lease, "beat": 4})


def test_a_running_trial_shows_signs_of_life(tmp_path: Path) -> None:
    store = store_of(spec_of("journal", tmp_path), lease_s=0.02)
    store.add_tickets([None])
    store.take(space_of(), 0)
    with store.leased(0):
        deadline = time.monotonic() + 10
        while store.trial(0).user_attrs["lease"]["beat"] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.trial(0).user_attrs["lease"]["beat"] >= 2
        assert store.give_back_stale() == []


def test_a_study_is_found_again_and_another_search_is_refused(tmp_path: Path) -> None:
    store = TrialStore(SweepTerms(storage=spec_of("journal", tmp_path), name="sweep"))
    terms = {"space": {"x": {"low": 0, "high": 1}}, "fixed": ["a=1"], "seeds": (0, 1)}
    assert open_study(store, terms, resume="auto", on_change="refuse") is False
    assert open_study(store, terms, resume="must", on_change="refuse") is True
    changed = {**terms, "space": {"x": {"low": 0, "high": 2}, "y": 3}}
    with pytest.raises(ConfigError, match=r"space: x: high was 1, is 2; space: y is new: 3"):
        open_study(store, changed, resume="auto", on_change="refuse")
    assert open_study(store, changed, resume="auto", on_change="allow") is True
    assert open_study(store, changed, resume="auto", on_change="refuse") is True, "what was allowed is remembered"
    with pytest.raises(ConfigError, match="resume is never"):
        open_study(store, changed, resume="never", on_change="refuse")
    other = TrialStore(SweepTerms(storage=store.terms.storage, name="other"))
    with pytest.raises(ConfigError, match="resume is must"):
        open_study(other, terms, resume="must", on_change="refuse")


def test_another_direction_or_a_foreign_study_is_refused(tmp_path: Path) -> None:
    spec = spec_of("journal", tmp_path)
    store_of(spec)
    turned = TrialStore(SweepTerms(storage=spec, name="sweep", directions=("maximize",)))
    with pytest.raises(ConfigError, match="minimize"):
        open_study(turned, {"space": {}}, resume="auto", on_change="refuse")
    optuna.create_study(storage=spec.open(), study_name="foreign").add_trial(optuna.trial.create_trial(value=1.0))
    foreign = TrialStore(SweepTerms(storage=spec, name="foreign"))
    with pytest.raises(ConfigError, match="not made by this sweeper"):
        open_study(foreign, {"space": {}}, resume="auto", on_change="refuse")


def test_a_study_whose_maker_died_before_its_terms_is_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("research.sweeps.sweep_study.READY_S", 0.3)
    spec, terms = spec_of("journal", tmp_path), {"space": {"x": 1}}
    optuna.create_study(storage=spec.open(), study_name="sweep").set_metric_names(["loss"])  # and dies here
    turned = TrialStore(SweepTerms(storage=spec, name="sweep", directions=("maximize",)))
    with pytest.raises(ConfigError, match=r"goes \['minimize'\]"):
        open_study(turned, terms, resume="auto", on_change="refuse")
    store = TrialStore(SweepTerms(storage=spec, name="sweep", objectives=("loss",)))
    assert open_study(store, terms, resume="auto", on_change="refuse") is False, "as if it had been made now"
    assert open_study(store, terms, resume="auto", on_change="refuse") is True
    with pytest.raises(ConfigError, match="another search"):
        open_study(store, {"space": {"x": 2}}, resume="auto", on_change="refuse")


def test_differences_name_what_is_gone_new_and_changed() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "d": 4}) == [
        "a is gone (was 1)", "b: c was 2, is 3", "d is new: 4",
    ]  # fmt: skip


def test_one_controller_at_a_time(tmp_path: Path) -> None:
    store = store_of(spec_of("journal", tmp_path))
    claim_control(store, 60.0)
    claim_control(store, 60.0)  # its own
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    held = {**this_process(), "pid": child.pid, "beat": 0}
    held["start"] = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    study_id = store.storage.get_study_id_from_name("sweep")
    store.storage.set_study_user_attr(study_id, "controller", held)
    with pytest.raises(ConfigError, match="another command"):
        claim_control(store, 60.0)
    child.kill()
    child.wait()
    claim_control(store, 60.0)
    silent = {"host": "elsewhere", "pid": 1, "start": "1", "beat": 0}
    store.storage.set_study_user_attr(study_id, "controller", silent)
    claim_control(store, 0.01)


def _claim_beside_others(spec: StorageSpec, begin: Any, told: Any) -> None:
    store = TrialStore(SweepTerms(storage=spec, name="sweep"))
    store.study()
    begin.wait(60)
    try:
        claim_control(store, 60.0)
        told.put("controls")
    except ConfigError:
        told.put("refused")
    begin.wait(60)  # who controls lives until all have looked


@pytest.mark.parametrize("kind", ["journal", "rdb"])
def test_of_commands_that_begin_at_once_one_controls(kind: str, tmp_path: Path) -> None:
    store = store_of(spec_of(kind, tmp_path))
    context = multiprocessing.get_context("fork")
    begin, told = context.Barrier(4), context.Queue()
    commands = [context.Process(target=_claim_beside_others, args=(store.terms.storage, begin, told)) for _ in range(4)]
    for command in commands:
        command.start()
    found = sorted(told.get(timeout=60) for _ in commands)
    for command in commands:
        command.join(60)
    assert found == ["controls", "refused", "refused", "refused"]


def test_a_journal_torn_by_a_loss_of_power_is_mended(tmp_path: Path) -> None:
    store = store_of(spec_of("journal", tmp_path))
    store.add_tickets([None, None])
    path = Path(str(store.terms.storage.path))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "worker')
    again = TrialStore(store.terms)
    assert again.counts().waiting == 2
    again.add_tickets([None])
    assert TrialStore(store.terms).counts().waiting == 3
    FlockOnFile(path.with_name("study.journal.lock")).mend(path)
    assert path.read_bytes().startswith(whole)


def test_a_store_travels_without_its_connection(tmp_path: Path) -> None:
    store = store_of(spec_of("journal", tmp_path))
    store.add_tickets([None])
    assert pickle.loads(pickle.dumps(store)).counts().waiting == 1


def test_memory_of_another_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose journal"):
        StorageSpec("memory", path="memory of process 1").open()


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"name": "jornal"}, "nearest valid: journal"),
        ({"name": "journal", "url": "x"}, "no key of storage journal"),
        ({"name": "rdb"}, "needs hydra.sweeper.storage.url"),
        ({"name": "rdb", "url": "postgresql://me:word@host/db"}, "holds a password"),
        ({"name": "rdb", "url": "postgresql://host/db?user=me&password=word"}, "holds a password"),
        ({"name": "journal_redis"}, "such as redis://host"),
        ({"name": "journal_redis", "url": "redis://:word@host:6379/0"}, "holds a password"),
        ({"name": "journal_redis", "url": "redis://host:6379/0?password=word"}, "holds a password"),
        ({"name": "journal_redis", "url": "http://host:6379"}, "begins with redis://"),
    ],
)
def test_a_storage_that_cannot_be_is_refused(node: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        storage_spec(node, tmp_path)


def test_what_cannot_be_reached_is_told_without_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_WORD", "hunter2")
    spec = storage_spec({"name": "rdb", "url": "postgresql+psycopg://me:$SWEEP_WORD@127.0.0.1:1/db"}, tmp_path)
    with pytest.raises(ConfigError) as error:
        spec.open()
    assert "cannot be used" in str(error.value) and "hunter2" not in str(error.value)
    with pytest.raises(ConfigError, match="no gRPC proxy"):
        StorageSpec("grpc", port=1).open()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        StorageSpec("journal", path=str(blocked / "study.journal")).open()


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"journal_redis needs a package .* 'research-distillation\[sweep\]'"):
        storage_spec({"name": "journal_redis", "url": "redis://host:6379/0"}, tmp_path).open()


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="nearest valid: n_startup_trials"):
        build_sampler({"name": "tpe", "n_startup_trial": 3}, 0)
    with pytest.raises(ConfigError, match="nearest valid: n_warmup_steps"):
        build_pruner({"name": "median", "n_warmup_step": 3})
    with pytest.raises(ConfigError, match="refuses its settings"):
        build_pruner({"name": "percentile", "percentile": 300.0})


def test_every_sampler_and_pruner_of_the_config_is_built() -> None:
    from dataclasses import asdict

    from hydra_plugins.optuna_study_sweeper.config import PRUNERS, SAMPLERS

    for kind in SAMPLERS:
        assert isinstance(build_sampler(asdict(kind()), 0), optuna.samplers.BaseSampler)
    for pruner in PRUNERS:
        settings = asdict(pruner())
        if settings["name"] == "threshold":
            settings["upper"] = 3.0
        if settings["name"] == "patient":
            settings["wrapped"] = {"name": "median"}
        assert isinstance(build_pruner(settings), optuna.pruners.BasePruner)


def test_a_lowered_target_takes_back_what_was_never_begun(store: TrialStore) -> None:
    store.add_tickets([None] * 6)
    for _ in range(3):
        trial = store.take(space_of(), 0)
        assert trial is not None
        store.note_folder(trial.number, f"sweep/{trial.number}")
    store.complete(0, 1.0)
    store.interrupted(2, "killed")
    store.take_back_surplus(2)
    counts = store.counts()
    assert (counts.complete, counts.running, counts.waiting) == (1, 1, 1), "2 was begun, and has a folder"
    assert [trial.number for trial in store.trials()] == [0, 1, 2]


def test_a_trial_taken_from_a_dead_process_is_not_seen_with_its_lease(store: TrialStore) -> None:
    """Between taking and leasing it must not be given back: a second process would run it too."""
    store.add_tickets([None])
    store.take(space_of(), 0)
    dead = {**this_process(), "start": "another", "beat": 0}
    store.storage.set_trial_user_attr(store.trial(0)._trial_id, "lease", dead)
    assert store.give_back_stale() == [0]
    store.storage.set_trial_state_values(store.trial(0)._trial_id, state=TrialState.RUNNING)
    assert store.give_back_stale() == [] and store.trial(0).state is TrialState.RUNNING


def test_signs_of_life_go_on_after_the_storage_was_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(spec_of("journal", tmp_path), lease_s=0.02)
    store.add_tickets([None])
    store.take(space_of(), 0)
    opened, failures = StorageSpec.open, [OSError("away"), OSError("away")]

    def flaky(spec: StorageSpec) -> Any:
        if failures:
            raise failures.pop()
        return opened(spec)

    monkeypatch.setattr(StorageSpec, "open", flaky)
    with store.leased(0):
        deadline = time.monotonic() + 10
        while store.trial(0).user_attrs["lease"]["beat"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not failures and store.trial(0).user_attrs["lease"]["beat"] >= 3


def test_a_reason_fits_every_storage_and_file(store: TrialStore) -> None:
    store.add_tickets([None])
    store.take(space_of(), 0)
    store.failed(0, "no file \udcff\0" + "h" * 10**6, "line\n" + "h" * 10**6)
    attrs = store.trial(0).user_attrs
    assert attrs["reason"].startswith("no file \\udcff\\0hhh") and len(attrs["reason"]) == 2000
    assert len(attrs["traceback"]) < 500
    attrs["reason"].encode()


def test_what_optuna_keeps_for_a_whole_study_cannot_change(tmp_path: Path) -> None:
    store = TrialStore(SweepTerms(storage=spec_of("journal", tmp_path), name="sweep"))
    first = {"space": space_of(kind=["a", "b"], x="interval(0,1)").described()}
    open_study(store, first, resume="auto", on_change="refuse")
    for params in ({"kind": ["a", "c"]}, {"x": "tag(log,interval(1,2))"}, {"x": "range(0,3)"}, {"x": [1, 2]}):
        with pytest.raises(ConfigError, match=f"another type of {next(iter(params))}"):
            open_study(store, {"space": space_of(**params).described()}, resume="auto", on_change="allow")
    wider = {"space": space_of(kind=["a", "b"], x="interval(0,9)", new=[1, 2]).described()}
    assert open_study(store, wider, resume="auto", on_change="allow") is True


def test_runs_that_are_none_of_the_studys_are_not_written_over(tmp_path: Path) -> None:
    store = store_of(spec_of("journal", tmp_path))
    store.add_tickets([None] * 2)
    refuse_foreign_runs(store, tmp_path)
    (tmp_path / "0").mkdir()
    with pytest.raises(ConfigError, match=r"holds runs \(0\) that are no trials"):
        refuse_foreign_runs(store, tmp_path)
    store.note_folder(0, f"/moved/since/{0}")
    refuse_foreign_runs(store, tmp_path)
    with pytest.raises(ConfigError, match="of the study 'other'"):
        refuse_foreign_runs(TrialStore(SweepTerms(storage=store.terms.storage, name="other")), tmp_path)


def test_an_sqlite_file_is_the_same_from_every_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_spec({"name": "rdb", "url": "sqlite:///a b.db"}, tmp_path).url == f"sqlite:///{tmp_path}/a b.db"
    assert storage_spec({"name": "rdb", "url": "sqlite:////x/y.db"}, tmp_path).url == "sqlite:////x/y.db"
    for url in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(ConfigError, match="storage=memory"):
            storage_spec({"name": "rdb", "url": url}, tmp_path)


def test_what_a_task_returns_is_made_plain() -> None:
    returned = {
        "a": np.float32(0.5),
        "b": torch.tensor(2),
        "c": np.array([1.0, 2.0]),
        "d": None,
        "e": "text",
        "f": True,
    }
    plain = {"a": 0.5, "b": 2, "c": [1.0, 2.0], "d": None, "e": "text", "f": True}
    found = plain_returned(returned)
    assert found == plain and [type(one) for one in found.values()] == [type(one) for one in plain.values()]


def test_an_error_that_no_other_process_can_read_travels_as_its_text() -> None:
    class Odd(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} {second}")

    kept = ValueError("plain")
    assert portable(kept) is kept
    made = pickle.loads(pickle.dumps(portable(Odd("not", "plain"))))
    assert str(made) == "Odd: not plain" and "Odd" in made.trace


def test_a_run_of_its_own_dies_with_the_process_that_waits_for_it() -> None:
    """kill -9 of a worker: its trial is begun again at once, and nothing else may be at work on it."""
    script = (
        "import subprocess, sys; from research.sweeps.trial_runs import _dies_with_parent as f;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=f());"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = Path(f"/proc/{int(parent.stdout.readline())}/stat")
    assert child.exists()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_run_of_its_own_is_ended_with_a_job_that_leaves() -> None:
    """A launcher leaves by an exit, not by Ctrl-C: the child would go on beside whoever takes the trial next."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(144)

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(SystemExit):
            _wait(child)
        assert child.poll() == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGALRM, before)
        child.kill()
        child.wait()
