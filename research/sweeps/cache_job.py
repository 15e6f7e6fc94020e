"""Teacher signals on disk, as a command of its own and once for all runs that name the same place."""

import copy
import datetime as dt
import hashlib
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from research.config import build_data, build_teacher, expect_kind, plain
from research.data.base import AbstractClassData
from research.data.traces import TraceData
from research.errors import ConfigError
from research.loops.ledger import training_of
from research.results.record import RunRecord, collect_versions, git_revision, hardware, write_record
from research.schemas import check_root
from research.sweeps.process import prepare_process, sole_owner
from research.teachers.base import AbstractTeacher
from research.teachers.cache import CacheWriter
from research.teachers.manifest import MANIFEST_FILE, CacheFingerprint, read_manifest

log = logging.getLogger(__name__)
CACHEABLE = ("research.teachers.load.frozen", "research.teachers.load.ensemble")
CACHED = "research.teachers.load.cached"
_WRITTEN: dict[str, Path] = {}  # what this process has asked for before -> the folder that holds it


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
    fingerprint = _fingerprint(teacher, data, cfg.split, top_k=cfg.top_k, dtype=cfg.dtype)
    rows = len(data.split_tensors(cfg.split)[1])
    writer = CacheWriter(folder, fingerprint, rows=rows, shard_rows=cfg.shard_rows)
    with sole_owner(folder), Progress(transient=True, disable=not show_progress) as progress:
        bar = progress.add_task(f"scoring {cfg.split}", total=rows)
        for done in writer.write(teacher, data, cfg.split):
            progress.update(bar, completed=done)
        record = _cache_record(cfg, folder, data, teacher, started_at, time.perf_counter() - started)
        write_record(folder / "run.json", record)
    log.info("%s rows in %s: %s", rows, folder, record.metrics)
    return folder


def with_cached_signals(cfg: DictConfig) -> DictConfig:
    """The config of a run with its teacher's signals from `teacher_cache`, where the first that needs them writes them.

    Every teacher, selection of the data and network has a folder of its own below `teacher_cache`, named by a hash, so
    that runs which differ in any of these never share. Signals are whole logits in float32: they hold at every
    temperature. The teacher stays the `reference` that fidelity is measured against, where the config names no other.

    Raises ConfigError where one signal a row would be wrong, or the teacher is none that can be cached.
    """
    if cfg.teacher_cache is None:
        return cfg
    node = plain(cfg.teacher)
    if str(node.get("_target_")) not in CACHEABLE:
        given = node.get("_target_")
        raise ConfigError(f"teacher_cache keeps signals of teacher=frozen or teacher=ensemble; the teacher is {given}")
    place = Path(cfg.teacher_cache).absolute()
    whole = copy.deepcopy(cfg)
    with open_dict(whole):
        if "holdout" in whole.data:
            whole.data.holdout = 0  # signals of every row; which of them are held out is each run's own affair
    asked = json.dumps([str(place), node, _files_of(node), plain(whole.data)], sort_keys=True, default=str)
    folder = _WRITTEN.get(asked)
    if folder is None or not (folder / MANIFEST_FILE).exists():
        folder = _WRITTEN[asked] = _written(whole, place)
    found = copy.deepcopy(cfg)
    with open_dict(found):
        is_control = bool(plain(cfg.signal_transform).get("_target_"))
        if not is_control and not plain(cfg.reference).get("_target_"):
            found.reference = node
        found.teacher = {"_target_": CACHED, "path": str(folder), "teacher_sha256": None}
    return found


def _files_of(node: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change of each file of the teachers: other values are other weights."""
    paths = [Path(path) for path in [node.get("path"), *(node.get("paths") or [])] if path]
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _written(cfg: DictConfig, place: Path) -> Path:
    """The folder with the signals of the train split, written where they are not there yet."""
    data = build_data(cfg)
    if isinstance(data, TraceData):
        raise ConfigError("teacher_cache holds one signal for each row of a classification split; these data are text")
    data.setup()
    if data.transform_name != "identity":
        raise ConfigError(
            f"teacher_cache holds one signal a row, and the train rows are changed anew in every epoch "
            f"({data.transform_name}); leave one of them out"
        )
    teacher = expect_kind(build_teacher(cfg, "teacher", data.facts()), "teacher", AbstractTeacher)
    fingerprint = _fingerprint(teacher, data, "train", top_k=None, dtype="float32")
    mark = hashlib.sha256(json.dumps(asdict(fingerprint), sort_keys=True).encode()).hexdigest()
    folder = place / mark[:16]
    with sole_owner(folder, shared_by_ranks=False):
        writer = CacheWriter(folder, fingerprint, rows=len(data.split_tensors("train")[1]))
        for rows in writer.write(teacher, data, "train"):
            log.debug("%s rows of the teacher's signals in %s", rows, folder)
    return folder


def _fingerprint(
    teacher: AbstractTeacher, data: AbstractClassData, split: Any, *, top_k: int | None, dtype: str
) -> CacheFingerprint:
    return CacheFingerprint(
        teacher_sha256=teacher.identity.sha256,
        teacher_details=teacher.identity.details,
        data_sha256=data.source_fingerprint(split),
        view="identity",
        num_classes=data.num_classes,
        top_k=top_k,
        dtype=dtype,
    )


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
