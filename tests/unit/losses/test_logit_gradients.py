"""The written-out values and gradients, pinned to the one definition of each divergence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.losses.divergences import DIVERGENCES
from research.losses.logit_gradients import FAR, FORMS, form_of, top_k_value_and_gradient, value_and_gradient
from research.losses.logprob_divergences import LOGPROB_DIVERGENCES
from research.losses.sparse import sparse_divergence, teacher_bucket_logprobs
from research.records import TopKLogprobs

WEIGHTED = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"teacher_mixture_weight": 0.05}),
    ("jsd", {"teacher_mixture_weight": 0.5}),
    ("jsd", {"teacher_mixture_weight": 0.95}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.3}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.0}),
    ("normalised_jsd", {"teacher_mixture_weight": 1.0}),
]
WITHOUT_FORM = [
    ("jsd", {"teacher_mixture_weight": 1e-3}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.999}),
    ("skewed_forward_kl", {"skew_weight": 0.1}),
    ("skewed_reverse_kl", {"skew_weight": 0.1}),
    ("total_variation", {}),
]


def rows(num, width, seed, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num, width, generator=generator, dtype=torch.float64)).to(dtype)


def defined(name, weights, student, teacher):
    leaf = student.clone().requires_grad_()
    value = DIVERGENCES[name](leaf, teacher, **weights)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize(("name", "weights"), WEIGHTED + WITHOUT_FORM)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(2, 40),
    scale=st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    shift=st.sampled_from([0.0, -50.0, 1000.0]),
)
def test_p14_every_form_is_its_definition(name, weights, seed, width, scale, shift):
    """Near and far rows, logits with an offset, probabilities that underflow: value and gradient in float64."""
    student, teacher = rows(4, width, seed, scale), rows(4, width, seed + 1, scale) + shift
    assert (form_of(name, weights) is not None) == ((name, weights) in WEIGHTED)
    value, gradient = value_and_gradient(name, student, teacher, weights)
    expected, expected_gradient = defined(name, weights, student, teacher)
    slack = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(value, expected, atol=1e-10 * slack, rtol=0)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-10 * slack, rtol=0)


@pytest.mark.parametrize(("name", "weights"), WEIGHTED)
@pytest.mark.parametrize("gap", [40.0, FAR - 1, FAR + 1, 200.0, 1e4])
def test_p07_far_apart_rows_in_float32(name, weights, gap):
    """Teacher and student sure of different classes, past the end of float32's exponents: the definition in float64."""
    student = torch.tensor([[gap, 0.0, 0.5], [0.0, gap, -1.0]])
    teacher = torch.tensor([[0.0, gap, 1.0], [0.0, gap, 2.0]])
    value, gradient = value_and_gradient(name, student, teacher, weights)
    expected, expected_gradient = defined(name, weights, student.double(), teacher.double())
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-5 * gap, rtol=1e-5)


@pytest.mark.parametrize(("name", "weights"), WEIGHTED)
def test_p03_near_rows_lose_little_in_float32_and_equal_ones_nothing(name, weights):
    student = rows(200, 3000, 1, dtype=torch.float32)
    for step in (1e-2, 1e-4):
        teacher = student + step * rows(200, 3000, 2, dtype=torch.float32)
        value, _ = value_and_gradient(name, student, teacher, weights)
        exact, _ = defined(name, weights, student.double(), teacher.double())
        assert float((value - exact).abs().max()) < 3e-7
    value, gradient = value_and_gradient(name, student, student.clone(), weights)
    assert not value.any() and not gradient.any()


@pytest.mark.parametrize(("name", "weights"), WEIGHTED + WITHOUT_FORM)
@pytest.mark.parametrize("lacks", ["student", "teacher", "both"])
def test_classes_that_do_not_exist_have_the_values_and_gradients_of_the_definition(name, weights, lacks):
    student, teacher = rows(3, 6, 1), rows(3, 6, 2)
    for side, tensor in (("student", student), ("teacher", teacher)):
        if lacks in (side, "both"):
            tensor[1, 4] = -math.inf
    value, gradient = value_and_gradient(name, student, teacher, weights)
    expected, expected_gradient = defined(name, weights, student, teacher)
    if "jsd" not in name or lacks == "both":
        assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-13, atol=1e-13)
    if lacks != "teacher":
        assert gradient[1, 4] == 0


def test_the_arguments_are_left_as_they_were():
    student, teacher = rows(3, 6, 1), rows(3, 6, 2)
    copies = student.clone(), teacher.clone()
    for name, weights in WEIGHTED + WITHOUT_FORM:
        value_and_gradient(name, student, teacher, weights)
    ids = torch.tensor([[0, 3]] * 3)
    signal = TopKLogprobs(ids, torch.full((3, 2), -1.5), torch.full((3,), math.log(1 - 2 * math.exp(-1.5))), 6)
    top_k_value_and_gradient("jsd", student, ids, teacher_bucket_logprobs(signal), {"teacher_mixture_weight": 0.5})
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


@pytest.mark.parametrize(("name", "weights"), WEIGHTED + WITHOUT_FORM)
@pytest.mark.parametrize("kept", [1, 3, 7, 8])
@pytest.mark.parametrize("absent", [0, 4, 7])
def test_p19_the_sparse_form_is_the_sparse_definition(name, weights, kept, absent):
    """Also where classes do not exist, down to a tail of nothing at all."""
    student, teacher = rows(5, 8, 3), rows(5, 8, 4)
    if absent:
        student[2, 8 - absent :] = teacher[2, 8 - absent :] = -math.inf
    logprobs, ids = teacher.log_softmax(-1).sort(dim=-1, descending=True)
    tail = logprobs[:, kept:].logsumexp(-1) if kept < 8 else torch.full((5,), -math.inf).double()
    signal = TopKLogprobs(ids[:, :kept], logprobs[:, :kept], tail, 8)
    leaf = student.clone().requires_grad_()
    expected = sparse_divergence(name, leaf, signal, **weights)
    value, gradient = top_k_value_and_gradient(name, student, signal.ids_NK, teacher_bucket_logprobs(signal), weights)
    torch.testing.assert_close(value, expected.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0], atol=1e-12, rtol=1e-10)


def test_every_form_belongs_to_a_divergence():
    assert set(FORMS) <= set(LOGPROB_DIVERGENCES)
