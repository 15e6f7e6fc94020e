"""The work of one Hydra job: `train_job` and `cache_job` turn a composed config into a finished run folder.

Single runs, multiruns and the cells of a study all come through here.
"""

import datetime as dt
import fcntl
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from research.config import (
    Parts,
    build,
    build_data,
    build_logger,
    build_teacher,
    build_trainer,
    expect_kind,
    make,
    plain,
)
from research.data.base import AbstractClassData
from research.data.traces import TraceData
from research.errors import ConfigError, Preempted, Pruned
from research.loops.fit import ReportProgress, StopOnInterrupt, profiler_into
from research.loops.ledger import training_of
from research.loops.pruning_stop import PruningStop
from research.loops.self_taught_plan import SelfTaughtPlan
from research.loops.strong_to_weak import StrongToWeakPlan
from research.loops.training import TrainingRun
from research.results.record import RunRecord, collect_versions, git_revision, hardware, write_record
from research.schemas import check_root
from research.sweeps.preflight_job import preflight_before
from research.sweeps.secrets import refuse_secrets
from research.sweeps.trial_hooks import as_trial, pruning_stop, returned_by
from research.teachers.base import AbstractTeacher
from research.teachers.cache import CacheWriter
from research.teachers.manifest import CacheFingerprint, read_manifest

log = logging.getLogger(__name__)


def train_job(cfg: DictConfig) -> RunRecord:
    """Fit, evaluate, record; the run folder is Hydra's output directory."""
    prepare_process(cfg)
    cfg = as_trial(cfg)
    job = HydraConfig.get()
    return train_into(Path(job.runtime.output_dir), cfg, list(job.overrides.task))


def train_into(run_dir: Path, cfg: DictConfig, overrides: list[str]) -> RunRecord:
    """The same in a folder of the caller's choice, its own process prepared before; `overrides` are for the record."""
    with _sole_owner(run_dir):
        parts = build(cfg)
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
        )
        run.loop = _loop(cfg, parts, run_dir, overrides)
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
        return train_job(cfg).metrics.get(cfg.monitor)
    except Preempted as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped


def trial_cell(cfg: DictConfig) -> Any:
    """A train job as a trial: the objectives, or the exceptions that a sweeper knows."""
    from optuna import TrialPruned

    try:
        check_root(cfg, "train")
        return returned_by(train_job(cfg), cfg)
    except Pruned as stopped:
        raise TrialPruned(str(stopped)) from None
    except Preempted as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped


def cache_job(cfg: DictConfig, *, show_progress: bool = False) -> Path:
    """Score one split with a teacher; returns the cache folder."""
    from rich.progress import Progress

    started_at, started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.perf_counter()
    prepare_process(cfg)
    data = build_data(cfg)
    data.setup()
    if isinstance(data, TraceData):
        raise ConfigError("distill cache scores classification data; a teacher of text is asked live: teacher=frozen")
    teacher = build_teacher(cfg, "teacher", data.facts())
    if teacher is None:
        raise ConfigError("distill cache needs a teacher; give teacher=frozen teacher.path=FOLDER")
    folder = Path(cfg.cache_dir or f"{HydraConfig.get().runtime.output_dir}/cache")
    if teacher.identity.kind == "cached":
        raise ConfigError(
            "teacher=cached is a cache already; score with the teacher behind it: teacher=frozen or ensemble"
        )
    rows = len(data.split_tensors(cfg.split)[1])
    fingerprint = CacheFingerprint(
        teacher_sha256=teacher.identity.sha256,
        teacher_details=teacher.identity.details,
        data_sha256=data.source_fingerprint(cfg.split),
        view="identity",
        num_classes=data.num_classes,
        top_k=cfg.top_k,
        dtype=cfg.dtype,
    )
    writer = CacheWriter(folder, fingerprint, rows=rows, shard_rows=cfg.shard_rows)
    with _sole_owner(folder), Progress(transient=True, disable=not show_progress) as progress:
        bar = progress.add_task(f"scoring {cfg.split}", total=rows)
        for done in writer.write(teacher, data, cfg.split):
            progress.update(bar, completed=done)
        record = _cache_record(cfg, folder, data, teacher, started_at, time.perf_counter() - started)
        write_record(folder / "run.json", record)
    log.info("%s rows in %s: %s", rows, folder, record.metrics)
    return folder


def _cache_record(
    cfg: DictConfig, folder: Path, data: AbstractClassData, teacher: AbstractTeacher, started_at: str, wall_s: float
) -> RunRecord:
    """What a cache cost and lost; `<split>/cache_kl_T<temperature>` is KL(teacher || cache), nats."""
    manifest = read_manifest(folder)
    nothing: dict[str, float | None] = {"flops": 0.0, "tokens": 0.0, "seconds": 0.0}
    scoring = {"flops": manifest.scoring_flops, "tokens": float(manifest.rows), "seconds": wall_s}
    training = training_of(teacher.identity)
    return RunRecord(
        command="distill cache",
        experiment=cfg.name,
        status="completed",
        seed=cfg.seed,
        config=plain(cfg),
        overrides=list(HydraConfig.get().overrides.task),
        metrics={f"{cfg.split}/cache_kl_T{temperature}": gap for temperature, gap in manifest.kl_gap.items()},
        started_at=started_at,
        wall_s=wall_s,
        versions=collect_versions(),
        revision=git_revision(Path(__file__).parent),
        hardware=hardware(torch.get_num_threads()),
        ledger={
            "student_update": nothing,
            "rollout": nothing,
            "prompt_prefill": nothing,
            "teacher_scoring": scoring,
            "teacher_training": training,
        },
        data={"name": type(data).__name__, "fingerprint": data.fingerprint(cfg.split), "summary": data.summary()},
        teacher=asdict(teacher.identity),
    )


def cache_cell(cfg: DictConfig) -> str:
    """A cache job inside a study."""
    check_root(cfg, "cache")
    return str(cache_job(cfg))


def cache_is_complete(folder: Path) -> bool:
    """Whether a cache folder holds a finished cache and the record of it."""
    return (folder / "run.json").exists() and read_manifest(folder).complete


def prepare_process(cfg: DictConfig) -> None:
    """Process-wide settings: threads, and the chatter of libraries kept to what a user can act on."""
    refuse_secrets(cfg, Path(HydraConfig.get().runtime.output_dir) / str(HydraConfig.get().output_subdir))
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        chatty = logging.getLogger(name)
        chatty.setLevel(logging.WARNING)
        chatty.handlers.clear()
    warnings.filterwarnings("ignore", message=".*(LeafSpec|treespec).*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")


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
        return
    wrong = [c for c in options.bias_classes if not 0 <= c < data.num_classes]
    if wrong or len(set(options.bias_classes)) not in range(data.num_classes):
        raise ConfigError(
            f"evaluation.bias_classes is {list(options.bias_classes)}; expected fewer than all of the classes "
            f"0 to {data.num_classes - 1}, each once"
        )


@contextmanager
def _sole_owner(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, waiting for a process that a kill of its controller left behind in it.

    The further ranks of one run share the lock of the first.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process works in %s; waiting until it ends", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
