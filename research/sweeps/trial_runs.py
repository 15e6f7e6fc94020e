"""The runs of one trial: in this process or in one of its own, once or for every seed."""

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from research.errors import ConfigError
from research.sweeps.grammar import quoted
from research.sweeps.memory_errors import is_out_of_memory, kills_for_memory, was_killed_for_memory
from research.sweeps.trial_context import TrialContext, within_trial

RESULT_FILE = "trial_result.json"
STDERR_FILE = "stderr.log"
KILL_AFTER_S = 30.0
TASK_OF_SRUN = ("SLURM_NTASKS", "SLURM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP")
_PR_SET_PDEATHSIG = 1


class TrialFailed(RuntimeError):
    """A run that failed elsewhere or in another way than by an exception, and that run's own traceback."""

    trace, out_of_memory = "", False

    @classmethod
    def of(cls, told: str, trace: str, *, out_of_memory: bool = False) -> "TrialFailed":
        """With the traceback and whether memory had run out, which travel between processes."""
        made = cls(told)
        made.trace, made.out_of_memory = trace, out_of_memory
        return made


@dataclass(frozen=True)
class RunPlan:
    """How the runs of a trial are made.

    seeds       the trial is run once for each, and its value is their mean; empty: once, as configured
    seed_key    the key that a seed is given to
    subprocess  every run in a process of its own, which frees what it held: memory, a GPU, ranks
    program     what starts the application there, such as [python, script.py]
    quiet       overrides that keep a run's log out of the terminal
    hydra       the command's overrides of Hydra's own config that hold for a run too, such as hydra.job.chdir
    prune_on, prune_step  what the runs report to a pruner, and what the reports count; see `TrialContext`
    """

    seeds: tuple[int, ...] = ()
    seed_key: str = "seed"
    subprocess: bool = False
    program: tuple[str, ...] = ()
    quiet: tuple[str, ...] = ()
    hydra: tuple[str, ...] = ()
    prune_on: str | None = None
    prune_step: str = "step"


class TrialRuns:
    """Makes the runs of trials; travels to workers with Hydra's context and the application's task."""

    def __init__(self, task: TaskFunction, hydra_context: HydraContext, plan: RunPlan) -> None:
        self._task, self._hydra_context, self.plan = task, hydra_context, plan
        self._seed: Any = None

    def run(
        self,
        context: TrialContext,
        *,
        done: Mapping[str, Any],
        note: Callable[[str, Any], None],
        direct: Callable[[], Any] | None = None,
    ) -> Any:
        """What the task returned; of several seeds the mean of each value.

        done    seed -> what was returned for it before an interruption
        note    told seed and result as each seed ends; it may raise to stop the trial
        direct  the run that Hydra has already prepared in this process, where there is just one
        """
        if not self.plan.seeds:
            if direct is not None and not self.plan.subprocess:
                with within_trial(context):
                    return direct()
            return self._one(context)
        returned = dict(done)
        for seed in self.plan.seeds:
            if str(seed) in returned:
                continue
            overrides = (*context.overrides, f"{self.plan.seed_key}={seed}")
            folder = str(Path(context.folder) / f"seed_{seed}")
            returned[str(seed)] = plain_returned(self._one(_replaced(context, overrides, folder)))
            note(str(seed), returned[str(seed)])
        return mean_of([returned[str(seed)] for seed in self.plan.seeds])

    def see_seed(self, cfg: Any) -> None:
        """Keep the seed that a run is composed with, whoever gave it: an override, a file, `${hydra:job.num}`."""
        self._seed = seed_in(cfg, self.plan.seed_key)

    def seed_seen(self) -> Any:
        """The seed of the run that ended; None: not known, or one of several."""
        seed, self._seed = self._seed, None
        return None if self.plan.seeds else seed

    def _one(self, context: TrialContext) -> Any:
        with within_trial(context):
            return self._in_child(context) if self.plan.subprocess else self._here(context)

    def _here(self, context: TrialContext) -> Any:
        """One run in this process, with its own config, folder and log."""
        loader = self._hydra_context.config_loader
        config = loader.load_configuration(
            config_name=HydraConfig.get().job.config_name,
            overrides=[*self._overrides(context), f"hydra.run.dir={quoted(context.folder)}"],
            run_mode=RunMode.RUN,
        )
        with read_write(config.hydra.job), open_dict(config.hydra.job):
            config.hydra.job.num, config.hydra.job.id = context.number, str(context.number)

        def task(cfg: DictConfig) -> Any:
            self.see_seed(cfg)
            return self._task(cfg)

        done = run_job(
            hydra_context=self._hydra_context,
            task_function=task,
            config=config,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
        )
        if done.status is not JobStatus.COMPLETED and isinstance(done._return_value, Exception):
            raise done._return_value
        return done._return_value

    def _overrides(self, context: TrialContext) -> list[str]:
        return [*context.overrides, *self.plan.hydra, *self.plan.quiet]

    def _in_child(self, context: TrialContext) -> Any:
        """One run as the application's own single run, in a new process."""
        folder = Path(context.folder)
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / RESULT_FILE
        result.unlink(missing_ok=True)
        callback = f"{{_target_: {WriteResult.__module__}.WriteResult, seed_key: {quoted(self.plan.seed_key)}}}"
        command = [
            *self.plan.program, *self._overrides(context), "hydra.mode=RUN",
            f"hydra.run.dir={quoted(context.folder)}", f"+hydra.callbacks.trial_result={callback}",
        ]  # fmt: skip
        kills = kills_for_memory()
        with (folder / STDERR_FILE).open("a") as errors:
            child = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=_dies_with_parent(), env=environment(),
                cwd=where_it_began(),
            )  # fmt: skip
            code = _wait(child)
        if not result.exists():
            lines = (folder / STDERR_FILE).read_text(errors="replace").strip().splitlines()[-20:]
            is_memory = was_killed_for_memory(code, kills)
            told = "was killed by Linux for want of memory" if is_memory else f"ended with code {code} and no result"
            reason = f"the run's process {told}; see {folder / STDERR_FILE}"
            raise TrialFailed.of(reason, "\n".join(lines), out_of_memory=is_memory)
        told = json.loads(result.read_text())
        self._seed = told["seed"]
        return _returned_in(told)


class WriteResult(Callback):
    """Hydra's callback that leaves a run's returned value, or its error, and its seed in the run's folder."""

    def __init__(self, seed_key: str = "seed") -> None:
        self._seed_key = seed_key

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # a further rank of the same run
            return
        value = job_return._return_value
        if job_return.status is JobStatus.COMPLETED:
            told = {"status": "completed", "returned": value}
        else:
            pruned = any(kind.__name__ == "TrialPruned" for kind in type(value).__mro__)
            trace = "".join(traceback.format_exception(value)) if isinstance(value, BaseException) else ""
            told = {
                "status": "pruned" if pruned else "failed",
                "error": f"{type(value).__name__}: {value}",
                "traceback": trace,
                "out_of_memory": isinstance(value, BaseException) and is_out_of_memory(value),
            }
        told["seed"] = seed_in(config, self._seed_key)
        path = Path(config.hydra.runtime.output_dir) / RESULT_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plain_returned(told)))
        partial.replace(path)


def refuse_in_a_rank(*, is_job: bool = False) -> None:
    """Raise ConfigError where this process is a further rank of a distributed run: it must not start a sweep.

    is_job  asked in a launched job: a further task of it must not work beside the first one
    """
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
        value = os.environ.get(name, "0")
        if value.isdigit() and int(value) > 0:
            if is_job:
                raise ConfigError(
                    f"{name} is {value}: this is a further task of a launched job, and each of them would run trials. "
                    "Give a job one task (hydra.launcher.tasks_per_node=1), and a trial its ranks with "
                    "trainer.devices and hydra.sweeper.subprocess=true"
                )
            raise ConfigError(
                f"{name} is {value}: this is a further rank of a distributed run, which must not sweep. Start "
                "the sweep outside, or give a trial its ranks with trainer.devices and hydra.sweeper.subprocess=true"
            )


def mean_of(returned: Sequence[Any]) -> Any:
    """The mean of what the task returned for each seed: numbers, sequences of them, or mappings of them."""
    first = returned[0]
    if isinstance(first, Mapping):
        shared = [key for key in first if all(isinstance(one.get(key), int | float) for one in returned)]
        return {key: statistics.fmean(one[key] for one in returned) for key in shared}
    if isinstance(first, list | tuple):
        return [statistics.fmean(values) for values in zip(*returned, strict=True)]
    return statistics.fmean(returned)


def own_program() -> tuple[str, ...]:
    """What starts this application again: its script or its module, with the config that it was told to take."""
    import __main__

    spec = getattr(__main__, "__spec__", None)
    flags = _config_flags(sys.argv[1:])
    if spec is not None:
        return (sys.executable, "-m", spec.name.removesuffix(".__main__"), *flags)
    return (sys.executable, str(Path(sys.argv[0]).absolute()), *flags)


def _config_flags(arguments: Sequence[str]) -> tuple[str, ...]:
    """Hydra's flags that say which config an application has, paths made absolute where they are the folder's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-dir", "-cd")
    given = parser.parse_known_args(list(arguments))[0]
    folder = str(Path(given.config_dir).absolute()) if given.config_dir else None
    told = {"--config-name": given.config_name, "--config-path": given.config_path, "--config-dir": folder}
    return tuple(text for flag, value in told.items() if value for text in (flag, value))


def environment() -> dict[str, str]:
    """For a child: this process's, but for what says that srun started it. It did not, and the ranks are the child's.

    Lightning takes the task that a cluster's launcher gave this worker for its own, and refuses a second rank.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(TASK_OF_SRUN)}


def where_it_began() -> str | None:
    """The folder in which the command was given: from there `python -m` finds its module, and paths mean the same.

    A job may be in a folder of its own (hydra.job.chdir). None, for this one, where the folder is not on this machine.
    """
    cwd = str(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else ""
    return cwd if cwd and Path(cwd).is_dir() else None


def _dies_with_parent() -> Callable[[], None] | None:
    """For a child on Linux: killed when this process is, or an orphan would work on beside the trial's next attempt."""
    if not sys.platform.startswith("linux"):
        return None
    system = ctypes.CDLL(None)
    return lambda: system.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _replaced(context: TrialContext, overrides: tuple[str, ...], folder: str) -> TrialContext:
    from dataclasses import replace

    return replace(context, overrides=overrides, folder=folder)


def _wait(child: "subprocess.Popen[bytes]") -> int:
    """Wait for a child; a signal to this process is passed on, and the child is waited for before it counts here."""

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)
        raise KeyboardInterrupt(signal.Signals(number).name)

    try:
        before = signal.signal(signal.SIGTERM, forward)
    except ValueError:  # not the main thread
        before = None
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        try:
            child.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _returned_in(told: Mapping[str, Any]) -> Any:
    """What a run in a process of its own returned; raises what it raised."""
    from optuna import TrialPruned

    if told["status"] == "pruned":
        raise TrialPruned(told["error"].partition(": ")[2])
    if told["status"] == "failed":
        raise TrialFailed.of(told["error"], told["traceback"], out_of_memory=told["out_of_memory"])
    return told["returned"]


def seed_in(cfg: Any, key: str) -> Any:
    """The value of the key that seeds are given to, as a config has it; None: it has none, or none that resolves."""
    try:
        seed = OmegaConf.select(cfg, key.lstrip("+"), default=None)
    except OmegaConfBaseException:
        return None
    return seed if seed is None or isinstance(seed, int | float) else str(seed)


def plain_returned(value: Any) -> Any:
    """What a task returned as plain values: numbers of numpy and torch as Python's, their arrays as lists."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): plain_returned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_returned(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):
        return plain_returned(value.tolist())
    return float(value) if hasattr(value, "__float__") else str(value)
