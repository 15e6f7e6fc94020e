"""How well the student predicts the true label: errors, accuracy, recall, negative log-likelihood, Brier score.

Logits are [N, V], labels int64 [N]. The prediction is the argmax; among equal logits the lowest class id wins.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassStatScores

from research.metrics.base import MeanOverItems, UndefinedMetric, check_labels

_RIGHT, _ITEMS = 0, 4  # columns of torchmetrics' stat scores: true positives; support


class Errors(Metric):
    """Number of items whose prediction is not the label (a count, int64), as in "146 errors on 10,000 images"."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    errors: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("errors", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits_NV: Tensor, label_N: Tensor) -> None:
        """Count the wrong predictions of one batch; ValueError on labels that do not fit the logits."""
        check_labels(logits_NV, label_N)
        self.errors += (logits_NV.argmax(dim=-1) != label_N).sum()

    def compute(self) -> Tensor:
        """The number of errors so far."""
        return self.errors


def class_counts(num_classes: int) -> MulticlassStatScores:
    """A torchmetrics counter, ``update(prediction_N, label_N)``; ``compute`` gives int64 [V, 5] for the ratios below.

    torchmetrics counts; its own accuracy and recall divide in float32, which turns 0.9854 into 0.9854000210762024 in
    every record, and call the recall of a class without items 0.
    """
    return MulticlassStatScores(num_classes, average="none")


def accuracy(counts_V5: Tensor) -> float:
    """Right predictions over items, from :func:`class_counts`; :class:`UndefinedMetric` when there are no items."""
    right, num_items = int(counts_V5[:, _RIGHT].sum()), int(counts_V5[:, _ITEMS].sum())
    if num_items == 0:
        raise UndefinedMetric("accuracy: no item was seen")
    return right / num_items


def recall(counts_V5: Tensor, class_id: int) -> float:
    """P(prediction = c | label = c), from :func:`class_counts`; :class:`UndefinedMetric` where no item has label c."""
    num_items = int(counts_V5[class_id, _ITEMS])
    if num_items == 0:
        raise UndefinedMetric(f"recall of class {class_id}: no item of the split has this label")
    return int(counts_V5[class_id, _RIGHT]) / num_items


def negative_log_likelihood(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """``-log softmax(logits)[label]`` per item, in nats, float64 [N]; +inf where the label's logit is -inf."""
    check_labels(logits_NV, label_N)
    logprobs_NV = logits_NV.double().log_softmax(dim=-1)
    return -logprobs_NV.gather(1, label_N[:, None]).squeeze(1)


def brier_score(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """``sum_c (p_c - [c = label])^2`` per item, float64 [N], in [0, 2].

    Brier's own (1950) convention: the sum over classes. The two-class variant that looks at one class only is half
    as large, and a mean over classes is V times smaller.
    """
    check_labels(logits_NV, label_N)
    error_NV = logits_NV.double().softmax(dim=-1)
    rows_N = torch.arange(label_N.shape[0], device=label_N.device)
    error_NV[rows_N, label_N] -= 1.0
    return error_NV.square().sum(dim=-1)


class NegativeLogLikelihood(MeanOverItems):
    """Mean over items of :func:`negative_log_likelihood` (nats, softmax at temperature 1)."""

    higher_is_better = False

    def update(self, logits_NV: Tensor, label_N: Tensor) -> None:
        """Add one batch."""
        self.add(negative_log_likelihood(logits_NV, label_N))


class BrierScore(MeanOverItems):
    """Mean over items of :func:`brier_score` (sum over classes, so between 0 and 2)."""

    higher_is_better = False

    def update(self, logits_NV: Tensor, label_N: Tensor) -> None:
        """Add one batch."""
        self.add(brier_score(logits_NV, label_N))
