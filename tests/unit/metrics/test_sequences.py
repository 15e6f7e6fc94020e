"""pass@k and consensus against enumeration, loops against a search by hand, token accuracy against a count."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.metrics.sequences import consensus_at_k, has_loop, majority, pass_at_k, token_right


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples: int) -> None:
    for num_right in range(num_samples + 1):
        right = [place < num_right for place in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(right, k))
            share = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_at_k(num_samples, num_right, k) == pytest.approx(float(share), abs=1e-15)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3, abs=1e-15)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5, abs=1e-15)  # the plug-in 1 - (3/4)^2 gives .4375
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9, abs=1e-15)
    assert pass_at_k(7, 0, 7) == 0.0 and pass_at_k(7, 1, 7) == 1.0


def test_pass_at_k_is_stable_where_binomials_overflow() -> None:
    exact = 1 - Fraction(math.comb(9_000, 1_000), math.comb(10_000, 1_000))
    assert pass_at_k(10_000, 1_000, 1_000) == pytest.approx(float(exact), rel=1e-12)
    small = 1 - Fraction(math.comb(99_999, 2), math.comb(100_000, 2))
    assert pass_at_k(100_000, 1, 2) == pytest.approx(float(small), rel=1e-9)


@pytest.mark.parametrize(("num_samples", "num_right", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_outside_its_range_is_refused(num_samples: int, num_right: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        pass_at_k(num_samples, num_right, k)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["8", "7", "7"], 1),
        (["7", "8", "8", "7"], 0),  # a tie: the earliest vote, not the smallest text
        (["8", "7", "7", "8"], 0),
        ([None, None, None, "5"], 3),  # no answer never wins
        ([None, None], None),
        ([], None),
        (["", "", "3"], 0),  # an empty answer is an answer
        ([" 7", "8", "7 "], 0),  # white space apart
    ],
)
def test_majority(answers: list[str | None], winner: int | None) -> None:
    assert majority(answers) == winner


def test_majority_does_not_depend_on_which_answer_is_right() -> None:
    """Renaming the answers renames the winner: no order among texts decides a tie."""
    for names in itertools.permutations(["1", "2", "3"]):
        answers = [names[place] for place in (0, 1, 1, 0, 2)]
        assert majority(answers) == 0


def test_consensus_by_hand() -> None:
    answers, gold = ["8", "7", "7", "8", None, "8"], "8"
    right = [answer == gold for answer in answers]
    assert consensus_at_k(answers, right, 6) == 1.0  # 3 votes to 2
    assert consensus_at_k(answers, right, 3) == 0.5  # "7" wins the first three, "8" the last
    assert consensus_at_k(answers, right, 1) == pytest.approx(sum(right) / 6)
    assert consensus_at_k(answers, right, 4) == 1.0  # one group; the two samples left over are not used
    assert consensus_at_k([None, None], [False, False], 2) == 0.0


@pytest.mark.parametrize(("num_right", "k"), [(2, 3), (2, 0), (3, 1)])
def test_consensus_outside_its_range_is_refused(num_right: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        consensus_at_k(["1", "1"], [True] * num_right, k)


def looped(ids: list[int], min_repeats: int, min_tokens: int) -> bool:
    """Every block at every place, copy by copy."""
    for start in range(len(ids)):
        for size in range(1, len(ids) - start + 1):
            block, end = ids[start : start + size], start + size
            while end < len(ids) and ids[end] == block[(end - start) % size]:
                end += 1
            if end - start >= min_repeats * size and end - start >= min_tokens:
                return True
    return False


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(2, 5), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_loops_are_those_of_a_search_by_hand(ids: list[int], min_repeats: int, min_tokens: int) -> None:
    assert has_loop(ids, min_repeats=min_repeats, min_tokens=min_tokens) == looped(ids, min_repeats, min_tokens)


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("", False),
        ("1000000", False),
        ("49;80;20;14", False),
        ("a" * 15, False),
        ("a" * 16, True),
        ("so the answer is 8. " * 3, False),
        ("so the answer is 8. " * 4, True),
        ("17+32=49; " + "49;" * 6 + "80", True),
        ("the quick brown fox jumps over the lazy dog", False),
    ],
)
def test_loops_in_text(text: str, loop: bool) -> None:
    assert has_loop([ord(letter) for letter in text]) is loop


def test_a_loop_of_one_copy_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        has_loop([1, 2], min_repeats=1)


def test_token_right_counts_argmaxes() -> None:
    logits_NV = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    assert token_right(logits_NV, torch.tensor([1, 1, 2])).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="expected"):
        token_right(logits_NV, torch.tensor([0, 1, 3]))
