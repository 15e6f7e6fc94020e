"""Cross-entropy with true classes."""

import torch
from torch import Tensor

from research.losses.logprobs import tempered_logprobs, working_dtype
from research.losses.reduce import fill_masked_rows, masked_sum, weighted_sum
from research.records import LossSum


def cross_entropy(
    logits_NV: Tensor,
    label_N: Tensor,
    loss_mask_N: Tensor | None = None,
    label_smoothing: float = 0.0,
    weight_N: Tensor | None = None,
) -> LossSum:
    """``-sum_i y_i log softmax(logits)_i`` in nats, summed over trained positions.

    ``y`` is the one-hot label mixed with the uniform distribution over all V classes:
    ``(1 - label_smoothing) onehot + label_smoothing / V`` (Szegedy et al. 2016). ``label_N`` holds integers in [0, V);
    where ``loss_mask_N`` is False it may hold any integer and the row any float, and neither adds to loss or gradient.
    No label value has a meaning of its own: -100 at a trained position is an error. Temperature 1. ``weight_N`` takes
    the place of the mask: each position counts by its weight, in the sum and in the count.

    Raises ValueError on shapes that disagree, label_smoothing outside [0, 1), and (checked on the CPU only, a check on
    an accelerator would wait for it) a trained label outside [0, V); TypeError on labels that are not integers.
    """
    check_smoothing(label_smoothing)
    check_labels(label_N, logits_NV.shape[:-1])
    check_mask_or_weight(loss_mask_N, weight_N)
    if weight_N is not None:
        loss_mask_N = weight_N > 0
    logits_NV = fill_masked_rows(logits_NV, loss_mask_N)
    label_N1 = fill_masked_rows(label_N.long().unsqueeze(-1), loss_mask_N, 0)
    check_label_range(label_N1, logits_NV.shape[-1])
    logprobs_NV = tempered_logprobs(logits_NV, 1.0, working_dtype(logits_NV))
    loss_N = -logprobs_NV.gather(-1, label_N1).squeeze(-1)
    if label_smoothing > 0:
        loss_N = (1 - label_smoothing) * loss_N - label_smoothing * logprobs_NV.mean(dim=-1)
    return masked_sum(loss_N, loss_mask_N) if weight_N is None else weighted_sum(loss_N, weight_N)


def check_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless ``0 <= label_smoothing < 1``."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing!r}: expected a number from 0 up to but not including 1")


def check_labels(label_N: Tensor, rows: torch.Size) -> None:
    """Raise TypeError unless the labels are integers, ValueError unless there is one for each row of logits."""
    if label_N.is_floating_point() or label_N.dtype == torch.bool:
        raise TypeError(f"labels have dtype {label_N.dtype}: expected integer class ids")
    if label_N.shape != rows:
        raise ValueError(
            f"labels have shape {tuple(label_N.shape)} for positions of shape {tuple(rows)}: expected one label for "
            "each row of logits"
        )


def check_mask_or_weight(loss_mask_N: Tensor | None, weight_N: Tensor | None) -> None:
    """Raise ValueError where both are given, TypeError where the weight is no floating-point tensor."""
    if weight_N is not None and loss_mask_N is not None:
        raise ValueError("loss_mask and weight were both given: give one; a weight of 0 is a mask")
    if weight_N is not None and not weight_N.is_floating_point():
        raise TypeError(f"loss weights have dtype {weight_N.dtype}: expected a floating-point type")


def check_label_range(label_N1: Tensor, num_classes: int) -> None:
    """Raise ValueError where a trained label is outside [0, V); checked on the CPU only."""
    if label_N1.device.type != "cpu" or label_N1.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = int(label_N1.min()), int(label_N1.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"trained labels run from {low} to {high}, the logits have {num_classes} classes: expected labels from 0 "
            f"to {num_classes - 1}; take positions without a label out with loss_mask"
        )
