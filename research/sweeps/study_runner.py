"""Runs the cells of a study through any Hydra launcher: finished cells are skipped, interrupted ones go on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode, TaskFunction

from research.errors import ConfigError
from research.results.collect import collect
from research.results.record import read_record
from research.results.study_file import read_study
from research.results.study import Requirement, Study, cells, fill_placeholders, requirements
from research.sweeps.jobs import cache_cell, cache_is_complete, train_cell
from research.sweeps.progress import StudyProgress

TASKS: dict[str, TaskFunction] = {"train": train_cell, "cache": cache_cell}
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
        path = self.folder / "run.json"
        if not path.exists():
            return False
        record = read_record(path)
        return record.status == "completed" and set(self.overrides) <= set(record.overrides)


class StudyRunner:
    """All runs of one study.

    runs_dir           where its cells' folders lie, by cell key
    shared_dir         where requirements lie, by name and hash of what makes them: studies share equal ones
    launcher           overrides that choose and set Hydra's launcher, such as ["hydra/launcher=joblib"]
    extra              overrides for every cell and requirement
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
        self._extra, self._launcher = tuple(extra), tuple(launcher)
        self._requirement_dirs: dict[str, str] = {}

    def run(self) -> None:
        """Make what is missing, then collect the records into the study's folder.

        Raises ConfigError naming the first failure where a requirement or a cell failed; the others are kept.
        """
        waiting = requirements(self.study, self.preset)
        declared = cells(self.study, self.preset)
        with StudyProgress(self.study.name, len(waiting) + len(declared)) as progress:
            while waiting:
                batch, waiting = self._ready(waiting)
                self._launch([self._requirement_job(item) for item in batch], progress)
            failures = self._launch([self._cell_job(cell) for cell in declared], progress, tolerate=True)
        found = collect(self.study, self.runs_dir, self.preset, self._requirement_dirs)
        if failures:
            counts = ", ".join(f"{number} {reason}" for reason, number in found.count_by_reason().items())
            raise ConfigError(f"{len(failures)} of {len(declared)} cells did not finish ({counts}). First: {failures[0]}")

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
            raise ConfigError(f"{self.study.path}: requires.{waiting[0].name} needs itself or a later one; reorder them")
        return batch, waiting[len(batch) :]

    def _requirement_job(self, item: Requirement) -> Job:
        values = {f"requires.{name}": folder for name, folder in self._requirement_dirs.items()}
        overrides = fill_placeholders((*item.overrides, *self._extra), values)
        mark = hashlib.sha256(json.dumps([item.command, overrides]).encode()).hexdigest()[:8]
        folder = self.shared_dir / f"{item.name}-{mark}"
        self._requirement_dirs[item.name] = str(folder)
        return self._job(item.name, item.command, overrides, folder)

    def _cell_job(self, cell: Any) -> Job:
        overrides = [*cell.filled(self._requirement_dirs), *self._extra]
        return self._job(cell.key, "train", overrides, self.runs_dir / cell.key)

    def _job(self, name: str, command: str, overrides: Sequence[str], folder: Path) -> Job:
        fixed = QUIET_TRAIN if command == "train" else (f"cache_dir={quoted(str(folder))}",)
        return Job(name, command, (*fixed, *overrides), folder)

    # -- running ------------------------------------------------------------------------------------------------------

    def _launch(self, jobs: list[Job], progress: StudyProgress, *, tolerate: bool = False) -> list[str]:
        """Run the unfinished jobs through the launcher; returns what failed, or raises at once unless tolerated."""
        todo = [job for job in jobs if not job.is_finished()]
        progress.advance(len(jobs) - len(todo))
        if not todo:
            return []
        for job in todo:
            _set_aside_other_run(job)
        launcher = self._launcher_for(todo[0].command)
        overrides = [[*job.overrides, f"hydra.sweep.subdir={quoted(str(job.folder))}"] for job in todo]
        with progress.watching([job.folder for job in todo], lambda folder: _finished(folder, todo)):
            try:
                returns: Sequence[JobReturn] = launcher.launch(overrides, initial_job_idx=0)
            except HydraException as error:
                raise ConfigError(f"{self.study.path}: the overrides of a run do not compose: {error}") from error
        failures = [
            f"{job.name}: {_reason(done)}"
            for job, done in zip(todo, returns, strict=True)
            if done.status is not JobStatus.COMPLETED
        ]
        if failures and not tolerate:
            raise ConfigError(f"a requirement of {self.study.name} failed. {failures[0]}")
        return failures

    def _launcher_for(self, command: str) -> Any:
        """The configured launcher, set up for the config of another command."""
        hydra = GlobalHydra.instance().hydra
        if hydra is None:
            raise ConfigError("a study runs inside `distill study`; Hydra is not initialised here")
        loader = hydra.config_loader
        sweep_dir = f"hydra.sweep.dir={quoted(str(self.runs_dir))}"
        config = loader.load_configuration(
            config_name=command, overrides=[*QUIET, *self._launcher, sweep_dir], run_mode=RunMode.MULTIRUN
        )
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        return Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=TASKS[command], config=config
        )


def quoted(text: str) -> str:
    """A text as one value of Hydra's override grammar, whatever it contains."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _finished(folder: Path, jobs: Sequence[Job]) -> bool:
    return next(job for job in jobs if job.folder == folder).is_finished()


def _set_aside_other_run(job: Job) -> None:
    """Keep what an earlier definition of the study left in this folder, under a name of its own."""
    path = job.folder / "run.json"
    if path.exists() and job.command == "train":
        record = read_record(path)
        if not set(job.overrides) <= set(record.overrides):
            number = sum(1 for _ in job.folder.parent.glob(f"{job.folder.name}.other-*"))
            job.folder.rename(job.folder.with_name(f"{job.folder.name}.other-{number}"))


def _reason(done: JobReturn) -> str:
    try:
        return f"returned {done.return_value!r} with status {done.status.name}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
