"""From stored traces to the documents that are trained on: held-out problems out, formats and modes in."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from research.data.modes import Modes
from research.data.splits import DataError
from research.records import Problem, Trace
from research.text.codec import Codec
from research.text.document import Document
from research.text.formats import arrange
from research.text.refusals import EmptyChain

HELD_OUT = "held_out"  # a trace of a problem that validation or test poses


def train_documents(
    traces: Sequence[Trace],
    codec: Codec,
    modes: Modes,
    *,
    trace_format: str,
    format_seed: int,
    separator: str,
    held_out: Iterable[Problem],
    unread: Counter[str],
) -> tuple[list[Document], Counter[str]]:
    """The documents of those traces that have one, and how many have none, by reason; ``unread`` of them were not read.

    A document's ``index`` is the place of its trace in ``traces``. ``separator`` stands between the steps of a chain.
    Problems are compared by their words: a store of other people's traces does not know this task's splits. Raises
    DataError where no trace has a document.
    """
    asked = {_words(problem.text) for problem in held_out}
    posed = [place for place, trace in enumerate(traces) if _words(trace.problem) not in asked]
    kept = [place for place in posed if modes.takes(traces[place])]
    codec = codec.marked("")  # the traces bring their marks along
    arranged = arrange([traces[place] for place in kept], trace_format, format_seed, separator)
    placed = [replace(trace, index=place) for place, trace in zip(kept, arranged, strict=True)]
    documents, skipped = codec.encode_all(modes.training(placed, codec.template))
    left_out = {HELD_OUT: len(traces) - len(posed), EmptyChain.reason: len(posed) - len(kept)}
    skipped += unread + Counter(left_out)
    if not documents:
        told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"none of {len(traces)} traces can be encoded as {trace_format}: {told}")
    return documents, skipped


def _words(text: str) -> str:
    return " ".join(text.split()).casefold()
