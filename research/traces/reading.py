"""Traces to train on, wherever they lie: a store's folder, or a JSON lines file."""

import logging
from itertools import islice
from pathlib import Path

from research.errors import ConfigError
from research.records import Trace
from research.traces.importing import TraceImport
from research.traces.store import TraceStore

log = logging.getLogger(__name__)
FILES = (".jsonl", ".jsonl.gz")


def read_traces(path: Path, num: int | None = None, *, allow_empty_chain: bool = False) -> list[Trace]:
    """The first ``num`` kept traces of a store, or good rows of a ``.jsonl`` or ``.jsonl.gz`` file; None: all.

    A source with fewer gives those it has. ``allow_empty_chain``: rows of a file that hold an answer alone are good
    ones; a store holds what it was written with. Bad rows of a file are counted by reason in a warning. Raises
    ConfigError where the path is neither, or gives no trace at all; StoreError where it is damaged or not finished.
    """
    if path.is_dir():
        return list(islice(TraceStore(path).traces(), num))
    if not path.name.endswith(FILES):
        raise ConfigError(f"{path} is no folder of a trace store and no file in {' or '.join(FILES)}")
    rows = TraceImport(path, allow_empty_chain=allow_empty_chain)
    traces = list(islice(rows, num))
    report = rows.report
    told = ", ".join(f"{count} {reason}" for reason, count in report.quarantined.most_common())
    if not traces:
        raise ConfigError(f"none of the {report.rows} rows of {path} is a trace ({told or 'the file is empty'})")
    if told:
        log.warning(
            "%s of %s rows of %s are no traces (%s); `distill traces source=file` lists them line by line",
            sum(report.quarantined.values()), report.rows, path, told,
        )  # fmt: skip
    return traces
