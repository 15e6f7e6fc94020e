"""Log-probabilities of single classes from hidden states, against those of the whole logits in float64."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from research.losses import linear_chunks
from research.losses.linear import linear_logprobs
from research.losses.policy import clipped_surrogate
from research.losses.projection import project
from research.records import HiddenProjection

V, D = 23, 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, so that a chunk has several and a shorter last one."""
    monkeypatch.setitem(linear_chunks.BLOCK_LOGITS, "cpu", 3 * V)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*shape: int, width: int = V, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states, head and bias of a student, each a leaf."""
    made = [numbers(*shape, D, seed=0, dtype=dtype), numbers(width, D, seed=1), numbers(width, seed=2)]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def labels_of(*shape: int) -> Tensor:
    return (torch.arange(math.prod(shape)) * 5 % V).view(shape)


def by_hand(student: HiddenProjection, label_N: Tensor, temperature: float) -> Tensor:
    """The definition, on logits written out by hand."""
    logits_NV = student.hidden_ND @ student.weight_VD.T
    logits_NV = logits_NV if student.bias_V is None else logits_NV + student.bias_V
    if student.softcap is not None:
        logits_NV = student.softcap * torch.tanh(logits_NV / student.softcap)
    return (logits_NV / temperature).log_softmax(-1).gather(-1, label_N.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shape", [(42,), (6, 7)])
def test_every_position_has_its_own_value_and_its_own_gradient(
    shape: tuple[int, ...], softcap: float | None, temperature: float
) -> None:
    """Weights of both signs, and one of 0: what a policy gradient sends back is different at every place."""
    student, label = leaves(*shape), labels_of(*shape)
    projection, weight = HiddenProjection(*student, softcap), numbers(*shape, seed=9)
    weight.view(-1)[3] = 0.0
    oracle = by_hand(projection, label, temperature)
    expected = torch.autograd.grad((weight * oracle).sum(), student)
    for chunk_rows in (None, 1, 10, 42, 100):
        ours = linear_logprobs(projection, label, temperature=temperature, chunk_rows=chunk_rows)
        torch.testing.assert_close(ours, oracle, atol=1e-12, rtol=0)
        found = torch.autograd.grad((weight * ours).sum(), student)
        for gradient, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, truth, atol=1e-11, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    tensors = [numbers(5, 2, seed=0), numbers(6, 2, seed=1), numbers(6, seed=2)]
    mask = torch.tensor([True, False, True, True, False]) if masked else None

    def values(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = HiddenProjection(hidden, weight, bias, 3.0)
        return linear_logprobs(student, torch.tensor([0, 5, 2, 2, 1]), mask, temperature=2.0, chunk_rows=2)

    assert torch.autograd.gradcheck(values, [tensor.requires_grad_() for tensor in tensors])


def test_a_clipped_policy_gradient_and_a_second_backward_of_it() -> None:
    student, label = leaves(40), labels_of(40)
    projection, advantage = HiddenProjection(*student), numbers(40, seed=4)
    sampler = by_hand(projection, label, 1.0).detach() + 0.4 * numbers(40, seed=5)

    def loss(logprob_N: Tensor) -> Tensor:
        return clipped_surrogate(logprob_N, sampler, advantage, clip_low=0.2, clip_high=0.3).sum()

    oracle, ours = (
        loss(by_hand(projection, label, 1.0)), loss(linear_logprobs(projection, label, chunk_rows=16))
    )  # fmt: skip
    expected = torch.autograd.grad(oracle, student)
    for _ in range(2):
        for gradient, truth in zip(torch.autograd.grad(ours, student, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(gradient, truth, atol=1e-11, rtol=0)


def test_masked_positions_cost_nothing_and_may_hold_anything() -> None:
    student, label, mask = leaves(6, 7), labels_of(6, 7), torch.zeros(6, 7).bool()
    mask[1:3] = mask[5, 2] = True
    hidden = torch.where(mask[..., None], student[0].detach(), math.nan).requires_grad_()
    label = torch.where(mask, label, -100)
    ours = linear_logprobs(HiddenProjection(hidden, *student[1:]), label, mask, chunk_rows=4)
    oracle = by_hand(HiddenProjection(student[0][mask], *student[1:]), label[mask], 1.0)
    assert ours.shape == label.shape and not ours[~mask].any()
    torch.testing.assert_close(ours[mask], oracle, atol=1e-12, rtol=0)
    weight = numbers(6, 7, seed=9)
    in_hidden, in_head = torch.autograd.grad((weight * ours).sum(), [hidden, student[1]])
    truth = torch.autograd.grad((weight[mask] * oracle).sum(), student[:2])
    assert not in_hidden[~mask].any()
    torch.testing.assert_close(in_hidden[mask], truth[0][mask], atol=1e-11, rtol=0)
    torch.testing.assert_close(in_head, truth[1], atol=1e-11, rtol=0)
    nothing = linear_logprobs(HiddenProjection(*student), label, torch.zeros(6, 7).bool())
    assert not nothing.any() and not any(part.any() for part in torch.autograd.grad(nothing.sum(), student))


# -- what exists, and what is kept ------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The most numbers in any tensor that an operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@contextmanager
def watched() -> Iterator[tuple[Watch, dict[int, int]]]:
    """The watch, and storage -> numbers in it of all that the graph keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield watch, kept


def in_chunks_by_autograd(student: HiddenProjection, label: Tensor) -> Tensor:
    """Chunk by chunk and no more: what the graph keeps is all chunks, together all logits."""
    pairs = zip(student.hidden_ND.split(10), label.split(10), strict=True)
    return torch.cat([by_hand(HiddenProjection(part, student.weight_VD), some, 1.0) for part, some in pairs])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_p29_no_logits_but_a_chunk_s_exist_and_none_are_kept(temperature: float) -> None:
    rows, chunk_rows, label = 200, 10, labels_of(200)

    def step(logprobs: Callable[[HiddenProjection], Tensor]) -> tuple[int, int]:
        student = HiddenProjection(*leaves(rows))
        with watched() as (watch, kept):
            logprob_N = logprobs(student)
            (logprob_N * numbers(rows, seed=9)).sum().backward()
        return watch.largest, sum(kept.values())

    largest, kept = step(
        lambda student: linear_logprobs(student, label, temperature=temperature, chunk_rows=chunk_rows)
    )
    assert largest <= max(V * chunk_rows, rows * D) < rows * V / 2
    assert kept <= rows * D + V * D + V + 3 * rows < rows * V, "the student's own tensors, and numbers of rows"
    assert step(lambda student: in_chunks_by_autograd(student, label))[1] >= rows * V, "the fault is seen"
    assert step(lambda student: by_hand(student, label, temperature))[0] >= rows * V


def test_without_gradient_nothing_is_kept_and_a_head_alone_can_have_one() -> None:
    student, label = leaves(40), labels_of(40)
    with torch.no_grad():
        assert not linear_logprobs(HiddenProjection(*student), label).requires_grad
    for wanted in itertools.product((False, True), repeat=3):
        given = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(student, wanted, strict=True)]
        logprob_N = linear_logprobs(HiddenProjection(*given), label, chunk_rows=8)
        assert logprob_N.requires_grad == any(wanted)
        if any(wanted):
            logprob_N.sum().backward()
        assert [tensor.grad is not None for tensor in given] == list(wanted)


# -- precision, padded heads, bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_p08_half_precision_is_computed_in_float32(dtype: torch.dtype, bound: float) -> None:
    """Against float64 of the same rounded numbers; the values are float32 whatever the student is."""
    student, label, weight = leaves(400, dtype=dtype), labels_of(400), numbers(400, seed=9)
    wide = [tensor.detach().double().requires_grad_() for tensor in student]
    oracle = by_hand(HiddenProjection(*wide), label, 1.0)
    truth = torch.autograd.grad((weight * oracle).mean(), wide)
    for options in ({}, {"float32_head_gradient": True}):
        ours = linear_logprobs(HiddenProjection(*student), label, chunk_rows=16, **options)
        assert ours.dtype == torch.float32
        assert float((ours - oracle).detach().abs().max()) < 40 * bound
        for found, exact in zip(torch.autograd.grad((weight * ours).mean(), student), truth, strict=True):
            assert found.dtype == dtype
            assert float((found.double() - exact).abs().max() / exact.abs().max()) < 4 * bound


def test_a_float32_sum_of_the_head_s_gradient_keeps_what_bf16_loses_over_many_chunks() -> None:
    hidden, weight = numbers(400, 8, seed=1).bfloat16(), numbers(V, 8, seed=2).bfloat16()
    label, errors = labels_of(400), {}
    exact = weight.double().requires_grad_()
    (truth,) = torch.autograd.grad(by_hand(HiddenProjection(hidden.double(), exact), label, 1.0).sum(), exact)
    for wide in (False, True):
        head = weight.clone().requires_grad_()
        ours = linear_logprobs(HiddenProjection(hidden, head), label, chunk_rows=2, float32_head_gradient=wide)
        (found,) = torch.autograd.grad(ours.sum(), head)
        errors[wide] = float((found.double() - truth).abs().max() / truth.abs().max())
    assert errors[True] < 0.5 * errors[False]


def test_autocast_takes_the_products_in_its_precision() -> None:
    student, label = leaves(50, dtype=torch.float32), labels_of(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logprobs(HiddenProjection(*student), label, chunk_rows=16)
    ours.sum().backward()
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in student]
    theirs = linear_logprobs(HiddenProjection(*rounded), label, chunk_rows=16)
    theirs.sum().backward()
    assert torch.equal(ours, theirs)
    for tensor, half in zip(student, rounded, strict=True):
        assert tensor.grad is not None and half.grad is not None and torch.equal(tensor.grad, half.grad.float())


def test_p18_rows_of_a_head_that_stand_for_no_token_have_no_probability() -> None:
    student, label = leaves(40, width=V + 8), labels_of(40)
    ours = linear_logprobs(HiddenProjection(*student), label, num_classes=V, chunk_rows=16)
    oracle = by_hand(HiddenProjection(student[0], student[1][:V], student[2][:V]), label, 1.0)
    torch.testing.assert_close(ours, oracle, atol=1e-12, rtol=0)
    head = torch.autograd.grad(ours.sum(), student[1])[0]
    assert not head[V:].any() and bool(head[:V].any())


def test_a_class_that_does_not_exist_has_no_probability() -> None:
    student = leaves(9)
    with torch.no_grad():
        student[2][4] = -math.inf
    label = torch.tensor([4, *range(8)])
    ours = linear_logprobs(HiddenProjection(*student), label, chunk_rows=4)
    oracle = torch.log_softmax(project(HiddenProjection(*student)), -1).gather(-1, label[:, None]).squeeze(-1)
    assert ours[0].item() == -math.inf
    torch.testing.assert_close(ours, oracle, atol=1e-12, rtol=0)
    assert bool(torch.autograd.grad(ours[1:4].sum(), student[0])[0].isfinite().all())


def test_bad_input_is_named() -> None:
    student = HiddenProjection(*leaves(6))
    for told, label, options in (
        ("temperature=0.0", labels_of(6), {"temperature": 0.0}),
        ("chunk_rows=0: expected at least 1", labels_of(6), {"chunk_rows": 0}),
        (r"labels have shape \(5,\)", labels_of(5), {}),
        (f"labels run from 0 to {V}", torch.tensor([0, 1, V, 2, 3, 4]), {}),
        (r"loss_mask has shape \(5,\)", labels_of(6), {"loss_mask_N": torch.ones(5).bool()}),
        ("num_classes=99", labels_of(6), {"num_classes": 99}),
    ):
        with pytest.raises(ValueError, match=told):
            linear_logprobs(student, label, **options)
    with pytest.raises(TypeError, match=r"torch.float32: expected integer class ids"):
        linear_logprobs(student, torch.zeros(6))
