"""Losses from hidden states against the same losses of the whole logits, which are the oracle in float64."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from research.losses import linear, linear_chunks
from research.losses.linear import linear_cross_entropy, linear_divergence
from research.losses.projection import project
from research.losses.soft_target import soft_target
from research.losses.supervised import cross_entropy
from research.records import DenseLogits, HiddenProjection, TopKLogprobs

WEIGHTED = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"teacher_mixture_weight": 0.3}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.7}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.0}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.001}),
    ("skewed_forward_kl", {"skew_weight": 0.1}),
    ("skewed_reverse_kl", {"skew_weight": 0.1}),
    ("total_variation", {}),
]
every_divergence = pytest.mark.parametrize(("name", "weights"), WEIGHTED)
V, D, DT = 23, 7, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, so that a chunk has several and a shorter last one."""
    monkeypatch.setitem(linear_chunks.BLOCK_LOGITS, "cpu", 3 * V)


def numbers(*shape: int, seed: int, scale: float = 1.0, dtype=torch.float64) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def leaves(*shape: int, seed: int = 0, width: int = V, bias: bool = True, dtype=torch.float64) -> list[torch.Tensor]:
    """Hidden states, head and bias of a student, each a leaf."""
    made = [numbers(*shape, D, seed=seed, dtype=dtype), numbers(width, D, seed=seed + 1, dtype=dtype)]
    made += [numbers(width, seed=seed + 2, dtype=dtype)] if bias else []
    return [tensor.requires_grad_() for tensor in made]


def teacher(*shape: int, seed: int = 10, width: int = V, softcap: float | None = None) -> HiddenProjection:
    return HiddenProjection(numbers(*shape, DT, seed=seed), numbers(width, DT, seed=seed + 1), None, softcap)


def cut(logits: torch.Tensor, kept: int) -> TopKLogprobs:
    logprobs, ids = logits.log_softmax(-1).sort(dim=-1, descending=True)
    width = logits.shape[-1]
    tail = logprobs[..., kept:].logsumexp(-1) if kept < width else torch.full(logits.shape[:-1], -math.inf).double()
    return TopKLogprobs(ids[..., :kept], logprobs[..., :kept], tail, width)


def mask_of(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)) > 0.4


def assert_same(ours, oracle, tensors, atol=1e-10) -> None:
    """Equal totals, counts and, through a mean and a factor, gradients."""
    assert ours.total.item() == pytest.approx(oracle.total.item(), abs=atol)
    torch.testing.assert_close(ours.count, oracle.count)
    found = torch.autograd.grad(-2.5 * ours.mean(), tensors, retain_graph=True)
    expected = torch.autograd.grad(-2.5 * oracle.mean(), tensors, retain_graph=True)
    for ours_gradient, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_gradient, theirs, atol=atol, rtol=0)


# -- equal to the whole -----------------------------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["dense", "hidden", "top_k", "top_V"])
def test_p15_value_and_gradients_are_those_of_the_whole_logits(name, weights, temperature, kind):
    for softcap, masked in itertools.product((None, 2.0), (False, True)):
        student = leaves(7, 6)
        projection, target = HiddenProjection(*student, softcap), teacher(7, 6, softcap=softcap)
        whole = project(target)
        signal = {"dense": DenseLogits(whole), "hidden": target}.get(kind) or cut(whole, 4 if kind == "top_k" else V)
        options = {"divergence": name, "temperature": temperature, **weights}
        options |= {"loss_mask_N": mask_of(7, 6) if masked else None}
        oracle = DenseLogits(whole) if kind == "hidden" else signal
        ours = linear_divergence(projection, signal, chunk_rows=10, **options)
        assert_same(ours, soft_target(project(projection), oracle, **options), student)


@every_divergence
@pytest.mark.parametrize("kept", [None, 4])
def test_gradcheck(name, weights, kept):
    """Numerical differences; it also differentiates the same graph twice, which forms the gradients a second time."""
    width = 6
    hidden, weight, bias = (
        tensor.requires_grad_() for tensor in (numbers(3, 2, seed=0), numbers(width, 2, seed=1), numbers(width, seed=2))
    )
    target = teacher(3, width=width)
    signal = target if kept is None else cut(project(target), kept)

    def total(hidden, weight, bias):
        student = HiddenProjection(hidden, weight, bias, 3.0)
        return linear_divergence(student, signal, divergence=name, temperature=2.0, chunk_rows=2, **weights).total

    assert torch.autograd.gradcheck(total, (hidden, weight, bias))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["all", "mask", "weight"])
def test_cross_entropy_is_that_of_the_whole_logits(smoothing, kind):
    student, labels = leaves(6, 7), torch.arange(42).view(6, 7) % V
    mask = mask_of(6, 7)
    weight = mask * numbers(6, 7, seed=8).abs()
    labels[~mask] = 0 if kind == "all" else -100
    given = {"mask": {"loss_mask_N": mask}, "weight": {"weight_N": weight}}.get(kind, {})
    for softcap in (None, 2.0):
        projection = HiddenProjection(*student, softcap)
        ours = linear_cross_entropy(projection, labels, label_smoothing=smoothing, chunk_rows=5, **given)
        assert_same(ours, cross_entropy(project(projection), labels, label_smoothing=smoothing, **given), student)


def test_p15_several_terms_of_the_same_hidden_states():
    """Half cross-entropy, half JSD, of one forward pass: as of whole logits, and 0 where student and teacher agree."""
    student, target, labels = leaves(40), teacher(40), torch.arange(40) % V
    jsd = {"divergence": "jsd", "teacher_mixture_weight": 0.5, "temperature": 2.0}
    projection = HiddenProjection(*student)
    hard = linear_cross_entropy(projection, labels, chunk_rows=16)
    soft = linear_divergence(projection, target, chunk_rows=16, **jsd)
    whole = project(projection)
    expected = 0.5 * cross_entropy(whole, labels).mean() + 0.5 * soft_target(whole, target, **jsd).mean()
    ours = 0.5 * hard.mean() + 0.5 * soft.mean()
    assert ours.item() == pytest.approx(expected.item(), abs=1e-12)
    for found, truth in zip(torch.autograd.grad(ours, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    own = HiddenProjection(*(tensor.detach() for tensor in student))
    assert abs(linear_divergence(projection, own, chunk_rows=16, **jsd).total.item()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_divergence
def test_p03_zero_at_equality_and_never_negative(name, weights, dtype):
    student = leaves(9, dtype=dtype)
    projection = HiddenProjection(*student)
    own = HiddenProjection(*(tensor.detach().clone() for tensor in student))
    total = linear_divergence(projection, own, divergence=name, chunk_rows=4, **weights).total
    assert total.item() == 0
    assert all(float(gradient.abs().max()) < 1e-5 for gradient in torch.autograd.grad(total, student))
    near = HiddenProjection(student[0].detach() + 1e-4, *(tensor.detach() for tensor in student[1:]))
    value = linear_divergence(projection, near, divergence=name, chunk_rows=4, **weights).total.item()
    wide = soft_target(project(projection).double(), DenseLogits(project(near).double()), divergence=name, **weights)
    assert value == pytest.approx(wide.total.item(), rel=0.1, abs=5e-7) and value > -5e-7  # of nine rows


# -- chunks -----------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Every operation's outputs: how large the largest is, and how many products are as wide as the vocabulary."""

    largest, head_products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                wide = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and tensor.shape[-1] == V
                self.head_products += wide
        return out


@contextmanager
def watched() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("shape", [(60,), (5, 12), (3, 4, 5), (1, 60)])
@pytest.mark.parametrize(("chunk_rows", "chunks"), [(7, 9), (20, 3), (59, 2), (60, 1), (100, 1)])
def test_p17_any_shape_is_cut_into_chunks_of_positions(shape, chunk_rows, chunks):
    student, target = leaves(*shape), teacher(*shape)
    flat = [student[0].detach().reshape(60, D).requires_grad_(), *student[1:]]
    with watched() as watch:
        ours = linear_divergence(HiddenProjection(*student), target, chunk_rows=chunk_rows)
    assert watch.head_products == 2 * chunks == 2 * math.ceil(60 / chunk_rows)  # the student's and the teacher's
    flat_target = HiddenProjection(target.hidden_ND.reshape(60, DT), target.weight_VD)
    theirs = linear_divergence(HiddenProjection(*flat), flat_target, chunk_rows=chunk_rows)
    assert torch.equal(ours.total, theirs.total)
    gradients = torch.autograd.grad(ours.mean(), student), torch.autograd.grad(theirs.mean(), flat)
    assert torch.equal(gradients[0][0].reshape(60, D), gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1]) and torch.equal(gradients[0][2], gradients[1][2])


@every_divergence
@pytest.mark.parametrize("kind", ["hidden", "top_k", "labels"])
def test_p29_no_tensor_is_larger_than_a_chunk_of_logits(name, weights, kind):
    shape, chunk_rows = (4, 50), 10
    student, target, labels = leaves(*shape), teacher(*shape), torch.arange(200).view(shape) % V
    signal = cut(project(target), 4) if kind == "top_k" else target
    with watched() as watch:
        if kind == "labels":
            total = linear_cross_entropy(HiddenProjection(*student), labels, chunk_rows=chunk_rows).total
        else:
            options = {"divergence": name, "chunk_rows": chunk_rows, "loss_mask_N": torch.ones(shape).bool()}
            total = linear_divergence(HiddenProjection(*student), signal, **options, **weights).total
        total.backward()
    largest_input = max(200 * D, 200 * (4 + 1), V * D)
    assert V * chunk_rows <= watch.largest <= max(V * chunk_rows, largest_input) < 200 * V
    with watched() as watch:
        soft_target(project(HiddenProjection(*student)), signal, divergence=name, **weights)
    assert watch.largest >= 200 * V


def test_masked_positions_cost_no_products_and_may_hold_anything():
    student, target, mask = leaves(40), teacher(40), torch.zeros(40).bool()
    mask[3:15] = True
    hidden = torch.where(mask[:, None], student[0].detach(), math.nan).requires_grad_()
    bad = HiddenProjection(torch.where(mask[:, None], target.hidden_ND, math.nan), target.weight_VD)
    with watched() as watch:
        ours = linear_divergence(HiddenProjection(hidden, *student[1:]), bad, loss_mask_N=mask, chunk_rows=6)
    assert watch.head_products == 2 * 2
    oracle = linear_divergence(HiddenProjection(student[0][3:15], *student[1:]), target.at(mask), chunk_rows=6)
    assert torch.equal(ours.total, oracle.total) and ours.count == 12
    gradient, in_head = torch.autograd.grad(ours.total, [hidden, student[1]])
    assert bool((gradient[~mask] == 0).all()) and bool(gradient[mask].isfinite().all())
    torch.testing.assert_close(in_head, torch.autograd.grad(oracle.total, student[1])[0])


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy"])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_nothing_trained_on_is_zero_and_attached(loss, chunk_rows):
    student, mask = leaves(6), torch.zeros(6).bool()
    projection = HiddenProjection(*student)
    if loss == "divergence":
        found = linear_divergence(projection, teacher(6), loss_mask_N=mask, chunk_rows=chunk_rows)
    else:
        found = linear_cross_entropy(projection, torch.full((6,), -100), mask, chunk_rows=chunk_rows)
    assert found.total.item() == 0 and found.count == 0 and found.mean().item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(found.mean(), student))


def test_few_positions_are_taken_whole_and_many_are_not():
    """Where nobody asks for chunks a handful of rows takes the plain way: there is nothing to save."""
    for rows, whole in ((linear.DENSE_ROWS, True), (linear.DENSE_ROWS + 1, False)):
        student = leaves(rows)
        found = linear_divergence(HiddenProjection(*student), teacher(rows))
        assert (found.total.grad_fn.name() != "_ChunkedTotalBackward") == whole
        assert_same(found, linear_divergence(HiddenProjection(*student), teacher(rows), chunk_rows=8), student)


def test_automatic_chunks_feed_the_products_and_spare_the_memory():
    cpu = torch.device("cpu")
    sizes = {width: linear.automatic_chunk_rows(width, cpu) for width in (2, 1000, 32_000, 50_257, 151_936, 10**9)}
    assert sizes == {2: 4096, 1000: 4096, 32_000: 512, 50_257: 256, 151_936: 256, 10**9: 256}


# -- what asks for gradients ------------------------------------------------------------------------------------------


def test_p52_a_second_backward_of_a_kept_graph_and_two_calls_give_the_same():
    student, target = leaves(20), teacher(20)
    projection = HiddenProjection(*student)
    total = linear_divergence(projection, target, chunk_rows=8).total
    for factor in (1.0, 3.0, -0.5):
        (factor * total).backward(retain_graph=True)
    summed = [tensor.grad.clone() for tensor in student]
    again = linear_divergence(projection, target, chunk_rows=8).total
    for ours, once in zip(summed, torch.autograd.grad(again, student), strict=True):
        torch.testing.assert_close(ours, 3.5 * once, atol=1e-12, rtol=1e-12)
    assert torch.equal(total, again)


def test_only_what_asks_for_a_gradient_is_given_one():
    target = teacher(20)
    for wanted in itertools.product((False, True), repeat=3):
        student = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(leaves(20), wanted, strict=True)]
        total = linear_divergence(HiddenProjection(*student), target, chunk_rows=8).total
        assert total.requires_grad == any(wanted)
        if any(wanted):
            total.backward()
        assert [tensor.grad is not None for tensor in student] == list(wanted)
    with torch.no_grad():
        found = linear_divergence(HiddenProjection(*leaves(20)), target, chunk_rows=8).total
    assert not found.requires_grad and torch.equal(found, total.detach())


def test_no_gradient_reaches_the_teacher():
    target = HiddenProjection(
        *(tensor.requires_grad_() for tensor in (numbers(40, DT, seed=1), numbers(V, DT, seed=2)))
    )
    for chunk_rows in (None, 8, 100):
        linear_divergence(HiddenProjection(*leaves(40)), target, chunk_rows=chunk_rows).total.backward()
    assert target.hidden_ND.grad is None and target.weight_VD.grad is None


def test_a_tied_head_has_both_gradients():
    table = numbers(V, D, seed=3).requires_grad_()
    target, ids = teacher(12), torch.arange(12)

    def total(loss):
        return loss(HiddenProjection(torch.tanh(table[ids]), table)).total

    ours = torch.autograd.grad(total(lambda side: linear_divergence(side, target, chunk_rows=5)), table)
    oracle = torch.autograd.grad(total(lambda side: soft_target(project(side), target)), table)
    torch.testing.assert_close(ours, oracle, atol=1e-12, rtol=0)


def test_it_is_not_twice_differentiable():
    student = leaves(20)
    total = linear_divergence(HiddenProjection(*student), teacher(20), chunk_rows=8).total
    (gradient,) = torch.autograd.grad(total.square(), student[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# -- padded heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [8, 136])
@pytest.mark.parametrize("kind", ["dense", "hidden"])
@every_divergence
def test_p18_padded_heads_compare_the_classes_they_share(name, weights, padding, kind):
    student = leaves(40, width=V + padding)
    target = teacher(40, width=V + padding // 2)
    signal = target if kind == "hidden" else DenseLogits(project(target))
    ours = linear_divergence(
        HiddenProjection(*student), signal, divergence=name, num_classes=V, chunk_rows=16, **weights
    )
    shared = HiddenProjection(target.hidden_ND, target.weight_VD[:V])
    bare = HiddenProjection(student[0], student[1][:V], student[2][:V])
    oracle = soft_target(project(bare), shared, divergence=name, **weights)
    assert_same(ours, oracle, student, atol=1e-12)
    head = torch.autograd.grad(oracle.total, student[1])[0]
    assert head.shape == (V + padding, D) and not head[V:].any() and head[:V].any()
    with pytest.raises(ValueError, match=rf"student has {V + padding} classes .*give num_classes"):
        linear_divergence(HiddenProjection(*student), signal, divergence=name, **weights)


def test_p18_cross_entropy_over_the_tokens_alone():
    student, labels = leaves(40, width=V + 8), torch.arange(40) % V
    ours = linear_cross_entropy(HiddenProjection(*student), labels, num_classes=V, chunk_rows=16)
    bare = HiddenProjection(student[0], student[1][:V], student[2][:V])
    assert_same(ours, cross_entropy(project(bare), labels), student)
    with pytest.raises(ValueError, match=f"labels run from 0 to {V + 2}.*{V} classes"):
        linear_cross_entropy(HiddenProjection(*student), torch.full((40,), V + 2) * (labels > 0), num_classes=V)


# -- precision --------------------------------------------------------------------------------------------------------


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize(
    "divergence", [("forward_kl", {}), ("reverse_kl", {}), ("jsd", {"teacher_mixture_weight": 0.5})]
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2), (torch.float16, 3e-2)], ids=str
)
def test_p08_precision_against_float64_on_the_same_rounded_inputs(divergence, dtype, bound):
    """A real width, 400 positions: errors in units of the largest gradient, and those of whole logits."""
    name, weights = divergence
    hidden, weight = numbers(400, 32, seed=1, dtype=dtype), numbers(500, 32, seed=2, scale=0.4, dtype=dtype)
    target = HiddenProjection(numbers(400, 16, seed=3, dtype=dtype), numbers(500, 16, seed=4, scale=0.4, dtype=dtype))
    wide = HiddenProjection(target.hidden_ND.double(), target.weight_VD.double())

    def run(loss, side, tensors):
        tensors = [tensor.clone().requires_grad_() for tensor in tensors]
        mean = loss(HiddenProjection(*tensors), side).mean()
        return mean.item(), torch.autograd.grad(mean, tensors)

    def whole(student, side):
        return soft_target(project(student), side, divergence=name, **weights)

    def ours(student, side):
        return linear_divergence(student, side, divergence=name, chunk_rows=64, **weights)

    truth, gradients = run(whole, wide, [hidden.double(), weight.double()])
    value, found = run(ours, target, [hidden, weight])
    _, naive = run(whole, target, [hidden, weight])
    assert value == pytest.approx(truth, rel=bound / 5)
    errors = [relative_error(gradient, exact) for gradient, exact in zip(found, gradients, strict=True)]
    naive_errors = [relative_error(gradient, exact) for gradient, exact in zip(naive, gradients, strict=True)]
    assert [gradient.dtype for gradient in found] == [dtype, dtype]
    assert max(errors) <= bound
    assert all(ours <= 2 * theirs + 1e-6 for ours, theirs in zip(errors, naive_errors, strict=True))


def test_a_float32_sum_of_the_head_s_gradient_keeps_what_bf16_loses_over_many_chunks():
    hidden, weight = numbers(400, 8, seed=1).bfloat16(), numbers(V, 8, seed=2).bfloat16()
    target = teacher(400)
    errors = {}
    for wide, chunk_rows in ((False, 400), (False, 2), (True, 2)):
        head = weight.clone().requires_grad_()
        options = {"chunk_rows": chunk_rows, "float32_head_gradient": wide}
        (found,) = torch.autograd.grad(linear_divergence(HiddenProjection(hidden, head), target, **options).total, head)
        exact = weight.double().requires_grad_()
        oracle = soft_target(project(HiddenProjection(hidden.double(), exact)), target)
        errors[wide, chunk_rows] = relative_error(found, torch.autograd.grad(oracle.total, exact)[0])
        assert found.dtype == torch.bfloat16
    assert errors[True, 2] < 1.5 * errors[False, 400] < 0.5 * errors[False, 2]


def test_autocast_takes_the_products_in_its_precision():
    student, target = leaves(50, dtype=torch.float32, bias=False), teacher(50)
    target = HiddenProjection(target.hidden_ND.float(), target.weight_VD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_divergence(HiddenProjection(*student), target, chunk_rows=16)
        ours.total.backward()
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in student]
    oracle = linear_divergence(HiddenProjection(*rounded), target, chunk_rows=16)
    oracle.total.backward()
    assert torch.equal(ours.total, oracle.total)
    for tensor, half in zip(student, rounded, strict=True):
        assert tensor.grad.dtype == torch.float32 and torch.equal(tensor.grad, half.grad.float())


def test_classes_that_do_not_exist_and_infinite_values_are_those_of_the_definition():
    """A bias of -inf takes a class away; where only the student lacks it the KL is infinite, its gradient 0."""
    for absent, infinite in (((True, True), False), ((False, True), True), ((True, False), False)):
        student, target = leaves(9), teacher(9)
        biases = [torch.zeros(V, dtype=torch.float64), student[2].detach().clone()]
        for bias, gone in zip(biases, absent, strict=True):
            bias[4] = -math.inf if gone else bias[4]
        projection = HiddenProjection(*student[:2], biases[1])
        signal = HiddenProjection(target.hidden_ND, target.weight_VD, biases[0])
        ours = linear_divergence(projection, signal, chunk_rows=4)
        oracle = soft_target(project(projection), signal)
        assert math.isinf(ours.total.item()) == infinite
        if not infinite:
            assert_same(ours, oracle, student[:2])
        assert bool(torch.autograd.grad(ours.total, student[0])[0].isfinite().all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_elementwise_work_gives_the_same():
    """One form is enough to see that the compiled one is called; every block has three rows, so it compiles once."""
    student, target = leaves(36), teacher(36)
    options = {"divergence": "jsd", "chunk_rows": 12, "teacher_mixture_weight": 0.3}
    ours = linear_divergence(HiddenProjection(*student), target, compiled=True, **options)
    assert_same(ours, linear_divergence(HiddenProjection(*student), target, **options), student)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    student, target = HiddenProjection(*leaves(6)), teacher(6)
    for match, given in (
        (r"teacher_mixture_weight=0\.5 was given", {"teacher_mixture_weight": 0.5}),
        ("needs teacher_mixture_weight", {"divergence": "jsd"}),
        ("did you mean 'forward_kl'", {"divergence": "foward_kl"}),
        ("temperature=0", {"temperature": 0}),
        (r"loss_mask has shape \(5,\)", {"loss_mask_N": torch.ones(5).bool()}),
        ("chunk_rows=0", {"chunk_rows": 0}),
        ("num_classes=24 of a head with 23 rows", {"num_classes": V + 1}),
    ):
        with pytest.raises(ValueError, match=match):
            linear_divergence(student, target, **given)
    with pytest.raises(ValueError, match=r"positions of shape \(6,\) and the teacher of \(5,\)"):
        linear_divergence(student, teacher(5))
    with pytest.raises(ValueError, match="student has 23 classes and the teacher 22"):
        linear_divergence(student, teacher(6, width=22))
    with pytest.raises(ValueError, match="student has 20 classes and the teacher 23"):
        linear_divergence(student, cut(project(target), 4), num_classes=20)
    with pytest.raises(ValueError, match=r"hidden states have shape \(6, 7\) and the head \(23, 6\)"):
        linear_divergence(HiddenProjection(student.hidden_ND, student.weight_VD[:, :6]), target)
    with pytest.raises(TypeError, match="type Tensor"):
        linear_divergence(student, project(target))
    for match, given in (
        ("label_smoothing=1", {"label_smoothing": 1.0}),
        ("both given", {"loss_mask_N": torch.ones(6).bool(), "weight_N": torch.ones(6)}),
        (r"loss_mask has shape \(5,\)", {"weight_N": torch.ones(5)}),
    ):
        with pytest.raises(ValueError, match=match):
            linear_cross_entropy(student, torch.zeros(6).long(), **given)
    with pytest.raises(TypeError, match=r"loss weights have dtype torch\.int64"):
        linear_cross_entropy(student, torch.zeros(6).long(), weight_N=torch.ones(6).long())
    with pytest.raises(ValueError, match=r"labels have shape \(5,\)"):
        linear_cross_entropy(student, torch.zeros(5).long())


def test_soft_target_takes_hidden_states_on_either_side():
    """As student they go to the chunks, with every option; as teacher of written-out logits they are projected."""
    student, target, mask = leaves(6, 7), teacher(6, 7), mask_of(6, 7)
    projection = HiddenProjection(*student)
    options = {"divergence": "jsd", "temperature": 3.0, "teacher_mixture_weight": 0.3, "loss_mask_N": mask}
    for squared in (True, False):
        options |= {"scale_by_temperature_squared": squared}
        oracle = soft_target(project(projection), DenseLogits(project(target)), **options)
        for ours in (
            soft_target(projection, target, **options),
            soft_target(project(projection), target, **options),
            soft_target(projection, DenseLogits(project(target)), **options),
        ):
            assert_same(ours, oracle, student)
        sparse = cut(project(target), 4)
        assert_same(
            soft_target(projection, sparse, **options), soft_target(project(projection), sparse, **options), student
        )
    with pytest.raises(ValueError, match=r"\(6, 7, 23\) and teacher logits \(6, 6, 23\)"):
        soft_target(project(projection), teacher(6, 6), loss_mask_N=mask)
    bad = HiddenProjection(torch.where(mask[..., None], target.hidden_ND, math.nan), target.weight_VD)
    total = soft_target(project(projection), bad, loss_mask_N=mask).total
    assert bool(torch.autograd.grad(total, student[0])[0].isfinite().all())
