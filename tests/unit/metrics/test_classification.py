"""Errors, accuracy, recall, NLL and Brier against loops, hand values and scikit-learn."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch

from research.metrics.base import UndefinedMetric
from research.metrics.classification import (
    BrierScore,
    Errors,
    NegativeLogLikelihood,
    accuracy,
    brier_score,
    class_counts,
    negative_log_likelihood,
    recall,
)


def items(num_items=200, num_classes=7, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(num_items, num_classes, generator=generator)
    return logits_NV, torch.randint(num_classes, (num_items,), generator=generator)


def loop_probs(logits_NV):
    rows = [[math.exp(z - max(row)) for z in row] for row in logits_NV.double().tolist()]
    return np.array([[value / sum(row) for value in row] for row in rows])


def computed(metric, *tensors):
    metric.update(*tensors)
    return metric.compute()


def test_hand_values():
    logits_NV = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]]).log()
    label_N = torch.tensor([0, 0])
    assert int(computed(Errors(), logits_NV, label_N)) == 1
    assert float(computed(NegativeLogLikelihood(), logits_NV, label_N)) == pytest.approx(
        (-math.log(0.7) - math.log(0.2)) / 2, abs=1e-7
    )
    first, second = 0.3**2 + 0.2**2 + 0.1**2, 0.8**2 + 0.3**2 + 0.5**2
    assert float(computed(BrierScore(), logits_NV, label_N)) == pytest.approx((first + second) / 2, abs=1e-7)


def test_against_scikit_learn():
    logits_NV, label_N = items()
    probs = loop_probs(logits_NV)
    label, classes = label_N.numpy(), list(range(7))
    assert float(computed(NegativeLogLikelihood(), logits_NV, label_N)) == pytest.approx(
        sklearn.metrics.log_loss(label, probs, labels=classes), abs=1e-12
    )
    brier = sklearn.metrics.brier_score_loss(label, probs, labels=classes, scale_by_half=False)
    assert float(computed(BrierScore(), logits_NV, label_N)) == pytest.approx(brier, abs=1e-12)
    counts = computed(class_counts(7), logits_NV.argmax(-1), label_N)
    prediction = logits_NV.argmax(-1).numpy()
    assert accuracy(counts) == sklearn.metrics.accuracy_score(label, prediction)
    expected = sklearn.metrics.recall_score(label, prediction, average=None)
    assert [recall(counts, c) for c in classes] == pytest.approx(expected.tolist(), abs=1e-15)
    assert int(computed(Errors(), logits_NV, label_N)) == int((prediction != label).sum())


def test_accuracy_is_a_float64_ratio():
    prediction_N = torch.zeros(10_000, dtype=torch.int64)
    label_N = (torch.arange(10_000) < 146).long()
    assert accuracy(computed(class_counts(2), prediction_N, label_N)) == 0.9854


def test_recall_of_an_absent_class_is_undefined_not_zero():
    counts = computed(class_counts(3), torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(UndefinedMetric, match="class 2"):
        recall(counts, 2)


@pytest.mark.parametrize("metric_class", [NegativeLogLikelihood, BrierScore, Errors])
def test_value_does_not_depend_on_batches_and_merges(metric_class):
    """A ragged split over two objects, merged as processes are, equals one update: no mean of means."""
    logits_NV, label_N = items(101)
    whole = computed(metric_class(), logits_NV, label_N)
    first, second = metric_class(), metric_class()
    first.update(logits_NV[:7], label_N[:7])
    for start in range(7, 101, 10):
        second.update(logits_NV[start : start + 10], label_N[start : start + 10])
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(float(whole), rel=1e-14)


def test_sum_keeps_small_items_after_many_large_ones():
    """A float32 sum of 4e5 items loses digits; the mean of equal values must be that value."""
    metric = NegativeLogLikelihood()
    logits_NV = torch.tensor([[0.1, 0.0]]).repeat(100_000, 1)
    label_N = torch.zeros(100_000, dtype=torch.int64)
    for _ in range(4):
        metric.update(logits_NV, label_N)
    exact = math.log1p(math.exp(-float(torch.tensor(0.1))))
    assert float(metric.compute()) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_are_computed_in_float64(dtype):
    logits_NV, label_N = items(50)
    rounded_NV = logits_NV.to(dtype)
    probs = loop_probs(rounded_NV)
    expected = [-math.log(row[y]) for row, y in zip(probs, label_N.tolist(), strict=True)]
    assert negative_log_likelihood(rounded_NV, label_N).tolist() == pytest.approx(expected, abs=1e-12)


def test_extreme_logits():
    logits_NV = torch.tensor([[1e4, -1e4], [1e4, -1e4], [0.0, -math.inf]])
    label_N = torch.tensor([0, 1, 0])
    assert negative_log_likelihood(logits_NV, label_N).tolist() == [0.0, 2e4, 0.0]
    assert brier_score(logits_NV, label_N).tolist() == [0.0, 2.0, 0.0]


def test_no_items_is_undefined():
    with pytest.raises(UndefinedMetric, match="no item"), pytest.warns(UserWarning, match="before the ``update``"):
        NegativeLogLikelihood().compute()


@pytest.mark.parametrize(
    ("logits_NV", "label_N", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-100, 0]), "-100"),
        (torch.zeros(2, 3), torch.tensor([0]), "expected 2 integer"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "float32"),
        (torch.zeros(2, 3, 1), torch.tensor([0, 1]), r"\[N, V\]"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), "int64"),
    ],
)
@pytest.mark.parametrize("metric_class", [NegativeLogLikelihood, BrierScore, Errors])
def test_bad_input_is_refused(metric_class, logits_NV, label_N, message):
    with pytest.raises(ValueError, match=message):
        metric_class().update(logits_NV, label_N)
