"""The runs of one trial: in this process or in one of its own, once or for every seed."""

import json
import os
import signal
import statistics
import subprocess
import sys
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

from research.errors import ConfigError
from research.sweeps.grammar import quoted
from research.sweeps.trial_context import TrialContext, within_trial

RESULT_FILE = "trial_result.json"
STDERR_FILE = "stderr.log"
KILL_AFTER_S = 30.0


class TrialFailed(RuntimeError):
    """A run that ended in a process of its own, with its last lines."""


@dataclass(frozen=True)
class RunPlan:
    """How the runs of a trial are made.

    seeds       the trial is run once for each, and its value is their mean; empty: once, as configured
    seed_key    the key that a seed is given to
    subprocess  every run in a process of its own, which frees what it held: memory, a GPU, ranks
    program     what starts the application there, such as [python, script.py]
    quiet       overrides that keep a run's log out of the terminal
    prune_on, prune_step  what the runs report to a pruner, and what the reports count; see `TrialContext`
    """

    seeds: tuple[int, ...] = ()
    seed_key: str = "seed"
    subprocess: bool = False
    program: tuple[str, ...] = ()
    quiet: tuple[str, ...] = ()
    prune_on: str | None = None
    prune_step: str = "step"


class TrialRuns:
    """Makes the runs of trials; travels to workers with Hydra's context and the application's task."""

    def __init__(self, task: TaskFunction, hydra_context: HydraContext, plan: RunPlan) -> None:
        self._task, self._hydra_context, self.plan = task, hydra_context, plan

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
            returned[str(seed)] = self._one(_replaced(context, overrides, folder))
            note(str(seed), returned[str(seed)])
        return mean_of([returned[str(seed)] for seed in self.plan.seeds])

    def _one(self, context: TrialContext) -> Any:
        with within_trial(context):
            return self._in_child(context) if self.plan.subprocess else self._here(context)

    def _here(self, context: TrialContext) -> Any:
        """One run in this process, with its own config, folder and log."""
        loader = self._hydra_context.config_loader
        config = loader.load_configuration(
            config_name=HydraConfig.get().job.config_name,
            overrides=[*context.overrides, *self.plan.quiet, f"hydra.run.dir={quoted(context.folder)}"],
            run_mode=RunMode.RUN,
        )
        with read_write(config.hydra.job), open_dict(config.hydra.job):
            config.hydra.job.num, config.hydra.job.id = context.number, str(context.number)
        done = run_job(
            hydra_context=self._hydra_context,
            task_function=self._task,
            config=config,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
        )
        if done.status is not JobStatus.COMPLETED and isinstance(done._return_value, Exception):
            raise done._return_value
        return done._return_value

    def _in_child(self, context: TrialContext) -> Any:
        """One run as the application's own single run, in a new process."""
        folder = Path(context.folder)
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / RESULT_FILE
        result.unlink(missing_ok=True)
        told = [f"+hydra.callbacks.trial_result._target_={WriteResult.__module__}.WriteResult"]
        command = [
            *self.plan.program, *context.overrides, *self.plan.quiet, "hydra.mode=RUN",
            f"hydra.run.dir={quoted(context.folder)}", *told,
        ]  # fmt: skip
        with (folder / STDERR_FILE).open("a") as errors:
            code = _wait(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors))
        if not result.exists():
            lines = (folder / STDERR_FILE).read_text().strip().splitlines()[-20:]
            raise TrialFailed(f"the run's process ended with code {code} and no result\n" + "\n".join(lines))
        return _read_result(result)


class WriteResult(Callback):
    """Hydra's callback that leaves a run's returned value, or its error, in the run's folder."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # a further rank of the same run
            return
        value = job_return._return_value
        if job_return.status is JobStatus.COMPLETED:
            told = {"status": "completed", "returned": value}
        else:
            pruned = any(kind.__name__ == "TrialPruned" for kind in type(value).__mro__)
            told = {"status": "pruned" if pruned else "failed", "error": f"{type(value).__name__}: {value}"}
        path = Path(config.hydra.runtime.output_dir) / RESULT_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(_plain(told)))
        partial.replace(path)


def refuse_in_a_rank() -> None:
    """Raise ConfigError where this process is a further rank of a distributed run: it must not start a sweep."""
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
        value = os.environ.get(name, "0")
        if value.isdigit() and int(value) > 0:
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
    """What starts this application again: its script or its module."""
    import __main__

    spec = getattr(__main__, "__spec__", None)
    if spec is not None:
        return (sys.executable, "-m", spec.name.removesuffix(".__main__"))
    return (sys.executable, str(Path(sys.argv[0]).absolute()))


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
    except KeyboardInterrupt:
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


def _read_result(path: Path) -> Any:
    from optuna import TrialPruned

    told = json.loads(path.read_text())
    if told["status"] == "pruned":
        raise TrialPruned(told["error"].partition(": ")[2])
    if told["status"] == "failed":
        raise TrialFailed(told["error"])
    return told["returned"]


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return float(value) if hasattr(value, "__float__") else str(value)
