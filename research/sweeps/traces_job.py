"""The work of one `distill traces`: from a composed config to a sealed store with its record."""

import datetime as dt
import logging
import time
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from research.config import plain
from research.models.weights import save_tokenizer
from research.results.record import RunRecord, collect_versions, git_revision, hardware, write_record
from research.schemas import check_root
from research.sweeps.process import prepare_process
from research.sweeps.traces_parts import TRAINING, Parts, build_parts, stored_codec
from research.traces.explorer import write_explorer
from research.traces.manifest import StoreManifest, read_manifest
from research.traces.progress import TraceProgress
from research.traces.store import StoreWriter, TraceStore
from research.traces.writer import write_traces

log = logging.getLogger(__name__)
EXPLORER_FILE, TOKENIZER_FOLDER = "explorer.html", "tokenizer"
UNCHECKED = ("unchecked", "no_chain")  # outcomes that say nothing of a chain
NOTHING: dict[str, float | None] = {"flops": 0.0, "tokens": 0.0, "seconds": 0.0}


def traces_job(cfg: DictConfig, *, show_progress: bool = False) -> Path:
    """Write, or go on with, one store; returns its folder, which holds the record."""
    started_at, started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.perf_counter()
    prepare_process(cfg)
    folder = Path(cfg.store or f"{HydraConfig.get().runtime.output_dir}/store")
    parts = build_parts(cfg, folder)
    with StoreWriter(folder, parts.settings) as writer:
        if parts.codec is not None:
            save_tokenizer(folder / TOKENIZER_FOLDER, parts.codec.tokenizer)
        with TraceProgress("writing", parts.source.total, shown=show_progress) as watch:
            manifest = write_traces(parts.source, parts.filters, writer, keep_dropped=cfg.keep_dropped, watch=watch)
        record = _record(cfg, parts, manifest, started_at, time.perf_counter() - started)
        write_record(folder / "run.json", record)
        if cfg.explorer:
            write_explorer(TraceStore(folder, verify=False), parts.codec, folder / EXPLORER_FILE)
    log.info("%s traces in %s: %s", manifest.tally.kept, folder, record.metrics)
    return folder


def rebuild_explorer(folder: Path) -> Path:
    """Write the page of a finished store again, from the store alone."""
    store = TraceStore(folder)
    codec = stored_codec(store.manifest.settings, folder / TOKENIZER_FOLDER)
    return write_explorer(store, codec, folder / EXPLORER_FILE)


def traces_cell(cfg: DictConfig) -> str:
    """A trace job inside a study."""
    check_root(cfg, "traces")
    return str(traces_job(cfg))


def traces_are_complete(folder: Path) -> bool:
    """Whether a store folder holds a finished store and the record of it."""
    return (folder / "run.json").exists() and read_manifest(folder).complete


def _metrics(parts: Parts, manifest: StoreManifest) -> dict[str, float]:
    tally = manifest.tally
    numbers: dict[str, float] = {
        "problems": tally.problems,
        "distinct_problems": len({problem.text for problem in parts.problems}),
        "written": tally.written,
        "kept": tally.kept,
        "acceptance": tally.kept / tally.written if tally.written else 0.0,
        "tokens": tally.tokens,
    }
    for prefix, counts in (
        ("dropped", tally.dropped),
        ("verdict", tally.verdicts),
        ("outcome", tally.outcomes),
        ("kept_outcome", tally.kept_outcomes),
        ("corruption", tally.corruptions),
    ):
        numbers |= {f"{prefix}_{name}": number for name, number in counts.items()}
    checked = tally.kept - sum(tally.kept_outcomes.get(name, 0) for name in UNCHECKED)
    if tally.kept_outcomes and checked:  # kept, and no right answer at the end of a valid chain
        numbers["false_positives"] = 1 - tally.kept_outcomes.get("valid_right", 0) / checked
    return {f"traces/{name}": float(value) for name, value in numbers.items()}


def _record(cfg: DictConfig, parts: Parts, manifest: StoreManifest, started_at: str, wall_s: float) -> RunRecord:
    """What a store cost and holds; the ledger's teacher_scoring is the teacher's writing, over all processes.

    Its passes over the prompts are in there: prompt_prefill and rollout are a student's.
    """
    scoring, training, teacher = NOTHING, NOTHING, None
    if parts.teacher is not None:
        generator = getattr(parts.source, "generator", None)
        events = {name: number for name, number in getattr(generator, "events", {}).items() if number}
        limited = getattr(getattr(generator, "spent", None), "context_limited", 0)
        teacher = {**parts.teacher, "events": events, "context_limited": limited}
        scoring = manifest.cost
        training = {name.removeprefix("training_"): parts.teacher[name] for name in TRAINING}
    name = parts.task.name if parts.task is not None else Path(str(cfg.data.file)).name
    return RunRecord(
        command="distill traces",
        experiment=cfg.name,
        status="completed",
        seed=cfg.seed,
        config=plain(cfg),
        overrides=list(HydraConfig.get().overrides.task),
        metrics=_metrics(parts, manifest),
        started_at=started_at,
        wall_s=wall_s,
        versions=collect_versions(),
        revision=git_revision(Path(__file__).parent),
        hardware=hardware(torch.get_num_threads()),
        ledger={
            "student_update": NOTHING,
            "rollout": NOTHING,
            "prompt_prefill": NOTHING,
            "teacher_scoring": scoring,
            "teacher_training": training,
        },
        data={
            "name": name,
            "fingerprint": parts.settings.get("problems_sha256") or parts.settings["file"]["sha256"],
            "summary": {"shards": {name: shard.sha256 for name, shard in manifest.shards.items()}},
        },
        teacher=teacher,
    )
