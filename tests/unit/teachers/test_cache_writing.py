"""Writing that is interrupted: by a kill at any moment, and by a disk that is really full."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from research.data.loader import TensorLoader
from research.errors import CacheError
from research.records import ClassBatch, DenseLogits
from research.teachers.base import AbstractTeacher, TeacherIdentity
from research.teachers.cache import CachedTeacher, CacheWriter
from research.teachers.frozen import FrozenTeacher
from research.teachers.manifest import CacheFingerprint

if TYPE_CHECKING:  # it loads Lightning, which the writer's own process does without
    from research.data.digits import Digits

ROWS, SHARD_ROWS = 3000, 10
MARK = CacheFingerprint("a" * 64, {}, "b" * 64, "identity", 4, None, "float32")

# The writer in a process of its own.
PROGRAM = f"""
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_cache_writing import MARK, ROWS, SHARD_ROWS, Rows, Scores
from research.teachers.cache import CacheWriter
for done in CacheWriter(Path(sys.argv[1]), MARK, rows=ROWS, shard_rows=SHARD_ROWS).write(Scores(), Rows(), "train"):
    print(done, flush=True)
"""


class Scores(AbstractTeacher):
    """Logits made of a row's inputs; counts the rows it was asked for."""

    num_classes = 4
    identity = TeacherIdentity("frozen", "a" * 64, "scores", {})

    def __init__(self) -> None:
        self.asked = 0

    def signal(self, batch: ClassBatch) -> DenseLogits:
        self.asked += len(batch)
        return DenseLogits(batch.inputs.cumsum(dim=-1))


class Rows:
    """3,000 rows, and a loader as a datamodule gives it; every index is shifted, so that it is no row number."""

    def loader(self, split: str, *, batch_size: int) -> TensorLoader:
        inputs = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0))
        return TensorLoader(inputs, torch.zeros(ROWS, dtype=torch.long), torch.arange(ROWS) + 7, batch_size=batch_size)


def write(folder: Path, steps: int | None = None) -> int:
    """Write a cache, or its first shards; returns how many rows were scored in this call for the shards."""
    scores = Scores()
    writing = CacheWriter(folder, MARK, rows=ROWS, shard_rows=SHARD_ROWS).write(scores, Rows(), "train")
    if steps is not None:
        for _ in range(steps):
            next(writing)
        return scores.asked
    list(writing)
    return scores.asked - ROWS  # the measurement of the gap scores every row once


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert write(folder) == ROWS
    return contents(folder)


def test_a_kill_at_any_moment_loses_no_row_and_doubles_none(folder: Path, unbroken: dict[str, bytes]) -> None:
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(random.randint(1, 60)):  # then somewhere within a shard: it does not wait for us
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        shards = {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}
        assert 1 <= len(shards) < ROWS // SHARD_ROWS
        assert all(unbroken[name] == content for name, content in shards.items())  # whole, or absent
        with pytest.raises(CacheError, match="not finished"):
            CachedTeacher(folder)
    assert write(folder) == ROWS - SHARD_ROWS * len(shards)
    assert contents(folder) == unbroken
    index_N = torch.arange(ROWS) + 7
    everything = ClassBatch(torch.zeros(ROWS, 4), torch.zeros(ROWS, dtype=torch.long), index_N, ROWS)
    (batch,) = Rows().loader("train", batch_size=ROWS)
    assert torch.equal(CachedTeacher(folder).signal(everything).logits_NV, Scores().signal(batch).logits_NV)


@pytest.mark.parametrize("steps", [1, 2, 150, 299, 300])
def test_going_on_scores_what_is_missing_and_nothing_else(folder: Path, unbroken: dict[str, bytes], steps: int) -> None:
    assert write(folder, steps) == SHARD_ROWS * steps
    (folder / f"shard-{steps:05d}.partial").write_bytes(b"half a shard")
    if steps == 300:
        (folder / f"shard-{steps:05d}.partial").unlink()  # there is no such shard, so nothing would take it away
    (folder / "manifest.json.partial").write_text("half a manifest")
    assert write(folder) == ROWS - SHARD_ROWS * steps
    assert contents(folder) == unbroken


def test_a_finished_cache_is_left_alone(folder: Path, unbroken: dict[str, bytes]) -> None:
    write(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    scores = Scores()
    done = list(CacheWriter(folder, MARK, rows=ROWS, shard_rows=7).write(scores, Rows(), "train"))
    assert done == list(range(SHARD_ROWS, ROWS + 1, SHARD_ROWS))  # its own shard size, whatever is asked for now
    assert scores.asked == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def mark(teacher: AbstractTeacher, digits: Digits) -> CacheFingerprint:
    source = digits.source_fingerprint("train")
    return CacheFingerprint(teacher.identity.sha256, {}, source, "identity", 10, None, "float32")


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """The kernel refuses to let this process's files grow beyond a size: to a writer the same as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_may_not_grow_stop_the_writing_and_it_goes_on(
    folder: Path, live: FrozenTeacher, digits: Digits
) -> None:
    with largest_file(4096), pytest.raises(CacheError, match=r"the disk is full .*; 0 finished shards are kept"):
        list(CacheWriter(folder, mark(live, digits), rows=1437, shard_rows=500).write(live, digits, "train"))
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    list(CacheWriter(folder, mark(live, digits), rows=1437, shard_rows=500).write(live, digits, "train"))
    CachedTeacher(folder).connect(digits)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB; the cache of the digits needs about 75."""
    folder = tmp_path / "disk"
    folder.mkdir()
    told = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True, text=True
    ) if os.geteuid() == 0 else None  # fmt: skip
    if told is None or told.returncode != 0:
        pytest.skip(f"no right to mount a file system: {told.stderr.strip() if told else 'not root'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_says_what_to_do_and_the_same_command_goes_on(
    small_disk: Path, live: FrozenTeacher, digits: Digits
) -> None:
    folder, ballast = small_disk / "cache", small_disk / "ballast"
    ballast.write_bytes(bytes(40 * 1024))
    writer = CacheWriter(folder, mark(live, digits), rows=1437, shard_rows=200)
    advice = r"the disk is full .* finished shards are kept\. Free space and run the same command again"
    with pytest.raises(CacheError, match=advice) as told:
        list(writer.write(live, digits, "train"))
    kept = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(kept) > 0 and f"{len(kept)} finished shards" in str(told.value)
    assert not list(folder.glob("*.partial"))
    assert json.loads((folder / "manifest.json").read_text())["complete"] is False
    before = {name: (folder / name).stat().st_mtime_ns for name in kept}
    ballast.unlink()
    list(CacheWriter(folder, mark(live, digits), rows=1437, shard_rows=200).write(live, digits, "train"))
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == before
    for batch in digits.loader("train"):
        torch.testing.assert_close(
            CachedTeacher(folder).signal(batch).logits_NV, live.signal(batch).logits_NV, atol=1e-6, rtol=0
        )
