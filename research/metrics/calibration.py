"""Whether confidence means what it says: expected calibration error over equal-width and equal-mass bins.

Confidence is the largest softmax probability (temperature 1, float64); an item is right where the argmax is the label.

torchmetrics has ``MulticlassCalibrationError(norm="l1")``, the same quantity, and on small sets the two agree to 1e-6
(a test holds them together). It is not used here for two reasons, both measured on torchmetrics 1.9: it adds up in
float32, one item after another, which on 131,000 speech frames moved an error of 0.0153 by 0.0004; and a confidence
that rounds to exactly 1, common in trained classifiers, falls into a 16th bin of its own.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from research.metrics.base import UndefinedMetric, check_labels

NUM_BINS = 15


class ExpectedCalibrationError(Metric):
    """ECE: ``sum_b (n_b / N) |accuracy_b - mean confidence_b|`` over ``num_bins`` bins of equal width on [0, 1].

    Bins are [lower, upper), the last one closed. The state is a sum per bin, so the value does not depend on how items
    are split into batches or processes. Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599), equation 3.

    Raises :class:`UndefinedMetric` from ``compute`` when no item was seen.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    confidence_sums: Tensor
    right_sums: Tensor
    count: Tensor

    def __init__(self, num_bins: int = NUM_BINS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_bins = _checked_bins(num_bins)
        self.add_state("confidence_sums", torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("right_sums", torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits_NV: Tensor, label_N: Tensor) -> None:
        """Add one batch of logits [N, V] and labels int64 [N]."""
        confidence_N, right_N = confidence_and_right(logits_NV, label_N)
        edges = torch.linspace(0, 1, self.num_bins + 1, dtype=torch.float64, device=confidence_N.device)
        bin_N = (torch.bucketize(confidence_N, edges, right=True) - 1).clamp(0, self.num_bins - 1)
        self.confidence_sums += torch.bincount(bin_N, confidence_N, minlength=self.num_bins)
        self.right_sums += torch.bincount(bin_N, right_N, minlength=self.num_bins)
        self.count += label_N.shape[0]

    def compute(self) -> Tensor:
        """The error, a probability in [0, 1], float64."""
        if int(self.count) == 0:
            raise UndefinedMetric("expected calibration error: no item was seen")
        return (self.right_sums - self.confidence_sums).abs().sum() / self.count


class EqualMassCalibrationError(Metric):
    """ECE over ``num_bins`` bins of equal item counts (they differ by at most one item), from low to high confidence.

    A trained classifier puts nearly all items into the last equal-width bin; equal-mass bins look inside it (Nguyen
    and O'Connor 2015; Nixon et al. 2019, arXiv:1904.01685). Items of exactly equal confidence share their accuracy, so
    the value does not depend on their order where a bin edge cuts them. Keeps two numbers per item.

    Raises :class:`UndefinedMetric` from ``compute`` with fewer items than bins.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    confidences: list[Tensor]
    rights: list[Tensor]

    def __init__(self, num_bins: int = NUM_BINS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_bins = _checked_bins(num_bins)
        self.add_state("confidences", [], dist_reduce_fx="cat")
        self.add_state("rights", [], dist_reduce_fx="cat")

    def update(self, logits_NV: Tensor, label_N: Tensor) -> None:
        """Add one batch of logits [N, V] and labels int64 [N]."""
        confidence_N, right_N = confidence_and_right(logits_NV, label_N)
        self.confidences.append(confidence_N)
        self.rights.append(right_N)

    def compute(self) -> Tensor:
        """The error, a probability in [0, 1], float64."""
        # A list of batches, or one tensor where torchmetrics has just gathered all processes.
        confidence_N = dim_zero_cat(self.confidences) if len(self.confidences) else torch.zeros(0)
        if confidence_N.shape[0] < self.num_bins:
            raise UndefinedMetric(
                f"equal-mass calibration error: {confidence_N.shape[0]} items cannot fill {self.num_bins} bins"
            )
        tied_values, tie_N, tied_counts = confidence_N.unique(return_inverse=True, return_counts=True)
        tied_rights = torch.bincount(tie_N, dim_zero_cat(self.rights), minlength=tied_values.shape[0]) / tied_counts
        gap_N = (tied_rights - tied_values).repeat_interleave(tied_counts)
        gaps = torch.stack([part.sum() for part in gap_N.tensor_split(self.num_bins)])
        return gaps.abs().sum() / gap_N.shape[0]


def confidence_and_right(logits_NV: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """Largest softmax probability, and 1 where the argmax is the label, else 0: both float64 [N]."""
    check_labels(logits_NV, label_N)
    confidence_N = logits_NV.detach().double().softmax(dim=-1).amax(dim=-1)
    return confidence_N, (logits_NV.argmax(dim=-1) == label_N).double()


def _checked_bins(num_bins: int) -> int:
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: expected at least 1")
    return num_bins
