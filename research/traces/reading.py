"""Traces to train on, wherever they lie: a store's folder, or somebody's file."""

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from research.errors import ConfigError
from research.records import Trace
from research.traces.files import FILES
from research.traces.importing import QUARANTINED, TraceImport
from research.traces.store import TraceStore

log = logging.getLogger(__name__)


def read_traces(path: Path, num: int | None = None, *, allow_empty_chain: bool = False) -> list[Trace]:
    """All that :func:`stream_traces` gives."""
    return list(stream_traces(path, num, allow_empty_chain=allow_empty_chain))


def stream_traces(
    path: Path,
    num: int | None = None,
    *,
    allow_empty_chain: bool = False,
    quarantine: Path | None = None,
    unread: Counter[str] | None = None,
    quiet: bool = False,
) -> Iterator[Trace]:
    """The first ``num`` kept traces of a store, or good rows of a file of FILES; None: all.

    A source with fewer gives those it has; little of it is in memory at a time. ``allow_empty_chain``: rows of a file
    that hold an answer alone are good ones; a store holds what it was written with. Bad rows of a file are told in a
    warning at the end (not where ``quiet``), go to the file ``quarantine`` line by line (see :class:`TraceImport`), and
    are counted in ``unread`` as ``quarantine_REASON``. Raises ConfigError where the path is neither, or gives no trace
    at all; StoreError where it is damaged or not finished.
    """
    if path.is_dir():
        yield from islice(TraceStore(path).traces(), num)
        return
    if not path.name.endswith(FILES):
        raise ConfigError(f"{path} is no folder of a trace store and no file in {', '.join(FILES)}")
    rows = TraceImport(path, quarantine, allow_empty_chain=allow_empty_chain)
    yield from islice(rows, num)
    report = rows.report
    told = ", ".join(f"{count} {reason}" for reason, count in report.quarantined.most_common())
    if not report.accepted:
        raise ConfigError(f"none of the {report.rows} rows of {path} is a trace ({told or 'the file is empty'})")
    if unread is not None:
        unread.update({f"{QUARANTINED}{reason}": count for reason, count in report.quarantined.items()})
    if told and not quiet:
        where = "`distill traces source=file` lists them line by line" if quarantine is None else f"see {quarantine}"
        log.warning(
            "%s of %s rows of %s are no traces (%s); %s",
            sum(report.quarantined.values()), report.rows, path, told, where,
        )  # fmt: skip
