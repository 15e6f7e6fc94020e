"""The command that sweeps: makes the trials, has them run in batches or by workers, and ends where a limit says so."""

import copy
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from research.errors import ConfigError
from research.loops.signals import handled
from research.sweeps.grammar import quoted
from research.sweeps.sweep_study import (
    await_tickets,
    beat_control,
    claim_control,
    open_study,
    refuse_foreign_runs,
    tell_tickets,
)
from research.sweeps.trial_store import TrialStore
from research.sweeps.trial_work import (
    BatchTask,
    SweepLimits,
    TrialWork,
    WorkerTask,
    as_ctrl_c,
    failed_jobs,
    worker_seed,
)

log = logging.getLogger(__name__)
MODES = ("batch", "workers")
KEEPS_ITS_SEED = ("qmc", "grid", "brute_force")  # their points follow from the seed and from the trials there are
DYING_S = 10.0
FRUITLESS = 3


@dataclass(frozen=True)
class SweepPlan:
    """What is to be swept.

    n_trials   trials that the study has in the end, those of earlier commands included
    n_jobs     at once: of a batch, or workers
    mode       batch: so many trials are launched and waited for, together; workers: each takes the next one at once
    enqueue    points to try first: parameter name -> value
    copy_from  storage URL or journal file and name of a study whose finished trials the sampler shall know
    """

    n_trials: int
    n_jobs: int = 1
    mode: str = "batch"
    enqueue: tuple[Mapping[str, Any], ...] = ()
    copy_from: Mapping[str, Any] = field(default_factory=dict)
    resume: str = "auto"
    on_change: str = "refuse"
    limits: SweepLimits = field(default_factory=SweepLimits)
    sampler_seed: int | None = None

    def check(self) -> None:
        """Raise ConfigError for numbers and words that make no sweep."""
        if self.mode not in MODES:
            raise ConfigError(f"hydra.sweeper.mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        for key in ("n_trials", "n_jobs"):
            if getattr(self, key) < 1:
                raise ConfigError(f"hydra.sweeper.{key} is {getattr(self, key)}; expected at least 1")
        if self.limits.patience is not None and self.limits.patience < 1:
            raise ConfigError(f"hydra.sweeper.patience is {self.limits.patience}; expected at least 1, or null")


class SweepController:
    """One command's part in a sweep.

    launcher_for  makes a Hydra launcher around a task
    folder_for    trial's number, overrides -> the folder that Hydra gives it; None: one of its own in any case
    """

    def __init__(
        self,
        plan: SweepPlan,
        work: TrialWork,
        task: Callable[[Any], Any],
        launcher_for: Callable[[Any], Any],
        terms: Mapping[str, Any],
        folder_for: Callable[[int, list[str]], str] | None = None,
    ) -> None:
        self.plan, self.work, self.store, self.space = plan, work, work.store, work.space
        self._task, self._launcher_for, self._terms, self._folder_for = task, launcher_for, terms, folder_for
        self._started = time.time()
        self._goes_on_with, self._worker_error, self._trials = False, "", plan.n_trials

    def open(self) -> None:
        """Make the study or find it. Raises ConfigError for what cannot be swept, before anything is changed."""
        self.plan.check()
        self._trials = self._target()
        refuse_foreign_runs(self.store, Path(self.work.sweep_dir))
        self._goes_on_with = open_study(self.store, self._terms, resume=self.plan.resume, on_change=self.plan.on_change)

    def run(self, watch: Callable[[TrialStore, int], Any]) -> list[Any]:
        """Sweep until the target is met or a limit ends it; returns what the launcher returned, launch by launch.

        The study is open by now.

        watch  (store, target) -> a context manager that shows how far the sweep is
        """
        with self._control():
            target = self._trials
            if not self._goes_on_with:
                self._copy_trials()
            self._top_up(target, self._goes_on_with)
            tell_tickets(self.store)
            with watch(self.store, target), handled({signal.SIGTERM: as_ctrl_c}):
                try:
                    returns = self._batches(target) if self.plan.mode == "batch" else self._workers(target)
                finally:
                    self._leave_none_taken()
        return returns

    # -- the trials there are -----------------------------------------------------------------------------------------

    def _target(self) -> int:
        """How many trials there are to be: a space that can be counted is tried once."""
        sampler, wanted, held = self.store.terms.sampler["name"], self.plan.n_trials, self.store.terms.fixed
        if sampler not in ("grid", "brute_force"):
            return wanted
        endless = [p.name for p in self.space.parameters if p.name not in held and not p.is_countable]
        if endless:
            raise ConfigError(
                f"sampler {sampler} tries every point, and {', '.join(endless)} has no end "
                "of values; give choice(...) or range(...), or another sampler"
            )
        size = sum(1 for _ in islice(self.space.points(held), wanted + 1))  # of a vast space no more than needed
        if size < wanted:
            log.info("the search has %s points: the target of %s trials is cut to it", size, wanted)
        elif size > wanted:
            log.info("the search has more points than hydra.sweeper.n_trials=%s: the others are left out", wanted)
        return min(size, wanted)

    def _top_up(self, target: int, goes_on: bool) -> None:
        """Add the trials that the target lacks: points given by hand first, a grid's in its order.

        Whoever finds a study that has just been made waits for the trials of its maker.
        """
        if goes_on:
            await_tickets(self.store)
        missing = target - self.store.counts().total
        if missing < 0:
            self.store.take_back_surplus(target)
        if missing <= 0:
            return
        known = {_key(point) for trial in self.store.trials() for point in _points_of(trial)}
        given = [self.space.check_point(point, f"enqueue[{n}]") for n, point in enumerate(self.plan.enqueue)]
        first = [point for point in given if _key(point) not in known]
        points: list[Mapping[str, Any] | None] = [*first[:missing]]
        if self.store.terms.sampler["name"] == "grid":
            known |= {_key(point) for point in given}
            untried = (p for p in self.space.points(self.store.terms.fixed) if _key(p) not in known)
            points += islice(untried, missing - len(points))
        else:
            points += [None] * (missing - len(points))
        self.store.add_tickets(points, target)

    def _copy_trials(self) -> None:
        """Add the finished trials of another study; they are known to the sampler and count nowhere."""
        if not self.plan.copy_from:
            return
        import optuna

        from research.sweeps.engines import storage_spec

        source = dict(self.plan.copy_from)
        name = source.pop("study_name", None)
        spec = storage_spec(source.get("storage", source), Path(self.work.sweep_dir))
        storage = spec.open()
        names = optuna.get_all_study_names(storage)
        if name not in names:
            raise ConfigError(
                f"copy_from.study_name is {name!r}; {spec.described()} holds {', '.join(names) or 'none'}"
            )
        study, copied, left_out = self.store.study(), 0, 0
        other = optuna.load_study(study_name=name, storage=storage)
        if other.directions != study.directions:
            raise ConfigError(
                f"copy_from.study_name {name!r} goes {[d.name.lower() for d in other.directions]}, this study "
                f"{list(self.store.terms.directions)}; its values mean something else"
            )
        for trial in other.get_trials(deepcopy=True):
            point = trial.params
            fits = set(point) <= self.space.names and trial.state is optuna.trial.TrialState.COMPLETE
            by_name = {parameter.name: parameter for parameter in self.space.parameters}
            if fits and all(by_name[key].contains(value) for key, value in point.items()):
                study.add_trial(
                    optuna.trial.create_trial(
                        values=trial.values, params=point, distributions=trial.distributions,
                        user_attrs={"copied_from": f"{name}/{trial.number}"},
                    )
                )  # fmt: skip
                copied += 1
            else:
                left_out += 1
        log.info("copied %s trials of %s; %s left out: not complete, or outside this search", copied, name, left_out)

    # -- running them -------------------------------------------------------------------------------------------------

    def _batches(self, target: int) -> list[Any]:
        launcher = self._launcher_for(BatchTask(self.work, self._task))
        returns = []
        while self._goes_on():
            batch: list[tuple[int, list[str]]] = []
            room = min(self.plan.n_jobs, target - self.store.counts().under_way)
            while len(batch) < room and (trial := self.store.take(self.space, self._sampler_seed())):
                batch.append((trial.number, self.work.prepare(trial)))
            if not batch:
                if not self.store.counts().running:
                    break
                time.sleep(1.0)  # a process that an earlier command left behind is at work
                continue
            for group in _consecutive(batch):
                returns.append(self._launch_batch(launcher, group))
        return returns

    def _launch_batch(self, launcher: Any, group: list[tuple[int, list[str]]]) -> Any:
        """Launch trials with consecutive numbers, which are their jobs' numbers."""
        numbers = [number for number, _ in group]
        overrides = [
            [
                *overrides, *self.work.runs.plan.quiet, f"hydra.run.dir={quoted(self.work.folder(number))}",
                *self._folder_of_its_own(number, overrides),
            ]
            for number, overrides in group
        ]  # fmt: skip
        try:
            returns = launcher.launch(overrides, initial_job_idx=numbers[0])
        except KeyboardInterrupt:
            self._give_up(numbers, "stopped by Ctrl-C or SIGTERM", counts=False)
            raise
        except Exception as error:
            log.warning("the launcher failed (%s: %s); what it left waits again", type(error).__name__, error)
            self._give_up(numbers, f"its launcher failed: {error}")
            if not any(self.store.trial(number).state.is_finished() for number in numbers) and self._is_fruitless():
                raise
            return []
        for position, told in failed_jobs(returns).items():  # of a job that failed before its trial was begun
            self.store.failed(numbers[position], told, "")
        self._give_up(numbers, "its job ended without telling how")
        return returns

    def _folder_of_its_own(self, number: int, overrides: list[str]) -> list[str]:
        """The override that gives a trial another folder, where a template such as x=${x} names that of another one."""
        if self._folder_for is None:
            return []
        folder = self._folder_for(number, overrides)
        taken = {trial.user_attrs.get("folder") for trial in self.store.trials() if trial.number != number}
        is_taken = folder in taken
        folder = f"{folder}_{number}" if is_taken else folder
        self.store.note_folder(number, folder)
        return [f"hydra.sweep.subdir={quoted(os.path.relpath(folder, self.work.sweep_dir))}"] if is_taken else []

    def _workers(self, target: int) -> list[Any]:
        """Launch the workers, and again where some died: until nothing waits."""
        returns: list[Any] = []
        before, fruitless = -1, 0
        while self._goes_on():
            finished = self.store.counts().finished
            fruitless = fruitless + 1 if finished == before else 0
            if fruitless >= FRUITLESS:
                raise ConfigError(
                    f"{FRUITLESS} launches of workers in a row finished no trial"
                    f"{f' ({self._worker_error})' if self._worker_error else ''}; see {self.work.sweep_dir}/workers"
                )
            before = finished
            counts = self.store.counts()
            room = min(counts.waiting, target - counts.under_way)
            if room < 1:
                if not counts.running:
                    break
                time.sleep(1.0)
                before = -1
                continue
            returns.append(self._launch_workers(min(self.plan.n_jobs, room), target))
        return returns

    def _launch_workers(self, count: int, target: int) -> Any:
        task = WorkerTask(self.work, self.plan.limits, self._started, self.plan.sampler_seed, target)
        mark = f"{os.uname().nodename}-{os.getpid()}-{int(time.time())}"
        overrides = [
            [*self.work.fixed, *self.work.runs.plan.quiet, f"hydra.sweep.subdir={quoted(f'workers/{mark}-{index}')}"]
            for index in range(count)
        ]
        try:
            returns = self._launcher_for(task).launch(overrides, initial_job_idx=0)
            for told in failed_jobs(returns).values():
                self._worker_error = told
                log.warning("a worker ended with %s", told)
            return returns
        except KeyboardInterrupt:
            self._wait_for_the_dying(counts=False)
            raise
        except Exception as error:
            log.warning("a worker died (%s: %s); its trial waits again", type(error).__name__, error)
            self._wait_for_the_dying(counts=True)
            return []

    def _goes_on(self) -> bool:
        self.store.give_back_stale()
        reason = self.plan.limits.reason(self.store, self._started)
        if reason:
            log.info("the sweep ends: %s", reason)
        return reason is None

    def _is_fruitless(self) -> bool:
        self._fruitless = getattr(self, "_fruitless", 0) + 1
        return self._fruitless >= FRUITLESS

    def _give_up(self, numbers: Sequence[int], reason: str, *, counts: bool = True) -> None:
        """Let those of these trials wait again that are still running by name alone."""
        from optuna.trial import TrialState

        deadline = time.monotonic() + DYING_S
        running = [n for n in numbers if self.store.trial(n).state is TrialState.RUNNING]
        while running and time.monotonic() < deadline:
            for number in running:
                lease = self.store.trial(number).user_attrs.get("lease")
                if not lease or _is_mine(lease) or not _lives(lease):
                    self.store.interrupted(number, reason, counts=counts)
            running = [n for n in running if self.store.trial(n).state is TrialState.RUNNING]
            if running:
                time.sleep(0.2)

    def _leave_none_taken(self) -> None:
        """Let trials wait again that this process took and did not come to run: nothing of its own runs any more."""
        for trial in self.store.trials():
            if trial.state.name == "RUNNING" and _is_mine(trial.user_attrs.get("lease") or {}):
                self.store.interrupted(trial.number, "its command ended before it began", counts=False)

    def _wait_for_the_dying(self, *, counts: bool) -> None:
        """Give workers that are being stopped a moment, then let their trials wait again."""
        deadline = time.monotonic() + DYING_S
        while time.monotonic() < deadline and self.store.counts().running:
            for number in [trial.number for trial in self.store.trials() if trial.state.name == "RUNNING"]:
                lease = self.store.trial(number).user_attrs.get("lease") or {}
                if lease and (_is_mine(lease) or not _lives(lease)):
                    self.store.interrupted(number, "its worker died", counts=counts)
            time.sleep(0.2)

    def _sampler_seed(self) -> int | None:
        """The configured seed at a sweep's beginning; on a resume another one, or the first points would come again."""
        seed, known = self.plan.sampler_seed, self.store.counts().finished
        if seed is None or not known or self.store.terms.sampler["name"] in KEEPS_ITS_SEED:
            return seed
        return worker_seed(seed, known)

    @contextmanager
    def _control(self) -> Iterator[None]:
        """In batch mode, be the one controller, and show it from a thread."""
        if self.plan.mode == "workers":
            yield
            return
        claim_control(self.store, self.store.terms.stale_s)
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(self.store.terms.lease_s):
                count += 1
                beat_control(self.store, count)

        thread = threading.Thread(target=beat, daemon=True, name="controller's lease")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            beat_control(self.store, None)


def quiet_launches(config: DictConfig) -> DictConfig:
    """A sweep's config whose launcher does not print a line for every job: the sweep has a display of its own."""
    config = copy.deepcopy(config)
    if OmegaConf.select(config, "hydra.hydra_logging.root") is not None:
        root = config.hydra.hydra_logging.root
        with read_write(root), open_dict(root):  # Hydra 1.4 hands out what may not be written to
            root.level = "WARNING"
    return config


def _consecutive(batch: Sequence[tuple[int, list[str]]]) -> Iterator[list[tuple[int, list[str]]]]:
    ordered = sorted(batch)
    for _, group in groupby(enumerate(ordered), key=lambda pair: pair[1][0] - pair[0]):
        yield [item for _, item in group]


def _points_of(trial: Any) -> list[Mapping[str, Any]]:
    """The point of a trial, and what of it was given by hand."""
    return [trial.params, trial.system_attrs.get("fixed_params", {})]


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps({key: point[key] for key in sorted(point)}, default=str)


def _lives(lease: Mapping[str, Any]) -> bool:
    from research.sweeps.owners import is_alive, is_same_machine

    return not is_same_machine(lease) or is_alive(lease)


def _is_mine(lease: Mapping[str, Any]) -> bool:
    from research.sweeps.owners import this_process

    return {key: lease.get(key) for key in ("host", "pid", "start")} == this_process()
