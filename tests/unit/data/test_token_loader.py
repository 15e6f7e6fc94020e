"""The loader of documents against brute force: which documents make up a step, and what the step counts."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.token_loader import TokenLoader
from research.records import TokenBatch
from research.text.document import Document

PAD = 0


def documents(num: int = 23) -> list[Document]:
    """Document ``n`` has 2 to 16 tokens, in no order of length, and the index 100 + n."""
    return [Document(tuple(range(3, 5 + n * 7 % 15)), 1 + n % 2, 100 + n) for n in range(num)]


def loader(num: int = 23, **options: object) -> TokenLoader:
    given = {"batch_size": 5, "shuffle": True, "seed": 1, "pad_id": PAD, "prompt_loss_weight": 0.25} | options
    return TokenLoader(documents(num), **given)  # type: ignore[arg-type]


def steps_over_ranks(
    num: int, micro_batches: int = 1, world_size: int = 1, **options: object
) -> list[list[TokenBatch]]:
    """All micro-batches of every optimizer step of one epoch, over all ranks."""
    cut = {"micro_batches": micro_batches, "world_size": world_size, **options}
    ranks = [list(loader(num, rank=rank, **cut)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    starts = range(0, len(ranks[0]), micro_batches)
    return [[batch for batches in ranks for batch in batches[n : n + micro_batches]] for n in starts]


def content(step: list[TokenBatch]) -> Counter[int]:
    return Counter(int(index) for batch in step for index in batch.index_D)


def contents(loader: TokenLoader) -> list[Counter[int]]:
    return [content([batch]) for batch in loader]


LAYOUTS = st.sampled_from([{}, {"packed_to": 16}, {"packed_to": 40}, {"length_grouping": 2, "packed_to": 20}])


@settings(max_examples=40, deadline=None)
@given(st.integers(6, 40), st.integers(6, 15), st.integers(1, 3), st.integers(1, 2), LAYOUTS)
def test_every_document_once_in_steps_that_know_what_they_count(
    num: int, batch_size: int, micro: int, world: int, layout: dict[str, int]
) -> None:
    steps = steps_over_ranks(num, micro, world, batch_size=batch_size, **layout)
    assert sum(map(content, steps), Counter()) == Counter(range(100, 100 + num))
    for step in steps:
        weight = sum(float(batch.weight_BT.sum()) for batch in step)
        completion_tokens = sum(int(batch.completion_BT.sum()) for batch in step)
        for batch in step:
            assert batch.step_weight == pytest.approx(weight) and len(batch) > 0
            assert (batch.step_completion_tokens, batch.step_rows) == (completion_tokens, content(step).total())


@pytest.mark.parametrize("cut", [{"micro_batches": 4}, {"micro_batches": 2, "world_size": 2}, {"packed_to": 30}])
@pytest.mark.parametrize("grouping", [0, 2])
def test_p44_a_step_holds_the_same_documents_however_it_is_cut_and_packed(cut: dict[str, int], grouping: int) -> None:
    whole = steps_over_ranks(44, batch_size=8, length_grouping=grouping)
    parts = steps_over_ranks(44, batch_size=8, length_grouping=grouping, **cut)
    assert [content(step) for step in parts] == [content(step) for step in whole]


def test_without_grouping_the_steps_are_runs_of_the_shuffled_order() -> None:
    for packed_to in (None, 16, 64):
        made = loader(packed_to=packed_to)
        expected = [100 + row for row in made.order(0).tolist()]
        assert contents(made) == [Counter(expected[first : first + 5]) for first in range(0, 23, 5)]


def test_packing_fills_fewer_rows_and_loses_nothing() -> None:
    for padded, packed in zip(loader(batch_size=23), loader(batch_size=23, packed_to=32), strict=True):
        assert packed.ids_BT.shape[0] < padded.ids_BT.shape[0] == 23 and packed.ids_BT.shape[1] <= 32
        by_index = {document.index: document for document in documents()}
        lengths = Counter(len(by_index[index].ids) for index in packed.index_D.tolist())
        inside = packed.segment_BT != 0
        assert int(inside.sum()) == sum(length * count for length, count in lengths.items())
        assert packed.weight_BT.sum() == padded.weight_BT.sum()


# -- length grouping --------------------------------------------------------------------------------------------------


def test_grouping_sorts_within_runs_of_steps_and_shuffles_the_steps() -> None:
    """43 documents, steps of 5, runs of 3 steps: three windows of 15, 15 and 13, the last of them with a rest of 3."""
    plain, grouped = loader(43), loader(43, length_grouping=3)
    windows = [set(part.tolist()) for part in plain.order(0).split(15)]
    order = grouped.order(0).tolist()
    length = {n: len(document.ids) for n, document in enumerate(documents(43))}
    steps = [order[first : first + 5] for first in range(0, 40, 5)]
    assert sorted(order) == list(range(43))
    found: list[list[list[int]]] = [[], [], []]
    for step in steps:
        (window,) = [number for number, window in enumerate(windows) if set(step) <= window]
        found[window].append(step)
    found[2].append(order[40:])
    for window, own in zip(windows, found, strict=True):
        by_length = sorted(own, key=lambda step: (length[step[0]], length[step[-1]]))
        assert [length[row] for step in by_length for row in step] == sorted(length[row] for row in window)
    assert steps != [step for own in found for step in own[:3]], "the steps are shuffled, not only sorted within"
    assert grouped.order(0).tolist() != grouped.order(1).tolist()


def test_grouping_pads_less() -> None:
    def padding(made: TokenLoader) -> int:
        return sum(int((batch.segment_BT == 0).sum()) for batch in made)

    assert padding(loader(40, length_grouping=8)) < 0.5 * padding(loader(40))


def test_what_is_not_shuffled_is_not_grouped() -> None:
    made = loader(shuffle=False, length_grouping=3)
    assert [int(index) for batch in made for index in batch.index_D] == list(range(100, 123))


# -- order and resume -------------------------------------------------------------------------------------------------


def test_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {tuple(loader(seed=seed).order(epoch).tolist()) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9
    made = loader()
    first, second = contents(made), contents(made)
    assert first == contents(loader())
    assert second != first and sum(second, Counter()) == sum(first, Counter())


@pytest.mark.parametrize("done", [0, 1, 3, 5, 7, 10, 12])
@pytest.mark.parametrize("layout", [{}, {"packed_to": 20, "length_grouping": 2, "micro_batches": 2}])
def test_p82_state_after_any_batch_goes_on_with_the_next(layout: dict[str, int], done: int) -> None:
    def batches(made: TokenLoader, epochs: int) -> list[tuple[list[int], list[list[int]], float]]:
        rows = (batch for _ in range(epochs) for batch in made)
        return [(batch.index_D.tolist(), batch.ids_BT.tolist(), batch.step_weight) for batch in rows]

    expected = batches(loader(**layout), 3)
    first = loader(**layout)
    taken = list(itertools.islice((batch for _ in range(3) for batch in first), done))
    assert len(taken) == done
    state = first.state_dict()
    assert (state["epoch"], state["position"]) == divmod(done, len(first))
    second = loader(**layout)
    second.load_state_dict(state)
    assert batches(second, 3 - state["epoch"]) == expected[done:]


def test_state_of_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: 5 saved, 6 now"):
        loader(batch_size=6).load_state_dict(loader().state_dict())


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_rows_shorter_than_a_document_are_refused() -> None:
    with pytest.raises(ValueError, match="packed_to=15: the longest document has 16 tokens"):
        loader(packed_to=15)
    assert sum(map(len, loader(packed_to=16))) == 23


@pytest.mark.parametrize("options", [{"length_grouping": -1}, {"num": 0}, {"batch_size": 0}, {"micro_batches": 6}])
def test_schedules_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give"):
        loader(**options)


def test_batches_are_put_on_the_device() -> None:
    batch = next(iter(loader(device=torch.device("meta"))))
    assert batch.ids_BT.is_meta and batch.index_D.is_meta and batch.step_rows == 5
