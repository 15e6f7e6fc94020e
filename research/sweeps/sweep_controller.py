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
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from research.errors import ConfigError
from research.loops.signals import handled
from research.sweeps.grammar import quoted
from research.sweeps.sweep_study import await_tickets, beat_control, claim_control, open_study, tell_tickets
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


class SweepController:
    """One command's part in a sweep.

    launcher_for  makes a Hydra launcher around a task
    """

    def __init__(
        self,
        plan: SweepPlan,
        work: TrialWork,
        task: Callable[[Any], Any],
        launcher_for: Callable[[Any], Any],
        terms: Mapping[str, Any],
    ) -> None:
        self.plan, self.work, self.store, self.space = plan, work, work.store, work.space
        self._task, self._launcher_for, self._terms = task, launcher_for, terms
        self._started = time.time()

    def run(self, watch: Callable[[TrialStore, int], Any]) -> list[Any]:
        """Sweep until the target is met or a limit ends it; returns what the launcher returned, launch by launch.

        watch  (store, target) -> a context manager that shows how far the sweep is
        """
        self.plan.check()
        goes_on = open_study(self.store, self._terms, resume=self.plan.resume, on_change=self.plan.on_change)
        with self._control():
            target = self._target()
            if not goes_on:
                self._copy_trials()
            self._top_up(target, goes_on)
            tell_tickets(self.store)
            with watch(self.store, target), handled({signal.SIGTERM: as_ctrl_c}):
                returns = self._batches() if self.plan.mode == "batch" else self._workers()
        return returns

    # -- the trials there are -----------------------------------------------------------------------------------------

    def _target(self) -> int:
        """How many trials there are to be: a space that can be counted is tried once."""
        exhaustive = self.work.store.terms.sampler["name"] in ("grid", "brute_force")
        size = self.space.size() if exhaustive else None
        if exhaustive and size is None:
            continuous = [p.name for p in self.space.parameters if not p.choices and p.step is None and not p.is_int]
            raise ConfigError(
                f"sampler {self.store.terms.sampler['name']} tries every point, and {', '.join(continuous)} has no end "
                "of values; give choice(...) or range(...), or another sampler"
            )
        if size is not None and size < self.plan.n_trials:
            log.info("the search has %s points: the target of %s trials is cut to it", size, self.plan.n_trials)
        return self.plan.n_trials if size is None else min(size, self.plan.n_trials)

    def _top_up(self, target: int, goes_on: bool) -> None:
        """Add the trials that the target lacks: points given by hand first, a grid's in its order.

        Whoever finds a study that has just been made waits for the trials of its maker.
        """
        if goes_on:
            await_tickets(self.store)
        missing = target - self.store.counts().total
        if missing <= 0:
            return
        known = {_key(_point_of(trial)) for trial in self.store.trials()}
        given = [self.space.check_point(point, f"enqueue[{n}]") for n, point in enumerate(self.plan.enqueue)]
        first = [point for point in given if _key(point) not in known]
        points: list[Mapping[str, Any] | None] = [*first[:missing]]
        if self.store.terms.sampler["name"] == "grid":
            known |= {_key(point) for point in given}
            points += [point for point in self.space.points() if _key(point) not in known]
        else:
            points += [None] * (missing - len(points))
        self.store.add_tickets(points[:missing], target)

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
        for trial in optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=True):
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

    def _batches(self) -> list[Any]:
        launcher = self._launcher_for(BatchTask(self.work, self._task))
        returns = []
        while self._goes_on():
            batch: list[tuple[int, list[str]]] = []
            while len(batch) < self.plan.n_jobs and (trial := self.store.take(self.space, self._sampler_seed())):
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
            [*overrides, *self.work.runs.plan.quiet, f"hydra.run.dir={quoted(self.work.folder(number))}"]
            for number, overrides in group
        ]
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

    def _workers(self) -> list[Any]:
        """Launch the workers, and again where some died: until nothing waits."""
        returns: list[Any] = []
        before, fruitless = -1, 0
        while self._goes_on():
            finished = self.store.counts().finished
            fruitless = fruitless + 1 if finished == before else 0
            if fruitless >= FRUITLESS:
                raise ConfigError(
                    f"{FRUITLESS} launches of workers in a row finished no trial; see {self.work.sweep_dir}/workers"
                )
            before = finished
            counts = self.store.counts()
            if not counts.waiting:
                if not counts.running:
                    break
                time.sleep(1.0)
                before = -1
                continue
            returns.append(self._launch_workers(min(self.plan.n_jobs, counts.waiting)))
        return returns

    def _launch_workers(self, count: int) -> Any:
        task = WorkerTask(self.work, self.plan.limits, self._started, self.plan.sampler_seed)
        mark = f"{os.uname().nodename}-{os.getpid()}-{int(time.time())}"
        overrides = [
            [*self.work.fixed, *self.work.runs.plan.quiet, f"hydra.sweep.subdir={quoted(f'workers/{mark}-{index}')}"]
            for index in range(count)
        ]
        try:
            return self._launcher_for(task).launch(overrides, initial_job_idx=0)
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

    def _wait_for_the_dying(self, *, counts: bool) -> None:
        """Give workers that are being stopped a moment, then let their trials wait again."""
        deadline = time.monotonic() + DYING_S
        while time.monotonic() < deadline and self.store.counts().running:
            for number in [trial.number for trial in self.store.trials() if trial.state.name == "RUNNING"]:
                lease = self.store.trial(number).user_attrs.get("lease") or {}
                if lease and not _lives(lease):
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


def _point_of(trial: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = trial.params or trial.system_attrs.get("fixed_params", {})
    return found


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps({key: point[key] for key in sorted(point)}, default=str)


def _lives(lease: Mapping[str, Any]) -> bool:
    from research.sweeps.owners import is_alive, is_same_machine

    return not is_same_machine(lease) or is_alive(lease)


def _is_mine(lease: Mapping[str, Any]) -> bool:
    from research.sweeps.owners import this_process

    return {key: lease.get(key) for key in ("host", "pid", "start")} == this_process()
