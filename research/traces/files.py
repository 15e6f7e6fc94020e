"""Files of traces as the lines of JSON that they are, or that their rows would be."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
from pyarrow import parquet

from research.errors import StoreError

FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
_BATCH_ROWS = 256
_GZIP = b"\x1f\x8b"


def lines_of(path: Path, max_characters: int) -> Iterator[bytes]:
    """The rows of a file, each as one line of JSON, by the file's name; compressed by that, or by its first bytes.

    .parquet  a row is an object of its columns
    .csv      the same; the first line names the columns, and an empty cell is null
    .json     one list of objects, which is read as a whole; where it begins otherwise, lines as in any other file
    others    the lines as they stand. Of one much longer than ``max_characters`` the rest is read over, not into memory

    Raises StoreError where the file is damaged.
    """
    try:
        if path.suffix == ".parquet":
            yield from _of_parquet(path)
        elif path.suffix == ".csv":
            yield from _of_csv(path, max_characters)
        else:
            with _opened(path) as stream:
                if ".json" in path.suffixes and stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                    yield from (_line(row) for row in json.loads(stream.read().decode("utf-8-sig")))
                else:
                    yield from _of_lines(stream, 4 * max_characters + 2)  # bytes, whatever its characters
    except (EOFError, zlib.error, OSError, csv.Error, pyarrow.ArrowException, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read to its end ({error}); fetch or write the file again") from None


def _opened(path: Path) -> Any:
    with path.open("rb") as stream:
        compressed = path.suffix == ".gz" or stream.read(2) == _GZIP
    return gzip.open(path, "rb") if compressed else path.open("rb")


def _of_lines(stream: IO[bytes], limit: int) -> Iterator[bytes]:
    while line := stream.readline(limit):
        if len(line) == limit and not line.endswith(b"\n"):
            while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
                pass
        yield line


def _of_parquet(path: Path) -> Iterator[bytes]:
    with parquet.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
            yield from (_line(row) for row in batch.to_pylist())


def _of_csv(path: Path, max_characters: int) -> Iterator[bytes]:
    csv.field_size_limit(max(csv.field_size_limit(), 4 * max_characters))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        for row in csv.DictReader(stream, restkey="unnamed"):
            yield _line({name: value or None for name, value in row.items()})


def _line(row: object) -> bytes:
    return json.dumps(row, default=_plain).encode()


def _plain(value: object) -> str:
    """Of a column's value that JSON has no word for; bytes that are no text are told by the row that has them."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
