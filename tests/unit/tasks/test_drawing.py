"""Seeded permutations, splits by content, levels that run out."""

import itertools
from collections import Counter

import pytest

from research.records import Problem
from research.tasks.drawing import of_levels, problems_of, shuffled, split_of, take


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000, 4097])
def test_an_order_holds_every_number_once(size: int) -> None:
    assert sorted(shuffled(size, 3)) == list(range(size))


def test_an_order_looks_random_and_depends_on_the_seed() -> None:
    orders = [list(shuffled(1000, seed)) for seed in range(20)]
    assert len(set(map(tuple, orders))) == 20
    firsts = [order[0] for order in orders]
    assert len(set(firsts)) > 15
    fixed = sum(place == number for order in orders for place, number in enumerate(order))
    assert fixed < 60, "a random permutation has one fixed point on average: 20 here"
    first_half = sum(number < 500 for order in orders for number in order[:500]) / 10_000
    assert abs(first_half - 0.5) < 0.03
    rising = sum(left < right for order in orders for left, right in itertools.pairwise(order)) / 19_980
    assert abs(rising - 0.5) < 0.02


def test_a_space_beyond_memory_is_drawn_from() -> None:
    drawn = list(itertools.islice(shuffled(10**40, 0), 1000))
    assert len(set(drawn)) == 1000 and max(drawn) > 10**39


def test_splits_hold_8_1_and_1_tenths_of_all_texts() -> None:
    counts = Counter(split_of(f"problem {number}") for number in range(20_000))
    assert abs(counts["train"] / 20_000 - 0.8) < 0.01 and abs(counts["val"] / 20_000 - 0.1) < 0.01
    assert split_of("17+32") == split_of("17+32")


def _problem(number: int) -> Problem:
    return Problem(0, f"number {number}", str(number))


def test_a_space_that_runs_out_says_what_it_held() -> None:
    everything = [list(problems_of(100, _problem, split, 0, "test")) for split in ("train", "val", "test")]
    assert sorted(problem.answer for part in everything for problem in part) == sorted(map(str, range(100)))
    with pytest.raises(ValueError, match=rf"toy: num=100: split 'val' holds only {len(everything[1])} distinct"):
        take(problems_of(100, _problem, "val", 0, "test"), "toy", "val", 100)


def test_levels_are_drawn_evenly_until_one_runs_out() -> None:
    levels = {
        1: iter([Problem(0, f"small {number}", "", level=1) for number in range(5)]),
        2: iter([Problem(0, f"large {number}", "", level=2) for number in range(500)]),
    }
    drawn = list(of_levels(levels, 0, "test"))
    assert Counter(problem.level for problem in drawn) == {1: 5, 2: 500}
    assert max(place for place, problem in enumerate(drawn) if problem.level == 1) < 40
