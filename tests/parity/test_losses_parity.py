"""The divergences against other libraries' implementations, on random rows."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.special import softmax as scipy_softmax
from torch.distributions import Categorical, kl_divergence

from research.losses.divergences import forward_kl, jsd, normalised_jsd, reverse_kl, total_variation
from research.losses.soft_target import soft_target
from research.losses.supervised import cross_entropy
from research.records import DenseLogits

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def pair(num=32, width=11):
    generator = torch.Generator().manual_seed(20)
    return tuple(3 * torch.randn(num, width, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_forward_kl_mean_is_torch_kl_div_batchmean(temperature):
    student, teacher = pair()
    ours_leaf, theirs_leaf = student.clone().requires_grad_(), student.clone().requires_grad_()
    theirs = temperature**2 * torch.nn.functional.kl_div(
        (theirs_leaf / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    ours = soft_target(ours_leaf, DenseLogits(teacher), temperature=temperature).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    ours.backward()
    theirs.backward()
    assert torch.allclose(ours_leaf.grad, theirs_leaf.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_both_kls_are_those_of_torch_distributions(temperature):
    student, teacher = pair()
    q, p = Categorical(logits=student / temperature), Categorical(logits=teacher / temperature)
    assert torch.allclose(forward_kl(student, teacher, temperature=temperature), kl_divergence(p, q), atol=1e-12)
    assert torch.allclose(reverse_kl(student, teacher, temperature=temperature), kl_divergence(q, p), atol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_scipy_relative_entropy_and_jensen_shannon(temperature):
    student, teacher = pair()
    q, p = (scipy_softmax(logits.numpy() / temperature, axis=-1) for logits in (student, teacher))
    kls = {"forward": rel_entr(p, q).sum(-1), "reverse": rel_entr(q, p).sum(-1)}
    np.testing.assert_allclose(forward_kl(student, teacher, temperature=temperature), kls["forward"], atol=1e-12)
    np.testing.assert_allclose(reverse_kl(student, teacher, temperature=temperature), kls["reverse"], atol=1e-12)
    half = jsd(student, teacher, temperature=temperature, teacher_mixture_weight=0.5)
    np.testing.assert_allclose(half, jensenshannon(p, q, axis=-1) ** 2, atol=1e-12)
    for weight in (0.1, 0.9):
        m = weight * p + (1 - weight) * q
        reference = weight * rel_entr(p, m).sum(-1) + (1 - weight) * rel_entr(q, m).sum(-1)
        ours = jsd(student, teacher, temperature=temperature, teacher_mixture_weight=weight)
        np.testing.assert_allclose(ours, reference, atol=1e-12)
        ours = normalised_jsd(student, teacher, temperature=temperature, teacher_mixture_weight=weight)
        np.testing.assert_allclose(ours, reference / (weight * (1 - weight)), atol=1e-11)
    distance = total_variation(student, teacher, temperature=temperature)
    np.testing.assert_allclose(distance, np.abs(p - q).sum(-1) / 2, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch_with_ignored_labels_masked(smoothing):
    logits, _ = pair()
    labels = torch.arange(32) % 11
    labels[::5] = -100
    ours_leaf, theirs_leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(theirs_leaf, labels, label_smoothing=smoothing)
    ours = cross_entropy(ours_leaf, labels, labels != -100, label_smoothing=smoothing).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    ours.backward()
    theirs.backward()
    assert torch.allclose(ours_leaf.grad, theirs_leaf.grad, atol=1e-12, rtol=0)


def test_soft_cross_entropy_less_the_teachers_entropy_is_the_forward_kl():
    student, teacher = pair()
    p = teacher.softmax(-1)
    soft = torch.nn.functional.cross_entropy(student, p, reduction="none")
    assert torch.allclose(forward_kl(student, teacher), soft - Categorical(probs=p).entropy(), atol=1e-12)
    assert soft.min() > 0 and math.isclose(forward_kl(teacher, teacher).abs().max().item(), 0.0)
