"""Trace stores on disk: parquet shards and a manifest.

A shard is whole, under its final name, or absent; its footer holds its own counts, so that everything the manifest
says of it can be read from the shard again. Shards are written in order: what a killed writer left is a prefix, and
the next one goes on after it. ``datasets.load_dataset(FOLDER)`` reads a store as well.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow
import pyarrow.compute
from pyarrow import parquet

from research.errors import ConfigError, StoreError
from research.records import Trace
from research.traces.manifest import (
    MANIFEST_FILE,
    SHARD_FOLDER,
    SHARDS,
    Shard,
    StoreManifest,
    Tally,
    read_manifest,
    refuse_difference,
    replace_file,
    write_manifest,
)
from research.traces.rows import COLUMNS, StoredTrace, from_batch, to_table

LOCK_FILE = ".lock"
ROW_GROUP_ROWS = 1024
# what `datasets` reads to find the rows among the store's other files
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

Traces written by `distill traces`; `manifest.json` holds settings, hashes and the drop ledger. Rows with `kept` false
were dropped for the reason that stands beside them:

    from datasets import load_dataset
    kept = load_dataset("this folder", split="train").filter(lambda row: row["kept"])
"""
_TALLY, _SETTINGS = "tally", "settings_sha256"


class TraceStore:
    """Reads a store row by row, one row group in memory at a time.

    Raises StoreError where the folder is no store, was not finished (unless ``require_complete`` is off), a shard is
    missing, or its bytes are not those that were written (``verify``: each shard is hashed before its rows are given).
    """

    def __init__(self, folder: str | Path, *, require_complete: bool = True, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._verify = verify
        self._verified: set[str] = set()
        if require_complete and not self.manifest.complete:
            raise StoreError(
                f"the store {self.folder} is not finished ({self.manifest.tally.problems} problems so far); "
                "run the `distill traces` command that began it again: it goes on from there"
            )

    def __len__(self) -> int:
        """Kept traces."""
        return self.manifest.tally.kept

    def rows(self, kept: bool | None = None) -> Iterator[StoredTrace]:
        """Every stored row in the order it was written; ``kept`` True or False gives those alone."""
        for name, shard in self.manifest.shards.items():
            held = {None: shard.rows, True: shard.tally.kept, False: shard.rows - shard.tally.kept}
            if held[kept]:
                yield from self.rows_of(name, kept)

    def rows_of(self, shard: str, kept: bool | None = None) -> Iterator[StoredTrace]:
        """The rows of one shard, by its name in the manifest."""
        for batch in self._batches(shard):
            if kept is not None:
                batch = batch.filter(batch.column("kept") if kept else pyarrow.compute.invert(batch.column("kept")))
            yield from from_batch(batch)

    def traces(self) -> Iterator[Trace]:
        """The kept traces."""
        return (row.trace for row in self.rows(kept=True))

    def _batches(self, name: str) -> Iterator[pyarrow.RecordBatch]:
        path, shard = self.folder / SHARD_FOLDER / name, self.manifest.shards[name]
        advice = "write the store again, or restore the file"
        try:
            if self._verify and name not in self._verified:
                if _file_sha256(path) != shard.sha256:
                    raise StoreError(f"{path} is not as it was written: its sha256 differs from the manifest; {advice}")
                self._verified.add(name)
            with parquet.ParquetFile(path, pre_buffer=False) as file:
                for group in range(file.num_row_groups):
                    yield from file.read_row_group(group, columns=list(COLUMNS), use_threads=False).to_batches()
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; {advice}") from None
        except pyarrow.ArrowInvalid as error:
            raise StoreError(f"{path} is not a readable parquet file ({error}); {advice}") from None


class StoreWriter:
    """Writes a store shard by shard; the only writer of its folder while the context is open.

        with StoreWriter(folder, settings) as writer:
            for rows, tally in blocks[writer.finished:]:
                writer.write(rows, tally, seconds)
            writer.seal()

    Entering reads what an earlier writer of the same settings left: ``finished`` shards, each checked against its
    hash. Raises StoreError where another process writes, the settings differ (each is named), or a shard is missing,
    foreign or damaged.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        try:
            self.settings: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the settings of a trace store must be plain JSON values: {error}") from None
        self.manifest = StoreManifest(self.settings)
        self._lock: IO[str] | None = None

    @property
    def finished(self) -> int:
        """Shards that are whole on disk."""
        return len(self.manifest.shards)

    @property
    def settings_sha256(self) -> str:
        """Fingerprint of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def __enter__(self) -> "StoreWriter":
        (self.folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._recover()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def write(
        self,
        rows: Sequence[StoredTrace],
        tally: Tally,
        seconds: float | None = None,
        *,
        tokens: float | None = None,
        flops: float | None = None,
        prefill: dict[str, float | None] | None = None,
    ) -> None:
        """Write the next shard: ``rows`` as they stand, ``tally`` with what is not stored, and what it cost."""
        if self.manifest.complete:
            raise StoreError(f"the store {self.folder} is finished; nothing can be added to it")
        metadata = {_TALLY: json.dumps(asdict(tally)), _SETTINGS: self.settings_sha256}
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(to_table(rows, metadata), sink, row_group_size=ROW_GROUP_ROWS, compression="zstd")
        content = sink.getvalue().to_pybytes()
        name = _shard_name(self.finished)
        try:
            replace_file(self.folder / SHARD_FOLDER / name, content)
        except OSError as error:
            raise StoreError(
                f"{name} of {self.folder} could not be written ({error}); the {self.finished} finished shards are "
                "kept. Free space and run the same command again: it goes on from there"
            ) from error
        sha256 = hashlib.sha256(content).hexdigest()
        self._enter(name, Shard(sha256, len(rows), tally, tokens, flops, seconds, prefill))

    def seal(self) -> StoreManifest:
        """Say that the store is complete. A sealed store is read by anyone and written by nobody."""
        self.manifest = replace(self.manifest, complete=True)
        replace_file(self.folder / "README.md", CARD.encode())
        write_manifest(self.folder, self.manifest)
        return self.manifest

    def rows(self) -> Iterator[StoredTrace]:
        """What is stored so far: filters that compare with earlier traces begin with these."""
        return TraceStore(self.folder, require_complete=False, verify=False).rows()

    def _recover(self) -> None:
        if not (self.folder / MANIFEST_FILE).exists():
            found = sorted((self.folder / SHARD_FOLDER).glob(SHARDS))
            if found:
                raise StoreError(f"{self.folder} holds {len(found)} shards and no {MANIFEST_FILE}; give another folder")
            write_manifest(self.folder, self.manifest)
            return
        manifest = read_manifest(self.folder)
        refuse_difference(manifest.settings, self.settings, self.folder)
        self.manifest = manifest
        names = sorted(path.name for path in (self.folder / SHARD_FOLDER).glob(SHARDS))
        expected = [_shard_name(number) for number in range(max(len(names), len(manifest.shards)))]
        if names != expected:
            wrong = sorted({*names} ^ {*expected})[0]
            raise StoreError(
                f"the store {self.folder} is not as it was left: {wrong} is missing or was added; "
                "restore its shards, or give another store folder"
            )
        for name in manifest.shards:
            if _file_sha256(self.folder / SHARD_FOLDER / name) != manifest.shards[name].sha256:
                raise StoreError(
                    f"{name} of {self.folder} is not as it was written: its sha256 differs from the manifest; "
                    "restore it, or give another store folder"
                )
        for name in names[len(manifest.shards) :]:
            self._enter(name, self._adopt(name))

    def _adopt(self, name: str) -> Shard:
        """A whole shard that a kill kept out of the manifest, by its own footer; its seconds are not known."""
        path = self.folder / SHARD_FOLDER / name
        try:
            metadata = parquet.read_metadata(path)
            own = {key.decode(): value.decode() for key, value in (metadata.metadata or {}).items()}
            tally = Tally(**json.loads(own[_TALLY]))
        except (pyarrow.ArrowInvalid, KeyError, ValueError, TypeError) as error:
            raise StoreError(f"{path} is no shard of a trace store ({error!r}); delete it and run again") from None
        if self.manifest.complete or own.get(_SETTINGS) != self.settings_sha256:
            raise StoreError(f"{path} does not belong to this store; delete it and run again")
        return Shard(_file_sha256(path), metadata.num_rows, tally)

    def _enter(self, name: str, shard: Shard) -> None:
        self.manifest = replace(self.manifest, shards={**self.manifest.shards, name: shard})
        write_manifest(self.folder, self.manifest)

    def _take_lock(self) -> None:
        lock = (self.folder / LOCK_FILE).open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise StoreError(
                f"another process{f' ({holder})' if holder else ''} writes into the store {self.folder}; "
                "wait until it ends, or give another store folder"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()  # the lock goes with the descriptor, also where a process is killed
            self._lock = None


def store_rows(
    folder: str | Path, settings: Mapping[str, Any], blocks: Iterable[tuple[Sequence[StoredTrace], Tally]]
) -> StoreManifest:
    """Write a whole store from blocks that come the same every time; those that are on disk already are left alone."""
    with StoreWriter(folder, settings) as writer:
        if not writer.manifest.complete:
            for number, (rows, tally) in enumerate(blocks):
                if number >= writer.finished:
                    writer.write(rows, tally)
            return writer.seal()
        return writer.manifest


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
