"""Many documents in little memory: the same documents, in memory or on disk."""

import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.text.compact import CompactDocuments, lengths
from research.text.document import Document

DOCUMENT = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9).flatmap(
    lambda ids: st.builds(Document, st.just(tuple(ids)), st.integers(1, len(ids)), st.integers(0, 2**62))
)


@settings(max_examples=40, deadline=None)
@given(st.lists(DOCUMENT, max_size=12), st.sampled_from([0, 40, 2**20]))
def test_they_are_the_documents_they_were_made_of(documents: list[Document], resident_bytes: int) -> None:
    compact = CompactDocuments(iter(documents), resident_bytes)
    assert list(compact) == documents == compact[:] and compact == documents and documents == compact
    assert len(compact) == len(documents) and compact[1:-1] == documents[1:-1]
    assert lengths(compact).tolist() == lengths(documents).tolist() == [len(one.ids) for one in documents]
    assert compact.index_D.tolist() == [one.index for one in documents]
    assert all(isinstance(token, int) for one in compact for token in (*one.ids, one.prompt_length, one.index))
    if documents:
        assert compact[-1] == documents[-1] and compact[0] != Document((7, 7, 7, 7), 2, -1)
        assert compact != documents[:-1] and compact != [*documents[:-1], Document((7,), 1, -1)]


def test_ids_beyond_the_limit_lie_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    documents = [Document(tuple(range(n, n + 50)), 3, n) for n in range(100)]
    small, large = CompactDocuments(documents, 2**20), CompactDocuments(documents, 1000)
    assert small == large == documents
    assert not isinstance(small._ids_N, np.memmap) and isinstance(large._ids_N, np.memmap)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: open("/dev/full", "wb", buffering))  # noqa: SIM115
    with pytest.raises(OSError, match=r"do not fit into the temporary folder .*set TMPDIR"):
        CompactDocuments([Document((1, 2, 3), 1, 0)] * 10, 8)


def test_memory_is_bounded() -> None:
    """10,000 documents of 100 ids that Python does not share: lists of them would take 36 bytes an id, 36 MB."""

    def documents() -> Iterator[Document]:
        return (Document(tuple(range(n + 1000, n + 1100)), 5, n) for n in range(10_000))

    tracemalloc.start()
    kept = CompactDocuments(documents(), 2**18)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 10_000 and size < 10_000 * 24 + 20_000 and peak < 2_000_000
