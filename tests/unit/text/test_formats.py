"""Shuffled and swapped chains: what is moved, what never moves, and what chance decides."""

from collections import Counter
from dataclasses import replace

import pytest

from research.records import Trace
from research.text.formats import TRACE_FORMATS, arrange
from research.text.template import LAYOUTS


def traces(num: int, samples: int = 1, steps: int = 4) -> list[Trace]:
    return [
        Trace(
            f"problem {index}", ";".join(f"{index}.{sample}.{step}" for step in range(steps)), str(index), index, sample
        )
        for index in range(num)
        for sample in range(samples)
    ]


def test_every_format_has_a_layout() -> None:
    assert set(TRACE_FORMATS) == {
        "chain_then_answer",
        "answer_then_chain",
        "answer_only",
        "filler_then_answer",
        "shuffled_chain",
        "swapped_chain",
    }
    assert set(TRACE_FORMATS.values()) == set(LAYOUTS)
    with pytest.raises(ValueError, match=r"trace_format='chain': give one of chain_then_answer"):
        arrange(traces(2), "chain", 0, ";")


@pytest.mark.parametrize(
    "trace_format", ["chain_then_answer", "answer_then_chain", "answer_only", "filler_then_answer"]
)
def test_other_formats_leave_traces_alone(trace_format: str) -> None:
    assert arrange(traces(5), trace_format, 0, ";") == traces(5)


def test_shuffled_chains_keep_their_steps_and_never_their_order() -> None:
    before = traces(400, steps=2) + traces(100, steps=4)
    after = arrange(before, "shuffled_chain", 7, ";")
    for old, new in zip(before, after, strict=True):
        assert new.chain != old.chain
        assert Counter(new.chain.split(";")) == Counter(old.chain.split(";"))
        assert (new.problem, new.answer, new.index, new.sample) == (old.problem, old.answer, old.index, old.sample)
    orders = Counter(
        tuple(int(step[-1]) for step in trace.chain.split(";")) for trace in after if trace.chain.count(";") == 3
    )
    assert len(orders) > 15, "23 orders of four steps are not the identity, and 100 draws should meet most"


def test_a_shuffle_is_its_traces_own() -> None:
    """The order hangs on seed, index and sample: no other trace of the list changes it."""
    several = arrange(traces(20, samples=3, steps=6), "shuffled_chain", 1, ";")
    alone = [arrange([trace], "shuffled_chain", 1, ";")[0] for trace in traces(20, samples=3, steps=6)]
    assert several == alone
    same = [replace(trace, sample=sample) for sample in range(20) for trace in traces(1, steps=6)]
    assert len({trace.chain for trace in arrange(same, "shuffled_chain", 1, ";")}) > 15
    other = arrange(traces(20, samples=3, steps=6), "shuffled_chain", 2, ";")
    assert sum(one.chain == two.chain for one, two in zip(several, other, strict=True)) < 5


@pytest.mark.parametrize("chain", ["", "5", "5;5;5", "5;", ";;", " ; "])
def test_a_chain_without_two_different_steps_stays(chain: str) -> None:
    assert arrange([Trace("p", chain, "5", 0)], "shuffled_chain", 0, ";")[0].chain == chain


def test_a_blank_step_is_no_step() -> None:
    """Moving a blank line would look like a shuffle and leave the steps in their order."""
    for seed in range(20):
        assert arrange([Trace("p", "a\n\nb\n", "5", 0)], "shuffled_chain", seed, "\n")[0].chain == "b\n\na\n"
        assert arrange([Trace("p", "a\n\na\n", "5", 0)], "shuffled_chain", seed, "\n")[0].chain == "a\n\na\n"


@pytest.mark.parametrize(("num", "samples"), [(2, 1), (3, 1), (50, 1), (2, 5), (10, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_swapped_chains_come_from_another_problem_each_once(num: int, samples: int, seed: int) -> None:
    before = traces(num, samples)
    after = arrange(before, "swapped_chain", seed, ";")
    for old, new in zip(before, after, strict=True):
        assert not new.chain.startswith(f"{old.index}.")
        assert (new.problem, new.answer, new.index, new.sample) == (old.problem, old.answer, old.index, old.sample)
    assert Counter(trace.chain for trace in after) == Counter(trace.chain for trace in before)


def test_swaps_hang_on_the_seed_and_nothing_else() -> None:
    one, again, other = (arrange(traces(50), "swapped_chain", seed, ";") for seed in (1, 1, 2))
    assert one == again
    assert sum(left.chain == right.chain for left, right in zip(one, other, strict=True)) < 10


def test_an_uneven_list_is_deranged_too() -> None:
    """Five of ten traces belong to one problem: each of them takes from the other five."""
    before = [*traces(1, samples=5), *traces(6)[1:]]
    for seed in range(10):
        after = arrange(before, "swapped_chain", seed, ";")
        assert all(not new.chain.startswith(f"{new.index}.") for new in after)


def test_a_problem_with_more_than_half_of_the_traces_cannot_be_swapped() -> None:
    with pytest.raises(ValueError, match=r"swapped_chain: 6 of 11 traces belong to one problem"):
        arrange([*traces(1, samples=6), *traces(6)[1:]], "swapped_chain", 0, ";")
    with pytest.raises(ValueError, match="1 of 1 traces"):
        arrange(traces(1), "swapped_chain", 0, ";")
    assert arrange([], "swapped_chain", 0, ";") == []
