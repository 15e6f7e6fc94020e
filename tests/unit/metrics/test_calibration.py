"""Both calibration errors against loops, hand values and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from research.metrics.base import UndefinedMetric
from research.metrics.calibration import EqualMassCalibrationError, ExpectedCalibrationError


def items(num_items=300, num_classes=6, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(num_items, num_classes, generator=generator)
    right_N = torch.rand(num_items, generator=generator) < 0.6
    random_N = torch.randint(num_classes, (num_items,), generator=generator)
    return logits_NV, torch.where(right_N, logits_NV.argmax(-1), random_N)


def of_confidence(confidence, right):
    """Two-class logits with the given confidence in class 0, and labels that make it right or wrong."""
    confidence = torch.tensor(confidence, dtype=torch.float64)
    logits_NV = torch.stack([confidence.log(), torch.log1p(-confidence)], dim=1)
    return logits_NV, torch.tensor([0 if hit else 1 for hit in right])


def loop_ece(logits_NV, label_N, num_bins):
    rows, bins = logits_NV.double().tolist(), {}
    for row, label in zip(rows, label_N.tolist(), strict=True):
        confidence = 1 / sum(math.exp(z - max(row)) for z in row)
        which = min(sum(confidence >= edge for edge in np.linspace(0, 1, num_bins + 1)[1:]), num_bins - 1)
        bins.setdefault(which, []).append((confidence, float(row.index(max(row)) == label)))
    total = 0.0
    for members in bins.values():
        gap = np.mean([right for _, right in members]) - np.mean([confidence for confidence, _ in members])
        total += len(members) / len(rows) * abs(gap)
    return total


def loop_equal_mass(logits_NV, label_N, num_bins):
    pairs = []
    for row, label in zip(logits_NV.double().tolist(), label_N.tolist(), strict=True):
        pairs.append((1 / sum(math.exp(z - max(row)) for z in row), float(row.index(max(row)) == label)))
    pairs.sort()
    parts = np.array_split(np.array(pairs), num_bins)
    return sum(len(part) / len(pairs) * abs(part[:, 1].mean() - part[:, 0].mean()) for part in parts)


def computed(metric, *tensors):
    metric.update(*tensors)
    return float(metric.compute())


def test_hand_value_of_both():
    """.95 right and wrong, .65 right: bins 14 and 9 of 15; two equal-mass bins of 2 and 1 items."""
    logits_NV, label_N = of_confidence([0.95, 0.95, 0.65], [True, False, True])
    assert computed(ExpectedCalibrationError(), logits_NV, label_N) == pytest.approx((0.9 + 0.35) / 3, abs=1e-12)
    # sorted: .65 right, then two tied .95 that share their accuracy .5; bins [.65, .95] and [.95]
    expected = (abs(0.35 - 0.45) + 0.45) / 3
    assert computed(EqualMassCalibrationError(num_bins=2), logits_NV, label_N) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_against_loops(num_bins, scale):
    logits_NV, label_N = items(scale=scale)
    assert computed(ExpectedCalibrationError(num_bins), logits_NV, label_N) == pytest.approx(
        loop_ece(logits_NV, label_N, num_bins), abs=1e-12
    )
    assert computed(EqualMassCalibrationError(num_bins), logits_NV, label_N) == pytest.approx(
        loop_equal_mass(logits_NV, label_N, num_bins), abs=1e-12
    )


def test_equal_width_agrees_with_torchmetrics_on_a_small_set():
    logits_NV, label_N = items()
    theirs = MulticlassCalibrationError(num_classes=6, n_bins=15, norm="l1")
    theirs.update(logits_NV.softmax(-1), label_N)
    assert computed(ExpectedCalibrationError(), logits_NV, label_N) == pytest.approx(float(theirs.compute()), abs=1e-6)


def test_certain_items_stay_in_the_last_bin():
    """Confidence exactly 1 and .95 share the bin [14/15, 1]: .95 right, 1 wrong gives |.5 - .975|."""
    sure = torch.tensor([[1e4, 0.0]], dtype=torch.float64)
    almost_NV, _ = of_confidence([0.95], [True])
    value = computed(ExpectedCalibrationError(), torch.cat([sure, almost_NV]), torch.tensor([1, 0]))
    assert value == pytest.approx(0.475, abs=1e-12)


def test_equal_width_keeps_its_digits_on_many_items():
    """130,000 items of confidence .9996: a float32 running sum moves the error by more than 1e-4."""
    count, wrong = 130_000, 2_000
    logits_NV, _ = of_confidence([0.9996], [True])
    label_N = (torch.arange(count) < wrong).long()
    value = computed(ExpectedCalibrationError(), logits_NV.repeat(count, 1), label_N)
    assert value == pytest.approx(0.9996 - (1 - wrong / count), abs=1e-11)


@pytest.mark.parametrize("metric_class", [ExpectedCalibrationError, EqualMassCalibrationError])
def test_batches_order_and_merging_leave_the_value(metric_class):
    logits_NV, label_N = items(97)
    logits_NV = (logits_NV * 2).round() / 2  # many exact ties of confidence, which bin edges cut
    whole = computed(metric_class(), logits_NV, label_N)
    order_N = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    first, second = metric_class(), metric_class()
    first.update(logits_NV[order_N[:5]], label_N[order_N[:5]])
    second.update(logits_NV[order_N[5:60]], label_N[order_N[5:60]])
    second.update(logits_NV[order_N[60:]], label_N[order_N[60:]])
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(whole, abs=1e-14)


def test_too_few_items_is_undefined():
    logits_NV, label_N = items(14)
    metric = EqualMassCalibrationError()
    metric.update(logits_NV, label_N)
    with pytest.raises(UndefinedMetric, match="14 items cannot fill 15 bins"):
        metric.compute()
    empty = ExpectedCalibrationError()
    empty.update(logits_NV[:0], label_N[:0])
    with pytest.raises(UndefinedMetric, match="no item"):
        empty.compute()


def test_bin_count_below_one_is_refused():
    for metric_class in (ExpectedCalibrationError, EqualMassCalibrationError):
        with pytest.raises(ValueError, match="num_bins=0"):
            metric_class(num_bins=0)
