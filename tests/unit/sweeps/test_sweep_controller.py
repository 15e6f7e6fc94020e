"""The command that sweeps, where it is stopped between two of its steps."""

import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from research.errors import ConfigError
from research.sweeps.owners import this_process
from research.sweeps.space_parser import parse_space
from research.sweeps.storages import StorageSpec
from research.sweeps.sweep_controller import SweepController
from research.sweeps.sweep_plan import SweepPlan
from research.sweeps.sweep_points import copy_trials
from research.sweeps.sweep_terms import SweepTerms
from research.sweeps.trial_runs import RunPlan, TrialRuns
from research.sweeps.trial_store import TrialStore
from research.sweeps.trial_work import TrialWork


@dataclass
class StoppedWork(TrialWork):
    """Ctrl-C comes when the second trial of a batch has been taken and nothing has been launched."""

    prepared: int = 0

    def prepare(self, trial: Any) -> list[str]:
        self.prepared += 1
        if self.prepared == 2:
            raise KeyboardInterrupt
        return super().prepare(trial)


def test_a_stop_between_taking_and_launching_lets_both_trials_wait_again(tmp_path: Path) -> None:
    space, _ = parse_space({"x": "interval(0,1)"}, [])
    store = TrialStore(SweepTerms(StorageSpec("journal", path=str(tmp_path / "study.journal")), "sweep"))
    runs = TrialRuns(lambda cfg: 0.0, None, RunPlan())  # type: ignore[arg-type]
    launched: list[Any] = []
    work = StoppedWork(store, space, runs, str(tmp_path))
    controller = SweepController(
        SweepPlan(n_trials=3, n_jobs=2), work, lambda cfg: 0.0, lambda task: launched, {"space": space.described()}
    )
    controller.open()
    with pytest.raises(KeyboardInterrupt):
        controller.run(lambda shown, target: nullcontext())
    assert [trial.state for trial in store.trials()] == [TrialState.WAITING] * 3
    drawn = [trial.params for trial in store.trials()]
    assert set(drawn[0]) == set(drawn[1]) == {"x"} and not drawn[2], "what was drawn stays drawn"
    taken = [store.take(space, 1) for _ in range(2)]
    assert [trial.number for trial in taken if trial] == [0, 1] and [t.params for t in taken if t] == drawn[:2]


def controller_in(folder: Path, **terms: Any) -> SweepController:
    space, _ = parse_space({"x": "interval(0,1)"}, [])
    store = TrialStore(SweepTerms(StorageSpec("journal", path=str(folder / "study.journal")), "sweep", **terms))
    work = TrialWork(store, space, TrialRuns(lambda cfg: 0.0, None, RunPlan()), str(folder))  # type: ignore[arg-type]
    terms_kept = {"space": space.described()}
    return SweepController(SweepPlan(n_trials=1), work, lambda cfg: 0.0, lambda task: None, terms_kept)


def test_a_command_that_is_refused_begins_nothing(tmp_path: Path) -> None:
    """What it would write into the sweep's folder is the other command's."""
    controller, begun = controller_in(tmp_path), []
    controller.open()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        began = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        study_id = controller.store.storage.get_study_id_from_name("sweep")
        held = {**this_process(), "pid": other.pid, "start": began, "beat": 0}
        controller.store.storage.set_study_user_attr(study_id, "controller", held)
        with pytest.raises(ConfigError, match="another command"):
            controller.run(lambda shown, target: nullcontext(), lambda: begun.append(1))
        other.communicate(b"\n")
    assert not begun and not controller.store.trials()


def test_a_controller_gives_signs_of_life_after_the_storage_was_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from research.sweeps import sweep_controller

    controller = controller_in(tmp_path, lease_s=0.02)
    controller.open()
    beat, failures = sweep_controller.beat_control, [OSError("away"), OSError("away")]

    def flaky(store: TrialStore, number: int | None) -> None:
        if failures:
            raise failures.pop()
        beat(store, number)

    def held() -> Any:
        return controller.store.study().user_attrs.get("controller")

    def wait(target: int) -> list[Any]:
        deadline = time.monotonic() + 10
        while held()["beat"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return [held()["beat"]]

    monkeypatch.setattr(sweep_controller, "beat_control", flaky)
    monkeypatch.setattr(controller, "_batches", wait)
    (reached,) = controller.run(lambda shown, target: nullcontext())
    assert not failures and reached >= 3 and held() is None


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe"])
def test_a_resumed_sweep_draws_no_point_again(sampler: str, tmp_path: Path) -> None:
    """Ctrl-C in trial 0: it keeps its values, and trial 1 does not get them too."""
    space, _ = parse_space({"x": "interval(0,1)"}, [])
    runs = TrialRuns(lambda cfg: 0.0, None, RunPlan())  # type: ignore[arg-type]
    terms = SweepTerms(StorageSpec("journal", path=str(tmp_path / "study.journal")), "sweep", sampler={"name": sampler})

    class OneAtATime:
        def __init__(self, store: TrialStore) -> None:
            self.store = store

        def launch(self, overrides: Any, initial_job_idx: int) -> list[Any]:
            self.store.complete(initial_job_idx, float(initial_job_idx))
            return []

    for kind in (StoppedWork, TrialWork):
        store = TrialStore(terms)
        work = kind(store, space, runs, str(tmp_path))
        if isinstance(work, StoppedWork):
            work.prepared = 1  # the first trial is taken, and stopped before it ends
        plan = SweepPlan(n_trials=4, sampler_seed=0)
        launcher = OneAtATime(store)
        controller = SweepController(
            plan, work, lambda cfg: 0.0, lambda task, used=launcher: used, {"space": space.described()}
        )
        controller.open()
        with pytest.raises(KeyboardInterrupt) if kind is StoppedWork else nullcontext():
            controller.run(lambda shown, target: nullcontext())
    drawn = [trial.params["x"] for trial in store.trials()]
    assert len(drawn) == 4 and len(set(drawn)) == 4, drawn


def test_a_study_whose_maker_died_before_its_trials_gets_them_and_the_copied_ones_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("research.sweeps.sweep_study.READY_S", 0.3)
    space, _ = parse_space({"x": "interval(0,1)"}, [])
    specs = {name: StorageSpec("journal", path=str(tmp_path / f"{name}.journal")) for name in ("old", "new")}
    runs = TrialRuns(lambda cfg: 0.0, None, RunPlan())  # type: ignore[arg-type]

    def controller_of(name: str, **plan: Any) -> SweepController:
        store = TrialStore(SweepTerms(specs[name], name))
        work = TrialWork(store, space, runs, str(tmp_path / name))
        terms = {"space": space.described()}
        return SweepController(SweepPlan(**plan), work, lambda cfg: 0.0, lambda task: None, terms)

    old = controller_of("old", n_trials=2)
    old.open()
    for value in (1.0, 2.0):
        old.store.add_tickets([None])
        trial = old.store.take(space, 0)
        assert trial is not None
        old.store.complete(trial.number, value)
    source = {"storage": {"name": "journal", "path": specs["old"].path}, "study_name": "old"}
    dying = controller_of("new", n_trials=3, copy_from=source)
    dying.open()
    copy_trials(dying._to_copy, dying.store, space)  # and dies here
    for _ in range(2):
        again = controller_of("new", n_trials=3, copy_from=source)
        again.open()
        monkeypatch.setattr(again, "_batches", lambda target: [])
        again.run(lambda shown, target: nullcontext())
    assert [trial.values for trial in again.store.study().get_trials() if trial.values] == [[1.0], [2.0]]
    assert again.store.counts().waiting == 3
