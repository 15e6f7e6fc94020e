"""Which classes a sparse comparison keeps: the teacher's best, or the student's own."""

import math

import pytest
import torch

from research.losses.divergences import DIVERGENCES
from research.losses.projection import project
from research.losses.soft_target import soft_target
from research.losses.support import best_of, on_student_support, on_support
from research.records import DenseLogits, HiddenProjection
from research.teachers.top_k import keep_top_k, spread_tail

WEIGHTED = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"teacher_mixture_weight": 0.3}),
    ("skewed_forward_kl", {"skew_weight": 0.1}),
    ("total_variation", {}),
]


def rows(*shape, seed, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def from_probs(probs):
    return torch.tensor([probs], dtype=torch.float64).log()


@pytest.mark.parametrize(("name", "weights"), WEIGHTED)
@pytest.mark.parametrize("top_k", [1, 3, 11, 12])
def test_p19_the_student_s_support_bounds_the_divergence_too(name, weights, top_k):
    student, teacher = rows(40, 12, seed=1).requires_grad_(), rows(40, 12, seed=2)
    signal = on_student_support(student, DenseLogits(teacher), top_k)
    dense = DIVERGENCES[name](student, teacher, **weights).sum()
    sparse = soft_target(student, signal, divergence=name, **weights).total
    assert -1e-6 <= sparse.item() <= dense.item() + 1e-6
    if top_k == 12:
        assert sparse.item() == pytest.approx(dense.item(), abs=1e-4)
    assert torch.autograd.grad(sparse, student)[0].abs().sum() > 1
    own = on_student_support(student, DenseLogits(student.detach()), top_k)
    assert abs(soft_target(student, own, divergence=name, **weights).total.item()) < 1e-6


def test_p19_reverse_kl_on_the_pair_that_truncation_gets_wrong():
    student = from_probs([0.6, 0.4]).requires_grad_()
    signal = on_student_support(student, DenseLogits(from_probs([0.9, 0.1])), 1)
    value = soft_target(student, signal, divergence="reverse_kl").total
    assert value.item() == pytest.approx(0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1), abs=1e-6)
    assert torch.autograd.grad(value, student)[0].abs().min() > 0.1


def test_p20_reverse_kl_on_its_own_support_keeps_the_teacher_s_mass_there():
    """The support follows the student. Without a tail the loss is least where its mass has left every support."""
    teacher = rows(1, 20, seed=4, scale=2.0)
    student = torch.zeros(1, 20, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        signal = on_student_support(student, DenseLogits(teacher), 5)
        loss = soft_target(student, signal, divergence="reverse_kl").total
        student = (student - torch.autograd.grad(loss, student)[0]).detach().requires_grad_()
    own, theirs = (side.softmax(-1).gather(-1, signal.ids_NK).detach() for side in (student, teacher))
    torch.testing.assert_close(own, theirs, atol=0.01, rtol=0)
    assert own.sum() > 0.5 and loss < 1e-3


def test_the_teacher_s_row_is_its_own_on_the_given_classes_with_its_own_tail():
    teacher = rows(2, 3, 7, seed=5)
    ids = torch.tensor([6, 0, 3]).expand(2, 3, 3)
    signal = on_support(DenseLogits(teacher), ids)
    probs = teacher.softmax(-1)
    assert signal.num_classes == 7 and signal.ids_NK.shape == (2, 3, 3) and signal.tail_logprob_N.shape == (2, 3)
    torch.testing.assert_close(signal.logprobs_NK.double().exp(), probs.gather(-1, signal.ids_NK), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        signal.tail_logprob_N.double().exp(), probs[..., [1, 2, 4, 5]].sum(-1), atol=1e-7, rtol=0
    )
    assert torch.equal(signal.ids_NK.sort(-1).values, ids.sort(-1).values)
    assert bool((signal.logprobs_NK.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 100])
def test_p29_a_projection_is_cut_chunk_by_chunk_to_the_same(chunk_rows):
    side = HiddenProjection(rows(3, 5, 4, seed=1), rows(9, 4, seed=2), rows(9, seed=3), softcap=4.0)
    dense = DenseLogits(project(side))
    for found, expected in (
        (best_of(side, 3, chunk_rows), best_of(dense, 3)),
        (on_support(side, dense.logits_NV.topk(2).indices, chunk_rows), best_of(dense, 2)),
        (on_student_support(side, dense, 4, chunk_rows), best_of(dense, 4)),
    ):
        assert torch.equal(found.ids_NK, expected.ids_NK) and not found.logprobs_NK.requires_grad
        torch.testing.assert_close(found.logprobs_NK, expected.logprobs_NK)
        torch.testing.assert_close(found.tail_logprob_N, expected.tail_logprob_N)


def test_keep_top_k_and_back_for_any_leading_dimensions():
    logits = rows(2, 3, 6, seed=7)
    whole = keep_top_k(DenseLogits(logits), 6)
    torch.testing.assert_close(spread_tail(whole).double(), logits.log_softmax(-1), atol=1e-6, rtol=0)
    assert torch.equal(whole.tail_logprob_N, torch.full((2, 3), -math.inf))
    flat = keep_top_k(DenseLogits(logits.view(6, 6)), 2)
    assert torch.equal(spread_tail(keep_top_k(DenseLogits(logits), 2)).view(6, 6), spread_tail(flat))
    tied = keep_top_k(DenseLogits(torch.zeros(1, 5)), 3)
    assert tied.ids_NK.tolist() == [[0, 1, 2]]


def test_no_rows_give_no_rows():
    assert best_of(DenseLogits(torch.zeros(0, 4)), 2).ids_NK.shape == (0, 2)
    assert on_student_support(torch.zeros(0, 4), DenseLogits(torch.zeros(0, 4)), 2).tail_logprob_N.shape == (0,)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="top_k=7 of 6 classes"):
        best_of(DenseLogits(torch.zeros(2, 6)), 7)
    with pytest.raises(ValueError, match="top_k=0 of 6 classes"):
        keep_top_k(DenseLogits(torch.zeros(2, 6)), 0)
    with pytest.raises(ValueError, match=r"support has rows of shape \(3,\), the signal \(2,\)"):
        on_support(DenseLogits(torch.zeros(2, 6)), torch.zeros(3, 1).long())
