"""Masked cross-entropy."""

import math

import pytest
import torch

from research.losses.supervised import cross_entropy


def rows(num, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num, width, generator=generator, dtype=torch.float64)).to(dtype)


def test_hand_value():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    loss = cross_entropy(logits, torch.tensor([0, 2]))
    assert loss.total.item() == pytest.approx(-math.log(0.7) - math.log(0.5), abs=1e-12)
    assert loss.count.item() == 2 and loss.count.dtype == torch.int64
    assert loss.mean().item() == pytest.approx(-math.log(0.35) / 2, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_matches_the_loop_oracle(oracle, smoothing):
    logits, labels = rows(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    truth = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for index, logprob in enumerate(oracle.log_softmax(row)):
            target = smoothing / 5 + (1 - smoothing if index == label else 0.0)
            truth -= target * logprob
    assert cross_entropy(logits, labels, label_smoothing=smoothing).total.item() == pytest.approx(truth, abs=1e-11)
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, labels, label_smoothing=smoothing).total, logits.requires_grad_()
    )


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("label", [-100, 10**9])
def test_p32_p36_masked_positions_add_nothing_whatever_they_hold(garbage, label):
    mask = torch.tensor([True, False, True, False])
    clean = rows(4, 6)
    labels = torch.tensor([1, label, 3, label])
    dirty = clean.clone()
    dirty[~mask] = garbage
    dirty.requires_grad_()
    loss = cross_entropy(dirty, labels, mask, label_smoothing=0.1)
    loss.total.backward()
    kept = clean[mask].requires_grad_()
    sliced = cross_entropy(kept, labels[mask], label_smoothing=0.1)
    sliced.total.backward()
    assert loss.total.item() == pytest.approx(sliced.total.item(), abs=1e-12)
    assert loss.count.item() == sliced.count.item() == 2
    assert torch.equal(dirty.grad[~mask], torch.zeros(2, 6, dtype=torch.float64))
    assert torch.allclose(dirty.grad[mask], kept.grad, atol=1e-12)


@pytest.mark.parametrize("pads", [0, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_p32_padding_changes_neither_value_nor_gradient(pads, side):
    core, labels = rows(5, 4, 1), torch.tensor([0, 1, 2, 3, 0])
    padding, ignored = torch.full((pads, 4), math.nan, dtype=torch.float64), torch.full((pads,), -100)
    order = (padding, core) if side == "left" else (core, padding)
    logits = torch.cat(order).requires_grad_()
    padded_labels = torch.cat((ignored, labels) if side == "left" else (labels, ignored))
    mask = padded_labels >= 0
    loss = cross_entropy(logits, padded_labels, mask)
    loss.mean().backward()
    plain = core.clone().requires_grad_()
    reference = cross_entropy(plain, labels)
    reference.mean().backward()
    assert loss.mean().item() == pytest.approx(reference.mean().item(), abs=1e-12)
    assert torch.allclose(logits.grad[mask], plain.grad, atol=1e-12)


def test_p36_nothing_trained_on_is_zero_on_the_graph():
    logits = torch.full((3, 4), math.nan, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -100), torch.zeros(3, dtype=torch.bool))
    assert loss.total.item() == 0 and loss.count.item() == 0 and loss.mean().item() == 0
    loss.mean().backward()
    assert torch.equal(logits.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_in_short_floats(dtype):
    logits = torch.tensor([[1e4, -1e4, -math.inf], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 1]))
    loss.total.backward()
    span = (logits[0, 0].double() - logits[0, 1].double()).item()
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(span + math.log(2), rel=1e-6)
    assert logits.grad.flatten().tolist() == pytest.approx([1, -1, 0, 0, -0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_a_trained_label_outside_the_classes_is_refused(label):
    with pytest.raises(ValueError, match=rf"labels run from .*{label}.*4 classes.*loss_mask"):
        cross_entropy(rows(2, 4), torch.tensor([0 if label > 0 else 3, label]))


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="label_smoothing=1"):
        cross_entropy(rows(2, 4), torch.tensor([0, 1]), label_smoothing=1.0)
    with pytest.raises(TypeError, match="float32"):
        cross_entropy(rows(2, 4), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        cross_entropy(rows(2, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match=r"torch\.bool"):
        cross_entropy(rows(2, 4), torch.tensor([0, 1]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"loss_mask has shape \(1,\)"):
        cross_entropy(rows(2, 4), torch.tensor([0, 1]), torch.tensor([True]))


def test_no_rows_at_all():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.int64))
    assert loss.mean().item() == 0 and loss.count.item() == 0
    loss.mean().backward()
