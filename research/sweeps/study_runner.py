"""Runs the cells of a study through any Hydra launcher: finished cells are skipped, interrupted ones go on."""

import hashlib
import json
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import OmegaConf, open_dict

from research.errors import ConfigError, Preempted
from research.loops.signals import handled
from research.results.collect import collect
from research.results.record import json_ready, read_record
from research.results.study import Requirement, Study, cells, fill_placeholders, requirements, stages
from research.results.study_file import read_study
from research.schemas import check_root
from research.sweeps.cache_job import cache_cell, cache_is_complete
from research.sweeps.grammar import quoted
from research.sweeps.jobs import train_cell
from research.sweeps.progress import StudyProgress
from research.sweeps.secrets import refuse_secret_overrides
from research.sweeps.sweep_cell import SweepCell
from research.sweeps.traces_job import traces_are_complete, traces_cell
from research.traces.manifest import MANIFEST_FILE

TASKS: dict[str, TaskFunction] = {"train": train_cell, "cache": cache_cell, "traces": traces_cell}
ROOTS = {"train": "train", "sweep": "train", "cache": "cache", "traces": "traces"}  # command -> its config
QUIET = ("hydra/hydra_logging=disabled", "hydra/job_logging=quiet")
QUIET_TRAIN = ("trainer.enable_progress_bar=false", "logger=none", "keep_checkpoints=false", "ckpt_path=last")


@dataclass(frozen=True)
class Job:
    """One run to make: its command, its final overrides, and the folder it leaves."""

    name: str
    command: str
    overrides: tuple[str, ...]
    folder: Path

    def is_finished(self) -> bool:
        """Whether the folder holds a completed run of exactly these overrides."""
        if self.command == "cache":
            return cache_is_complete(self.folder)
        if self.command == "traces":
            return (self.folder / MANIFEST_FILE).exists() and traces_are_complete(self.folder)
        path = self.folder / "run.json"
        if not path.exists():
            return False
        record = read_record(path)
        return record.status == "completed" and self.is_of(record.overrides)

    def is_of(self, recorded: Sequence[str]) -> bool:
        """Whether recorded overrides are this job's; those of Hydra's own node stand in a sweep's record alone."""
        if self.command != "sweep":
            return list(self.overrides) == list(recorded)
        begun = [text for text in self.overrides if not text.startswith("hydra")]
        return sorted(recorded) == sorted(self.overrides) or list(recorded) == begun


class StudyRunner:
    """All runs of one study.

    runs_dir           where its cells' folders lie, by cell key
    shared_dir         where requirements lie, by name and hash of what makes them: studies share equal ones
    launcher           overrides that choose and set Hydra's launcher, such as ["hydra/launcher=joblib"]
    extra              overrides for every train run, cells and requirements alike: a trial, which is not collected
    Raises ConfigError where the study's file is not one, or does not have this preset.
    """

    def __init__(
        self,
        folder: Path,
        *,
        runs_dir: Path,
        shared_dir: Path,
        preset: str | None = None,
        extra: Sequence[str] = (),
        launcher: Sequence[str] = (),
    ) -> None:
        self.study: Study = read_study(folder)
        self.preset, self.runs_dir, self.shared_dir = preset, runs_dir.absolute(), shared_dir.absolute()
        self._cells, self._requirements = cells(self.study, preset), requirements(self.study, preset)
        self._extra, self._launcher = tuple(extra), tuple(launcher)
        self._requirement_dirs: dict[str, str] = {}
        self._made: set[str] = set()

    def run(self) -> None:
        """Make what is missing, then collect the records into the study's folder (not those of a trial with `extra`).

        Raises ConfigError where a requirement failed, and naming every cell that did; the others are kept.
        """
        waiting, found = self._requirements, self._cells
        required = {item.name: self._requirement_job(item) for item in waiting}
        declared = [self._cell_job(cell) for cell in found]
        but_for_seeds = {cell.overrides: job for cell, job in zip(found, declared, strict=True)}
        self._check([*required.values(), *but_for_seeds.values()])
        with StudyProgress(self.study.name, len(required) + len(declared)) as progress:
            while waiting:
                batch, waiting = self._ready(waiting)
                self._launch([required[item.name] for item in batch], progress)
            failures: dict[str, str] = {}
            for stage in stages(found):
                keys = {cell.key for cell in stage}
                failures |= self._launch([job for job in declared if job.name in keys], progress, tolerate=True)
        if not self._extra:  # a trial leaves the study's own results as they are
            collect(self.study, self.runs_dir, self.preset, self._requirement_dirs)
        if failures:
            names = ", ".join(failures)
            first = next(iter(failures.items()))
            raise ConfigError(
                f"{len(failures)} of {len(declared)} cells did not finish: {names}. {first[0]} ended with {first[1]}"
            )

    # -- what to run --------------------------------------------------------------------------------------------------

    def _ready(self, waiting: list[Requirement]) -> tuple[list[Requirement], list[Requirement]]:
        """The leading requirements that need none of the others still waiting, all of one command."""
        names = {item.name for item in waiting}
        batch: list[Requirement] = []
        for item in waiting:
            needs_waiting = any(f"{{requires.{name}}}" in text for name in names for text in item.overrides)
            if needs_waiting or (batch and item.command != batch[0].command):
                break
            batch.append(item)
        if not batch:
            raise ConfigError(
                f"{self.study.path}: requires.{waiting[0].name} needs itself or a later one; reorder them"
            )
        return batch, waiting[len(batch) :]

    def _requirement_job(self, item: Requirement) -> Job:
        if item.command not in TASKS:
            told = f"{item.name} is a run of {item.command!r}; expected one of {', '.join(TASKS)}"
            raise ConfigError(f"{self.study.path}: {told}")
        extra = self._extra if item.command == "train" else ()
        values = {f"requires.{name}": folder for name, folder in self._requirement_dirs.items()}
        overrides = fill_placeholders((*item.overrides, *extra), values)
        mark = hashlib.sha256(json.dumps([item.command, overrides]).encode()).hexdigest()[:8]
        folder = self.shared_dir / f"{item.name}-{mark}"
        self._requirement_dirs[item.name] = str(folder)
        return self._job(item.name, item.command, overrides, folder)

    def _cell_job(self, cell: Any) -> Job:
        overrides = [*cell.filled(self._requirement_dirs, self.runs_dir), *self._extra]
        return self._job(cell.key, self.study.command, overrides, self.runs_dir / cell.key)

    def _job(self, name: str, command: str, overrides: Sequence[str], folder: Path) -> Job:
        where = {"cache": f"cache_dir={quoted(str(folder))}", "traces": f"store={quoted(str(folder))}"}
        fixed = QUIET_TRAIN if ROOTS[command] == "train" else (where[command],)
        return Job(name, command, (*fixed, *overrides), folder)

    def _check(self, jobs: list[Job]) -> None:
        """Compose the configs of jobs before anything runs: a typing error in the last arm costs no run."""
        loader = _hydra().config_loader
        for job in jobs:
            refuse_secret_overrides(job.overrides)
            try:
                config = loader.load_configuration(ROOTS[job.command], list(job.overrides), run_mode=RunMode.RUN)
                with open_dict(config):
                    del config["hydra"]
                check_root(config, ROOTS[job.command])
            except (HydraException, ConfigError) as error:
                told = " ".join(f"{error} {error.__cause__ or ''}".split())
                raise ConfigError(f"{self.study.path}: {job.name} does not compose: {told}") from None

    # -- running ------------------------------------------------------------------------------------------------------

    def _launch(self, jobs: list[Job], progress: StudyProgress, *, tolerate: bool = False) -> dict[str, str]:
        """Run the unfinished jobs through the launcher; returns why which failed, or raises unless tolerated."""
        outdated = [job for job in jobs if job.is_finished() and self._is_outdated(job)]
        todo = [job for job in jobs if job in outdated or not job.is_finished()]
        progress.advance(len(jobs) - len(todo))
        if not todo:
            return {}
        for job in todo:
            _set_aside_other_run(job, outdated=job in outdated)
            self._made.add(str(job.folder))
        launcher = self._launcher_for(todo[0].command)
        overrides = [[*job.overrides, f"hydra.sweep.subdir={quoted(str(job.folder))}"] for job in todo]
        folders = [job.folder for job in todo]
        with (
            handled({signal.SIGTERM: _stop}),
            progress.watching(folders, lambda folder: _finished(folder, todo)),
        ):
            try:
                returns: Sequence[JobReturn] = launcher.launch(overrides, initial_job_idx=0)
            except BrokenExecutor as error:
                raise ConfigError(
                    f"a worker process of {self.study.name} died ({error}); start the study again"
                ) from None
        failures = {
            job.name: _reason(done)
            for job, done in zip(todo, returns, strict=True)
            if done.status is not JobStatus.COMPLETED
        }
        for name, reason in failures.items():
            if not tolerate:
                raise ConfigError(f"{name}, which {self.study.name} requires, ended with {reason}")
        return failures

    def _is_outdated(self, job: Job) -> bool:
        """Whether a finished run would come out differently today: what it needs was made anew, or a file changed."""
        if any(folder in text for folder in self._made for text in job.overrides):
            return True
        path = job.folder / "run.json"
        return path.exists() and bool(changed_values(read_record(path).config, _composed(job)))

    def _launcher_for(self, command: str) -> Any:
        """The configured launcher, set up for the config of another command."""
        loader = _hydra().config_loader
        sweep_dir = f"hydra.sweep.dir={quoted(str(self.runs_dir))}"
        config = loader.load_configuration(
            config_name=ROOTS[command], overrides=[*QUIET, *self._launcher, sweep_dir], run_mode=RunMode.MULTIRUN
        )
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        task = SweepCell(context) if command == "sweep" else TASKS[command]
        return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)


def changed_values(recorded: Mapping[str, Any], composed: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys, in both configs, whose values differ: what a YAML file that was edited since would change in a run.

    Keys that only one of them has say nothing of the run, values that interpolate are resolved in a run alone, and a
    record holds infinity as a word.
    """
    changed = []
    for key in recorded.keys() & composed.keys():
        old, new = recorded[key], composed[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += changed_values(old, new, f"{prefix}{key}.")
        elif old != json_ready(new) and not (isinstance(new, str) and "${" in new):
            changed.append(f"{prefix}{key}")
    return sorted(changed)


def _composed(job: Job) -> dict[str, Any]:
    """The config that a job would run with today, unresolved."""
    config = _hydra().config_loader.load_configuration(ROOTS[job.command], list(job.overrides), run_mode=RunMode.RUN)
    with open_dict(config):
        del config["hydra"]
    container: Any = OmegaConf.to_container(config, resolve=False)
    return dict(container)


def _stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a study as Ctrl-C does, so that a launcher stops its workers; the exit code says which it was."""
    stopped = Preempted(f"{signal.Signals(number).name}; the same command goes on from here", 128 + number)
    raise KeyboardInterrupt(str(stopped)) from stopped


def _finished(folder: Path, jobs: Sequence[Job]) -> bool:
    return next(job for job in jobs if job.folder == folder).is_finished()


def _set_aside_other_run(job: Job, *, outdated: bool = False) -> None:
    """Keep what an earlier definition of the study left in this folder, under a name of its own.

    A run that was killed has no record yet, but a checkpoint that must not be gone on from with other overrides.
    """
    found = _overrides_of(job.folder)
    if outdated or (ROOTS[job.command] == "train" and found is not None and not job.is_of(found)):
        number = sum(1 for _ in job.folder.parent.glob(f"{job.folder.name}.other-*"))
        job.folder.rename(job.folder.with_name(f"{job.folder.name}.other-{number}"))


def _overrides_of(folder: Path) -> list[str] | None:
    """The overrides of the run in a folder, finished or not; None where none began."""
    if (folder / "run.json").exists():
        return read_record(folder / "run.json").overrides
    begun = folder / ".hydra" / "overrides.yaml"
    return [str(text) for text in OmegaConf.load(begun)] if begun.exists() else None


def _reason(done: JobReturn) -> str:
    """What a job that did not complete left; read without `return_value`, which would print the overrides."""
    left = done._return_value
    return f"{type(left).__name__}: {left}" if isinstance(left, Exception) else f"ended with status {done.status.name}"


def _hydra() -> Any:
    hydra = GlobalHydra.instance().hydra
    if hydra is None:
        raise ConfigError("a study runs inside `distill study`; Hydra is not initialised here")
    return hydra
