"""Frozen records passed between rooms, and the legend of dimensions.

A tensor's name ends in its dimensions:

    B batch   T time   V vocabulary or classes   K kept top-k   D width   N positions (rows of a class batch, or
    graded tokens)   P problems   G samples per problem

``logits`` are unnormalised, ``logprobs`` are natural logs, ``probs`` sum to one. ``loss_mask`` is True where a
position is trained on. ``index`` is the stable id of an item in its split: it joins a batch to a cache and an item to
its record.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassBatch:
    """One micro-batch of a classification task.

    inputs      float tensor [B, ...], as the student sees them (after any augmentation)
    label_B     int64 true classes
    index_B     int64 stable ids into the split
    step_rows   rows over which the whole optimizer step averages: all its micro-batches on all ranks
    """

    inputs: Tensor
    label_B: Tensor
    index_B: Tensor
    step_rows: int

    def __len__(self) -> int:
        return int(self.label_B.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ClassBatch":
        """The same batch on ``device``; itself where it is there already."""
        if self.inputs.device == torch.device(device):
            return self
        return replace(
            self,
            inputs=self.inputs.to(device, non_blocking=non_blocking),
            label_B=self.label_B.to(device, non_blocking=non_blocking),
            index_B=self.index_B.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class DenseLogits:
    """The teacher's full distribution: ``softmax(logits_NV)``, never requiring grad."""

    logits_NV: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.logits_NV.shape[-1])


@dataclass(frozen=True)
class TopKLogprobs:
    """The teacher's K largest logprobs (at temperature 1) and the mass of everything else in one bucket.

    ids_NK          int64 class ids, distinct within a row
    logprobs_NK     natural logs, in falling order
    tail_logprob_N  natural log of ``1 - sum(exp(logprobs_NK))``; -inf where nothing is left (K = V)
    num_classes     V, the width of the distribution the rows were cut from
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logprob_N: Tensor
    num_classes: int


TeacherSignal = DenseLogits | TopKLogprobs


@dataclass(frozen=True)
class LossSum:
    """One loss component before any mean: the sum over trained positions, and how many there were.

    The mean is taken once, in ``methods/base.py``, over the positions of the whole optimizer step.
    """

    total: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """``total / count``; exactly 0, still attached to the graph, where nothing was trained on."""
        return self.total / self.count.clamp(min=1)
