"""The run record: the one file a run leaves (``run.json``), from which every result is built."""

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

PROGRESS_FILE = "progress.json"  # in a run's folder while it trains: {"step": ..., "total_steps": ...}

SCHEMA_VERSION = 2
READ_SCHEMAS = (1, 2)  # in 1 the ledger had no part prompt_prefill: the prompts' passes are in its rollout
STATUSES = ("completed", "failed", "preempted", "pruned")
LEDGER_PARTS = ("student_update", "teacher_scoring", "teacher_training", "rollout", "prompt_prefill")
LEDGER_FIELDS = ("flops", "tokens", "seconds")
RECORDED_PACKAGES = (
    "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy", "scipy", "safetensors",
    "transformers", "pyarrow", "optuna",
)  # fmt: skip
_SECRET = re.compile(r"secret|passw|api_?key|credential|private_?key|token$", re.IGNORECASE)
_INLINE = re.compile(r"(?<=[{,\s])([\w.]+)(\s*:\s*)([^,{}\[\]]+)")
_SPECIAL_TOKEN = re.compile(r"(^|_)(eos|bos|pad|unk|mask|sep|cls|additional_special)_token$", re.IGNORECASE)


@dataclass(frozen=True)
class RunRecord:
    """Everything a result may need to know of one run.

    command, experiment    what was run; ``overrides`` are the command line's, ``config`` the resolved plain dict
    status, reason         one of STATUSES; ``reason`` says why a run did not complete or, of one that did, which limit
                           of its budget ended it; else None
    config_hash            :func:`hash_config` of ``config``
    versions, revision     installed distributions; git {commit, dirty}
    started_at, wall_s     UTC, ISO 8601; seconds of wall time
    metrics                flat ``split/name`` -> float
    ledger                 part (LEDGER_PARTS) -> {flops, tokens, seconds}; 0 means none was spent, an absent or null
                           field means not measured, and then no total exists. A rollout is what was generated,
                           prompt_prefill the passes over the prompts before it, teacher_training what was spent
                           once for all students: a teacher's training, and the writing of the stored traces
    data                   {name, fingerprint, summary}
    student, teacher       {architecture, parameters, sha256}; teacher None where there was none
    artifacts              name -> path relative to the record; ``items/<split>`` is the per-item parquet
    """

    command: str
    experiment: str
    status: str
    seed: int
    config: dict[str, Any]
    metrics: dict[str, float]
    started_at: str
    wall_s: float
    reason: str | None = None
    config_hash: str = ""
    overrides: list[str] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=dict)
    revision: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, dict[str, float | None]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] | None = None
    artifacts: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}; expected one of {', '.join(STATUSES)}")
        if self.status != "completed" and not self.reason:
            raise ValueError(f"a run that is {self.status} needs a reason; none was given")
        unknown = sorted(set(self.ledger) - set(LEDGER_PARTS))
        if unknown:
            raise ValueError(f"ledger has the part {unknown[0]!r}; expected only {', '.join(LEDGER_PARTS)}")


# The frozen surface of run.json, in the order it is written.
RECORD_KEYS = (
    "schema", "command", "experiment", "status", "reason", "seed", "config", "config_hash", "overrides",
    "versions", "revision", "hardware", "started_at", "wall_s", "metrics", "ledger", "data", "student",
    "teacher", "artifacts",
)  # fmt: skip


def write_record(path: str | Path, record: RunRecord) -> Path:
    """Writes ``run.json`` whole or not at all (temporary file, then rename), with secrets masked."""
    path = Path(path)
    content = asdict(record)
    content["config"] = mask_secrets(record.config)
    content["overrides"] = mask_overrides(record.overrides)
    content["command"] = " ".join(mask_overrides(record.command.split(" ")))
    content["config_hash"] = record.config_hash or hash_config(record.config)
    text = json.dumps(json_ready({key: content[key] for key in RECORD_KEYS}), indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())
    return path


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces ``path`` in one step, so that a kill leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_changed(path: Path, content: bytes) -> None:
    """:func:`write_atomic`, but a file that holds these bytes already is left alone."""
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def read_record(path: str | Path) -> RunRecord:
    """The record at ``path``; raises ValueError naming the file and the key where it does not fit the schema."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a run record: {error}") from error
    if not isinstance(content, dict) or content.get("schema") not in READ_SCHEMAS:
        given = content.get("schema") if isinstance(content, dict) else content
        raise ValueError(f"{path}: schema is {given!r}; this version reads {' and '.join(map(str, READ_SCHEMAS))}")
    missing = [key for key in RECORD_KEYS if key not in content]
    unknown = sorted(set(content) - set(RECORD_KEYS))
    if missing or unknown:
        schema = content["schema"]
        raise ValueError(f"{path}: not a run record of schema {schema}: missing {missing}, unknown {unknown}")
    content["metrics"] = {name: float(value) for name, value in content["metrics"].items()}
    content["wall_s"] = float(content["wall_s"])
    return RunRecord(**content)


def json_ready(value: Any) -> Any:
    """JSON has no nan or inf: they are written as the texts 'nan', 'inf', '-inf', which ``float`` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def hash_config(config: Mapping[str, Any]) -> str:
    """sha256 of the masked config in canonical JSON: independent of key order, and of secrets."""
    text = json.dumps(json_ready(mask_secrets(config)), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_secret(key: str) -> bool:
    """Whether a value under this key must not be written: api_key, hf_token, password.

    Not eos_token or max_tokens, nor api_key_env: the name of the variable that holds a key is no key.
    """
    return bool(_SECRET.search(key)) and not _SPECIAL_TOKEN.search(key) and not key.lower().endswith("_env")


def mask_secrets(config: Any) -> Any:
    """A copy in which every value under a secret key is ``***`` (an unset one stays None)."""
    if isinstance(config, Mapping):
        return {
            str(key): "***" if is_secret(str(key)) and value is not None else mask_secrets(value)
            for key, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [mask_secrets(item) for item in config]
    return config


def mask_overrides(overrides: Iterable[str]) -> list[str]:
    """``logger.api_key=abc`` -> ``logger.api_key=***``; the rest as given."""
    masked = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and value and is_secret(key.rsplit(".", 1)[-1]):
            masked.append(f"{key}=***")
        else:  # a whole node may be given at once: logger={project: a, api_key: b}
            masked.append(
                _INLINE.sub(lambda pair: f"{pair[1]}{pair[2]}***" if is_secret(pair[1]) else pair[0], override)
            )
    return masked


def collect_versions(packages: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str | None]:
    """Installed versions by distribution metadata, never a package's own ``__version__``; None where not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_revision(cwd: str | Path) -> dict[str, Any]:
    """{commit, dirty} of the checkout around ``cwd``; both None outside a checkout or without git.

    ``dirty`` is True where a tracked file differs from the commit.
    """
    try:
        commit = _git(cwd, "rev-parse", "HEAD")
        dirty = bool(_git(cwd, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": dirty}


def _git(cwd: str | Path, *arguments: str) -> str:
    command = ["git", "-C", str(cwd), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def hardware(threads: int | None = None, accelerator: str | None = None) -> dict[str, Any]:
    """{machine, processor, cores, threads, accelerator}, without asking torch.

    ``cores`` are those this process may use; ``threads`` defaults to OMP_NUM_THREADS, else to ``cores``;
    ``accelerator`` is the caller's word (None: none).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    declared = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or (int(declared) if declared.isdigit() else cores)
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": cores,
        "threads": threads,
        "accelerator": accelerator,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def ledger_total(ledger: Mapping[str, Mapping[str, Any]], quantity: str, parts: Iterable[str]) -> float | None:
    """Sum of ``quantity`` (flops, tokens or seconds) over ``parts``; None where any of them was not measured.

    An unmeasured cost is never counted as 0: two runs would then look comparable that are not.
    """
    total = 0.0
    for part in parts:
        value = ledger.get(part, {}).get(quantity)
        if value is None:
            return None
        total += float(value)
    return total


if set(RECORD_KEYS) != {item.name for item in fields(RunRecord)}:
    raise TypeError("RECORD_KEYS and the fields of RunRecord differ; change both together")
