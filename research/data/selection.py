"""Which examples of the official train split are held out, which are trained on, and which are dropped."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from research.seeding import rng_for


@dataclass(frozen=True)
class Selection:
    """The options of :class:`research.data.base.AbstractClassData` that choose examples; see there."""

    holdout: int = 0
    split_seed: int = 0
    keep_classes: tuple[int, ...] | None = None
    fraction: float = 1.0
    num_train: int | None = None
    subset_seed: int = 0

    def check(self, num_classes: int) -> None:
        """Raises ValueError where an option fits no data with ``num_classes`` classes."""
        if self.holdout < 0:
            raise ValueError(f"holdout={self.holdout!r}: give 0 (train on all) or a number of examples")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction={self.fraction!r}: give a number in (0, 1]")
        if self.num_train is not None and self.num_train < 1:
            raise ValueError(f"num_train={self.num_train!r}: give at least 1 example, or null for all")
        if self.num_train is not None and self.fraction != 1.0:
            raise ValueError(f"num_train={self.num_train} and fraction={self.fraction} both given: give one of them")
        if self.keep_classes is None:
            return
        wrong = [kept for kept in self.keep_classes if not 0 <= kept < num_classes]
        if wrong or not self.keep_classes or len(set(self.keep_classes)) < len(self.keep_classes):
            raise ValueError(
                f"keep_classes={list(self.keep_classes)}: give at least one class, each once, from 0 to"
                f" {num_classes - 1}, or null for all"
            )


def kept_classes(keep: Sequence[int] | None, drop: Sequence[int] | None, num_classes: int) -> tuple[int, ...] | None:
    """The classes that stay in train, from either way of saying it; None where neither is given.

    Raises ValueError where both are given, or a dropped class does not exist; :meth:`Selection.check` checks the rest.
    """
    if drop is None:
        return None if keep is None else tuple(int(kept) for kept in keep)
    if keep is not None:
        raise ValueError(f"keep_classes={list(keep)} and drop_classes={list(drop)} both given: give one of them")
    if any(not 0 <= dropped < num_classes for dropped in drop):
        raise ValueError(f"drop_classes={list(drop)}: give classes from 0 to {num_classes - 1}, or null")
    return tuple(kept for kept in range(num_classes) if kept not in drop)


@dataclass(frozen=True)
class Example:
    """The examples of a split: rows, or whole groups of rows.

    member_N   which example each row belongs to, 0 .. E - 1
    label_E    the class of each example
    """

    member_N: Tensor
    label_E: Tensor

    @staticmethod
    def of(label_N: Tensor, group_N: Tensor | None) -> "Example":
        """Raises ValueError where the rows of one group differ in class."""
        if group_N is None:
            return Example(torch.arange(len(label_N)), label_N)
        groups, member_N = group_N.unique(return_inverse=True)
        label_E = label_N.new_empty(len(groups)).scatter_(0, member_N, label_N)
        if not torch.equal(label_E[member_N], label_N):
            raise ValueError("rows of one group differ in class: a group must have one class to be subsampled by class")
        return Example(member_N, label_E)


@dataclass(frozen=True)
class Chosen:
    """Row numbers of the official train split, rising, and the rows dropped from train by reason."""

    train_N: Tensor
    val_N: Tensor
    dropped: dict[str, int]


def select_examples(examples: Example, selection: Selection, num_classes: int) -> Chosen:
    """Hold out, keep classes, take the subset: in this order, each from what the one before left.

    Raises ValueError where the options ask for more examples than there are, or leave none to train on.
    """
    num_examples = len(examples.label_E)
    if selection.holdout >= num_examples:
        raise ValueError(
            f"holdout={selection.holdout}: the train split has {num_examples} examples; give 0 to {num_examples - 1}"
        )
    order_E = torch.randperm(num_examples, generator=rng_for(selection.split_seed, "holdout"))
    val_E = _mask(order_E[: selection.holdout], num_examples)
    kept_E = ~val_E
    if selection.keep_classes is not None:
        kept_E &= torch.isin(examples.label_E, torch.tensor(selection.keep_classes))
    subset_E = _mask(_subset(examples.label_E, kept_E, selection, num_classes), num_examples)

    rows = {name: mask[examples.member_N] for name, mask in (("val", val_E), ("kept", kept_E), ("train", subset_E))}
    num_rows = {name: int(mask.sum()) for name, mask in rows.items()}
    dropped = {
        "holdout": num_rows["val"],
        "keep_classes": len(examples.member_N) - num_rows["val"] - num_rows["kept"],
        "fraction": num_rows["kept"] - num_rows["train"],
    }
    return Chosen(rows["train"].nonzero().flatten(), rows["val"].nonzero().flatten(), dropped)


def _subset(label_E: Tensor, kept_E: Tensor, selection: Selection, num_classes: int) -> Tensor:
    """The examples trained on: a prefix of one fixed stratified ranking, hence nested in its size."""
    available = int(kept_E.sum())
    if available == 0:
        raise ValueError(
            f"keep_classes={selection.keep_classes}, holdout={selection.holdout}: no train example is left"
        )
    wanted = selection.num_train if selection.num_train is not None else max(1, round(selection.fraction * available))
    if wanted > available:
        raise ValueError(
            f"num_train={wanted}: {available} train examples are left after holdout and keep_classes; give 1 to"
            f" {available}, or null for all"
        )
    return stratified_ranking(label_E, kept_E, selection.subset_seed, num_classes)[:wanted]


def stratified_ranking(label_E: Tensor, kept_E: Tensor, seed: int, num_classes: int) -> Tensor:
    """The kept examples, ranked so that every prefix holds each class in its share among them, to within one example.

    Each class is shuffled by ``rng_for(seed, "subset", class)``; its i-th of n examples gets the key (i + 1/2) / n,
    and all are sorted by key (ties by class).
    """
    numbers, keys = [], []
    for label in range(num_classes):
        members = ((label_E == label) & kept_E).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=rng_for(seed, "subset", label))]
        numbers.append(members)
        keys.append((torch.arange(len(members), dtype=torch.float64) + 0.5) / max(len(members), 1))
    return torch.cat(numbers)[torch.cat(keys).argsort(stable=True)]


def _mask(numbers: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[numbers] = True
    return mask
