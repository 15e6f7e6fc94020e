"""The loader of prompts against brute force: who answers what in which step, and which stored traces stand beside."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.prompt_loader import PromptLoader
from research.data.splits import DataError
from research.data.traces import TraceData
from research.errors import ConfigError
from research.records import PromptBatch, PromptRow, StoredRow
from research.tasks.addition import Addition
from research.text.templates import Alpaca, Plain

Step = list[PromptBatch]  # the micro-batches of one optimizer step, over all ranks


def prompts(num: int) -> list[PromptRow]:
    """Problem ``n`` has the index n."""
    posed = Addition(max_digits=2).problems("train", num)
    return [PromptRow(problem, (problem.index, 1), (2, problem.index)) for problem in posed]


def stored(num: int) -> list[StoredRow]:
    """Row ``n`` has the index 100 + n and 1 to 5 completion tokens."""
    return [StoredRow(tuple(range(3 + n * 7 % 5)), 2, 100 + n, (9,)) for n in range(num)]


def loader(num: int = 23, num_rows: int = 0, **options: Any) -> PromptLoader:
    given = {"batch_size": 5, "shuffle": True, "seed": 1, **options}
    return PromptLoader(prompts(num), stored=stored(num_rows), **given)


def steps_over_ranks(
    num: int, epochs: int = 1, micro_batches: int = 1, world_size: int = 1, **options: Any
) -> list[Step]:
    """All micro-batches of every optimizer step, over all ranks."""
    cut = {"micro_batches": micro_batches, "world_size": world_size, **options}
    made = [loader(num, rank=rank, **cut) for rank in range(world_size)]
    ranks = [[batch for _ in range(epochs) for batch in one] for one in made]
    assert len({len(batches) for batches in ranks}) == 1
    starts = range(0, len(ranks[0]), micro_batches)
    return [[batch for batches in ranks for batch in batches[n : n + micro_batches]] for n in starts]


def asked(step: Step) -> list[int]:
    return sorted(row.problem.index for batch in step for row in batch.prompts)


def beside(step: Step) -> list[int]:
    return [row.index for batch in step for row in batch.stored]


@settings(max_examples=40, deadline=None)
@given(st.integers(6, 30), st.integers(6, 12), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_every_prompt_once_an_epoch_for_as_many_steps_as_its_rollouts_serve(
    num: int, batch_size: int, micro: int, world: int, repeats: int
) -> None:
    steps = steps_over_ranks(num, 2, micro, world, batch_size=batch_size, steps_per_rollout=repeats)
    assert len(steps) == 2 * repeats * -(-num // batch_size) or num % batch_size < micro * world
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        assert Counter(n for step in epoch for n in asked(step)) == Counter(dict.fromkeys(range(num), repeats))
    for number, step in enumerate(steps):
        block, repeat = divmod(number, repeats)
        assert {(batch.block, batch.repeat) for batch in step} == {(block, repeat)}
        assert asked(step) == asked(steps[block * repeats])
        assert {batch.step_rows for batch in step} == {len(asked(step))}
        by_rank = [step[first : first + micro] for first in range(0, len(step), micro)]
        for batches in by_rank:
            assert [batch.micro_batch for batch in batches] == list(range(micro))
            own = tuple(row for batch in batches for row in batch.prompts)
            assert all(batch.step_prompts == own and len(batch) > 0 for batch in batches)


@pytest.mark.parametrize("cut", [{"micro_batches": 4}, {"micro_batches": 2, "world_size": 2}])
def test_p44_a_step_asks_the_same_however_it_is_cut(cut: dict[str, int]) -> None:
    whole = steps_over_ranks(24, 2, num_rows=9, num_stored=4)
    parts = steps_over_ranks(24, 2, num_rows=9, num_stored=4, **cut)
    assert [asked(step) for step in parts] == [asked(step) for step in whole]
    assert [sorted(beside(step)) for step in parts] == [sorted(beside(step)) for step in whole]
    assert all(batch.stored for step in parts for batch in step)
    assert {(one.step_stored_tokens, one.step_stored_rows) for one in parts[0]} == {(whole[0][0].step_stored_tokens, 4)}


def test_a_shuffled_order_follows_the_seed_and_the_epoch() -> None:
    first, again, other = (steps_over_ranks(23, 2, seed=seed) for seed in (1, 1, 2))
    assert [asked(step) for step in first] == [asked(step) for step in again] != [asked(step) for step in other]
    assert [asked(step) for step in first[:5]] != [asked(step) for step in first[5:]]


@pytest.mark.parametrize(("num_rows", "num_stored"), [(7, 3), (3, 7), (4, 4), (5, 1)])
def test_stored_rows_go_round_whole_orders(num_rows: int, num_stored: int) -> None:
    """No trace comes again before all have come, across epochs and repeats; each turn has an order of its own."""
    steps = steps_over_ranks(23, 3, steps_per_rollout=2, num_rows=num_rows, num_stored=num_stored)
    assert {len(beside(step)) for step in steps} == {num_stored}
    served = [n for step in steps for n in beside(step)]
    turns = [served[first : first + num_rows] for first in range(0, len(served), num_rows)]
    assert all(sorted(turn) == list(range(100, 100 + num_rows)) for turn in turns[:-1])
    assert len({tuple(turn) for turn in turns[:-1]}) > 1
    for step in steps:
        tokens = sum(len(row.ids) - row.prompt_length for batch in step for row in batch.stored)
        assert {batch.step_stored_tokens for batch in step} == {tokens}
        assert {batch.step_stored_rows for batch in step} == {num_stored}


def test_p82_it_goes_on_where_it_stood() -> None:
    options: dict[str, Any] = {"steps_per_rollout": 2, "micro_batches": 2, "num_rows": 7, "num_stored": 3}
    made = loader(23, **options)
    whole = [batch for _ in range(2) for batch in made]
    assert len(whole) == 2 * 5 * 2 * 2
    for stopped in (1, 3, 19, 20, 21, 33):
        first = loader(23, **options)
        before = list(itertools.islice(itertools.chain.from_iterable(first for _ in range(2)), stopped))
        second = loader(23, **options)
        second.load_state_dict(first.state_dict())
        after = [batch for _ in range(2) for batch in second]
        assert [*before, *after][: len(whole)] == whole
        place = divmod(stopped, 20)
        led = loader(23, **options, where=lambda place=place: place)
        assert list(led) == whole[stopped : 20 * (place[0] + 1)]


@pytest.mark.parametrize("changed", [{"steps_per_rollout": 1}, {"num_stored": 4}, {"batch_size": 6}, {"seed": 2}])
def test_p81_another_schedule_is_no_place_to_go_on(changed: dict[str, int]) -> None:
    options: dict[str, Any] = {"steps_per_rollout": 2, "num_rows": 7, "num_stored": 3, "batch_size": 5}
    with pytest.raises(ValueError, match="another schedule"):
        loader(**{**options, **changed}).load_state_dict(loader(**options).state_dict())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"steps_per_rollout": 0}, "steps_per_rollout=0"),
    ({"num_stored": 3}, "num_stored=3 with 0 stored rows"),
    ({"num_rows": 3}, "num_stored=0 with 3 stored rows"),
    ({"num_rows": 3, "num_stored": 1, "micro_batches": 2}, "a step is cut into 2 parts"),
    ({"batch_size": 1, "micro_batches": 2}, "batch_size is 1"),
    ({"num": 0}, "over 0 rows"),
]


@pytest.mark.parametrize(("options", "told"), BAD, ids=[told for _, told in BAD])
def test_bad_schedules_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        loader(**options)


# -- the datamodule ---------------------------------------------------------------------------------------------------


def make_data(**changes: Any) -> TraceData:
    options = {"num_train": 30, "num_val": 4, "num_test": 4, "num_prompts": 4, "max_tokens": 96, **changes}
    return TraceData(task=Addition(max_digits=4), **{"template": Plain(), **options})


def test_prompts_are_the_problems_as_the_student_is_asked_them() -> None:
    data = make_data()
    data.setup()
    rows = data.prompts()
    assert [row.problem for row in rows] == data.problems("train") and len(rows) == 30
    for row in rows:
        assert data.codec.decode(row.ids) == f"{row.problem.text}=" and row.teacher_ids == row.ids
    assert data.summary()["prompts"] == 30 and data.summary()["refused_prompts"] == {}
    assert data.summary()["rows"]["train"] == 0 and not data._documents.get("train")
    (batch, *_) = data.train_dataloader()
    assert isinstance(batch, PromptBatch) and len(batch) == 4 and batch.stored == ()


def test_p41_the_teacher_is_asked_in_its_own_words_with_the_same_tokens() -> None:
    data = make_data(teacher_template=Alpaca(), num_stored=2, max_tokens=256)
    for row in data.prompts():
        assert data.codec.decode(row.teacher_ids) == Alpaca().prompt(row.problem.text)
        assert data.codec.decode(row.ids) == Plain().prompt(row.problem.text)
    for row, document in zip(data.stored_rows(), data.documents("train"), strict=True):
        assert data.codec.decode(row.teacher_prompt_ids) == Alpaca().prompt(data.traces()[row.index].problem)
        assert row.ids == document.ids and row.prompt_length == document.prompt_length
    swapped = make_data(template=Alpaca(), teacher_template=Plain())
    assert swapped.facts()["tokenizer_sha256"] == data.facts()["tokenizer_sha256"]  # of the letters that either needs


def test_prompts_that_leave_no_room_are_refused_and_counted() -> None:
    """Problems of 1 to 4 digits: prompts of 4, 6, 8 and 10 tokens."""
    data = make_data(max_tokens=8, num_val=0)
    lengths = Counter(2 * problem.level + 2 for problem in data.problems("train"))
    assert {len(row.ids) for row in data.prompts()} == {4, 6}
    assert data.summary()["refused_prompts"] == {"too_long": lengths[8] + lengths[10]}


def test_no_prompt_at_all_is_an_error_every_time() -> None:
    data = make_data(max_tokens=4, num_val=0)
    for _ in range(2):
        with pytest.raises(DataError, match=r"no train problem of addition_1_to_4 can be posed \(30 too_long\)"):
            data.setup()


@pytest.mark.parametrize("changed", [{"num_prompts": -1}, {"steps_per_rollout": 0}, {"num_stored": -1}])
def test_bad_numbers_name_their_key(changed: dict[str, int]) -> None:
    (key,) = changed
    with pytest.raises(ConfigError, match=f"data.{key} is"):
        make_data(**changed)


FINGERPRINTS: list[tuple[Callable[[], TraceData], bool]] = [
    (make_data, True),
    (lambda: make_data(num_prompts=8, seed=3), True),
    (lambda: make_data(teacher_template=Alpaca()), False),
    (lambda: make_data(num_train=31), False),
    (lambda: make_data(num_stored=2), False),
    (lambda: make_data(num_prompts=0), False),
]


@pytest.mark.parametrize(("other", "same"), FINGERPRINTS)
def test_the_fingerprint_is_of_what_is_asked(other: Callable[[], TraceData], same: bool) -> None:
    assert (make_data().fingerprint("train") == other().fingerprint("train")) is same
