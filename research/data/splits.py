"""The rows of a split: as they are read, as they are served, and the checks between the two."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class DataError(ValueError):
    """A data file is missing, damaged or not the one it should be; the message names it and says what to do."""


@dataclass(frozen=True)
class SplitTensors:
    """One official split as a data set reads it, before anything is held out or dropped.

    inputs    float32 [N, *input_shape]
    label_N   int64 true classes
    group_N   int64 group of each row (the clip of a frame), or None where every row stands alone
    """

    inputs: Tensor
    label_N: Tensor
    group_N: Tensor | None = None


@dataclass(frozen=True)
class ServedRows:
    """One split as it is served: its rows, by rising ``index_N``, the row number in the official split."""

    inputs: Tensor
    label_N: Tensor
    index_N: Tensor
    group_N: Tensor | None

    @property
    def num_groups(self) -> int | None:
        """How many groups the rows come from; None where every row stands alone."""
        return None if self.group_N is None else len(self.group_N.unique())

    def to(self, device: torch.device) -> "ServedRows":
        """The same rows on ``device``."""
        group_N = None if self.group_N is None else self.group_N.to(device)
        return ServedRows(self.inputs.to(device), self.label_N.to(device), self.index_N.to(device), group_N)


def take(official: SplitTensors, rows_N: Tensor) -> ServedRows:
    """The rows ``rows_N`` of an official split."""
    group_N = None if official.group_N is None else official.group_N[rows_N]
    return ServedRows(official.inputs[rows_N], official.label_N[rows_N], rows_N, group_N)


def check_official(source: str, split: SplitTensors, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Raises DataError where ``split``, read from ``source``, is not what its data set declares."""
    rows = len(split.label_N)
    if tuple(split.inputs.shape) != (rows, *input_shape) or split.inputs.dtype != torch.float32 or rows == 0:
        raise DataError(
            f"{source}: inputs are {split.inputs.dtype} {tuple(split.inputs.shape)} for {rows} labels, expected"
            f" torch.float32 {('N', *input_shape)} with as many rows as labels, at least 1"
        )
    if split.group_N is not None and len(split.group_N) != rows:
        raise DataError(f"{source}: {len(split.group_N)} groups for {rows} rows, expected one per row")
    low, high = int(split.label_N.min()), int(split.label_N.max())
    if split.label_N.dtype != torch.int64 or low < 0 or high >= num_classes:
        raise DataError(
            f"{source}: labels are {split.label_N.dtype} from {low} to {high}, expected torch.int64 from 0 to"
            f" {num_classes - 1}"
        )
    if not bool(torch.isfinite(split.inputs).all()):
        raise DataError(f"{source}: inputs hold NaN or infinite values, expected finite ones")


def refuse_overlap(train: ServedRows, val: ServedRows) -> None:
    """Raises ValueError where a row or a group is both trained on and held out."""
    for name, left, right in (("index", train.index_N, val.index_N), ("group", train.group_N, val.group_N)):
        if left is not None and right is not None and bool(torch.isin(left, right).any()):
            raise ValueError(f"train and val share an {name}: the splits must be disjoint")


def duplicates_of_train(inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """For each other split, how many of its rows have exactly the input of some train row (compared by hash)."""
    hashes = {split: _row_hashes(rows) for split, rows in inputs.items()}
    seen = set(hashes["train"])
    return {split: sum(row in seen for row in hashes[split]) for split in hashes if split != "train"}


def _row_hashes(inputs: Tensor) -> list[bytes]:
    matrix = inputs.cpu().contiguous().reshape(len(inputs), -1).numpy()
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in matrix]
