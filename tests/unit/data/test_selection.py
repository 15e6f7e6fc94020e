from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from research.data.selection import Chosen, Example, Selection, select_examples, stratified_ranking

CLASSES = 4


def labels(rows: int) -> Tensor:
    """Classes of unequal size: class c has about twice the rows of class c + 1."""
    return torch.tensor([(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3)[row % 15] for row in range(rows)])


def choose(label_N: Tensor, group_N: Tensor | None = None, **options: Any) -> Chosen:
    return select_examples(Example.of(label_N, group_N), Selection(**options), CLASSES)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 200), st.integers(0, 5), st.data())
def test_every_prefix_of_the_ranking_is_stratified(rows: int, seed: int, data: st.DataObject) -> None:
    label_N = labels(rows)
    ranking = stratified_ranking(label_N, torch.ones(rows, dtype=torch.bool), seed, CLASSES)
    assert ranking.sort().values.tolist() == list(range(rows))
    size = data.draw(st.integers(0, rows))
    share = label_N.bincount(minlength=CLASSES) * (size / rows)
    assert bool(((label_N[ranking[:size]].bincount(minlength=CLASSES) - share).abs() <= 1 + 1e-9).all())


def test_smaller_subsets_lie_in_larger_ones() -> None:
    label_N, before = labels(150), set[int]()
    for num_train in (1, 7, 30, 100, 150):
        now = set(choose(label_N, num_train=num_train).train_N.tolist())
        assert len(now) == num_train and before <= now
        before = now
    by_fraction = set(choose(label_N, fraction=0.2).train_N.tolist())
    assert by_fraction == set(choose(label_N, num_train=30).train_N.tolist())
    assert by_fraction != set(choose(label_N, fraction=0.2, subset_seed=1).train_N.tolist())


def test_options_act_in_order_and_each_drop_is_counted() -> None:
    label_N = labels(150)
    chosen = choose(label_N, holdout=30, keep_classes=(1, 3), fraction=0.5)
    held, train = set(chosen.val_N.tolist()), set(chosen.train_N.tolist())
    kept = {row for row in range(150) if row not in held and int(label_N[row]) in (1, 3)}
    assert len(held) == 30 and train <= kept and len(train) == round(len(kept) / 2)
    assert chosen.dropped == {"holdout": 30, "keep_classes": 120 - len(kept), "fraction": len(kept) - len(train)}
    assert set(label_N[chosen.val_N].tolist()) == {0, 1, 2, 3}


def test_what_is_held_out_depends_on_split_seed_alone() -> None:
    label_N = labels(150)
    held = choose(label_N, holdout=40).val_N
    same = choose(label_N, holdout=40, keep_classes=(0,), num_train=3, subset_seed=9).val_N
    assert torch.equal(held, same)
    assert set(choose(label_N, holdout=20).val_N.tolist()) <= set(held.tolist())
    # neighbouring split seeds: 40 of 150 by chance share about 11
    assert len(set(held.tolist()) & set(choose(label_N, holdout=40, split_seed=1).val_N.tolist())) < 22


def test_groups_are_taken_whole() -> None:
    group_N = torch.arange(40).repeat_interleave(torch.arange(40) % 5 + 1)
    label_N = labels(40)[group_N]
    chosen = choose(label_N, group_N, holdout=6, num_train=10)
    held, train = set(group_N[chosen.val_N].tolist()), set(group_N[chosen.train_N].tolist())
    assert (len(held), len(train)) == (6, 10) and not held & train
    for rows, groups in ((chosen.val_N, held), (chosen.train_N, train)):
        assert rows.tolist() == [row for row, group in enumerate(group_N.tolist()) if group in groups]


def test_groups_of_two_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="one class"):
        Example.of(torch.tensor([0, 1]), torch.tensor([5, 5]))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"holdout": -1}, "holdout=-1"),
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"fraction": 1.1}, "fraction=1.1"),
        ({"fraction": float("nan")}, "fraction=nan"),
        ({"num_train": 0}, "num_train=0"),
        ({"num_train": 5, "fraction": 0.5}, "num_train=5 and fraction=0.5"),
        ({"keep_classes": ()}, "keep_classes"),
        ({"keep_classes": (4,)}, "0 to 3"),
        ({"keep_classes": (-1,)}, "0 to 3"),
        ({"keep_classes": (1, 1)}, "each once"),
    ],
)
def test_options_that_fit_no_data_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Selection(**options).check(CLASSES)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"holdout": 15}, "give 0 to 14"),
        ({"holdout": 10, "num_train": 6}, "give 1 to 5"),
        ({"keep_classes": (3,), "holdout": 14, "split_seed": 0}, "keep_classes"),
    ],
)
def test_options_that_ask_for_too_much_are_refused(options: dict[str, Any], names: str) -> None:
    label_N = labels(15)
    if "keep_classes" in options:  # hold out all but one example of another class
        label_N = torch.zeros(15, dtype=torch.int64)
    with pytest.raises(ValueError, match=names):
        choose(label_N, **options)
