"""The bias-corrected test metrics: which rows and which targets the offset is fitted on."""

import pytest
import torch
from torch import nn

from research.evaluation.bias import evaluate_with_bias
from research.records import ClassBatch, DenseLogits, TopKLogprobs


class TwoSplits:
    """Two classes; the margin of class 0 is the only input, so an offset on class 1 is a threshold on it."""

    def __init__(self, val, test):
        self.rows = {"val": val, "test": test}

    def loader(self, split, batch_size):
        margin, label = (torch.tensor(column) for column in zip(*self.rows[split], strict=True))
        inputs = torch.stack([margin, torch.zeros_like(margin)], dim=1)
        return [ClassBatch(inputs, label, torch.arange(len(margin)), len(margin))]


class Threshold:
    """A teacher that says class 1 below a margin of 6."""

    def __init__(self, top_k):
        self.top_k = top_k

    def signal(self, batch):
        logits_NV = torch.stack([batch.inputs[:, 0] - 6, torch.zeros(len(batch))], dim=1)
        if not self.top_k:
            return DenseLogits(logits_NV)
        logprobs_NK, ids_NK = logits_NV.log_softmax(-1).topk(1)
        return TopKLogprobs(ids_NK, logprobs_NK, torch.log1p(-logprobs_NK.exp())[:, 0], 2)


DATA = TwoSplits(
    val=[(1.0, 1), (3.0, 0), (5.0, 0), (9.0, 0)],  # labels alone would put the threshold at 2
    test=[(1.0, 1), (4.0, 1), (5.5, 0), (8.0, 0)],  # best on the test labels: 4.75
)


@pytest.mark.parametrize("top_k", [False, True])
def test_offset_follows_the_teachers_argmax_on_held_out_rows(top_k):
    metrics = evaluate_with_bias(nn.Identity(), DATA, Threshold(top_k), [1], batch_size=4)
    assert metrics == {
        "test/bias": 7.0,
        "test/recall_bias_classes": 0.0,
        "test/errors_bias_fixed": 1.0,
        "test/recall_bias_classes_bias_fixed": 1.0,
        "test/bias_on_test": 4.75,
        "test/errors_bias_on_test": 0.0,
    }


def test_without_a_teacher_the_labels_are_the_target():
    metrics = evaluate_with_bias(nn.Identity(), DATA, None, [1], batch_size=4)
    assert (metrics["test/bias"], metrics["test/errors_bias_fixed"]) == (2.0, 1.0)
