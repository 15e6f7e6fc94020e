"""What a cache folder says of itself: which teacher, data and view its signals belong to, and which files they are."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from research.errors import CacheError

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class CacheFingerprint:
    """Everything a signal depends on; two caches with equal fingerprints hold equal signals.

    top_k is None for dense logits; `view` names the augmentation of the inputs ("identity": the rows as they are).
    """

    teacher_sha256: str
    teacher_details: dict[str, Any]
    data_sha256: str
    view: str
    num_classes: int
    top_k: int | None
    dtype: str


@dataclass(frozen=True)
class CacheManifest:
    """The manifest of one cache.

    rows, shard_rows   rows in all, and of each shard file but the last
    kl_gap             temperature -> mean KL(teacher || what the cache gives back) in nats, over the first 10,000 rows
    shards             file name -> sha256 of its bytes; empty until the cache is complete
    scoring_flops      FLOPs of scoring every row once
    """

    fingerprint: CacheFingerprint
    rows: int
    shard_rows: int
    complete: bool
    teacher_source: str
    kl_gap: dict[str, float] = field(default_factory=dict)
    teacher_training_flops: float | None = None
    scoring_flops: float | None = None
    shards: dict[str, str] = field(default_factory=dict)
    teacher_training_tokens: float | None = None
    teacher_training_seconds: float | None = None


def read_manifest(folder: Path) -> CacheManifest:
    """The manifest of a cache folder. Raises CacheError where it is missing or damaged."""
    path = folder / MANIFEST_FILE
    try:
        plain = json.loads(path.read_text())
        return CacheManifest(**{**plain, "fingerprint": CacheFingerprint(**plain["fingerprint"])})
    except FileNotFoundError:
        raise CacheError(f"no {MANIFEST_FILE} in {folder}; write the cache first with `distill cache`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is not a cache manifest ({error}); delete the folder and write it again") from None


def refuse_difference(given: CacheFingerprint, expected: CacheFingerprint, folder: Path) -> None:
    """Raise CacheError naming every field in which a cache differs from what is asked of it."""
    found, wanted = asdict(given), asdict(expected)
    differing = [
        f"{name}: cache has {found[name]!r}, needed {wanted[name]!r}" for name in found if found[name] != wanted[name]
    ]
    if differing:
        raise CacheError(
            f"the cache {folder} was made for something else ({'; '.join(differing)}); "
            "write a cache of this teacher and these data into another folder"
        )
