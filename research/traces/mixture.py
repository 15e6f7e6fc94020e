"""One stream of traces out of several stores, by count or by weight: 600,000 of reasoning and 200,000 of other text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from research.errors import ConfigError
from research.records import Trace
from research.schemas import nearest
from research.seeding import rng_for
from research.traces.store import TraceStore

KEYS = ("store", "count", "weight", "name")


@dataclass(frozen=True)
class Part:
    """One store of a mixture: its name, how many kept traces it holds, and how many are taken."""

    name: str
    store: TraceStore
    available: int
    count: int


class Mixture:
    """Traces drawn from several stores, at random and without replacement.

    parts   a list of ``{store: FOLDER, count: N}``, or of ``{store: FOLDER, weight: W}``; ``name`` is what
            ``details["source"]`` of its traces says, by default the folder's own name
    total   traces in all, with weights; None: as many as fit without repeating any
    repeat  whether a store may be gone through more than once. Every trace is then taken as often as every other of
            its store, or once more
    seed    decides which traces are taken and how the stores interleave

    Iterating gives every trace in turn: each store's in the order they are stored in, the stores shuffled into each
    other. Memory holds one row group of each store, whatever their size; every pass gives the same. Raises ConfigError
    for a spec that does not say one thing, and where a store holds fewer traces than it is asked for.
    """

    def __init__(
        self, parts: Sequence[Mapping[str, Any]], *, total: int | None = None, repeat: bool = False, seed: int = 0
    ) -> None:
        if not parts:
            raise ConfigError("a mixture needs at least one store; expected a list of {store: FOLDER, count: N}")
        stores = [(TraceStore(_folder(part, number)), part) for number, part in enumerate(parts)]
        names = [str(part.get("name") or Path(part["store"]).name) for _, part in stores]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two stores of the mixture are called {name!r}; give each its own name")
        available = [len(store) for store, _ in stores]
        counts = _counts(parts, available, total, repeat)
        self.seed, self.repeat = seed, repeat
        self.parts = [
            Part(name, store, held, count)
            for name, (store, _), held, count in zip(names, stores, available, counts, strict=True)
        ]
        for part in self.parts:
            if part.count > part.available and not (repeat and part.available):
                raise ConfigError(
                    f"the mixture takes {part.count} traces of {part.name}, which holds {part.available}; "
                    "take fewer, or write more"
                )

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    def __iter__(self) -> Iterator[Trace]:
        streams = [self._drawn(part) for part in self.parts]
        of_M = torch.cat([torch.full((part.count,), number) for number, part in enumerate(self.parts)])
        order_M = torch.randperm(len(of_M), generator=rng_for(self.seed, "mixture/interleave"))
        for start in range(0, len(of_M), 10_000):
            for number in of_M[order_M[start : start + 10_000]].tolist():
                yield next(streams[number])

    def summary(self) -> dict[str, int]:
        """Name of each store -> traces taken from it."""
        return {part.name: part.count for part in self.parts}

    def _drawn(self, part: Part) -> Iterator[Trace]:
        if not part.count:
            return
        whole, rest = divmod(part.count, part.available)
        taken_N = torch.full((part.available,), whole, dtype=torch.int64)
        chosen_N = torch.randperm(part.available, generator=rng_for(self.seed, f"mixture/{part.name}"))[:rest]
        taken_N[chosen_N] += 1
        for times in range(int(taken_N.max())):  # a trace that is taken twice comes once in each pass
            for trace, taken in zip(part.store.traces(), taken_N.tolist(), strict=True):
                if taken > times:
                    yield replace(trace, details={**trace.details, "source": part.name})


def training_mixture(parts: Sequence[Mapping[str, Any]], num_train: int | None, seed: int) -> Mixture:
    """The mixture that ``data.mixture`` and ``data.num_train`` ask for, no trace of it twice.

    By weight, ``num_train`` is the total; by count, a limit: ConfigError where the counts pass it, since a part of a
    mixture is another mixture.
    """
    by_weight = any(part.get("weight") is not None for part in parts)
    try:
        mixture = Mixture(parts, total=num_train if by_weight else None, seed=seed)
    except ConfigError as error:
        total = f" (the total is data.num_train={num_train}; null takes as many as fit)" if by_weight else ""
        raise ConfigError(f"data.mixture: {error}{total}") from None
    if num_train is not None and len(mixture) > num_train:
        raise ConfigError(
            f"data.mixture takes {len(mixture)} traces by count, and data.num_train is {num_train}; "
            "give data.num_train=null, or weights, which num_train is shared out by"
        )
    return mixture


def _folder(part: Mapping[str, Any], number: int) -> str:
    for key in part:
        if key not in KEYS:
            raise ConfigError(f"unknown key mixture[{number}].{key}{nearest(str(key), KEYS)}. Valid: {', '.join(KEYS)}")
    if not part.get("store"):
        raise ConfigError(f"mixture[{number}].store is not set; expected the folder of a trace store")
    return str(part["store"])


def _counts(parts: Sequence[Mapping[str, Any]], available: Sequence[int], total: int | None, repeat: bool) -> list[int]:
    """Traces of each store; by weight, rounded so that they sum to the total (largest remainder first)."""
    by_count = [part.get("count") is not None for part in parts]
    by_weight = [part.get("weight") is not None for part in parts]
    if all(by_count) and not any(by_weight):
        if total is not None:
            raise ConfigError(f"the mixture gives counts and total={total}; give total with weights alone")
        return [_positive(part["count"], f"mixture[{number}].count", int) for number, part in enumerate(parts)]
    if any(by_count) or not all(by_weight):
        raise ConfigError("a mixture gives every store a count, or every store a weight")
    weights = [_positive(part["weight"], f"mixture[{number}].weight", float) for number, part in enumerate(parts)]
    shares = [weight / sum(weights) for weight in weights]
    if total is None:
        if repeat:
            raise ConfigError("a mixture by weight that repeats has no end; give total")
        total = math.floor(min(held / share for held, share in zip(available, shares, strict=True)) + 1e-9)
    total = _positive(total, "mixture.total", int)
    counts = [math.floor(share * total + 1e-9) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda number: (counts[number] - shares[number] * total, number))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _positive(given: Any, key: str, kind: type) -> Any:
    fits = isinstance(given, int) or (kind is float and isinstance(given, float))
    if isinstance(given, bool) or not fits or not given > 0 or not math.isfinite(given):
        raise ConfigError(f"{key} is {given!r}; expected a {'whole ' if kind is int else ''}number above 0")
    return kind(given)
