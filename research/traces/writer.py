"""From a source through the filters into a store: the loop behind `distill traces`."""

from collections.abc import Iterable
from dataclasses import asdict

from research.errors import ConfigError
from research.records import Trace
from research.traces.candidates import Candidate
from research.traces.corruptions import DETAIL
from research.traces.filters import FilterChain
from research.traces.importing import QUARANTINED
from research.traces.journal import JOURNAL_FILE, Journal
from research.traces.manifest import StoreManifest, Tally
from research.traces.rows import StoredTrace
from research.traces.sources import AbstractSource, Block, Unwatched, Watch
from research.traces.store import StoreWriter


def write_traces(
    source: AbstractSource,
    filters: FilterChain,
    writer: StoreWriter,
    *,
    keep_dropped: bool = True,
    watch: Watch | None = None,
) -> StoreManifest:
    """Write what is missing of a store and seal it; a finished store is left alone.

    keep_dropped  store dropped traces too, with their reason; they are counted in any case. ``kept`` says which is
                  which, and readers of a store get the kept ones

    The same settings give the same rows, however often the process was killed in between. Raises ConfigError where a
    filter judges by something the source does not give, and whatever the source, its generator or its grader raises:
    what is finished by then stays in the store.
    """
    for each in filters.filters:
        if each.needs is not None and each.needs not in source.gives:
            raise ConfigError(f"the filter {each.reason} judges by {each.needs}, which these traces do not have")
    if writer.manifest.complete:
        return writer.manifest
    watch = watch or Unwatched()
    filters.recall(writer.rows())
    journal = Journal(writer.folder / JOURNAL_FILE, writer.settings_sha256)
    done = writer.manifest.tally
    watch.judged(done.written, done.kept)
    try:
        for block in source.blocks(writer.finished, journal, watch):
            rows, tally = judge(block, filters)
            stored = rows if keep_dropped else [row for row in rows if row.kept]
            writer.write(stored, tally, **asdict(block.cost))
            journal.drop()
            watch.judged(tally.written, tally.kept)
    finally:
        journal.close()
    return writer.seal()


def judge(block: Block, filters: FilterChain) -> tuple[list[StoredTrace], Tally]:
    """The rows of a block after the filters, and their counts."""
    tally = Tally(problems=block.problems)
    rows = []
    for candidate in block.candidates:
        _make_storable(candidate)
        row = candidate.stored(filters.reason(candidate))
        _count(row, tally)
        rows.append(row)
    for reason, number in block.quarantined.items():
        tally.written += number
        _increase(tally.dropped, f"{QUARANTINED}{reason}", number)
    return rows, tally


def _count(row: StoredTrace, tally: Tally) -> None:
    tally.written += 1
    tally.kept += row.kept
    tally.tokens += row.tokens or 0
    if row.reason is not None:
        _increase(tally.dropped, row.reason)
    _increase(tally.verdicts, "none" if row.verdict is None else row.verdict.value)
    if outcome := row.trace.details.get("outcome"):
        _increase(tally.outcomes, outcome)
        if row.kept:
            _increase(tally.kept_outcomes, outcome)
    if DETAIL in row.trace.details:
        _increase(tally.corruptions, row.trace.details[DETAIL])


def _increase(counts: dict[str, int], name: str, by: int = 1) -> None:
    counts[name] = counts.get(name, 0) + by


def _make_storable(candidate: Candidate) -> None:
    """A half surrogate pair, as a broken byte token leaves it, cannot be written: shown as U+FFFD, and barred."""
    trace = candidate.trace
    texts = (candidate.text, trace.chain, trace.answer, trace.problem)
    if all(text.isascii() for text in texts) or _is_unicode(texts):
        return
    text, chain, answer, problem = (text.encode("utf-8", "replace").decode() for text in texts)
    candidate.text, candidate.barred = text, "not_unicode"
    candidate.trace = Trace(problem, chain, answer, trace.index, trace.sample, trace.details)


def _is_unicode(texts: Iterable[str]) -> bool:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True
