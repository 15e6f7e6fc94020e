"""Encoded documents by the hundred thousand: their ids in one row of integers, on disk where they are many."""

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO, overload

import numpy as np

from research.text.document import Document

ID_BYTES = 4
RESIDENT_BYTES = 2**26  # ids beyond it are written to an unnamed temporary file and mapped from there


class CompactDocuments(Sequence[Document]):
    """A sequence of documents, each made anew when it is asked for; equal to any sequence of the same documents.

    Memory holds 24 bytes of each document, and ids up to ``resident_bytes``. More of them lie in a temporary file (in
    ``TMPDIR``) that has no name, goes with the process, and is mapped: its pages are the system's to drop.

    length_D, index_D   tokens and index of each document

    Raises OSError, saying how much was written, where the disk is full.
    """

    def __init__(self, documents: Iterable[Document], resident_bytes: int = RESIDENT_BYTES) -> None:
        length, prompt, index, pending = array("i"), array("i"), array("q"), array("i")
        with ExitStack() as opened:
            file: IO[bytes] | None = None
            for document in documents:
                length.append(len(document.ids))
                prompt.append(document.prompt_length)
                index.append(document.index)
                pending.extend(document.ids)
                if len(pending) * ID_BYTES > resident_bytes:
                    file = file or opened.enter_context(tempfile.TemporaryFile(buffering=0))
                    _spill(pending, file)
            if file is not None:
                _spill(pending, file)
                self._ids_N: np.ndarray = np.memmap(file, dtype=np.int32, mode="r")  # the map outlives the file object
            else:
                self._ids_N = np.array(pending, dtype=np.int32)
        self._prompt_D, self._end_D = np.array(prompt, dtype=np.int32), np.cumsum(length, dtype=np.int64)
        self.length_D, self.index_D = np.array(length, dtype=np.int32), np.array(index, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.length_D)

    @overload
    def __getitem__(self, place: int) -> Document: ...

    @overload
    def __getitem__(self, place: slice) -> list[Document]: ...

    def __getitem__(self, place: int | slice) -> Document | list[Document]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        end = int(self._end_D[place])
        ids = tuple(self._ids_N[end - int(self.length_D[place]) : end].tolist())
        return Document(ids, int(self._prompt_D[place]), int(self.index_D[place]))

    def __iter__(self) -> Iterator[Document]:
        return (self[place] for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def lengths(documents: Sequence[Document]) -> np.ndarray:
    """Tokens of each document, int32 [D]."""
    if isinstance(documents, CompactDocuments):
        return documents.length_D
    return np.array([len(document.ids) for document in documents], dtype=np.int32)


def _spill(pending: "array[int]", file: IO[bytes]) -> None:
    """Write the ids that wait behind those in the file, and forget them."""
    try:
        left = memoryview(pending.tobytes())
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise OSError(
            f"the ids of the train documents do not fit into the temporary folder {tempfile.gettempdir()} ({error}); "
            "set TMPDIR to a folder with more room, or lower data.num_train"
        ) from error
    del pending[:]
