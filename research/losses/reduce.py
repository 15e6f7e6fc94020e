"""From positions to a sum and a count, with positions that are not trained on taken out of value and gradient."""

import torch
from torch import Tensor

from research.records import LossSum


def masked_sum(per_position_N: Tensor, loss_mask_N: Tensor | None = None) -> LossSum:
    """The sum of a per-position loss over the trained positions, and their number.

    ``per_position_N`` has any shape; ``loss_mask_N`` has the same and is True where trained on; None trains on all.
    Masked positions add exactly 0 whatever they hold, NaN included, and receive gradient 0. With nothing trained on
    the total is 0, still attached to the graph, and the count 0. The count is int64.

    A gradient of 0 does not survive a function whose own derivative is infinite, so rows must also be made harmless
    *before* the divergence: see :func:`fill_masked_rows`. Raises ValueError or TypeError on a mask of another shape or
    dtype.
    """
    if loss_mask_N is None:
        count = torch.full((), per_position_N.numel(), dtype=torch.int64, device=per_position_N.device)
        return LossSum(per_position_N.sum(), count)
    check_mask(loss_mask_N, per_position_N.shape)
    kept_N = torch.where(loss_mask_N, per_position_N, torch.zeros_like(per_position_N))
    return LossSum(kept_N.sum(), loss_mask_N.sum())


def weighted_sum(per_position_N: Tensor, weight_N: Tensor) -> LossSum:
    """``sum(weight * loss)`` over the places whose weight is above 0, and the sum of their weights.

    ``weight_N`` has the shape of ``per_position_N`` and no negative entries; places of weight 0 add exactly 0 whatever
    they hold, NaN included. The count is a float: with weights of 0 and 1 it is the number of trained places.
    Raises ValueError or TypeError on weights of another shape or dtype.
    """
    if not weight_N.is_floating_point():
        raise TypeError(f"loss weights have dtype {weight_N.dtype}: expected a floating-point type")
    weight_N = weight_N.to(per_position_N.dtype)
    kept = masked_sum(per_position_N * weight_N, weight_N > 0)
    return LossSum(kept.total, weight_N.sum())


def fill_masked_rows(rows_NV: Tensor, loss_mask_N: Tensor | None, value: float = 0.0) -> Tensor:
    """``rows_NV`` with every row outside the mask set to ``value``; those rows receive gradient exactly 0.

    Done ahead of a divergence, it makes padding rows (NaN, or -inf in every class) harmless in the backward pass too,
    without the data-dependent shapes of indexing by the mask.
    """
    if loss_mask_N is None:
        return rows_NV
    check_mask(loss_mask_N, rows_NV.shape[:-1])
    return rows_NV.masked_fill(~loss_mask_N.unsqueeze(-1), value)


def check_mask(loss_mask_N: Tensor, shape: torch.Size) -> None:
    """Raise TypeError unless the mask is boolean, ValueError unless it has the positions' shape."""
    if loss_mask_N.dtype != torch.bool:
        raise TypeError(
            f"loss_mask has dtype {loss_mask_N.dtype}: expected torch.bool, True where a position is trained"
        )
    if loss_mask_N.shape != shape:
        raise ValueError(
            f"loss_mask has shape {tuple(loss_mask_N.shape)} for positions of shape {tuple(shape)}: expected them equal"
        )
