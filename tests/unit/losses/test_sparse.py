"""The divergences over K kept classes and a tail bucket."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.losses.divergences import DIVERGENCES
from research.losses.sparse import bucket_logprobs, sparse_divergence, teacher_bucket_logprobs
from research.records import TopKLogprobs

WEIGHTED = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"teacher_mixture_weight": 0.3}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.1}),
    ("skewed_forward_kl", {"skew_weight": 0.1}),
    ("skewed_reverse_kl", {"skew_weight": 0.1}),
    ("total_variation", {}),
]
every_divergence = pytest.mark.parametrize(("name", "weights"), WEIGHTED, ids=[name for name, _ in WEIGHTED])


def rows(num, width, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num, width, generator=generator, dtype=torch.float64)


def cut(teacher_logits_NV, kept):
    """The top-k signal of a dense teacher at temperature 1, its tail summed class by class."""
    width = teacher_logits_NV.shape[-1]
    logprobs, ids = teacher_logits_NV.log_softmax(-1).sort(dim=-1, descending=True)
    tail = logprobs[..., kept:].logsumexp(-1) if kept < width else torch.full(logprobs.shape[:-1], -math.inf)
    return TopKLogprobs(ids[..., :kept], logprobs[..., :kept], tail.to(logprobs.dtype), width)


def from_probs(probs):
    return torch.tensor([probs], dtype=torch.float64).log()


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_p19_p23_equals_dense_where_everything_is_kept(name, weights, temperature):
    student, teacher = rows(30, 8, 0).requires_grad_(), rows(30, 8, 1)
    dense = DIVERGENCES[name](student, teacher, temperature=temperature, **weights)
    sparse = sparse_divergence(name, student, cut(teacher, 8), temperature=temperature, **weights)
    assert torch.allclose(sparse, dense, atol=1e-10, rtol=0)
    (dense_gradient,) = torch.autograd.grad(dense.sum(), student)
    (sparse_gradient,) = torch.autograd.grad(sparse.sum(), student)
    assert torch.allclose(sparse_gradient, dense_gradient, atol=1e-10, rtol=0)


@every_divergence
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), width=st.integers(2, 12), scale=st.sampled_from([0.1, 3.0, 30.0]), data=st.data())
def test_p19_between_zero_and_dense(name, weights, seed, width, scale, data):
    """Merging classes into a bucket loses information and never invents any."""
    kept = data.draw(st.integers(1, width))
    student, teacher = rows(5, width, seed, scale), rows(5, width, seed + 1, scale)
    dense = DIVERGENCES[name](student, teacher, **weights)
    sparse = sparse_divergence(name, student, cut(teacher, kept), **weights)
    assert (sparse >= -1e-15).all()
    assert (sparse <= dense + 1e-10).all()


@every_divergence
@pytest.mark.parametrize("kept", [1, 3, 8])
def test_zero_at_equality_and_gradcheck(name, weights, kept):
    teacher = rows(4, 8, 2)
    signal = cut(teacher, kept)
    # The tail is a sum of exponentials taken in another order on each side: equal to the last bits, not bit for bit.
    assert sparse_divergence(name, teacher, signal, **weights).abs().max() < 1e-15
    student = rows(4, 8, 3).requires_grad_()
    for temperature in (1.0, 3.0):
        assert torch.autograd.gradcheck(
            lambda logits, t=temperature: sparse_divergence(name, logits, signal, temperature=t, **weights), student
        )


def test_p19_reverse_kl_on_the_pair_that_truncation_gets_wrong():
    student = from_probs([0.6, 0.4]).requires_grad_()
    signal = cut(from_probs([0.9, 0.1]), 1)
    value = sparse_divergence("reverse_kl", student, signal)
    assert value.item() == pytest.approx(0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1), abs=1e-12)
    assert value.item() == pytest.approx(0.311, abs=5e-4)
    value.sum().backward()
    assert student.grad.abs().min() > 0.1


def test_p20_reverse_kl_does_not_push_the_student_off_the_support():
    teacher = rows(1, 20, 4, scale=2.0)
    signal = cut(teacher, 5)
    student = torch.zeros(1, 20, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([student], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        sparse_divergence("reverse_kl", student, signal).sum().backward()
        optimizer.step()
    support_mass = student.detach().softmax(-1).gather(-1, signal.ids_NK).sum()
    assert abs(support_mass - signal.logprobs_NK.exp().sum()) < 0.01


def test_p21_mass_off_the_support_is_seen_although_ratios_inside_agree():
    teacher = from_probs([0.66, 0.33, 0.005, 0.005])
    student = from_probs([0.01 * 2 / 3, 0.01 / 3, 0.495, 0.495])
    value = sparse_divergence("forward_kl", student, cut(teacher, 2)).item()
    assert value == pytest.approx(0.99 * math.log(0.99 / 0.01) + 0.01 * math.log(0.01 / 0.99), abs=1e-12)
    assert value == pytest.approx(4.50, abs=5e-3)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
def test_p23_a_uniform_tail_is_softened_exactly(temperature):
    """V=50, K=5: dividing the cached logprobs and keeping the tail of temperature 1 doubles the top probability."""
    teacher = torch.cat([rows(3, 5, 5) + 6, torch.zeros(3, 45, dtype=torch.float64)], -1)
    buckets = teacher_bucket_logprobs(cut(teacher, 5), temperature).exp()
    dense = (teacher / temperature).softmax(-1).sort(dim=-1, descending=True).values
    assert torch.allclose(buckets[:, :5], dense[:, :5], atol=1e-12, rtol=0)
    assert torch.allclose(buckets[:, 5], dense[:, 5:].sum(-1), atol=1e-12, rtol=0)


@every_divergence
def test_p23_equals_dense_at_a_temperature_where_both_tails_are_uniform(name, weights):
    tail = torch.zeros(3, 45, dtype=torch.float64)
    teacher, student = torch.cat([rows(3, 5, 6) + 6, tail], -1), torch.cat([rows(3, 5, 7) + 6, tail], -1)
    sparse = sparse_divergence(name, student, cut(teacher, 5), temperature=2.0, **weights)
    dense = DIVERGENCES[name](student, teacher, temperature=2.0, **weights)
    assert torch.allclose(sparse, dense, atol=1e-6)


def test_p23_the_uniform_assumption_errs_in_its_documented_direction():
    teacher = rows(50, 30, 8)
    signal = cut(teacher, 5)
    kept_ids = signal.ids_NK
    for temperature, sign in ((2.0, 1), (0.5, -1)):
        assumed = teacher_bucket_logprobs(signal, temperature).exp()[:, -1]
        true = 1 - (teacher / temperature).softmax(-1).gather(-1, kept_ids).sum(-1)
        assert (sign * (assumed - true) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", [1e-12, 1e-30])
def test_the_tail_is_right_where_one_minus_the_kept_mass_is_zero(dtype, tail):
    logits = torch.tensor([[0.0, -1.0, math.log(tail), math.log(tail)]], dtype=dtype, requires_grad=True)
    buckets = bucket_logprobs(logits, torch.tensor([[0, 1]]))
    expected = math.log(2 * tail) - math.log1p(math.exp(-1))
    assert buckets[0, 2].item() == pytest.approx(expected, rel=1e-6)
    buckets[0, 2].backward()
    assert logits.grad[0, 2:].tolist() == pytest.approx([0.5, 0.5], rel=1e-5)


@every_divergence
def test_classes_absent_on_both_sides_leave_an_empty_tail(name, weights):
    absent = torch.full((3, 2), -math.inf, dtype=torch.float64)
    student = torch.cat([rows(3, 4, 9), absent], -1).requires_grad_()
    teacher = torch.cat([rows(3, 4, 10), absent], -1)
    value = sparse_divergence(name, student, cut(teacher, 4), **weights)
    dense = DIVERGENCES[name](student, teacher, **weights)
    assert torch.allclose(value, dense, atol=1e-12)
    value.sum().backward()
    assert torch.isfinite(student.grad).all()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_student_logits_stay_finite(name, weights, dtype):
    student = torch.tensor([[1e4, -1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    value = sparse_divergence(name, student, cut(rows(1, 4, 11), 2), **weights)
    assert value.dtype == torch.float64  # the wider of the two sides
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(student.grad).all()


def test_leading_dimensions_and_a_teacher_stored_in_half_precision():
    student, teacher = rows(6, 7, 12).view(2, 3, 7), rows(6, 7, 13).view(2, 3, 7)
    signal = cut(teacher, 3)
    value = sparse_divergence("forward_kl", student, signal)
    flat = sparse_divergence("forward_kl", student.view(6, 7), cut(teacher.view(6, 7), 3))
    assert torch.equal(value, flat.view(2, 3))
    half = TopKLogprobs(signal.ids_NK.int(), signal.logprobs_NK.half(), signal.tail_logprob_N.half(), 7)
    assert torch.allclose(sparse_divergence("forward_kl", student.float(), half).double(), value, atol=5e-3)


def test_the_teacher_signal_receives_no_gradient():
    signal = cut(rows(2, 5, 14), 3)
    signal.logprobs_NK.requires_grad_()
    student = rows(2, 5, 15).requires_grad_()
    sparse_divergence("forward_kl", student, signal).sum().backward()
    assert signal.logprobs_NK.grad is None and student.grad.abs().sum() > 0


def test_a_signal_that_does_not_fit_is_refused():
    signal = cut(rows(4, 6, 16), 3)
    with pytest.raises(ValueError, match=r"student has 5 classes.*cut from 6"):
        sparse_divergence("forward_kl", torch.zeros(4, 5), signal)
    with pytest.raises(ValueError, match=r"\(3, 6\).*\(4, 3\)"):
        sparse_divergence("forward_kl", torch.zeros(3, 6), signal)
    with pytest.raises(ValueError, match="temperature=0"):
        sparse_divergence("forward_kl", torch.zeros(4, 6), signal, temperature=0)
    with pytest.raises(ValueError, match="did you mean 'forward_kl'"):
        sparse_divergence("forward", torch.zeros(4, 6), signal)
    wide = TopKLogprobs(torch.zeros(4, 7).long(), torch.zeros(4, 7), torch.zeros(4), 6)
    with pytest.raises(ValueError, match="keeps 7 classes of 6"):
        sparse_divergence("forward_kl", torch.zeros(4, 6), wide)
