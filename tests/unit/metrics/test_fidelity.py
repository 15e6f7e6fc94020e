"""Agreement, divergences, error copying, rank correlation and logit error against loops, scipy and hand values."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from research.losses.divergences import forward_kl, reverse_kl, total_variation
from research.losses.soft_target import logit_matching
from research.metrics.base import UndefinedMetric
from research.metrics.fidelity import AgreementAtK, CentredLogitMSE, ErrorCopying, MeanDivergence, WrongClassSpearman


def items(num_items=120, num_classes=8, seed=0, rounded=False):
    generator = torch.Generator().manual_seed(seed)
    teacher_NV = 3 * torch.randn(num_items, num_classes, generator=generator)
    student_NV = teacher_NV + 2 * torch.randn(num_items, num_classes, generator=generator)
    if rounded:
        student_NV, teacher_NV = student_NV.round(), teacher_NV.round()
    return student_NV, teacher_NV, torch.randint(num_classes, (num_items,), generator=generator)


def softmax(row, temperature):
    weights = [math.exp((z - max(row)) / temperature) for z in row]
    return [weight / sum(weights) for weight in weights]


def loop_mean(term, student_NV, teacher_NV, temperature):
    totals = []
    for z, v in zip(student_NV.double().tolist(), teacher_NV.double().tolist(), strict=True):
        q, p = softmax(z, temperature), softmax(v, temperature)
        totals.append(sum(term(a, b) for a, b in zip(p, q, strict=True)))
    return sum(totals) / len(totals)


def computed(metric, *tensors):
    metric.update(*tensors)
    return float(metric.compute())


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_divergences_against_loops(temperature):
    student_NV, teacher_NV, _ = items()
    terms = {
        forward_kl: lambda p, q: p * math.log(p / q),
        reverse_kl: lambda p, q: q * math.log(q / p),
        total_variation: lambda p, q: abs(p - q) / 2,
    }
    for function, term in terms.items():
        value = computed(MeanDivergence(function, temperature), student_NV, teacher_NV)
        assert value == pytest.approx(loop_mean(term, student_NV, teacher_NV, temperature), abs=1e-12)


def test_p01_direction_of_the_reported_divergences():
    teacher_NV, student_NV = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    assert computed(MeanDivergence(forward_kl), student_NV, teacher_NV) == pytest.approx(0.634897, abs=1e-6)
    assert computed(MeanDivergence(reverse_kl), student_NV, teacher_NV) == pytest.approx(0.675806, abs=1e-6)


def test_p04_copy_of_the_teacher():
    _, teacher_NV, label_N = items()
    for divergence in (forward_kl, reverse_kl, total_variation):
        for temperature in (1.0, 20.0):
            assert computed(MeanDivergence(divergence, temperature), teacher_NV.clone(), teacher_NV) < 1e-7
    prediction_N = teacher_NV.argmax(-1)
    assert computed(AgreementAtK(1), teacher_NV, prediction_N) == 1.0
    assert computed(ErrorCopying(), teacher_NV, prediction_N, label_N) == 1.0
    assert computed(WrongClassSpearman(), teacher_NV, teacher_NV, label_N) == pytest.approx(1.0, abs=1e-14)
    assert computed(CentredLogitMSE(), teacher_NV + 5.0, teacher_NV) < 1e-10


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("rounded", [False, True])
def test_agreement_against_a_stable_sort(k, rounded):
    """Rounded logits tie often; a stable sort puts the lower class id first."""
    student_NV, teacher_NV, _ = items(rounded=rounded)
    chosen = teacher_NV.argmax(-1)
    order = np.argsort(-student_NV.numpy(), axis=1, kind="stable")[:, :k]
    expected = np.mean([c in row for c, row in zip(chosen.tolist(), order.tolist(), strict=True)])
    assert computed(AgreementAtK(k), student_NV, chosen) == pytest.approx(expected, abs=1e-15)


def test_agreement_at_1_is_equality_of_argmaxes():
    student_NV, teacher_NV, _ = items(rounded=True)
    expected = (student_NV.argmax(-1) == teacher_NV.argmax(-1)).double().mean()
    assert computed(AgreementAtK(1), student_NV, teacher_NV.argmax(-1)) == float(expected)


def test_a_constant_student_does_not_agree_with_everything():
    assert computed(AgreementAtK(2), torch.zeros(4, 4), torch.tensor([0, 1, 2, 3])) == 0.5


def test_agreement_with_as_many_guesses_as_classes_is_undefined():
    metric = AgreementAtK(5)
    metric.update(torch.randn(6, 5), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(UndefinedMetric, match="1 for every student"):
        metric.compute()
    with pytest.raises(ValueError, match="k=0"):
        AgreementAtK(0)


def test_error_copying_hand_value():
    """Teacher wrong on items 1, 2, 3; the student repeats 1 and 3, is right on 2, and errs alone on 0."""
    teacher_N, label_N = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 0, 0])
    student_NV = torch.eye(3)[[2, 1, 0, 2]]
    assert computed(ErrorCopying(), student_NV, teacher_N, label_N) == pytest.approx(2 / 3, abs=1e-15)


def test_error_copying_of_a_perfect_teacher_is_undefined_not_zero():
    metric = ErrorCopying()
    metric.update(torch.eye(3), torch.arange(3), torch.arange(3))
    with pytest.raises(UndefinedMetric, match="makes no error"):
        metric.compute()


@pytest.mark.parametrize("rounded", [False, True])
def test_wrong_class_spearman_against_scipy(rounded):
    student_NV, teacher_NV, label_N = items(rounded=rounded)
    expected = []
    for z, v, y in zip(student_NV.tolist(), teacher_NV.tolist(), label_N.tolist(), strict=True):
        del z[y], v[y]
        expected.append(scipy.stats.spearmanr(z, v).statistic)
    assert computed(WrongClassSpearman(), student_NV, teacher_NV, label_N) == pytest.approx(
        np.mean(expected), abs=1e-12
    )


def test_wrong_class_spearman_ignores_the_label_and_counts_what_it_leaves_out():
    student_NV = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 1.0, 2.0, 3.0]])
    teacher_NV = torch.tensor([[-9.0, 1.0, 2.0, 3.0], [5.0, 0.0, 0.0, 0.0]])
    metric = WrongClassSpearman()
    metric.update(student_NV, teacher_NV, torch.zeros(2, dtype=torch.int64))
    assert float(metric.compute()) == pytest.approx(1.0, abs=1e-14)
    assert int(metric.count) == 1


def test_wrong_class_spearman_of_a_virtual_teacher_is_undefined():
    metric = WrongClassSpearman()
    metric.update(torch.randn(3, 4), torch.eye(4)[:3], torch.arange(3))
    with pytest.raises(UndefinedMetric, match="ranks them all equal"):
        metric.compute()


def test_centred_logit_mse_against_a_loop_and_the_training_loss():
    student_NV, teacher_NV, _ = items()
    difference = student_NV.double().numpy() - teacher_NV.double().numpy()
    expected = np.mean([np.mean((row - row.mean()) ** 2) for row in difference])
    value = computed(CentredLogitMSE(), student_NV, teacher_NV)
    assert value == pytest.approx(expected, abs=1e-12)
    assert value == pytest.approx(2 * float(logit_matching(student_NV, teacher_NV).mean()), rel=1e-5)


def test_excluded_classes_give_inf_or_undefined_never_nan():
    student_NV, teacher_NV = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    assert computed(MeanDivergence(forward_kl), student_NV, teacher_NV) == pytest.approx(math.log(1.5), abs=1e-12)
    assert computed(MeanDivergence(reverse_kl), student_NV, teacher_NV) == math.inf
    metric = CentredLogitMSE()
    metric.update(student_NV, teacher_NV)
    with pytest.raises(UndefinedMetric, match="not a number"):
        metric.compute()


def pair_metrics():
    return {
        "kl": (MeanDivergence(forward_kl, 4.0), "pair"),
        "mse": (CentredLogitMSE(), "pair"),
        "spearman": (WrongClassSpearman(), "labelled"),
        "agreement": (AgreementAtK(2), "prediction"),
        "copying": (ErrorCopying(), "both"),
    }


@pytest.mark.parametrize("name", list(pair_metrics()))
def test_value_does_not_depend_on_batches_and_merges(name):
    student_NV, teacher_NV, label_N = items(101)
    (whole, kind), (first, _), (second, _) = (pair_metrics()[name] for _ in range(3))
    tensors = {
        "pair": (student_NV, teacher_NV),
        "labelled": (student_NV, teacher_NV, label_N),
        "prediction": (student_NV, teacher_NV.argmax(-1)),
        "both": (student_NV, teacher_NV.argmax(-1), label_N),
    }[kind]
    first.update(*(tensor[:7] for tensor in tensors))
    for start in range(7, 101, 10):
        second.update(*(tensor[start : start + 10] for tensor in tensors))
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(computed(whole, *tensors), rel=1e-13)


def test_other_shapes_are_refused():
    label_N = torch.zeros(4, dtype=torch.int64)
    for metric, extra in (
        (MeanDivergence(forward_kl), ()),
        (CentredLogitMSE(), ()),
        (WrongClassSpearman(), (label_N,)),
    ):
        with pytest.raises(ValueError, match="same classes"):
            metric.update(torch.randn(4, 3), torch.randn(4, 5), *extra)
    with pytest.raises(ValueError, match="0 to 3"):
        AgreementAtK(1).update(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]))
