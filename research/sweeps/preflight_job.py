"""The preflight around a run: before its first step, or of a finished run by itself."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from research.config import DataModule, Parts, build_teacher, plain
from research.data.traces import TraceData
from research.errors import ConfigError
from research.evaluation.preflight import Preflight, preflight
from research.loops.fit import found_checkpoint
from research.methods.base import AbstractMethod
from research.results.record import write_atomic
from research.teachers.base import AbstractTeacher
from research.teachers.load import frozen

log = logging.getLogger(__name__)
PREFLIGHT_FILE = "preflight.json"
GPU = ("gpu", "cuda", "auto")


def preflight_before(cfg: DictConfig, parts: Parts, run_dir: Path) -> None:
    """What `preflight` of a train config asks for, written into the run's log and its folder.

    A teacher of classes, one that is never asked, or none needs no preflight. A run that goes on from a checkpoint had
    its own before, and of several ranks the first speaks for all. Raises ConfigError where the run is refused.
    """
    data, teacher = parts.data, parts.teacher
    if cfg.preflight == "skip" or teacher is None or not isinstance(data, TraceData) or not _asks_teacher(parts.method):
        return
    if found_checkpoint(cfg.ckpt_path, run_dir) is not None or int(os.environ.get("LOCAL_RANK", 0)) > 0:
        return
    on_gpu = cfg.trainer.accelerator in GPU and torch.cuda.is_available()
    report = preflight(
        parts.method.student,
        teacher,
        data,
        num_problems=cfg.preflight_problems,
        device="cuda" if on_gpu else "cpu",
        on_policy=_draws(parts.method),
    )
    write_report(run_dir / PREFLIGHT_FILE, report)
    for line in report.lines():
        log.info("preflight: %s", line)
    for finding in report.of_level("warning"):
        log.warning("preflight: %s: %s", finding.name, finding.told)
    refuse(report, ("refusal", "warning") if cfg.preflight == "refuse" else ("refusal",))


def _asks_teacher(method: AbstractMethod) -> bool:
    """Whether the loss has a term for the teacher's signal; a method that has no such weight is taken to ask."""
    return bool(getattr(method, "soft_weight", 1.0) != 0)


def _draws(method: AbstractMethod) -> bool:
    """Whether the student learns from its own words, in some blocks at least."""
    return method.needs_prompts and bool(getattr(method, "on_policy_fraction", 1.0) != 0)


def preflight_of_run(
    cfg: DictConfig, config: Mapping[str, Any], student: nn.Module, data: DataModule, folder: Path
) -> float:
    """The preflight of a finished run's student beside a teacher, printed and written; the number of its warnings.

    The teacher is `teacher` of the evaluate config, else `reference`, else the run's own. Raises ConfigError where
    there is none of them, where the data are classes, and with the reasons of a refusal.
    """
    if not isinstance(data, TraceData):
        raise ConfigError("preflight=true looks at language models, and this run's data are classes; leave it out")
    report = preflight(student, _named_teacher(cfg, config, data), data, num_problems=cfg.preflight_problems)
    write_report(folder / PREFLIGHT_FILE, report)
    print("\n".join([*report.lines(), f"written: {folder / PREFLIGHT_FILE}"]))
    refuse(report)
    return float(len(report.of_level("warning")))


def _named_teacher(cfg: DictConfig, config: Mapping[str, Any], data: TraceData) -> AbstractTeacher:
    facts = data.facts()
    teacher = build_teacher(cfg, "teacher", facts)
    if teacher is None and cfg.reference:
        return frozen(cfg.reference, **facts)
    if teacher is None:
        own = OmegaConf.create({"teacher": plain(config.get("teacher"))})
        teacher = build_teacher(own, "teacher", facts)
    if teacher is None:
        raise ConfigError(
            "preflight=true needs a teacher, and the run had none; give reference=FOLDER or teacher=frozen"
        )
    return teacher


def write_report(path: Path, report: Preflight) -> None:
    """The report as plain values."""
    write_atomic(path, (json.dumps(report.plain(), indent=1, ensure_ascii=False) + "\n").encode())


def refuse(report: Preflight, levels: tuple[str, ...] = ("refusal",)) -> None:
    """Raise ConfigError with the findings of these levels, where there are any."""
    found = [finding for level in levels for finding in report.of_level(level)]
    if found:
        reasons = "; ".join(f"{finding.name}: {finding.told}" for finding in found)
        raise ConfigError(f"the preflight refuses the run ({PREFLIGHT_FILE} has the whole report): {reasons}")
