import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from research.data.loader import TensorLoader
from research.data.views import PixelShift


def make(rows: int = 23, **options: object) -> TensorLoader:
    """Rows whose input tells their number, whose label is number % 3 and whose index is 100 + number."""
    number_N = torch.arange(rows)
    inputs = number_N[:, None].float() + torch.zeros(rows, 9)
    settings = {"batch_size": 5, "shuffle": True, "seed": 1} | options
    return TensorLoader(inputs, number_N % 3, number_N + 100, **settings)  # type: ignore[arg-type]


def epoch(loader: TensorLoader) -> list[int]:
    """The indices that one pass gives out, in order."""
    return [int(index) for batch in loader for index in batch.index_B]


def steps_over_ranks(rows: int, batch_size: int, micro_batches: int, world_size: int) -> list[list[tuple[int, int]]]:
    """(index, step_rows) of every optimizer step, gathered over all its micro-batches and ranks."""
    cut = {"micro_batches": micro_batches, "world_size": world_size}
    ranks = [list(make(rows, batch_size=batch_size, rank=rank, **cut)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    steps = []
    for first in range(0, len(ranks[0]), micro_batches):
        parts = [batch for batches in ranks for batch in batches[first : first + micro_batches]]
        assert all(len(part) > 0 for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        steps.append(sorted((int(i), part.step_rows) for part in parts for i in part.index_B))
    return steps


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.integers(1, 3))
def test_every_row_once_in_steps_that_know_their_size(rows: int, batch: int, micro: int, world: int) -> None:
    if min(rows, batch) < micro * world:
        with pytest.raises(ValueError, match="parts"):
            make(rows, batch_size=batch, micro_batches=micro, world_size=world)
        return
    steps = steps_over_ranks(rows, batch, micro, world)
    assert sorted(index for step in steps for index, _ in step) == list(range(100, 100 + rows))
    assert all(step_rows == len(step) for step in steps for _, step_rows in step)
    assert all(len(step) == batch for step in steps[:-1])
    assert len(steps[-1]) < batch + micro * world


@pytest.mark.parametrize(("micro", "world"), [(4, 2), (2, 2), (1, 4), (8, 1)])
def test_p44_steps_hold_the_same_rows_however_they_are_cut(micro: int, world: int) -> None:
    # 48 = 3 steps of 16 rows; 44 leaves a ragged last step of 12
    for rows in (48, 44):
        assert steps_over_ranks(rows, 16, micro, world) == steps_over_ranks(rows, 16, 1, 1)


def test_a_rest_too_small_to_cut_joins_the_step_before() -> None:
    steps = steps_over_ranks(rows=19, batch_size=8, micro_batches=2, world_size=2)
    assert [len(step) for step in steps] == [8, 11]
    assert [len(step) for step in steps_over_ranks(20, 8, 2, 2)] == [8, 8, 4]


def test_rows_stay_together() -> None:
    for batch in make():
        assert torch.equal(batch.inputs[:, 0] + 100, batch.index_B.float())
        assert torch.equal((batch.index_B - 100) % 3, batch.label_B)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [tuple(make(seed=seed).order(number).tolist()) for seed in (0, 1, 2) for number in (0, 1, 2)]
    assert len(set(orders)) == 9
    loader = make(seed=1)
    assert [epoch(loader) for _ in range(2)] == [
        [100 + row for row in orders[3]],
        [100 + row for row in orders[4]],
    ]


def test_unshuffled_rows_come_in_row_order_in_every_epoch() -> None:
    loader = make(shuffle=False)
    assert epoch(loader) == epoch(loader) == list(range(100, 123))


@pytest.mark.parametrize("done", range(11))
def test_p82_state_after_any_batch_goes_on_with_the_next(done: int) -> None:
    view = PixelShift(1, 3, 3)

    def signature(batch: object) -> tuple[list[int], list[float]]:
        return batch.index_B.tolist(), batch.inputs.flatten().tolist()  # type: ignore[attr-defined]

    whole = make(view=view)
    expected = [signature(batch) for _ in range(3) for batch in whole]
    first, given_out = make(view=view), 0
    iterator = iter(first)
    while given_out < done:
        batch = next(iterator, None)
        if batch is None:
            iterator = iter(first)
        else:
            given_out += 1
    state = first.state_dict()
    assert (state["epoch"], state["position"]) == divmod(done, 5)
    second = make(view=view)
    second.load_state_dict(state)
    resumed = [signature(batch) for _ in range(3 - state["epoch"]) for batch in second]
    assert resumed == expected[done:]


def test_making_iterators_moves_nothing() -> None:
    loader = make()
    expected = epoch(make())
    iter(loader)
    iter(loader)
    assert epoch(loader) == expected


@pytest.mark.parametrize("changed", [{"seed": 2}, {"batch_size": 6}, {"rows": 24}, {"micro_batches": 2}])
def test_state_of_another_schedule_is_refused(changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(changed))}: .* saved, .* now"):
        make(**changed).load_state_dict(make().state_dict())


def test_view_of_a_row_depends_on_epoch_and_row_alone() -> None:
    def seen(**cut: int) -> list[dict[int, Tensor]]:
        world = cut.get("world_size", 1)
        loaders = [make(24, batch_size=8, view=PixelShift(1, 3, 3), rank=rank, **cut) for rank in range(world)]
        epochs = []
        for _ in range(2):
            batches = [batch for loader in loaders for batch in loader]
            epochs.append(
                {int(i): row for batch in batches for i, row in zip(batch.index_B, batch.inputs, strict=True)}
            )
        return epochs

    one, many = seen(), seen(micro_batches=4, world_size=2)
    for left, right in zip(one, many, strict=True):
        assert left.keys() == right.keys() and all(torch.equal(left[i], right[i]) for i in left)
    assert any(not torch.equal(one[0][i], one[1][i]) for i in one[0])
    # neither does the place in the order matter: unshuffled, a row of epoch 0 looks the same
    in_row_order = torch.cat([batch.inputs for batch in make(24, shuffle=False, view=PixelShift(1, 3, 3))])
    assert all(torch.equal(one[0][100 + row], in_row_order[row]) for row in range(24))


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 0},
        {"world_size": 0},
        {"rank": 1},
        {"rank": -1},
        {"batch_size": 0},
        {"batch_size": 3, "micro_batches": 4},
        {"rows": 3, "micro_batches": 4},
        {"rows": 0},
    ],
)
def test_schedules_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        make(**options)


def test_ragged_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="'index_N': 3"):
        TensorLoader(torch.zeros(4, 2), torch.zeros(4).long(), torch.arange(3), batch_size=2)
