"""How generated problems are drawn: every problem of a space once, in a seeded order, each into the split of its text.

A problem's split is a hash of its text, so that no two seeds put one problem into two splits. A seed only decides the
order. Because that order is a permutation, a list holds nothing twice and a space that runs out says so.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import get_args

from research.records import Problem
from research.seeding import seed_for
from research.tasks.base import Split, TooFewProblems

SPLITS: tuple[Split, ...] = get_args(Split)
TENTHS: Mapping[Split, int] = {"train": 8, "val": 1, "test": 1}
ROUNDS = 4  # of a Feistel network with a random round function: enough for a permutation that looks random

Problems = Iterator[Problem]


def split_of(text: str) -> Split:
    """The split in which a problem with this text stands: 8 tenths of all texts train, 1 val, 1 test."""
    tenth = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 10
    return "train" if tenth < 8 else ("val" if tenth == 8 else "test")


def shuffled(size: int, seed: int) -> Iterator[int]:
    """Every number of ``0..size-1`` exactly once, in an order that ``seed`` decides; memory does not grow with size.

    A Feistel network permutes the numbers of twice ``half`` bits; those outside the range are left out.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, width = (1 << half) - 1, (half + 7) // 8
    keys = [seed_for(seed, "shuffled", number).to_bytes(8, "little") for number in range(ROUNDS)]
    for position in range(1 << (2 * half)):
        left, right = position >> half, position & mask
        for key in keys:
            drawn = hashlib.blake2b(right.to_bytes(width, "little"), key=key, digest_size=width).digest()
            left, right = right, left ^ (int.from_bytes(drawn, "little") & mask)
        number = (left << half) | right
        if number < size:
            yield number


def problems_of(size: int, make: Callable[[int], Problem], split: Split, seed: int, stream: str) -> Problems:
    """The problems ``make(0) .. make(size - 1)`` that stand in ``split``, in the order of ``(seed, stream, split)``."""
    for number in shuffled(size, seed_for(seed, f"{stream}/{split}")):
        problem = make(number)
        if split_of(problem.text) == split:
            yield problem


def of_levels(levels: Mapping[int, Problems], seed: int, stream: str) -> Problems:
    """Problems from each level with equal probability; a level that has run out is no longer drawn from."""
    open_levels, number = dict(levels), 0
    while open_levels:
        names = list(open_levels)
        level = names[seed_for(seed, f"{stream}/level", number) % len(names)]
        number += 1
        problem = next(open_levels[level], None)
        if problem is None:
            del open_levels[level]
        else:
            yield problem


def check_request(name: str, split: str, num: int | None, needed: bool) -> None:
    """Raises ValueError where ``split`` is none, or ``num`` is negative or, where it is ``needed``, absent."""
    if split not in SPLITS:
        raise ValueError(f"{name}: split={split!r}: give one of {', '.join(SPLITS)}")
    if num is None and needed:
        raise ValueError(f"{name}: num=None: its problems are generated without end, give how many")
    if num is not None and (isinstance(num, bool) or not isinstance(num, int) or num < 0):
        raise ValueError(f"{name}: num={num!r}: give a whole number of at least 0")


def take(problems: Problems, name: str, split: Split, num: int) -> list[Problem]:
    """The first ``num`` problems, ``index`` rising from 0; TooFewProblems where there are fewer."""
    taken = list(islice(problems, num))
    if len(taken) < num:
        raise TooFewProblems(name, num, f"split {split!r} holds only {len(taken)} distinct problems")
    return [
        Problem(index, problem.text, problem.answer, problem.chain, problem.level, problem.details)
        for index, problem in enumerate(taken)
    ]
