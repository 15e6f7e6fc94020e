"""The evaluator's numbers, names, omissions and refusals, on tiny students and teachers."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import nn

from research.evaluation.evaluate import (
    DENSE_TEACHER_NAMES,
    ITEM_COLUMNS,
    METRIC_NAMES,
    QUALITY_NAMES,
    TEACHER_NAMES,
    TOP_K_TEACHER_NAMES,
    evaluate,
    metric_names,
)
from research.losses.soft_target import soft_target
from research.losses.supervised import cross_entropy
from research.metrics.temperature_scaling import cross_fitted_logits
from research.records import ClassBatch, DenseLogits, TopKLogprobs

NUM_ITEMS, NUM_CLASSES = 60, 8


class LinearTeacher:
    """A plain object with fixed weights, dense or cut to its top ``k`` classes."""

    def __init__(self, seed=1, k=None, num_classes=NUM_CLASSES):
        generator = torch.Generator().manual_seed(seed)
        self.weight = 2 * torch.randn(num_classes, 5, generator=generator)
        self.k = k

    def signal(self, batch):
        logits_NV = batch.inputs @ self.weight.T
        if self.k is None:
            return DenseLogits(logits_NV)
        logprobs_NK, ids_NK = logits_NV.double().log_softmax(-1).topk(self.k)
        tail_N = torch.log1p(-logprobs_NK.exp().sum(-1).clamp(max=1.0))
        return TopKLogprobs(ids_NK, logprobs_NK, tail_N, logits_NV.shape[1])


def make_student(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, NUM_CLASSES))


def batches(size=16, num_items=NUM_ITEMS, order=None, offset=0):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(NUM_ITEMS, 5, generator=generator)[:num_items]
    label_N = torch.randint(NUM_CLASSES, (NUM_ITEMS,), generator=generator)[:num_items]
    rows = torch.arange(num_items) if order is None else order
    return [ClassBatch(inputs[r], label_N[r], r + offset, len(r)) for r in rows.split(size)]


def everything(size=16):
    """The student's and the teacher's logits and the labels as whole float64 arrays."""
    (batch,) = batches(NUM_ITEMS)
    with torch.no_grad():
        student_NV = make_student()(batch.inputs).double()
    return student_NV, LinearTeacher().signal(batch).logits_NV.double(), batch.label_B


def run(student=None, loader=None, **arguments):
    settings = {"split": "test", "num_classes": NUM_CLASSES, **arguments}
    return evaluate(student or make_student(), loader or batches(), **settings)


def test_metric_names_are_frozen():
    assert METRIC_NAMES == (
        "errors", "accuracy", "nll", "brier", "ece", "ece_equal_mass", "fitted_temperature", "nll_scaled", "ece_scaled",
        "teacher_errors", "agreement_at_1", "agreement_at_5", "error_copying", "kl_teacher_student",
        "kl_student_teacher", "kl_teacher_student_at_temperature", "kl_student_teacher_at_temperature", "jsd",
        "total_variation", "wrong_class_spearman", "wrong_class_spearman_items", "centred_logit_mse", "teacher_nll",
        "teacher_ece", "kl_teacher_student_top_k", "kl_student_teacher_top_k",
    )  # fmt: skip
    assert ITEM_COLUMNS == ("index", "label", "prediction", "nll", "max_prob", "teacher_prediction")


@pytest.mark.parametrize(
    ("teacher", "names"),
    [
        (None, QUALITY_NAMES),
        (LinearTeacher(), (*QUALITY_NAMES, *TEACHER_NAMES, *DENSE_TEACHER_NAMES)),
        (LinearTeacher(k=3), (*QUALITY_NAMES, *TEACHER_NAMES, *TOP_K_TEACHER_NAMES)),
    ],
)
def test_exactly_the_declared_metrics_are_reported(teacher, names):
    result = run(teacher=teacher)
    recalls = [f"recall_class_{c}" for c in range(NUM_CLASSES)]
    assert set(result.metrics) == {f"test/{name}" for name in (*names, *recalls)}
    assert {name.removeprefix("test/") for name in result.metrics} <= set(metric_names(NUM_CLASSES))
    assert all(type(value) is float and math.isfinite(value) for value in result.metrics.values())


def test_values_against_scikit_learn_and_loops():
    student_NV, teacher_NV, label_N = everything()
    metrics = run(teacher=LinearTeacher(), temperature=4.0).metrics
    probs, teacher_probs = student_NV.softmax(-1).numpy(), teacher_NV.softmax(-1).numpy()
    label, prediction = label_N.numpy(), probs.argmax(1)
    classes = list(range(NUM_CLASSES))
    expected = {
        "errors": (prediction != label).sum(),
        "accuracy": (prediction == label).mean(),
        "nll": sklearn.metrics.log_loss(label, probs, labels=classes),
        "brier": sklearn.metrics.brier_score_loss(label, probs, labels=classes, scale_by_half=False),
        "teacher_errors": (teacher_probs.argmax(1) != label).sum(),
        "teacher_nll": sklearn.metrics.log_loss(label, teacher_probs, labels=classes),
        "agreement_at_1": (prediction == teacher_probs.argmax(1)).mean(),
        "kl_teacher_student": (teacher_probs * np.log(teacher_probs / probs)).sum(1).mean(),
        "kl_student_teacher": (probs * np.log(probs / teacher_probs)).sum(1).mean(),
        "total_variation": np.abs(probs - teacher_probs).sum(1).mean() / 2,
        "wrong_class_spearman_items": NUM_ITEMS,
        "recall_class_3": (prediction[label == 3] == 3).mean(),
        "nll_scaled": sklearn.metrics.log_loss(
            label, cross_fitted_logits(student_NV, label_N, torch.arange(NUM_ITEMS)).softmax(-1), labels=classes
        ),
    }
    softer_q, softer_p = (student_NV / 4).softmax(-1).numpy(), (teacher_NV / 4).softmax(-1).numpy()
    expected["kl_teacher_student_at_temperature"] = (softer_p * np.log(softer_p / softer_q)).sum(1).mean()
    expected["kl_student_teacher_at_temperature"] = (softer_q * np.log(softer_q / softer_p)).sum(1).mean()
    assert {name: metrics[f"test/{name}"] for name in expected} == pytest.approx(expected, abs=2e-6)


def test_p49_evaluation_equals_training_loss_on_the_same_batch():
    student, teacher, (batch,) = make_student(), LinearTeacher(), batches(NUM_ITEMS)
    metrics = run(student, [batch], teacher=teacher, temperature=4.0).metrics
    student.train()
    logits_NV, signal = student(batch.inputs).detach(), teacher.signal(batch)
    hard = cross_entropy(logits_NV, batch.label_B).mean()
    assert metrics["test/nll"] == pytest.approx(float(hard), abs=1e-6)
    names = {("forward_kl", 1.0): "kl_teacher_student", ("forward_kl", 4.0): "kl_teacher_student_at_temperature"}
    names |= {("reverse_kl", 1.0): "kl_student_teacher", ("reverse_kl", 4.0): "kl_student_teacher_at_temperature"}
    for (divergence, temperature), name in names.items():
        settings = {"divergence": divergence, "temperature": temperature, "scale_by_temperature_squared": False}
        soft = soft_target(logits_NV, signal, **settings).mean()
        assert metrics[f"test/{name}"] == pytest.approx(float(soft), abs=1e-6)


@pytest.mark.parametrize(("size", "seed"), [(1, None), (7, None), (60, None), (16, 0), (13, 1)])
def test_batch_size_and_order_leave_every_number(size, seed):
    order = None if seed is None else torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(seed))
    reference = run(teacher=LinearTeacher(), temperature=4.0)
    result = run(loader=batches(size, order=order), teacher=LinearTeacher(), temperature=4.0)
    assert result.metrics == pytest.approx(reference.metrics, abs=1e-6)
    assert result.items["index"].tolist() == list(range(NUM_ITEMS))
    for name in ("label", "prediction", "teacher_prediction"):
        assert np.array_equal(result.items[name], reference.items[name])


def test_items_rebuild_the_metrics():
    result = run(teacher=LinearTeacher(), loader=batches(order=torch.arange(NUM_ITEMS).flip(0), offset=1000))
    items, metrics = result.items, result.metrics
    assert tuple(items) == ITEM_COLUMNS
    assert items["index"].tolist() == list(range(1000, 1000 + NUM_ITEMS))
    assert (items["prediction"] != items["label"]).sum() == metrics["test/errors"]
    assert items["nll"].mean() == pytest.approx(metrics["test/nll"], abs=1e-12)
    assert (items["prediction"] == items["teacher_prediction"]).mean() == metrics["test/agreement_at_1"]
    student_NV, _, label_N = everything()
    assert items["label"].tolist() == label_N.tolist()
    assert items["max_prob"] == pytest.approx(student_NV.softmax(-1).amax(-1).numpy(), abs=1e-6)
    assert "teacher_prediction" not in run().items


def test_student_that_is_its_own_teacher():
    student = make_student()

    class Itself:
        def signal(self, batch):
            return DenseLogits(student(batch.inputs))

    metrics = run(student, teacher=Itself(), temperature=4.0).metrics
    for name in ("agreement_at_1", "agreement_at_5", "error_copying"):
        assert metrics[f"test/{name}"] == 1.0
    for name in (
        "jsd",
        "total_variation",
        "centred_logit_mse",
        *(n for n in DENSE_TEACHER_NAMES if n.startswith("kl_")),
    ):
        assert abs(metrics[f"test/{name}"]) < 1e-7
    assert metrics["test/teacher_errors"] == metrics["test/errors"]
    assert metrics["test/teacher_nll"] == metrics["test/nll"]


def test_perfect_teacher_and_absent_class_are_omitted_with_a_reason():
    loader = [
        ClassBatch(batch.inputs, LinearTeacher().signal(batch).logits_NV.argmax(-1), batch.index_B, len(batch))
        for batch in batches(num_items=20)
    ]
    present = set(torch.cat([batch.label_B for batch in loader]).tolist())
    absent = [c for c in range(NUM_CLASSES) if c not in present]
    assert absent
    result = run(loader=loader, teacher=LinearTeacher())
    assert result.metrics["test/teacher_errors"] == 0.0
    assert set(result.omitted) == {"test/error_copying", *(f"test/recall_class_{c}" for c in absent)}
    assert "makes no error" in result.omitted["test/error_copying"]
    assert not set(result.omitted) & set(result.metrics)


def test_agreement_at_5_of_five_classes_is_omitted():
    loader = [ClassBatch(torch.randn(40, 5), torch.arange(40) % 5, torch.arange(40), 40)]
    result = run(nn.Linear(5, 5), loader, teacher=LinearTeacher(num_classes=5), num_classes=5)
    assert "test/agreement_at_5" in result.omitted and "test/agreement_at_1" in result.metrics


def test_too_few_items_omit_the_cross_fit_and_the_equal_mass_bins():
    omitted = run(loader=batches(num_items=1)).omitted
    assert {"test/nll_scaled", "test/ece_scaled", "test/ece_equal_mass"} <= set(omitted)


def test_top_k_teacher_gives_the_exact_bucket_kl_and_omits_the_rest():
    student_NV, teacher_NV, _ = everything()
    result, dense = run(teacher=LinearTeacher(k=3)), run(teacher=LinearTeacher())
    ids_NK = teacher_NV.topk(3).indices
    total = 0.0
    for z, v, ids in zip(student_NV.softmax(-1), teacher_NV.softmax(-1), ids_NK, strict=True):
        q, p = [*z[ids].tolist(), 1 - float(z[ids].sum())], [*v[ids].tolist(), 1 - float(v[ids].sum())]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    value = result.metrics["test/kl_teacher_student_top_k"]
    assert value == pytest.approx(total / NUM_ITEMS, abs=1e-6)
    assert 0 < value < dense.metrics["test/kl_teacher_student"]
    for name in TEACHER_NAMES:
        assert result.metrics[f"test/{name}"] == dense.metrics[f"test/{name}"]
    assert set(result.omitted) == {f"test/{name}" for name in DENSE_TEACHER_NAMES}
    assert "top 3 of 8" in result.omitted["test/kl_teacher_student"]


def test_top_k_teacher_that_kept_every_class_is_a_dense_one():
    full = run(teacher=LinearTeacher(k=NUM_CLASSES), temperature=4.0)
    assert full.metrics == pytest.approx(run(teacher=LinearTeacher(), temperature=4.0).metrics, abs=1e-6)


def test_seconds_are_measured():
    result = run(teacher=LinearTeacher())
    assert result.student_s > 0 and result.teacher_s > 0 and result.metrics_s > 0
    assert run().teacher_s == 0.0


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature_is_refused_without_a_teacher_too(temperature):
    with pytest.raises(ValueError, match="temperature="):
        run(temperature=temperature)


def test_bad_split_and_class_count_are_refused():
    for split in ("", "test/shifted"):
        with pytest.raises(ValueError, match="split="):
            run(split=split)
    with pytest.raises(ValueError, match="8 classes; the data have num_classes=10"):
        run(num_classes=10)
