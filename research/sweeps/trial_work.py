"""The two tasks that a launcher is given: one trial of a batch, or a worker that takes trials until none is left."""

import datetime as dt
import functools
import gc
import io
import logging
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from research.loops.signals import handled
from research.results.record import git_revision
from research.sweeps.gpus import GpuShare
from research.sweeps.memory_errors import is_out_of_memory
from research.sweeps.owners import this_process
from research.sweeps.preemption import Preemption, as_ctrl_c
from research.sweeps.search_space import SearchSpace
from research.sweeps.sweep_plan import SweepLimits
from research.sweeps.trial_context import TrialContext
from research.sweeps.trial_runs import TrialFailed, TrialRuns, plain_returned, refuse_in_a_rank, where_it_began
from research.sweeps.trial_store import TrialStore
from research.sweeps.trial_values import trace_of, values_of

if TYPE_CHECKING:
    from optuna.trial import Trial

log = logging.getLogger(__name__)
AWAY_S = 1.0  # between two attempts to reach a storage


@dataclass
class TrialWork:
    """How a trial is worked on, from lease to telling; travels to workers.

    fixed   overrides that every trial has
    order   keys of the command line's overrides: a trial's own stand in the same order
    gpus    dealt out to the workers
    """

    store: TrialStore
    space: SearchSpace
    runs: TrialRuns
    sweep_dir: str
    fixed: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    gpus: GpuShare = field(default_factory=GpuShare)
    leaving: bool = False  # this process's job has been preempted: it takes no further trial

    def prepare(self, trial: "Trial") -> list[str]:
        """Write down what a taken trial is; returns its overrides."""
        overrides = in_order([*self.fixed, *self.space.overrides(trial.params)], self.order)
        trial.set_user_attr("overrides", overrides)
        trial.set_user_attr("folder", self.folder(trial.number))
        return overrides

    def folder(self, number: int) -> str:
        """Where a trial's run lies."""
        return str(Path(self.sweep_dir).absolute() / str(number))

    def work_on(
        self, number: int, overrides: list[str], direct: Callable[[], Any] | None = None, folder: str | None = None
    ) -> Any:
        """Run one taken trial and tell what came of it; its exception, if any, comes through once it is told.

        direct  the run that Hydra has prepared in this process, in `folder`
        """
        from optuna import TrialPruned

        context = self._context(number, overrides, folder or self.folder(number))
        started = time.perf_counter()
        with self.store.leased(number) as trial, handled({signal.SIGTERM: as_ctrl_c}), Preemption().watched() as leave:
            _note_begin(trial, context.folder)
            try:
                returned = self.runs.run(
                    context,
                    done=trial.user_attrs.get("seed_results", {}),
                    note=lambda seed, result: self._note_seed(trial, seed, result),
                    direct=direct,
                )
                result = plain_returned(returned)
            except TrialPruned as stopped:
                self._spent(trial, started)
                self.store.pruned(number, str(stopped))
                raise
            except KeyboardInterrupt as stopped:
                with handled({signal.SIGTERM: lambda *_: None}):  # a cluster sends it while a job leaves
                    self._spent(trial, started)
                    self._tell_stop(number, stopped, leave)
                raise
            except BaseException as error:
                self._spent(trial, started)
                self._tell_error(number, error)
                if isinstance(error, SystemExit):  # it ends the trial, not the sweep
                    raise TrialFailed.of(reason_of(error), trace_of(error)) from error
                raise
            self._spent(trial, started)
            self._tell_result(number, result)
        leave_out_start_up()
        return returned

    def _tell_error(self, number: int, error: BaseException) -> None:
        """Tell what a run raised: it has failed, or it did not fit into memory."""
        trace = getattr(error, "trace", "") or trace_of(error)
        if is_out_of_memory(error):
            self.store.out_of_memory(number, f"out of memory: {reason_of(error)}", trace)
        else:
            self.store.failed(number, reason_of(error), trace)

    def _tell_result(self, number: int, result: Any) -> None:
        try:
            self.store.complete(number, result)
        except (TypeError, ValueError) as error:  # of what was told, not of a storage that is away
            self.store.failed(number, f"its result cannot be told: {reason_of(error)}", trace_of(error))
            raise

    def _tell_stop(self, number: int, stopped: KeyboardInterrupt, leave: Preemption) -> None:
        if leave.answer is not None:
            self._leave(number, leave.told, leave.answer)
        self.store.interrupted(number, f"stopped: {stopped}".strip(": "), counts=False)

    def _leave(self, number: int, told: str, answer: Callable[[], None]) -> None:
        """Answer a preemption: the trial waits, for the job that is started again or for the next command."""
        self.leaving = True
        try:
            answer()
        except SystemExit:
            self.store.interrupted(number, f"preempted by {told}", counts=False)
            raise
        except Exception as error:  # not started again, such as a job that ran out of its time
            self.store.interrupted(number, f"preempted by {told}: {error}")
            raise

    def _context(self, number: int, overrides: list[str], folder: str) -> TrialContext:
        terms = self.store.terms
        return TrialContext(
            number=number,
            study=terms.name,
            storage={key: value for key, value in asdict(terms.storage).items()},
            pruner=dict(terms.pruner),
            objectives=terms.objectives,
            overrides=tuple(overrides),
            folder=folder,
            prunes=terms.pruner["name"] != "none" and not self.runs.plan.seeds,
            prune_on=self.runs.plan.prune_on,
            prune_step=self.runs.plan.prune_step,
        )

    def _spent(self, trial: "Trial", started: float) -> None:
        before = float(trial.user_attrs.get("seconds", 0.0))
        trial.set_user_attr("seconds", before + time.perf_counter() - started)
        seed = self.runs.seed_seen()
        if seed is not None:
            trial.set_user_attr("seed", seed)

    def _note_seed(self, trial: "Trial", seed: str, result: Any) -> None:
        """Keep a seed's result, report it to the pruner, and stop the trial where that says so."""
        from optuna import TrialPruned

        results = {**trial.user_attrs.get("seed_results", {}), seed: result}
        trial.set_user_attr("seed_results", results)
        values = [values_of(self.store.terms, one) for one in results.values()]
        spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in zip(*values, strict=True)]
        trial.set_user_attr("seed_values", values)
        trial.set_user_attr("standard_deviation", spread)
        pruner = self.store.terms.pruner["name"]
        if pruner == "none" or len(values[0]) > 1:
            return
        # Wilcoxon's test pairs trials by seed; the others compare what is known so far
        reported = values[-1][0] if pruner == "wilcoxon" else statistics.fmean(value[0] for value in values)
        trial.report(reported, step=len(values))
        if len(values) < len(self.runs.plan.seeds) and trial.should_prune():
            raise TrialPruned(f"pruned after {len(values)} of {len(self.runs.plan.seeds)} seeds")


class TakenElsewhere(RuntimeError):
    """A job was started again, and its trial was not left to it."""


@dataclass
class BatchTask:
    """The task of a launcher in batch mode: the job's number is the trial's.

    controller  the process that took the trials for its jobs
    """

    work: TrialWork
    task: Callable[[Any], Any]
    controller: dict[str, Any] = field(default_factory=this_process)

    def __call__(self, cfg: DictConfig) -> Any:
        refuse_in_a_rank(is_job=True)
        hydra = HydraConfig.get()
        number = int(hydra.job.num)
        self.work.gpus.pin(number)
        if not self.work.store.holds(number, self.controller):
            raise TakenElsewhere(f"trial {number} has ended or is another process's: this job has nothing to do")
        folder = str(hydra.runtime.output_dir)
        self.work.runs.see_seed(cfg)
        overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        try:
            return self.work.work_on(number, overrides, lambda: self.task(cfg), folder)
        except Exception as error:
            told = portable(error)
            if told is error:
                raise  # with its cause, which a reader of the traceback needs
            raise told from None


@dataclass
class WorkerTask:
    """The task of a launcher in worker mode: take, run, tell, until no trial waits or a limit is reached.

    seed   of the sweep: every worker draws with one of its own, but for a sequence that all go along
    """

    work: TrialWork
    limits: SweepLimits
    started: float
    seed: int | None = None
    target: int | None = None
    done: list[int] = field(default_factory=list)

    def __call__(self, cfg: DictConfig) -> list[int]:
        refuse_in_a_rank(is_job=True)
        index = int(HydraConfig.get().job.num)
        self.work.gpus.pin(index)
        store, seed = self.work.store, worker_seed(self.seed, index, os.getpid())
        while self.limits.reason(store, self.started) is None:
            store.give_back_stale()
            is_met = self.target is not None and store.counts().under_way >= self.target
            try:
                trial = None if is_met else store.take(self.work.space, seed, self.seed)
            except Exception as error:
                self._let_go(error, fails=False)
                raise
            if trial is None:
                break
            try:
                self._work_on(trial)
            except Exception as error:  # told already; the next trial may be better
                if self.work.leaving:
                    raise
                log.info("trial %s: %s", trial.number, error)
            self.done.append(trial.number)
        return self.done

    def _work_on(self, trial: "Trial") -> None:
        """Run a taken trial; whatever is raised, it is not left running under a process that works on it no more."""
        is_begun = False
        try:
            overrides = self.work.prepare(trial)
            is_begun = True
            self.work.work_on(trial.number, overrides)
        except Exception as error:
            self._let_go(error, fails=not is_begun)
            raise

    def _let_go(self, error: Exception, *, fails: bool) -> None:
        """Let trials that run by this process's name alone wait again, or fail them; waits for a storage that is away.

        Raises the storage's error where that is out of reach for `stale_s`.
        """
        store, deadline = self.work.store, time.monotonic() + self.work.store.terms.stale_s
        while True:
            try:
                for number in store.running_here():
                    if fails:
                        store.failed(number, reason_of(error), trace_of(error))
                    else:
                        store.interrupted(number, f"its end could not be told: {reason_of(error)}")
                return
            except Exception as away:
                if time.monotonic() > deadline:
                    raise
                log.warning("the storage is out of reach (%s: %s); trying again", type(away).__name__, away)
                time.sleep(AWAY_S)


def in_order(overrides: Sequence[str], order: Sequence[str]) -> list[str]:
    """Overrides in the order in which their keys were given; first those that come from elsewhere."""
    place = {key: position for position, key in enumerate(order)}
    return sorted(overrides, key=lambda text: place.get(key_of(text), -1))


def key_of(override: str) -> str:
    """The key of an override, its prefix left out."""
    return override.partition("=")[0].lstrip("+~")


def _note_begin(trial: "Trial", folder: str) -> None:
    """Keep when and where a run begins, and of which code."""
    if trial.user_attrs.get("folder") != folder:
        trial.set_user_attr("folder", folder)
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    # one entry, since each one is a write that waits for the disk or the database
    trial.set_user_attr("begun", {"at": now, "host": os.uname().nodename, "revision": _revision(where_it_began())})


@functools.cache
def _revision(folder: str | None) -> str | None:
    """The commit of the checkout in which the command was given, marked where files differ from it."""
    found = git_revision(Path(folder or Path.cwd()))
    return f"{found['commit']}{'+' if found['dirty'] else ''}" if found["commit"] else None


@functools.cache
def leave_out_start_up() -> None:
    """Keep the garbage collector from what stands after the first trial: imported modules, a million objects.

    Composing a config makes so many small ones that a sweep of short trials spends a tenth of its time on looking
    through the modules again.
    """
    gc.collect()
    gc.freeze()


def worker_seed(seed: int | None, *parts: int) -> int | None:
    """A sampler seed of its own for every worker and every start: equal ones would draw equal points."""
    import hashlib

    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4])


def reason_of(error: BaseException) -> str:
    """An error in a line or two; of a run in a process of its own that run's error."""
    return str(error) if isinstance(error, TrialFailed) else f"{type(error).__name__}: {error}"


def portable(error: Exception) -> Exception:
    """The error, or its text where no other process could read it: it would take a launcher's workers with it."""
    import copy
    import pickle

    try:
        pickle.dumps(error)
        copy.deepcopy(error)  # builds it anew from its arguments, as reading it would
    except Exception:
        return TrialFailed.of(reason_of(error), trace_of(error))
    return error


def errors_of(returns: Any) -> Iterator[Exception]:
    """The errors of a launch's failed jobs, as Hydra raises them; none of what workers return, who have told theirs.

    Hydra 1.4 puts the traceback of another process on them when it raises them, and prints the overrides, here unseen.
    """
    from hydra.core.utils import JobReturn, JobStatus

    for job in returns:
        if isinstance(job, JobReturn) and job.status is JobStatus.FAILED:
            try:
                with redirect_stderr(io.StringIO()):
                    _ = job.return_value
            except Exception as error:
                yield error


def failed_jobs(returns: Any) -> Mapping[int, str]:
    """Position of each launched job that failed -> its error, read without Hydra printing the overrides.

    One that found its trial to be another process's has not failed.
    """
    from hydra.core.utils import JobStatus

    return {
        number: f"{type(done._return_value).__name__}: {done._return_value}"
        for number, done in enumerate(returns)
        if done.status is JobStatus.FAILED and not isinstance(done._return_value, TakenElsewhere)
    }
