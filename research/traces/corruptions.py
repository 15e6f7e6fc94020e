"""Error channels: chains of :class:`research.tasks.arithmetic.ChainedSums` spoilt in a known way.

Those of STEP_CHANNELS stand in for a teacher whose answers are often right and whose steps are not (claim C22): an
answer key lets most of these through, a step verifier none. Those of TEXT_CHANNELS leave the sum alone and write
something else before it, what the curation of R1-like sets removes (claim C23): one channel for each such filter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

import torch

from research.errors import ConfigError
from research.records import Trace
from research.schemas import nearest
from research.seeding import rng_for, seed_for
from research.tasks.arithmetic import TERM, columns_of
from research.tasks.steps import STEP_SEPARATOR, split_steps

DETAIL = "corruption"  # the key of a trace's details that names its error channel
UNTOUCHED = "none"  # a channel was drawn and found nothing to spoil

Draw = Callable[[int], int]  # a uniform number below its argument


@dataclass(frozen=True)
class Sum:
    """A chained sum worked out without error: its terms, the totals after each but the first, digits of a number."""

    terms: tuple[int, ...]
    totals: tuple[int, ...]
    width: int
    verbose: bool

    @property
    def highest(self) -> int:
        """The greatest number that its digits can write."""
        return 10**self.width - 1

    def before(self, totals: Sequence[int], step: int) -> int:
        """The total that a step goes on from, as it was written."""
        return totals[step - 1] if step else self.terms[0]


class Corruption:
    """Spoils a share of the traces that pass through it.

    rates  channel (a name of CHANNELS) -> share of traces it is applied to; the shares sum to at most 1
    seed   every trace draws from its own stream of (seed, index, sample): no other trace changes it

    A trace comes back with ``details["corruption"]``: the channel, or "none" where its sum offers nothing to spoil
    (no carry, a single step, a chain that was not right to begin with; for text, no chain at all). Traces that no
    channel was drawn for come back as they were. Raises ConfigError for an unknown channel, and for rates outside 0..1
    or of sum above 1.
    """

    def __init__(self, rates: Mapping[str, float], seed: int = 0) -> None:
        for name, rate in rates.items():
            if name not in CHANNELS:
                near = nearest(str(name), CHANNELS, "corruption.")
                raise ConfigError(f"unknown key corruption.{name}{near}. Valid: {', '.join(CHANNELS)}")
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ConfigError(f"corruption.{name} is {rate!r}; expected a share from 0 to 1")
        if sum(rates.values()) > 1 + 1e-9:
            raise ConfigError(
                f"corruption's shares sum to {sum(rates.values()):g}; expected at most 1, the rest is left alone"
            )
        self.rates, self.seed = dict(rates), seed

    def apply(self, trace: Trace) -> Trace:
        """The trace, spoilt where its draw says so."""
        rng = rng_for(seed_for(self.seed, "corruption", trace.index), "sample", trace.sample)
        place = float(torch.rand((), generator=rng, dtype=torch.float64))
        for name, end in zip(self.rates, accumulate(self.rates.values()), strict=True):
            if place < end:
                return corrupt(trace, name, lambda below: int(torch.randint(below, (), generator=rng)))
        return trace


def corrupt(trace: Trace, channel: str, draw: Draw) -> Trace:
    """The trace spoilt by one channel; ``draw(n)`` gives a uniform number below n."""
    if channel in TEXT_CHANNELS:
        return _with_text(trace, channel, draw)
    known = read_sum(trace)
    spoilt = STEP_CHANNELS[channel](known, draw) if known is not None else None
    if known is None or spoilt is None:
        return replace(trace, details={**trace.details, DETAIL: UNTOUCHED})
    steps, result = spoilt
    answer, details = f"{result:0{known.width}d}", {**trace.details, DETAIL: channel}
    return replace(trace, chain=STEP_SEPARATOR.join(steps), answer=answer, details=details)


def read_sum(trace: Trace) -> Sum | None:
    """The sum of a trace, where its problem is one and its chain and answer are right."""
    terms = tuple(int(term) for term in TERM.findall(trace.problem))
    totals = tuple(accumulate(terms))[1:]
    steps = split_steps(trace.chain)
    if not totals or len(steps) != len(totals):
        return None
    known = Sum(terms, totals, len(steps[-1].split(" ")[-1]), " " in steps[0])
    right = _written(known, totals) == steps and trace.answer == f"{totals[-1]:0{known.width}d}"
    return known if right else None


Spoilt = tuple[list[str], int] | None  # the steps and the answer, None where the channel has nothing to spoil


def wrong_step(known: Sum, draw: Draw) -> Spoilt:
    """One total is wrong and everything after it follows from it: one invalid step, a wrong answer."""
    end = len(known.totals)
    return _shifted(known, [range(step, end) for step in range(end)], draw)


def compensating_pair(known: Sum, draw: Draw) -> Spoilt:
    """One total is wrong, and a later error undoes it: two invalid steps, the right answer."""
    pairs = combinations(range(len(known.totals)), 2)
    return _shifted(known, [range(first, second) for first, second in pairs], draw)


def skipped_step(known: Sum, draw: Draw) -> Spoilt:
    """One total but the last is left out: no written step is wrong, one is missing, the right answer.

    Where the next term is 0, the left-out total would stand there all the same: such a place is not drawn.
    """
    places = [place for place in range(len(known.totals) - 1) if known.terms[place + 2] != 0]
    if not places:
        return None
    left_out = places[draw(len(places))]
    steps = [step for place, step in enumerate(_written(known, known.totals)) if place != left_out]
    return steps, known.totals[-1]


def lucky_guess(known: Sum, draw: Draw) -> Spoilt:
    """From some step on the totals are guesses, and the last of them happens to be right: a broken chain."""
    if len(known.totals) < 2:
        return None
    first = draw(len(known.totals) - 1)
    totals = list(known.totals)
    for place in range(first, len(totals) - 1):
        follows = known.before(totals, place) + known.terms[place + 1]
        wrong = [total for total in range(known.highest + 1) if total not in (follows, known.totals[place])]
        totals[place] = wrong[draw(len(wrong))]
    return _written(known, totals), totals[-1]


def lost_carry(known: Sum, draw: Draw) -> Spoilt:
    """Every carry (and borrow) out of the units is lost, and the next step goes on as if it had not been.

    A systematic error rather than a random one: the step that loses it and the one that repairs it are invalid, the
    answer is right. The last step, which nothing could repair, is left alone.
    """
    totals = list(known.totals)
    for place in range(len(totals) - 1):
        units, term = known.before(known.totals, place) % 10, known.terms[place + 1]
        carried = units + abs(term) % 10 > 9 if term >= 0 else units < abs(term) % 10
        lost = totals[place] + (-10 if term >= 0 else 10)
        if carried and 0 <= lost <= known.highest:
            totals[place] = lost
    return None if totals == list(known.totals) else (_written(known, totals), totals[-1])


STEP_CHANNELS: dict[str, Callable[[Sum, Draw], Spoilt]] = {
    "wrong_step": wrong_step,
    "compensating_pair": compensating_pair,
    "skipped_step": skipped_step,
    "lucky_guess": lucky_guess,
    "lost_carry": lost_carry,
}
# what is written before the first step; none of it holds a mark of the template `plain`, or of a step
TEXT_CHANNELS: dict[str, tuple[str, ...]] = {
    "foreign_text": ("我们来算一下", "Сейчас посчитаем"),
    "code_block": ("```\nprint(sum(terms))\n```", "```python\ntotal + term\n```"),
    "long_paragraph": (
        "let us add one number after the other, keep the total in mind, and look at it once more before the answer",
        "first the problem is read from left to right, then every sign is looked at, and only then is anything added",
    ),
    "loop": ("hm " * 20 + "now", "ok, " * 14 + "now"),
}
CHANNELS: tuple[str, ...] = (*STEP_CHANNELS, *TEXT_CHANNELS)


def _with_text(trace: Trace, channel: str, draw: Draw) -> Trace:
    """The trace with one of the channel's texts as a step of its own before its chain; right or wrong as it was."""
    if not trace.chain.strip():
        return replace(trace, details={**trace.details, DETAIL: UNTOUCHED})
    texts = TEXT_CHANNELS[channel]
    chain = f"{texts[draw(len(texts))]}{STEP_SEPARATOR}{trace.chain}"
    return replace(trace, chain=chain, details={**trace.details, DETAIL: channel})


def _written(known: Sum, totals: Sequence[int]) -> list[str]:
    """The steps that write these totals.

    Where the sum shows its columns, a step that follows shows its own, and one that does not those of the sum without
    error: its columns are right and its total is not.
    """
    plain = [f"{total:0{known.width}d}" for total in totals]
    if not known.verbose:
        return plain
    written = []
    for place, (term, total) in enumerate(zip(known.terms[1:], totals, strict=True)):
        start = known.before(totals, place)
        start = start if start + term == total else known.before(known.totals, place)
        written.append(f"{columns_of(start, term, known.width)} {plain[place]}")
    return written


def _shifted(known: Sum, stretches: Sequence[range], draw: Draw) -> Spoilt:
    """One of these stretches of totals, all off by the same error, which is not 0.

    Stretches for which every error would leave what the digits can write are not drawn.
    """
    possible = [(stretch, shifts) for stretch in stretches if (shifts := _shifts(known, stretch))]
    if not possible:
        return None
    stretch, shifts = possible[draw(len(possible))]
    shift = shifts[draw(len(shifts))]
    totals = [total + shift * (place in stretch) for place, total in enumerate(known.totals)]
    return _written(known, totals), totals[-1]


def _shifts(known: Sum, stretch: range) -> list[int]:
    inside = [known.totals[place] for place in stretch]
    return [shift for shift in range(-min(inside), known.highest - max(inside) + 1) if shift != 0]
