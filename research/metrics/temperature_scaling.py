"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599, section 4.2): one number that repairs overconfidence."""

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

from research.metrics.base import UndefinedMetric, check_labels
from research.seeding import seed_for

MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 100.0


def fit_temperature(logits_NV: Tensor, label_N: Tensor) -> float:
    """The T > 0 that minimises the mean of ``-log softmax(logits / T)[label]``; above 1 the logits are overconfident.

    The loss is convex in ``b = 1/T``, with the derivative ``mean(E_softmax(b z)[z] - z_label)``; its root is bracketed
    and found to 1e-12 in log T, in float64, without randomness.

    The minimum may lie at an end: T = 0 where every item is right (more confidence is always better), T = infinity
    where the logits say no more than chance. The answer is therefore kept in [MIN_TEMPERATURE, MAX_TEMPERATURE]. Where
    no T changes the loss (all logits of each item equal) it is 1.

    Raises ValueError on no items, non-finite logits, or labels that do not fit the logits.
    """
    check_labels(logits_NV, label_N)
    if label_N.shape[0] == 0 or not bool(logits_NV.isfinite().all()):
        raise ValueError(f"logits of shape {tuple(logits_NV.shape)}: expected at least one item and finite values only")
    centred_NV = logits_NV.detach().double()
    centred_NV = centred_NV - centred_NV.amax(dim=-1, keepdim=True)
    at_label = centred_NV.gather(1, label_N[:, None]).mean()

    def slope(log_temperature: float) -> float:
        probs_NV = (centred_NV / math.exp(log_temperature)).softmax(dim=-1)
        return float((probs_NV * centred_NV).sum(dim=-1).mean() - at_label)

    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    slope_low, slope_high = slope(low), slope(high)
    if slope_low == 0 and slope_high == 0:
        return 1.0
    if slope_low <= 0:
        return MIN_TEMPERATURE
    if slope_high >= 0:
        return MAX_TEMPERATURE
    return math.exp(brentq(slope, low, high, xtol=1e-12))


def cross_fitted_logits(logits_NV: Tensor, label_N: Tensor, index_N: Tensor) -> Tensor:
    """``logits / T`` [N, V] in float64, T fitted on the *other* half of the same items.

    The final arms of a study are trained on all training items, so no validation items are left to fit T on; fitting on
    the very items that are scored would flatter. Each item's half is a hash of its ``index`` alone (:func:`half_of`):
    the same in every run, arm and process. The two halves are independent only as far as items are: frames of one
    recording fall into both.

    Raises :class:`UndefinedMetric` where one half is empty.
    """
    half_N = torch.tensor([half_of(index) for index in index_N.tolist()], dtype=torch.bool, device=logits_NV.device)
    if bool(half_N.all()) or not bool(half_N.any()):
        raise UndefinedMetric(
            f"cross-fitted temperature: the {half_N.shape[0]} items all fall into one half, so none is left to fit on"
        )
    temperature_of_true = fit_temperature(logits_NV[~half_N], label_N[~half_N])
    temperature_of_false = fit_temperature(logits_NV[half_N], label_N[half_N])
    scaled_NV = logits_NV.detach().double()
    return torch.where(half_N[:, None], scaled_NV / temperature_of_true, scaled_NV / temperature_of_false)


def half_of(index: int) -> bool:
    """Which of the two halves an item belongs to: one bit of the hash of its stable id."""
    return bool(seed_for(0, "temperature_scaling_half", index) & 1)
