"""Teacher signals on disk: safetensors shards and a manifest, written once and joined to batches by `index`.

A cache is valid for one teacher, one data source and one view of it. The manifest's fingerprint says which, and
`CachedTeacher` refuses anything else by the name of the field that differs. Writing resumes after a kill: a shard is
either whole, under its final name, or absent.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from research.errors import CacheError, ConfigError
from research.losses.divergences import forward_kl
from research.losses.signal_divergence import teacher_logits
from research.records import ClassBatch, DenseLogits, TeacherSignal, TopKLogprobs
from research.teachers.base import AbstractTeacher, TeacherIdentity
from research.teachers.manifest import (
    MANIFEST_FILE,
    CacheFingerprint,
    CacheManifest,
    read_manifest,
    refuse_difference,
)
from research.teachers.top_k import keep_top_k, spread_tail

SHARDS = "shard-*.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GAP_TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 20.0)
GAP_ROWS = 10_000
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheWriter:
    """Writes the signals of one split, shard by shard, and measures what compression costs.

    rows        rows of the split
    shard_rows  rows of one shard file: the most that a kill can lose; a cache that is gone on with keeps its own
    Raises CacheError where the folder already holds a cache with another fingerprint or of other rows, and on a full
    disk; ConfigError for a dtype, top_k or shard_rows that fits no cache.
    """

    def __init__(self, folder: Path, fingerprint: CacheFingerprint, *, rows: int, shard_rows: int = 10_000) -> None:
        if fingerprint.dtype not in DTYPES:
            raise ConfigError(f"dtype is {fingerprint.dtype!r}; expected one of {', '.join(DTYPES)}")
        if fingerprint.top_k is not None and not 1 <= fingerprint.top_k <= fingerprint.num_classes:
            raise ConfigError(f"top_k is {fingerprint.top_k}; expected null or 1 to {fingerprint.num_classes} classes")
        if shard_rows < 1:
            raise ConfigError(f"shard_rows is {shard_rows}; expected at least 1")
        self.folder, self.fingerprint, self.rows, self.shard_rows = folder, fingerprint, rows, shard_rows
        self._sealed: dict[str, str] = {}
        if (folder / MANIFEST_FILE).exists():
            known = read_manifest(folder)
            refuse_difference(known.fingerprint, fingerprint, folder)
            if known.rows != rows:
                raise CacheError(
                    f"the cache {folder} is of {known.rows} rows, the split now has {rows}; write another selection of "
                    "the data into another folder"
                )
            self.shard_rows, self._sealed = known.shard_rows, dict(known.shards)

    def write(self, teacher: AbstractTeacher, data: Any, split: str) -> Iterator[int]:
        """Score the shards that are missing, yielding the rows finished so far after each; the last step seals it.

        `data.loader(split, batch_size=...)` gives unshuffled, unaugmented batches, so a shard's rows are always the
        same ones. A sealed cache whose shards are all as they were is left alone.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self._manifest(teacher)
        untouched = bool(self._sealed)
        if not untouched:
            self._write_manifest(manifest)
        done = 0
        for number, batch in enumerate(data.loader(split, batch_size=self.shard_rows)):
            path = self.folder / f"shard-{number:05d}.safetensors"
            if not _is_whole(path, batch, self._sealed.get(path.name)):
                if untouched:
                    path.unlink(missing_ok=True)  # so that a kill after this line cannot leave it among the whole ones
                    self._write_manifest(manifest)
                    untouched = False
                self._write_shard(path, batch, teacher.signal(batch))
            done += len(batch)
            yield done
        if done != self.rows:
            raise CacheError(f"the split {split!r} gave {done} rows where {self.rows} were expected")
        if not untouched:
            self._seal(manifest, teacher, data, split)

    def _manifest(self, teacher: AbstractTeacher) -> CacheManifest:
        return CacheManifest(
            fingerprint=self.fingerprint,
            rows=self.rows,
            shard_rows=self.shard_rows,
            complete=False,
            teacher_source=teacher.identity.source,
            teacher_training_flops=teacher.identity.training_flops,
            teacher_training_tokens=teacher.identity.training_tokens,
            teacher_training_seconds=teacher.identity.training_seconds,
            scoring_flops=teacher.flops_per_row() * self.rows,
        )

    def _seal(self, manifest: CacheManifest, teacher: AbstractTeacher, data: Any, split: str) -> None:
        gap = self._gap(teacher, data, split)
        hashes = {path.name: _sha256(path.read_bytes()) for path in sorted(self.folder.glob(SHARDS))}
        self._write_manifest(replace(manifest, complete=True, kl_gap=gap, shards=hashes))

    def _write_shard(self, path: Path, batch: ClassBatch, signal: TeacherSignal) -> None:
        tensors = {"index": batch.index_B, **self._columns(batch, signal)}
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            self._explain(error, path)

    def _columns(self, batch: ClassBatch, signal: TeacherSignal) -> dict[str, Tensor]:
        dtype, top_k = DTYPES[self.fingerprint.dtype], self.fingerprint.top_k
        if not isinstance(signal, DenseLogits):
            raise CacheError(f"only a dense teacher can be cached, this one gives {type(signal).__name__}")
        stored_NV = signal.logits_NV.to(dtype)
        bad_N = (stored_NV.isnan() | stored_NV.isinf() & ~signal.logits_NV.isneginf()).any(dim=-1)
        if bool(bad_N.any()):
            row = int(batch.index_B[bad_N][0])
            raise CacheError(
                f"the teacher's logits of row {row} are not finite in {self.fingerprint.dtype}; "
                "give dtype=float32, or look at the teacher"
            )
        if top_k is None:
            return {"logits": stored_NV}
        sparse = keep_top_k(signal, top_k)
        return {
            "ids": sparse.ids_NK.to(torch.int32),
            "logprobs": sparse.logprobs_NK.to(dtype),
            "tail_logprob": sparse.tail_logprob_N.to(dtype),
        }

    def _explain(self, error: OSError, path: Path) -> NoReturn:
        reason = "the disk is full" if error.errno in NO_SPACE else "the file could not be written"
        whole = len(list(self.folder.glob(SHARDS)))
        raise CacheError(
            f"{reason} ({error}) at {path.name} of {self.folder}; {whole} finished shards are kept. "
            "Free space and run the same command again: it goes on from there"
        ) from error

    def _gap(self, teacher: AbstractTeacher, data: Any, split: str) -> dict[str, float]:
        """Mean KL(dense teacher || read-back signal) in nats over the first GAP_ROWS rows, by temperature."""
        reader = CachedTeacher(self.folder, require_complete=False)
        totals, counted = dict.fromkeys(GAP_TEMPERATURES, 0.0), 0
        for batch in data.loader(split, batch_size=2_000):
            dense, stored = teacher.signal(batch), reader.signal(batch)
            if not isinstance(dense, DenseLogits):
                raise CacheError("only a dense teacher can be cached")
            for temperature in GAP_TEMPERATURES:
                totals[temperature] += float(_kl_to_stored(dense, stored, temperature).sum())
            counted += len(batch)
            if counted >= GAP_ROWS:
                break
        return {f"{temperature:g}": total / max(counted, 1) for temperature, total in totals.items()}

    def _write_manifest(self, manifest: CacheManifest) -> None:
        partial = self.folder / (MANIFEST_FILE + ".partial")
        try:
            partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
            os.replace(partial, self.folder / MANIFEST_FILE)
        except OSError as error:
            partial.unlink(missing_ok=True)
            self._explain(error, self.folder / MANIFEST_FILE)


class CachedTeacher(AbstractTeacher):
    """The signals of a cache folder, held in memory and looked up by `index`.

    Raises CacheError where the folder is incomplete, a shard is missing or damaged, a row is missing or doubled, the
    data or the view differ (`connect`), or `expected_teacher_sha256` names another teacher.
    """

    def __init__(
        self, folder: Path, *, expected_teacher_sha256: str | None = None, require_complete: bool = True
    ) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        mark = self.manifest.fingerprint
        if require_complete and not self.manifest.complete:
            raise CacheError(f"the cache {folder} is not finished; run the `distill cache` command that began it again")
        if expected_teacher_sha256 not in (None, mark.teacher_sha256):
            raise CacheError(
                f"the cache {folder} holds teacher {mark.teacher_sha256[:12]}.., "
                f"the run expects {str(expected_teacher_sha256)[:12]}..; write a cache of that teacher"
            )
        self.num_classes = mark.num_classes
        self.identity = TeacherIdentity(
            kind="cached",
            sha256=mark.teacher_sha256,
            source=str(folder),
            details={**mark.teacher_details, "top_k": mark.top_k, "dtype": mark.dtype},
            training_flops=self.manifest.teacher_training_flops,
            training_tokens=self.manifest.teacher_training_tokens,
            training_seconds=self.manifest.teacher_training_seconds,
        )
        self._columns, self._row_of = self._read_shards()

    def _read_shards(self) -> tuple[dict[str, Tensor], Tensor]:
        names = list(self.manifest.shards) or sorted(path.name for path in self.folder.glob(SHARDS))
        shards = [self._read_shard(name) for name in names]
        if not shards:
            raise CacheError(f"the cache {self.folder} holds no shard; run `distill cache` again")
        columns = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        index_N = columns.pop("index")
        if len(index_N) != self.manifest.rows or len(index_N.unique()) != len(index_N):
            raise CacheError(
                f"the cache {self.folder} holds {len(index_N)} rows ({len(index_N.unique())} distinct) "
                f"where its manifest says {self.manifest.rows}; delete it and write it again"
            )
        row_of = torch.full((int(index_N.max()) + 1,), -1, dtype=torch.long)
        row_of[index_N] = torch.arange(len(index_N))
        return columns, row_of

    def _read_shard(self, name: str) -> dict[str, Tensor]:
        advice = "run the `distill cache` command that made it again: it writes that shard anew"
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise CacheError(f"the shard {name} of {self.folder} is missing; {advice}") from None
        if self.manifest.shards.get(name, _sha256(content)) != _sha256(content):
            raise CacheError(f"the shard {name} of {self.folder} is damaged: its bytes are not those written; {advice}")
        try:
            return load(content)
        except SafetensorError as error:
            raise CacheError(f"the shard {name} of {self.folder} is damaged ({error}); {advice}") from None

    def connect(self, data: Any) -> None:
        mark = self.manifest.fingerprint
        expected = replace(mark, data_sha256=data.source_fingerprint("train"), view=data.transform_name)
        refuse_difference(mark, expected, self.folder)

    def signal(self, batch: ClassBatch) -> TeacherSignal:
        index_B = batch.index_B
        if int(index_B.max()) >= len(self._row_of):
            raise CacheError(f"the cache {self.folder} has no row {int(index_B.max())}; write it for the whole split")
        row_B = self._row_of[index_B]
        if bool((row_B < 0).any()):
            missing = int(index_B[row_B < 0][0])
            raise CacheError(f"the cache {self.folder} has no row {missing}; write it for the whole split")
        if self.manifest.fingerprint.top_k is None:
            return DenseLogits(self._columns["logits"][row_B].float())
        return TopKLogprobs(
            ids_NK=self._columns["ids"][row_B].long(),
            logprobs_NK=self._columns["logprobs"][row_B].float(),
            tail_logprob_N=self._columns["tail_logprob"][row_B].float(),
            num_classes=self.num_classes,
        )

    def to(self, device: torch.device | str) -> "CachedTeacher":
        self._columns = {name: column.to(device) for name, column in self._columns.items()}
        self._row_of = self._row_of.to(device)
        return self

    def spent_flops(self) -> float:
        return self.manifest.scoring_flops or 0.0


def _kl_to_stored(dense: DenseLogits, stored: TeacherSignal, temperature: float) -> Tensor:
    """KL(dense teacher || stored signal) per row, nats, both softened: the stored side stands where a student would."""
    logits_NV = spread_tail(stored) if isinstance(stored, TopKLogprobs) else teacher_logits(stored)
    return forward_kl(logits_NV.double(), dense.logits_NV.double(), temperature=temperature)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_whole(path: Path, batch: ClassBatch, sha256: str | None) -> bool:
    """Whether the shard reads, holds exactly this batch's rows and, once sealed, the bytes it was sealed with."""
    try:
        content = path.read_bytes()
        return sha256 in (None, _sha256(content)) and torch.equal(load(content)["index"], batch.index_B.cpu())
    except (FileNotFoundError, SafetensorError, KeyError):
        return False
