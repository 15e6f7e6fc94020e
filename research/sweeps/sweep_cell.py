"""A whole sweep as one cell of a study: what a search finds, how often, and at what cost, with seeds and intervals."""

import datetime as dt
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig

from research.config import plain
from research.errors import ConfigError
from research.results.curves import CURVE_FILE, write_curve
from research.results.record import (
    LEDGER_FIELDS,
    LEDGER_PARTS,
    RunRecord,
    collect_versions,
    git_revision,
    hardware,
    read_record,
    write_record,
)
from research.schemas import check_root
from research.sweeps.grammar import quoted
from research.sweeps.jobs import trial_cell
from research.sweeps.sweep_command import sweep
from research.sweeps.sweep_options import normalised
from research.sweeps.trial_constraints import is_feasible
from research.sweeps.trial_store import TrialStore
from research.sweeps.trial_values import refuse_test_monitor

SWEEP_FOLDER = "sweep"
OWN = ("hydra.sweeper", "hydra/sweeper")
QUIET = ("hydra/hydra_logging=disabled", "hydra/job_logging=quiet", "hydra/launcher=basic")
Ledger = dict[str, dict[str, float | None]]


class SweepCell:
    """The task of a cell whose study says `command: sweep`; travels to workers with Hydra's context."""

    def __init__(self, hydra_context: HydraContext) -> None:
        self._context = hydra_context

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run the sweep that the cell's overrides describe, one trial at a time, and leave `run.json` and a curve."""
        check_root(cfg, "train")
        hydra, started = HydraConfig.get(), time.perf_counter()
        started_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        folder, overrides = Path(hydra.runtime.output_dir), list(hydra.overrides.task)
        own = [text for text in hydra.overrides.hydra if text.startswith(OWN)]
        where = f"hydra.sweep.dir={quoted(str(folder / SWEEP_FOLDER))}"
        config = self._context.config_loader.load_configuration(
            "train", [*overrides, *own, *QUIET, where], run_mode=RunMode.MULTIRUN
        )
        options = normalised(config.hydra.sweeper)
        if "n_trials" not in options:
            raise ConfigError(
                "a cell of `command: sweep` needs the sweeper: hparams_search=NAME or hydra/sweeper=optuna_study"
            )
        store = sweep(
            options, overrides, self._context, trial_cell, config, self._launcher, check=refuse_test_monitor,
            is_shown=False,
        )[1]  # fmt: skip
        record = self._record(cfg, store, [*overrides, *own], folder, started_at, time.perf_counter() - started)
        write_record(folder / "run.json", record)
        return record.metrics.get("search/best")

    def _launcher(self, task: TaskFunction, config: DictConfig) -> Any:
        return Plugins.instance().instantiate_launcher(hydra_context=self._context, task_function=task, config=config)

    def _record(
        self, cfg: DictConfig, store: TrialStore, overrides: list[str], folder: Path, started_at: str, wall_s: float
    ) -> RunRecord:
        metrics = search_metrics(store)
        ledgers = [read_record(path).ledger for path in sorted((folder / SWEEP_FOLDER).glob("**/run.json"))]
        write_curve(folder / CURVE_FILE, search_curve(store))
        is_complete = "search/best" in metrics
        return RunRecord(
            command="distill train -m",
            experiment=cfg.name,
            status="completed" if is_complete else "failed",
            reason=None if is_complete else "no trial of the sweep was completed",
            seed=cfg.seed,
            config=plain(cfg),
            overrides=overrides,
            metrics=metrics,
            started_at=started_at,
            wall_s=wall_s,
            versions=collect_versions(),
            revision=git_revision(Path(__file__).parent),
            hardware=hardware(int(cfg.threads or 1)),
            ledger=summed(ledgers),
            artifacts={"curve": CURVE_FILE},
        )


def search_metrics(store: TrialStore) -> dict[str, float]:
    """What a finished sweep found, flat.

    search/best              the best trial's (first) objective; search/best_trial: its number
    search/<name>            the best trial's value of every searched number
    search/best/<name>=<value>, search/trials/<name>=<value>   of every searched choice: its share of the best trials,
                             which of several objectives are those that no other beats, and of all trials that ended
    search/hypervolume       of two objectives with a box: the share of it that the trials dominate
    search/complete, pruned, failed   trials that ended so; search/seconds: of all of them
    search/out_of_memory     those that are infeasible because of it, where there are such
    """
    counts, best = store.counts(), store.best_trials()
    found = {
        "search/complete": float(counts.complete),
        "search/pruned": float(counts.pruned),
        "search/failed": float(counts.failed),
        "search/seconds": sum(float(trial.user_attrs.get("seconds", 0.0)) for trial in store.trials()),
    }
    found |= {"search/out_of_memory": float(counts.out_of_memory)} if counts.out_of_memory else {}
    if not best:
        return found
    found |= {"search/best": float(best[0].values[0]), "search/best_trial": float(best[0].number)}
    volume = store.hypervolume()
    found |= {} if volume is None else {"search/hypervolume": volume}
    numbers = {k: v for k, v in best[0].params.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    ended = [trial for trial in store.trials() if trial.state.is_finished()]
    found |= _shares("search/best", [trial.params for trial in best])
    found |= _shares("search/trials", [trial.params for trial in ended])
    return found | {f"search/{name}": float(value) for name, value in numbers.items()}


def _shares(prefix: str, params: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`<prefix>/<name>=<value>` -> the share of these trials that chose it; text and truth alone."""
    chosen = Counter(f"{name}={v}" for one in params for name, v in one.items() if isinstance(v, str | bool))
    return {f"{prefix}/{name}": count / len(params) for name, count in sorted(chosen.items())}


def search_curve(store: TrialStore) -> list[dict[str, float | None]]:
    """The best feasible value after every trial that ended, against trials (`step`), seconds and FLOPs of all."""
    sign = -1.0 if store.terms.directions[0] == "maximize" else 1.0
    rows: list[dict[str, float | None]] = []
    best, seconds, flops = float("inf"), 0.0, 0.0
    ended = [trial for trial in store.trials() if trial.state.is_finished()]
    for number, trial in enumerate(sorted(ended, key=lambda one: one.datetime_complete or one.number), 1):
        seconds += float(trial.user_attrs.get("seconds", 0.0))
        flops += _flops(trial.user_attrs.get("folder"))
        if trial.state.name == "COMPLETE" and is_feasible(trial):
            best = min(best, sign * float(trial.values[0]))
        row: dict[str, float | None] = {"step": float(number), "spent_flops": flops, "spent_seconds": seconds}
        rows.append({**row, "spent_tokens": None, "search/best": sign * best if best < float("inf") else None})
    return rows


def summed(ledgers: Sequence[Mapping[str, Mapping[str, float | None]]]) -> Ledger:
    """The cost of all runs together; a teacher's training is theirs once, not once a run."""
    total: Ledger = {}
    for part in LEDGER_PARTS:
        lines = [ledger.get(part, {}) for ledger in ledgers]
        if part == "teacher_training":
            lines = lines[:1]
        known = {name: [line.get(name) for line in lines] for name in LEDGER_FIELDS}
        total[part] = {
            name: None if None in values else sum(value for value in values if value is not None)
            for name, values in known.items()
        }
    return total


def _flops(folder: Any) -> float:
    """What the runs of a trial cost, teacher scoring included, by their records."""
    found = 0.0
    for path in sorted(Path(str(folder)).glob("**/run.json")):
        lines = [line for part, line in read_record(path).ledger.items() if part != "teacher_training"]
        found += sum(line.get("flops") or 0.0 for line in lines)
    return found
