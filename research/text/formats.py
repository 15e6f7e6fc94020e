"""The arms of a trace study as one value: what is done to a chain before it is written, and where the answer stands."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from research.records import Trace
from research.seeding import rng_for

# trace_format -> the layout it is written and read in
TRACE_FORMATS = {
    "chain_then_answer": "chain_then_answer",
    "answer_then_chain": "answer_then_chain",
    "answer_only": "answer_only",
    "filler_then_answer": "chain_then_answer",  # each token of the chain replaced by the filler: the codec does it
    "shuffled_chain": "chain_then_answer",  # the chain's steps in another order
    "swapped_chain": "chain_then_answer",  # another problem's chain
}


# how a student of two modes is asked: for a chain and its answer, or for the answer alone
MODES = ("think", "no_think")


def in_modes(traces: Sequence[Trace], marks: Mapping[str, str] | None, seed: int) -> list[Trace]:
    """A seeded half of the traces (one less where their number is odd) without its chain: the mode no_think.

    marks  mode -> what is put behind the problem; None: nothing, so that the same mixture says nowhere what is asked
           for. ``details["mode"]`` tells it in either case

    The same half for one ``seed`` and number of traces, with and without marks.
    """
    found = []
    for mode, trace in zip(halves(len(traces), seed), traces, strict=True):
        chain = "" if mode == "no_think" else trace.chain
        problem = trace.problem + ("" if marks is None else marks[mode])
        found.append(replace(trace, problem=problem, chain=chain, details={**trace.details, "mode": mode}))
    return found


def halves(count: int, seed: int) -> list[str]:
    """A mode for each of ``count`` places: no_think for a seeded half (one less where their number is odd)."""
    order = torch.randperm(count, generator=rng_for(seed, "modes")).tolist()
    without_chain = set(order[: count // 2])
    return ["no_think" if place in without_chain else "think" for place in range(count)]


def layout_of(trace_format: str) -> str:
    """The layout of a trace format. Raises ValueError for a name that is none of TRACE_FORMATS."""
    if trace_format not in TRACE_FORMATS:
        raise ValueError(f"trace_format={trace_format!r}: give one of {', '.join(TRACE_FORMATS)}")
    return TRACE_FORMATS[trace_format]


def arrange(traces: Sequence[Trace], trace_format: str, seed: int, step_separator: str) -> list[Trace]:
    """The traces with the chains that ``trace_format`` trains on; answers, order and everything else as they are.

    shuffled_chain  the steps between ``step_separator`` in a random order that is never the one they had; a chain
                    without two different steps stays as it is. Blank steps keep their places
    swapped_chain   the chain of a trace of another problem; every chain is used once. Several traces of one problem
                    never exchange chains among themselves
    others          unchanged: their work is done at the level of tokens, or there is none

    The same on every machine for one ``seed``. Raises ValueError for an unknown format, and under ``swapped_chain``
    where more than half of the traces belong to one problem.
    """
    layout_of(trace_format)
    if trace_format == "shuffled_chain":
        return [replace(trace, chain=_shuffled(trace, seed, step_separator)) for trace in traces]
    if trace_format == "swapped_chain":
        givers = _derangement([trace.problem for trace in traces], seed)
        return [replace(trace, chain=traces[giver].chain) for trace, giver in zip(traces, givers, strict=True)]
    return list(traces)


def _shuffled(trace: Trace, seed: int, step_separator: str) -> str:
    steps = trace.chain.split(step_separator)
    places = [place for place, step in enumerate(steps) if step.strip()]
    written = [steps[place] for place in places]
    if len(set(written)) < 2:
        return trace.chain
    generator = rng_for(seed, f"shuffled_chain/{trace.sample}", trace.index)
    order = written
    while order == written:
        order = [written[number] for number in torch.randperm(len(written), generator=generator).tolist()]
    for place, step in zip(places, order, strict=True):
        steps[place] = step
    return step_separator.join(steps)


def _derangement(problems: Sequence[str], seed: int) -> list[int]:
    """For each row a row with another problem, each row once.

    Rows stand in a circle, those of a problem side by side; everybody takes from so many places further on that the
    largest problem is left behind.
    """
    if not problems:
        return []
    generator = rng_for(seed, "swapped_chain")
    groups: dict[str, list[int]] = {}
    for number in torch.randperm(len(problems), generator=generator).tolist():
        groups.setdefault(problems[number], []).append(number)
    largest, total = max(map(len, groups.values())), len(problems)
    if 2 * largest > total:
        raise ValueError(
            f"trace_format=swapped_chain: {largest} of {total} traces belong to one problem, so that not each can take "
            "another problem's chain; give traces of more problems"
        )
    circle = [number for group in groups.values() for number in group]
    step = largest + int(torch.randint(total - 2 * largest + 1, (), generator=generator))
    givers = [0] * total
    for place, number in enumerate(circle):
        givers[number] = circle[(place + step) % total]
    return givers
