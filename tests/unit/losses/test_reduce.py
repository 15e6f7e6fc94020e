"""Sums and counts under a mask."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.losses.reduce import fill_masked_rows, masked_sum


def test_sum_and_count_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    loss = masked_sum(values, torch.tensor([True, False, True, False]))
    assert (loss.total.item(), loss.count.item()) == (5.0, 2)
    loss = masked_sum(values)
    assert (loss.total.item(), loss.count.item()) == (15.0, 4)
    assert loss.count.dtype == torch.int64 and loss.total.shape == loss.count.shape == ()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_p36_masked_positions_may_hold_anything(garbage):
    values = torch.tensor([1.0, garbage, 3.0], requires_grad=True)
    loss = masked_sum(values, torch.tensor([True, False, True]))
    loss.total.backward()
    assert loss.total.item() == 4
    assert values.grad.tolist() == [1, 0, 1]


def test_p10_rows_filled_before_a_function_keep_its_gradient_finite():
    logits = torch.tensor([[1.0, 2.0], [-math.inf, -math.inf]], requires_grad=True)
    mask = torch.tensor([True, False])
    late = masked_sum(torch.log_softmax(logits, -1).sum(-1), mask).total
    (gradient,) = torch.autograd.grad(late, logits)
    assert gradient.isnan().any()  # what the filling is for
    early = masked_sum(torch.log_softmax(fill_masked_rows(logits, mask), -1).sum(-1), mask).total
    (gradient,) = torch.autograd.grad(early, logits)
    assert torch.isfinite(gradient).all() and gradient[1].tolist() == [0, 0]
    assert fill_masked_rows(logits, None) is logits


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(mask=st.lists(st.booleans(), max_size=12), seed=st.integers(0, 10**6))
def test_p32_a_mask_equals_a_slice(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(mask), generator=generator, dtype=torch.float64, requires_grad=True)
    mask_N = torch.tensor(mask, dtype=torch.bool)
    masked, sliced = masked_sum(values, mask_N), masked_sum(values[mask_N])
    assert masked.total.item() == pytest.approx(sliced.total.item(), abs=1e-12)
    assert masked.count.item() == sliced.count.item() == sum(mask)
    masked.mean().backward()
    expected = mask_N.double() / max(1, sum(mask))
    assert torch.allclose(values.grad, expected)


def test_bad_masks_are_refused():
    with pytest.raises(TypeError, match=r"float32.*torch\.bool"):
        masked_sum(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        masked_sum(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(3,\)"):
        fill_masked_rows(torch.zeros(3, 5), torch.ones(3, 1, dtype=torch.bool))
