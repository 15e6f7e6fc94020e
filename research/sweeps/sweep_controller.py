"""The command that sweeps: makes the trials, has them run in batches or by workers, and ends where a limit says so."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from research.errors import ConfigError
from research.loops.signals import handled
from research.sweeps.grammar import quoted
from research.sweeps.owners import is_alive, is_same_machine, is_this_process
from research.sweeps.preemption import as_ctrl_c
from research.sweeps.repeating import repeating
from research.sweeps.sweep_plan import SweepPlan
from research.sweeps.sweep_points import copy_trials, points_by_hand, study_to_copy, top_up, trial_target
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
    TrialWork,
    WorkerTask,
    failed_jobs,
    worker_seed,
)

log = logging.getLogger(__name__)
KEEPS_ITS_SEED = ("grid", "brute_force")  # they give no point again, whatever the seed
DYING_S = 10.0
FRUITLESS = 3


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
        self._by_hand: list[dict[str, Any]] = []
        self._to_copy: Any = None

    def open(self) -> None:
        """Make the study or find it. Raises ConfigError for what cannot be swept, before anything is changed."""
        self.plan.check()
        self._trials = trial_target(self.plan, self.store, self.space)
        self._by_hand = points_by_hand(self.plan, self.space)
        self._to_copy = study_to_copy(self.plan, self.store.terms, Path(self.work.sweep_dir))
        refuse_foreign_runs(self.store, Path(self.work.sweep_dir))
        self._goes_on_with = open_study(self.store, self._terms, resume=self.plan.resume, on_change=self.plan.on_change)

    def run(self, watch: Callable[[TrialStore, int], Any], begin: Callable[[], None] = lambda: None) -> list[Any]:
        """Sweep until the target is met or a limit ends it; returns what the launcher returned, launch by launch.

        The study is open by now. Raises ConfigError where another command controls it.

        watch  (store, target) -> a context manager that shows how far the sweep is
        begin  called once nothing can refuse this command any more
        """
        with self._control():
            begin()
            target = self._trials
            is_made = self._goes_on_with and await_tickets(self.store)
            if self._to_copy is not None and not is_made:
                copy_trials(self._to_copy, self.store, self.space)
            top_up(self.store, self.space, target, self._by_hand)
            tell_tickets(self.store)
            with watch(self.store, target), handled({signal.SIGTERM: as_ctrl_c}):
                try:
                    returns = self._batches(target) if self.plan.mode == "batch" else self._workers(target)
                finally:
                    self._leave_none_taken()
        return returns

    # -- running them -------------------------------------------------------------------------------------------------

    def _batches(self, target: int) -> list[Any]:
        launcher = self._launcher_for(BatchTask(self.work, self._task))
        returns = []
        while self._goes_on():
            batch: list[tuple[int, list[str]]] = []
            room = min(self.plan.n_jobs, target - self.store.counts().under_way)
            sequence = self.plan.sampler_seed
            while len(batch) < room and (trial := self.store.take(self.space, self._sampler_seed(), sequence)):
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
        for position, told in failed_jobs(returns).items():
            if self.store.trial(numbers[position]).state.name == "RUNNING":  # not told where it ran
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
                if not lease or is_this_process(lease) or not _lives(lease):
                    self.store.interrupted(number, reason, counts=counts, lease=lease)
            running = [n for n in running if self.store.trial(n).state is TrialState.RUNNING]
            if running:
                time.sleep(0.2)

    def _leave_none_taken(self) -> None:
        """Let trials wait again that this process took and did not come to run: nothing of its own runs any more."""
        for number in self.store.running_here():
            self.store.interrupted(number, "its command ended before it began", counts=False)

    def _wait_for_the_dying(self, *, counts: bool) -> None:
        """Give workers that are being stopped a moment, then let their trials wait again."""
        deadline = time.monotonic() + DYING_S
        while time.monotonic() < deadline and self.store.counts().running:
            for number in [trial.number for trial in self.store.trials() if trial.state.name == "RUNNING"]:
                lease = self.store.trial(number).user_attrs.get("lease")
                if lease and (is_this_process(lease) or not _lives(lease)):
                    self.store.interrupted(number, "its worker died", counts=counts, lease=lease)
            time.sleep(0.2)

    def _sampler_seed(self) -> int | None:
        """The configured seed at a sweep's beginning; on a resume another one, or the first points would come again.

        A trial that was interrupted has been drawn too, and keeps its values.
        """
        seed, known = self.plan.sampler_seed, sum(1 for trial in self.store.trials() if trial.params)
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
        count = 0

        def beat(number: int | None) -> None:
            try:
                beat_control(self.store, number)
            except Exception:
                log.debug("the storage is out of reach for now", exc_info=True)

        def beat_on() -> None:
            nonlocal count
            count += 1
            beat(count)

        try:
            with repeating(beat_on, self.store.terms.lease_s, "controller's lease"):
                yield
        finally:
            beat(None)  # the next command sees anyway that this process is gone


def _consecutive(batch: Sequence[tuple[int, list[str]]]) -> Iterator[list[tuple[int, list[str]]]]:
    ordered = sorted(batch)
    for _, group in groupby(enumerate(ordered), key=lambda pair: pair[1][0] - pair[0]):
        yield [item for _, item in group]


def _lives(lease: Mapping[str, Any]) -> bool:
    return not is_same_machine(lease) or is_alive(lease)
