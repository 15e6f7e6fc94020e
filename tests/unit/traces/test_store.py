"""Stores: what is written is read, whoever was killed in between; what is not as it was written is refused."""

import json
import multiprocessing
import os
import signal
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from research.errors import ConfigError, StoreError
from research.records import Trace
from research.traces.manifest import Tally, read_manifest
from research.traces.rows import COLUMNS, StoredTrace
from research.traces.store import StoreWriter, TraceStore, store_rows

Rows = list[StoredTrace]
Count = Callable[[Sequence[StoredTrace]], Tally]
SETTINGS = {"task": "sum5", "sampling": {"temperature": 1.0, "top_p": 0.9}, "filters": [{"name": "answer_key"}]}


@pytest.fixture
def rows(make_rows: Callable[..., Rows]) -> Rows:
    return make_rows([f"text {n} ü 数" for n in range(10)], {3: "answer_key", 4: "length"})


def test_what_is_written_is_read(rows: Rows, make_store: Callable[..., Path], tmp_path: Path) -> None:
    store = TraceStore(make_store(tmp_path / "store", rows))
    assert list(store.rows()) == rows
    assert list(store.traces()) == [row.trace for row in rows if row.kept]
    assert [row.reason for row in store.rows(kept=False)] == ["answer_key", "length"]
    assert len(store) == 8 and store.manifest.rows == 10 and list(store.manifest.shards) == [
        "shard-00000.parquet", "shard-00001.parquet", "shard-00002.parquet",
    ]  # fmt: skip


def test_nulls_and_empty_texts_are_kept(make_store: Callable[..., Path], tmp_path: Path) -> None:
    row = StoredTrace(Trace("", "", "", 0), "")
    (read,) = TraceStore(make_store(tmp_path / "store", [row])).rows()
    assert read == row and (read.verdict, read.tokens, read.logprob, read.reason) == (None, None, None, None)


@pytest.mark.filterwarnings("ignore")  # of the library's own imports
def test_datasets_reads_a_store(rows: Rows, make_store: Callable[..., Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = make_store(tmp_path / "store", rows)
    (folder / "run.json").write_text('{"another": "file"}')
    datasets.disable_progress_bars()
    for arguments in ({"path": str(folder)}, {"path": "parquet", "data_dir": str(folder / "data")}):
        read = datasets.load_dataset(**arguments, split="train", cache_dir=str(tmp_path / "cache"))
        assert read.column_names == list(COLUMNS)
        assert read["chain"][:] == [row.trace.chain for row in rows] and read["kept"][:].count(False) == 2


def test_the_ledger_adds_up(rows: Rows, make_store: Callable[..., Path], tmp_path: Path) -> None:
    tally = read_manifest(make_store(tmp_path / "store", rows)).tally
    assert (tally.written, tally.kept, tally.dropped) == (10, 8, {"answer_key": 1, "length": 1})
    assert tally.written == tally.kept + sum(tally.dropped.values())


# -- going on ---------------------------------------------------------------------------------------------------------


def blocks_of(rows: Rows, count: Count, size: int = 4) -> list[tuple[Rows, Tally]]:
    return [(rows[n : n + size], count(rows[n : n + size])) for n in range(0, len(rows), size)]


def test_a_writer_goes_on_where_another_stopped(rows: Rows, count: Count, tmp_path: Path) -> None:
    blocks = blocks_of(rows, count)
    with StoreWriter(tmp_path / "cut", SETTINGS) as writer:
        writer.write(*blocks[0], tokens=3.0, flops=5.0, seconds=2.0)
    with pytest.raises(StoreError, match="is not finished"):
        TraceStore(tmp_path / "cut")
    with StoreWriter(tmp_path / "cut", SETTINGS) as writer:
        assert writer.finished == 1 and list(writer.rows()) == blocks[0][0]
        for block in blocks[1:]:
            writer.write(*block, tokens=4.0, flops=1.0, seconds=1.0)
        sealed = writer.seal()
    whole = store_rows(tmp_path / "whole", SETTINGS, blocks)
    assert {name: shard.sha256 for name, shard in sealed.shards.items()} == {
        name: shard.sha256 for name, shard in whole.shards.items()
    }
    assert sealed == read_manifest(tmp_path / "cut") and sealed.cost == {"tokens": 11.0, "flops": 7.0, "seconds": 4.0}
    assert whole.cost["seconds"] is None, "what was not measured is not zero"


def test_a_shard_that_the_manifest_does_not_know_yet_is_adopted(rows: Rows, count: Count, tmp_path: Path) -> None:
    """A kill between the shard's last byte and the manifest: neither lost nor written twice."""
    blocks = blocks_of(rows, count)
    with StoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(*blocks[0])
        before = (tmp_path / "manifest.json").read_bytes()
        writer.write(*blocks[1])
    (tmp_path / "manifest.json").write_bytes(before)
    (tmp_path / "data" / ".shard-00002.parquet.partial").write_bytes(b"half a shard")
    with StoreWriter(tmp_path, SETTINGS) as writer:
        assert writer.finished == 2 and writer.manifest.tally.dropped == {"answer_key": 1, "length": 1}
        writer.write(*blocks[2])
        writer.seal()
    assert list(TraceStore(tmp_path).rows()) == rows


def test_blocks_that_are_on_disk_are_not_written_again(rows: Rows, count: Count, tmp_path: Path) -> None:
    store_rows(tmp_path, SETTINGS, blocks_of(rows, count))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("data/*")}
    store_rows(tmp_path, SETTINGS, [])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("data/*")}
    with (
        StoreWriter(tmp_path, SETTINGS) as writer,
        pytest.raises(StoreError, match="is finished; nothing can be added"),
    ):
        writer.write([], Tally())


def write_slowly(folder: Path, rows: Rows) -> None:
    with StoreWriter(folder, SETTINGS) as writer:
        for number in range(writer.finished, 1000):
            writer.write(rows, Tally(problems=number))
            time.sleep(0.005)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_killed_writer_leaves_whole_shards_and_no_lock(rows: Rows, shards: int, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=write_slowly, args=(tmp_path, rows))
    process.start()
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "data").glob("shard-*"))) < shards and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with StoreWriter(tmp_path, SETTINGS) as writer:
        assert writer.finished >= shards
        assert list(writer.rows()) == rows * writer.finished
        assert writer.manifest.tally.problems == sum(range(writer.finished)), "each shard once, in order"


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_two_writers_on_one_store_are_refused(tmp_path: Path) -> None:
    told = rf"another process \(process {os.getpid()}\) writes into the store"
    with StoreWriter(tmp_path, SETTINGS), pytest.raises(StoreError, match=told):
        StoreWriter(tmp_path, SETTINGS).__enter__()
    with StoreWriter(tmp_path, SETTINGS) as writer:
        assert writer.finished == 0, "the lock goes with its holder"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"task": "sum6"}, "task: the store has 'sum5', the run 'sum6'"),
        ({"sampling": {"temperature": 0.7, "top_p": 0.9}}, "sampling.temperature: the store has 1.0, the run 0.7"),
        ({"filters": [{"name": "length"}]}, r"filters\[0\].name: the store has 'answer_key', the run 'length'"),
        ({"filters": []}, "filters: the store has"),
        ({"seed": 1}, "seed: the store has None, the run 1"),
    ],
)
def test_a_store_of_other_settings_is_refused_by_the_key(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    with StoreWriter(tmp_path, SETTINGS):
        pass
    with pytest.raises(StoreError, match=told):
        StoreWriter(tmp_path, {**SETTINGS, **change}).__enter__()
    with StoreWriter(tmp_path, SETTINGS):
        pass  # a refusal lets go of the lock


def test_settings_are_plain_values(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain JSON values"):
        StoreWriter(tmp_path, {"model": object()})


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_tampered_shard_is_refused_by_its_hash(rows: Rows, make_store: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", rows)
    tamper(folder / "data" / "shard-00001.parquet")
    read = TraceStore(folder).rows()
    assert [next(read) for _ in range(4)] == rows[:4], "the first shard is as it was"
    with pytest.raises(StoreError, match=r"shard-00001\.parquet is not as it was written: its sha256 differs"):
        next(read)
    with pytest.raises(StoreError, match="its sha256 differs"):
        StoreWriter(folder, {"made": "here"}).__enter__()


def test_a_shard_of_other_rows_is_refused_by_its_hash(
    rows: Rows, make_store: Callable[..., Path], tmp_path: Path
) -> None:
    """A shard that is whole in itself, and was not written here."""
    folder, other = make_store(tmp_path / "store", rows), make_store(tmp_path / "other", rows[::-1])
    (folder / "data" / "shard-00000.parquet").write_bytes((other / "data" / "shard-00000.parquet").read_bytes())
    with pytest.raises(StoreError, match="its sha256 differs"):
        list(TraceStore(folder).rows())


def test_missing_and_foreign_shards_are_refused(rows: Rows, make_store: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", rows)
    shard = folder / "data" / "shard-00001.parquet"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.parquet is missing"):
        list(TraceStore(folder).rows())
    with pytest.raises(StoreError, match=r"shard-00001\.parquet is missing or was added"):
        StoreWriter(folder, {"made": "here"}).__enter__()
    shard.write_bytes(content)
    (folder / "data" / "shard-00003.parquet").write_bytes(content)
    with pytest.raises(StoreError, match="does not belong to this store"):
        StoreWriter(folder, {"made": "here"}).__enter__()


def test_a_stray_file_in_an_unfinished_store_is_refused(rows: Rows, count: Count, tmp_path: Path) -> None:
    with StoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(*blocks_of(rows, count)[0])
    stray = tmp_path / "data" / "shard-00001.parquet"
    stray.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(StoreError, match=r"shard-00001\.parquet is no shard of a trace store"):
        StoreWriter(tmp_path, SETTINGS).__enter__()
    with StoreWriter(tmp_path / "other", {**SETTINGS, "seed": 3}) as writer:
        writer.write(*blocks_of(rows, count)[1])
    stray.write_bytes((tmp_path / "other" / "data" / "shard-00000.parquet").read_bytes())
    with pytest.raises(StoreError, match="does not belong to this store"):
        StoreWriter(tmp_path, SETTINGS).__enter__()


def test_what_is_no_store_is_refused(rows: Rows, make_store: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no manifest\.json in"):
        TraceStore(tmp_path)
    folder = make_store(tmp_path / "store", rows)
    plain = json.loads((folder / "manifest.json").read_text())
    for content, told in (
        ("{", "is not the manifest"),
        ("[]", "is not the manifest"),
        ('{"a": 1}', "is not the manif"),
    ):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(StoreError, match=told):
            TraceStore(folder)
    (folder / "manifest.json").write_text(json.dumps({**plain, "schema": 99}))
    with pytest.raises(StoreError, match="schema 99; this version reads 1"):
        TraceStore(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"holds 3 shards and no manifest\.json"):
        StoreWriter(folder, {"made": "here"}).__enter__()


def test_a_full_disk_keeps_the_finished_shards(
    rows: Rows, count: Count, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(rows, count)

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with StoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(*blocks[0])
        with monkeypatch.context() as patched:
            patched.setattr("os.replace", full)
            with pytest.raises(StoreError, match=r"No space left on device.*the 1 finished shards are kept"):
                writer.write(*blocks[1])
    assert not list((tmp_path / "data").glob(".*"))
    with StoreWriter(tmp_path, SETTINGS) as writer:
        assert writer.finished == 1


# -- memory -----------------------------------------------------------------------------------------------------------


def test_reading_holds_one_row_group(
    make_rows: Callable[..., Rows], make_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of a pass, Python's and Arrow's, does not grow with store or shard; 4 shards of 4 row groups each."""
    monkeypatch.setattr("research.traces.store.ROW_GROUP_ROWS", 64)
    rows = make_rows(["x" * 4000] * 256)
    folder = make_store(tmp_path / "store", rows * 4, block=len(rows))
    with parquet.ParquetFile(folder / "data" / "shard-00000.parquet") as file:
        assert file.num_row_groups == 4
        one_shard = file.read().nbytes
    peaks, arrow_peaks = [], []
    for shards in (1, 4):
        store = TraceStore(folder, verify=False)
        before, arrow, number = pyarrow.total_allocated_bytes(), 0, 0
        tracemalloc.start()
        for name in list(store.manifest.shards)[:shards]:
            for _ in store.rows_of(name):
                number += 1
                arrow = max(arrow, pyarrow.total_allocated_bytes() - before)
        peaks.append(tracemalloc.get_traced_memory()[1])
        arrow_peaks.append(arrow)
        tracemalloc.stop()
        assert number == shards * len(rows)
    assert peaks[1] < 1.3 * peaks[0] and peaks[0] < 0.7 * one_shard, (peaks, one_shard)
    assert max(arrow_peaks) < 0.7 * one_shard, (arrow_peaks, one_shard)
