"""A run of several phases from one composed config: each phase is composed, trained and recorded like any run."""

import datetime as dt
import logging
import time
from collections.abc import Callable
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from research.config import start_from
from research.errors import CheckpointError, ConfigError
from research.loops.fit import CHECKPOINTS, LAST, FitOutcome, StopOnInterrupt
from research.loops.ledger import Ledger
from research.loops.scoring import DataModule, Scores
from research.loops.strong_to_weak import (
    Phase,
    StrongToWeakPlan,
    check_finished,
    folder_of,
    ledger_of_phases,
    overrides_of,
    scores_of,
)
from research.loops.training import RECORD_FILE
from research.methods.base import AbstractMethod
from research.results.curves import CURVE_FILE, joined_curves, read_curve, write_curve
from research.results.record import RunRecord, read_record
from research.schemas import check_root
from research.sweeps.grammar import quoted
from research.sweeps.process import refuse_further_processes
from research.sweeps.secrets import refuse_secret_overrides

log = logging.getLogger(__name__)
TrainInto = Callable[[Path, DictConfig, list[str]], RunRecord]


class StrongToWeakLoop:
    """The ``loop`` of a training run whose phases are runs themselves, in ``phases/<number>_<name>`` of its folder.

    A finished phase is not repeated; with ``ckpt_path=last`` one that was killed goes on from its own last checkpoint.
    All phases are composed, and what is finished is compared with them, before anything begins: a typing error in the
    last one costs no training.
    """

    def __init__(
        self,
        cfg: DictConfig,
        plan: StrongToWeakPlan,
        data: DataModule,
        run_dir: Path,
        overrides: list[str],
        train: TrainInto,
    ) -> None:
        _refuse_further_processes(cfg)
        if cfg.trainer.fast_dev_run:
            raise ConfigError("trainer.fast_dev_run leaves no student for a next phase; give trainer=smoke")
        self._cfg, self._plan, self._data, self._overrides, self._train = cfg, plan, data, overrides, train
        self.metrics: dict[str, float] = {}
        self.ledger: Ledger = {}
        self.scores: Scores | None = None
        for number, phase in enumerate(plan.declared()):
            composed, wanted = self._composed(phase, None, None)
            _refuse_further_processes(composed)
            finished = _finished(folder_of(run_dir, number, phase))
            if finished is not None:
                check_finished(finished, wanted, folder_of(run_dir, number, phase), is_first=number == 0)

    def run(self, method: AbstractMethod, interrupt: StopOnInterrupt, run_dir: Path) -> FitOutcome:
        """Run, or go on with, the phases; the last one's weights end in ``method``.

        Raises what a phase raises: Preempted, with the signal, where it was stopped.
        """
        started = time.perf_counter()
        records: dict[str, RunRecord] = {}
        folders: dict[str, Path] = {}
        init_from: str | None = None
        for number, phase in enumerate(self._plan.declared()):
            folder = folders[phase.name] = folder_of(run_dir.absolute(), number, phase)
            records[phase.name] = self._phase(phase, folder, init_from, list(records.values()))
            init_from = str(folder)
        start_from(method.student, str(init_from), self._data.facts())
        self.scores = scores_of(run_dir.absolute(), folders, records)
        self.ledger = ledger_of_phases(list(records.values()))
        curves = [read_curve(folder / CURVE_FILE) for folder in folders.values() if (folder / CURVE_FILE).exists()]
        write_curve(run_dir / CURVE_FILE, joined_curves(curves))
        return FitOutcome("completed", None, time.perf_counter() - started)

    def _phase(self, phase: Phase, folder: Path, init_from: str | None, earlier: list[RunRecord]) -> RunRecord:
        """The record of a phase: read where it is finished, else of the run that is made or gone on with."""
        begins = None if init_from is None else quoted(init_from)
        finished = _finished(folder)
        if finished is not None:
            if earlier and finished.started_at < earlier[-1].started_at:
                raise _older_than_its_start(folder)
            log.info("phase %s is finished: %s", phase.name, folder)
            return finished
        last = folder / CHECKPOINTS / LAST
        goes_on = self._cfg.ckpt_path is not None and last.exists()
        if goes_on and earlier and last.stat().st_mtime < dt.datetime.fromisoformat(earlier[-1].started_at).timestamp():
            raise _older_than_its_start(folder)
        cfg, overrides = self._composed(phase, begins, "last" if goes_on else None)
        log.info("phase %s: %s", phase.name, folder)
        return self._train(folder, cfg, overrides)

    def _composed(self, phase: Phase, init_from: str | None, ckpt_path: str | None) -> tuple[DictConfig, list[str]]:
        """A phase's config, checked, and the overrides that made it."""
        overrides = overrides_of(phase, self._overrides, init_from, ckpt_path)
        refuse_secret_overrides(overrides)
        hydra = GlobalHydra.instance().hydra
        if hydra is None:
            raise ConfigError("loop=strong_to_weak composes its phases with Hydra, which is not initialised here")
        try:
            cfg = hydra.config_loader.load_configuration("train", overrides, run_mode=RunMode.RUN)
            with open_dict(cfg):
                del cfg["hydra"]
            check_root(cfg, "train")
        except (HydraException, ConfigError) as error:
            told = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise ConfigError(f"loop.phases: {phase.name} does not compose: {told}") from None
        return cfg, overrides


def _older_than_its_start(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is older than the run of the phase that it begins with, which was made anew; remove it, or give "
        "another run folder"
    )


def _refuse_further_processes(cfg: DictConfig) -> None:
    by_hand = ", or run the phases one by one with init_from"
    refuse_further_processes(cfg, "loop=strong_to_weak runs its phases", by_hand)


def _finished(folder: Path) -> RunRecord | None:
    """The record of a completed run in a folder; None where there is none."""
    path = folder / RECORD_FILE
    record = read_record(path) if path.exists() else None
    return record if record is not None and record.status == "completed" else None
