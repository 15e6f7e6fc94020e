"""What every metric of this project shares: float64 sums that merge across processes, and a way to be undefined."""

from abc import ABC
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class UndefinedMetric(ValueError):
    """The quantity does not exist for the items seen (0/0, an empty set); the message says why.

    It is raised instead of a 0 or a NaN: a made-up number would enter a table, an average and a verdict unseen.
    """


class MeanOverItems(Metric, ABC):
    """Abstract: the mean of one number per item, over all items of all updates and processes.

    A subclass writes ``update`` with the tensors it takes, and calls :meth:`add` in it.

    The state is a float64 sum and an int64 count, both reduced by summation, so that the value depends neither on how
    the items are split into batches (beyond 1e-15 relative) nor on a small last batch (no mean of means).

    Raises :class:`UndefinedMetric` from ``compute`` when no item was seen or an item's value is NaN.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, value_N: Tensor) -> None:
        """Add one number per item."""
        self.add_sum(value_N.detach().double().sum(), value_N.shape[0])

    def add_sum(self, total: Tensor, count: int | Tensor) -> None:
        """Add the sum over ``count`` items."""
        self.total += total.detach()
        self.count += count

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; +inf where an item's value is."""
        if int(self.count) == 0:
            raise UndefinedMetric(f"{type(self).__name__}: no item was seen, so there is no mean; call update first")
        if bool(self.total.isnan()):
            raise UndefinedMetric(
                f"{type(self).__name__}: the value of an item is not a number, as when student and teacher logits are "
                "-inf in different classes"
            )
        return self.total / self.count


def check_logits(logits_NV: Tensor, name: str = "logits_NV") -> None:
    """Raise ValueError unless ``logits_NV`` is a floating tensor [N, V]."""
    if logits_NV.ndim != 2 or not logits_NV.is_floating_point():
        shape = tuple(logits_NV.shape)
        raise ValueError(f"{name} has shape {shape} and dtype {logits_NV.dtype}; expected floating logits [N, V]")


def check_labels(logits_NV: Tensor, label_N: Tensor) -> None:
    """Raise ValueError unless ``label_N`` is one integer class id in [0, V) per row of ``logits_NV`` [N, V]."""
    check_logits(logits_NV)
    num_items, num_classes = logits_NV.shape
    if label_N.shape != (num_items,) or label_N.is_floating_point():
        shape = tuple(label_N.shape)
        raise ValueError(
            f"label_N has shape {shape} and dtype {label_N.dtype}; expected {num_items} integer class ids, one per row"
        )
    if num_items and (int(label_N.min()) < 0 or int(label_N.max()) >= num_classes):
        span = f"{int(label_N.min())} to {int(label_N.max())}"
        raise ValueError(f"label_N runs from {span}; the logits have {num_classes} classes, so expected 0 to V - 1")


def check_pair(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> None:
    """Raise ValueError unless student and teacher logits are floating tensors of one shape [N, V]."""
    check_logits(student_logits_NV, "student_logits_NV")
    check_logits(teacher_logits_NV, "teacher_logits_NV")
    if student_logits_NV.shape != teacher_logits_NV.shape:
        raise ValueError(
            f"student logits are {tuple(student_logits_NV.shape)} and teacher logits "
            f"{tuple(teacher_logits_NV.shape)}; expected the same items and the same classes"
        )
