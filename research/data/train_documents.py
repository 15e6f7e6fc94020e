"""From stored traces to the documents that are trained on: held-out problems out, formats and modes in."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from research.data.modes import Modes
from research.data.splits import DataError
from research.data.train_traces import WRONG_ANSWER
from research.records import Problem, Trace
from research.text.codec import Codec
from research.text.compact import CompactDocuments
from research.text.formats import arrange
from research.text.refusals import ControlToken, EmptyChain, MissingAnswer, TooLong, UnknownCharacter, Unreadable
from research.text.templates import THINK
from research.traces.importing import QUARANTINE_FILE, QUARANTINED

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
    other people's traces does not know this task's splits. Raises DataError where no trace has a document, saying what
    to do about each reason.
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
        advice = ". ".join(_advice(skipped, codec, modes))
        raise DataError(f"none of {seen} traces can be encoded as {trace_format}: {told}{advice and f'. {advice}'}")
    return documents, skipped


def _advice(skipped: Iterable[str], codec: Codec, modes: Modes) -> Iterator[str]:
    """What to do about each of the reasons; nothing about those that only a release knows."""
    template, marks = type(codec.template).__name__, codec.template.marks(codec.layout)
    told = {
        TooLong.reason: f"raise data.max_tokens, now {codec.max_tokens}",
        EmptyChain.reason: "give data.trace_format=answer_only"
        if modes.mixture is None
        else f"data.modes={modes.mixture} needs a chain in each; give it traces with chains, or data.modes=null",
        MissingAnswer.reason: "give traces with an answer each",
        UnknownCharacter.reason: "data.tokenizer has no token for a part of the texts; give bpe or a pretrained one",
        ControlToken.reason: "the texts spell a special token of the tokenizer; remove it from them, or give another "
        "data.tokenizer",
        Unreadable.reason: f"the texts hold marks of the template {template}"
        + (f" ({' '.join(marks)})" if marks else "")
        + f"; give template={'alpaca' if THINK in marks else 'think'} or another",
        HELD_OUT: "validation or test poses the same problems; give other traces, or fewer of them in data.num_val and "
        "data.num_test",
        WRONG_ANSWER: "data.store=released:NAME without :correct takes them too",
    }
    for reason in skipped:
        if reason in told:
            yield f"{reason}: {told[reason]}"
        elif reason.startswith(QUARANTINED):
            yield f"{reason}: these rows are no traces; a run lists them in {QUARANTINE_FILE} of its folder"


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
