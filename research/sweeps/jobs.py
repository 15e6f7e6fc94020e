"""The work of one Hydra job: `train_job` turns a composed config into a finished run folder.

Single runs, multiruns and the cells of a study all come through here.
"""

import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from research.config import (
    Parts,
    build,
    build_data,
    build_logger,
    build_trainer,
    expect_kind,
    make,
    plain,
)
from research.data.traces import TraceData
from research.errors import ConfigError, Preempted, Pruned
from research.generation.distribution import check_sampling
from research.loops.early_stop import EarlyStop
from research.loops.fit import ReportProgress, StopOnInterrupt, profiler_into
from research.loops.pruning_stop import PruningStop
from research.loops.self_taught_plan import SelfTaughtPlan
from research.loops.strong_to_weak import StrongToWeakPlan
from research.loops.training import TrainingRun
from research.records import Sampling
from research.results.record import RunRecord
from research.schemas import check_root
from research.sweeps.cache_job import with_cached_signals
from research.sweeps.preflight_job import preflight_before
from research.sweeps.process import prepare_process, sole_owner
from research.sweeps.trial_hooks import as_trial, pruning_stop, returned_by

log = logging.getLogger(__name__)


def train_job(cfg: DictConfig, *, resume_is_asked: bool = True) -> RunRecord:
    """Fit, evaluate, record; the run folder is Hydra's output directory. `resume_is_asked` as of `TrainingRun`."""
    prepare_process(cfg)
    cfg = as_trial(cfg)
    job = HydraConfig.get()
    run_dir = Path(job.runtime.output_dir)
    return train_into(run_dir, cfg, list(job.overrides.task), resume_is_asked=resume_is_asked)


def train_into(run_dir: Path, cfg: DictConfig, overrides: list[str], *, resume_is_asked: bool = True) -> RunRecord:
    """The same in a folder of the caller's choice, its own process prepared before; `overrides` are for the record."""
    with sole_owner(run_dir):
        parts = build(with_cached_signals(cfg))
        _check_evaluation(cfg, parts)
        if not str(plain(cfg.loop).get("_target_")).endswith("StrongToWeakPlan"):  # each phase has its own
            preflight_before(cfg, parts, run_dir)
        run = TrainingRun(
            run_dir=run_dir,
            data=parts.data,
            method=parts.method,
            architecture=parts.architecture,
            reference=parts.reference,
            variants={name: build_data(cfg, keys) for name, keys in plain(cfg.evaluation.variants).items()},
            config=plain(cfg),
            command="distill train",
            overrides=overrides,
            resume_is_asked=resume_is_asked,
        )
        run.loop = _loop(cfg, parts, run_dir, overrides)
        if plain(cfg.early_stopping).get("_target_"):
            run.early_stop = expect_kind(make(cfg.early_stopping, "early_stopping"), "early_stopping", EarlyStop)
        interrupt = StopOnInterrupt()
        fast = bool(cfg.trainer.fast_dev_run)
        late: dict[str, Any] = {
            "default_root_dir": str(run_dir),
            "callbacks": [*run.callbacks(interrupt), *_pruning(cfg, run), ReportProgress(run_dir)],
            "logger": False if fast else build_logger(cfg, run_dir),
            "enable_checkpointing": not fast,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        options = plain(cfg.trainer)
        if options.get("profiler") in ("simple", "advanced"):
            late["profiler"] = profiler_into(run_dir, options.pop("profiler"))
        trainer = build_trainer(options, **late)
        if cfg.compile:
            parts.method.student.compile()
        log.info("student %s, teacher %s", parts.architecture["network"], parts.teacher and parts.teacher.identity)
        record = run.run(trainer, interrupt)
        log.info("%s after %.1f s: %s", record.status, record.wall_s, record.metrics)
        return record


def _pruning(cfg: DictConfig, run: TrainingRun) -> list[PruningStop]:
    """What reports to a sweep's pruner, where there is one."""
    found = pruning_stop(cfg)
    if found is not None and run.loop is not None:
        raise ConfigError(
            "a pruner compares reports of one fit, and this loop runs several; give pruner none or loop=none"
        )
    return [] if found is None else [found]


def _loop(cfg: DictConfig, parts: Parts, run_dir: Path, overrides: list[str]) -> Any:
    """What runs several fits where the config asks for it; None for one fit."""
    if not plain(cfg.loop).get("_target_"):
        return None
    if parts.method.budget is not None:
        raise ConfigError("budget ends one fit, and this loop runs several; give the loop its steps, or loop=none")
    if plain(cfg.early_stopping).get("_target_"):
        raise ConfigError(
            "early_stopping ends one fit, and this loop runs several; give loop=none, or with "
            "loop=strong_to_weak name it in the overrides of a phase"
        )
    from research.sweeps.self_taught_job import SelfTaughtLoop
    from research.sweeps.strong_to_weak_job import StrongToWeakLoop

    plan = expect_kind(make(cfg.loop, "loop"), "loop", (SelfTaughtPlan, StrongToWeakPlan))
    if isinstance(plan, StrongToWeakPlan):
        return StrongToWeakLoop(cfg, plan, parts.data, run_dir, overrides, train_into)
    if not isinstance(parts.data, TraceData):
        raise ConfigError("loop=self_taught needs problems with an answer key: data=traces and a task")
    return SelfTaughtLoop(cfg, parts.data, plan)


def train_cell(cfg: DictConfig) -> float | None:
    """A train job inside a study or sweep: a stop by a signal ends the whole launch, not this job alone."""
    check_root(cfg, "train")
    try:
        return train_job(cfg, resume_is_asked=False).metrics.get(cfg.monitor)
    except Preempted as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped


def trial_cell(cfg: DictConfig) -> Any:
    """A train job as a trial: the objectives, or the exceptions that a sweeper knows."""
    from optuna import TrialPruned

    try:
        check_root(cfg, "train")
        return returned_by(train_job(cfg, resume_is_asked=False), cfg)
    except Pruned as stopped:
        raise TrialPruned(str(stopped)) from None
    except Preempted as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped


def _check_sampling(options: DictConfig, max_tokens: int) -> None:
    """Refuse numbers that no answer can be drawn with."""
    for key in ("num_samples", "val_problems", "val_samples"):
        if options[key] < 0:
            raise ConfigError(f"evaluation.{key} is {options[key]}; expected 0 (none) or more")
    limit = max_tokens if options.max_new_tokens is None else options.max_new_tokens
    drawn = Sampling(max(options.num_samples, 1), options.sampling_temperature, options.top_p, limit)
    keys = {name: f"evaluation.{name}" for name in ("num_samples", "top_p", "max_new_tokens")}
    check_sampling(drawn, keys | {"temperature": "evaluation.sampling_temperature"})


def _check_evaluation(cfg: DictConfig, parts: Parts) -> None:
    """Refuse before the first step what the evaluation after the last one could not do."""
    data, options = parts.data, cfg.evaluation
    needs_val = {"splits": "val" in options.splits, "bias_classes": len(options.bias_classes) > 0}
    key_of_val = "num_val" if isinstance(data, TraceData) else "holdout"
    for key in (key for key, needed in needs_val.items() if needed and not data.has_val):
        raise ConfigError(
            f"evaluation.{key} is {options[key]}, which needs held-out rows; data.{key_of_val} is 0, raise it"
        )
    if isinstance(data, TraceData):
        if options.bias_classes:
            raise ConfigError("evaluation.bias_classes belongs to classification; data=traces has no classes")
        _check_sampling(options, data.max_tokens)
        return
    wrong = [c for c in options.bias_classes if not 0 <= c < data.num_classes]
    if wrong or len(set(options.bias_classes)) not in range(data.num_classes):
        raise ConfigError(
            f"evaluation.bias_classes is {list(options.bias_classes)}; expected fewer than all of the classes "
            f"0 to {data.num_classes - 1}, each once"
        )
