"""From stored traces to the documents that are trained on: held-out problems out, formats and modes in."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from research.data.modes import Modes
from research.data.splits import DataError
from research.records import Problem, Trace
from research.text.codec import Codec
from research.text.compact import CompactDocuments
from research.text.formats import arrange
from research.text.refusals import EmptyChain

HELD_OUT = "held_out"  # a trace of a problem that validation or test poses


def train_documents(
    traces: Iterable[Trace],
    codec: Codec,
    modes: Modes,
    *,
    trace_format: str,
    format_seed: int,
    separator: str,
    held_out: Iterable[Problem],
    unread: Counter[str],
) -> tuple[CompactDocuments, Counter[str]]:
    """The documents of those traces that have one, and how many have none, by reason.

    traces     gone through once; one is in memory at a time, unless chains are swapped or there are two modes: which
               trace gets which chain, or which mode, then hangs on all of them
    separator  stands between the steps of a chain
    unread     rows that were no traces, by reason, when ``traces`` have come to their end

    A document's ``index`` is the place of its trace in ``traces``. Problems are compared by their words: a store of
    other people's traces does not know this task's splits. Raises DataError where no trace has a document.
    """
    skipped, codec = Counter[str](), codec.marked("")  # the traces bring their marks along
    trainable = _trainable(traces, {_words(problem.text) for problem in held_out}, modes, skipped)
    together = modes.mixture is not None or trace_format == "swapped_chain"

    def arranged() -> Iterator[Trace]:
        for taken in [list(trainable)] if together else ([one] for one in trainable):
            ready = arrange([trace for _, trace in taken], trace_format, format_seed, separator)
            placed = [replace(trace, index=place) for (place, _), trace in zip(taken, ready, strict=True)]
            yield from modes.training(placed, codec.template)

    documents = CompactDocuments(codec.encode_each(arranged(), skipped))
    seen = len(documents) + skipped.total()
    skipped += unread
    if not documents:
        told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"none of {seen} traces can be encoded as {trace_format}: {told}")
    return documents, skipped


def _trainable(
    traces: Iterable[Trace], asked: set[str], modes: Modes, skipped: Counter[str]
) -> Iterator[tuple[int, Trace]]:
    """Place and trace of those that no held-out problem asks for, and that can be in either mode."""
    for place, trace in enumerate(traces):
        if _words(trace.problem) in asked:
            skipped[HELD_OUT] += 1
        elif modes.takes(trace):
            yield place, trace
        else:
            skipped[EmptyChain.reason] += 1


def _words(text: str) -> str:
    return " ".join(text.split()).casefold()
