"""Properties of every divergence on random shapes, dtypes and extreme logits, and its precision in short floats."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from research.losses.divergences import DIVERGENCES

WEIGHTED = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"teacher_mixture_weight": 0.5}),
    ("jsd", {"teacher_mixture_weight": 1e-4}),
    ("normalised_jsd", {"teacher_mixture_weight": 1e-4}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.9}),
    ("skewed_forward_kl", {"skew_weight": 0.1}),
    ("skewed_reverse_kl", {"skew_weight": 0.1}),
    ("total_variation", {}),
]
NAMES = ["-".join([name, *(str(value) for value in weights.values())]) for name, weights in WEIGHTED]
SHORT = [torch.float32, torch.bfloat16, torch.float16]
bounded = settings(max_examples=40, deadline=None, derandomize=True, database=None)
every_divergence = pytest.mark.parametrize(("name", "weights"), WEIGHTED, ids=NAMES)


def make_logits(kind: str, num: int, width: int, seed: int) -> torch.Tensor:
    """Float64 logits: normal; every entry +-1e4; one class at 1e4 above the rest; or normal and tiny."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num, width, generator=generator, dtype=torch.float64)
    if kind == "extreme":
        return 1e4 * torch.sign(normal)
    if kind == "one_hot":
        hot = torch.nn.functional.one_hot(normal.argmax(-1), width) if width else normal
        return 2e4 * hot.double() - 1e4
    return normal * {"normal": 4.0, "tiny": 1e-3}[kind]


@st.composite
def pairs(draw):
    """A student and a teacher of one shape, with some classes -inf in both, and a temperature."""
    num, width, seed = draw(st.integers(0, 4)), draw(st.integers(1, 7)), draw(st.integers(0, 10**6))
    kinds = st.sampled_from(["normal", "extreme", "one_hot", "tiny"])
    student = make_logits(draw(kinds), num, width, seed)
    teacher = make_logits(draw(kinds), num, width, seed + 1)
    absent = draw(st.sets(st.integers(0, width - 1), max_size=width - 1))
    for logits in (student, teacher):
        logits[:, sorted(absent)] = -math.inf
    # Below temperature 1 the true reverse-KL gradient at +-1e4 exceeds the largest float16.
    return student, teacher, draw(st.sampled_from([1.0, 4.0, 100.0]))


@every_divergence
@bounded
@given(pair=pairs(), dtypes=st.tuples(st.sampled_from(SHORT), st.sampled_from(SHORT)))
def test_value_and_gradient_are_finite_and_match_the_oracle(oracle, name, weights, pair, dtypes):
    student, teacher, temperature = pair
    student, teacher = student.to(dtypes[0]).requires_grad_(), teacher.to(dtypes[1])
    value = DIVERGENCES[name](student, teacher, temperature=temperature, **weights)
    assert value.dtype == torch.float32 and value.shape == student.shape[:-1]
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(student.grad).all()
    assert (value >= -1e-7).all()
    weight = next(iter(weights.values()), None)
    for row, got in enumerate(value.tolist()):
        truth = oracle.divergence(name, student[row].tolist(), teacher[row].tolist(), temperature, weight)
        assert got == pytest.approx(truth, abs=2e-6, rel=1e-5)


@every_divergence
@bounded
@given(pair=pairs(), dtype=st.sampled_from([*SHORT, torch.float64]))
def test_equal_rows_give_exactly_zero(name, weights, pair, dtype):
    _, teacher, temperature = pair
    teacher = teacher.to(dtype)
    student = teacher.clone().requires_grad_()
    value = DIVERGENCES[name](student, teacher, temperature=temperature, **weights)
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(student.grad.double().abs() < 1e-6, torch.ones_like(student, dtype=torch.bool))


@every_divergence
@bounded
@given(pair=pairs(), seed=st.integers(0, 10**6), shift=st.floats(-50, 50), cut=st.integers(0, 4))
def test_order_of_classes_and_rows_chunks_and_constants_change_nothing(name, weights, pair, seed, shift, cut):
    student, teacher, temperature = pair
    function, generator = DIVERGENCES[name], torch.Generator().manual_seed(seed)
    value = function(student, teacher, temperature=temperature, **weights)
    classes = torch.randperm(student.shape[1], generator=generator)
    permuted = function(student[:, classes], teacher[:, classes], temperature=temperature, **weights)
    assert torch.allclose(permuted, value, atol=1e-10, rtol=1e-10)
    order = torch.randperm(student.shape[0], generator=generator)
    assert torch.equal(function(student[order], teacher[order], temperature=temperature, **weights), value[order])
    chunks = [
        function(student[rows], teacher[rows], temperature=temperature, **weights)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    assert torch.allclose(torch.cat(chunks), value, atol=1e-12, rtol=1e-12)
    shifted = function(student + shift, teacher - shift, temperature=temperature, **weights)
    assert torch.allclose(shifted, value, atol=1e-9, rtol=1e-9)


@every_divergence
@pytest.mark.parametrize("dtype", [*SHORT, torch.float64])
def test_p07_logits_of_forty_at_a_temperature_of_a_twentieth(oracle, name, weights, dtype):
    signs = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [-1, 1, 1, 1]])
    student = (40 * signs).to(dtype).requires_grad_()
    teacher = (40 * signs.roll(1, -1)).to(dtype)
    value = DIVERGENCES[name](student, teacher, temperature=0.05, **weights)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(student.grad).all()
    weight = next(iter(weights.values()), None)
    truth = [oracle.divergence(name, student[row].tolist(), teacher[row].tolist(), 0.05, weight) for row in range(3)]
    assert value.tolist() == pytest.approx(truth, rel=1e-5, abs=1e-6)


@every_divergence
def test_p07_ten_thousand_at_a_temperature_of_a_twentieth_in_float32(name, weights):
    student = torch.tensor([[1e4, -1e4, 1e4, -math.inf]], requires_grad=True)
    value = DIVERGENCES[name](student, torch.tensor([[-1e4, 1e4, 1e4, -math.inf]]), temperature=0.05, **weights)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(student.grad).all()


@every_divergence
@pytest.mark.parametrize("student_dtype", SHORT, ids=str)
@pytest.mark.parametrize("teacher_dtype", SHORT, ids=str)
def test_p08_dtype_grid_on_logits_a_hundredth_apart(oracle, name, weights, student_dtype, teacher_dtype):
    generator = torch.Generator().manual_seed(8)
    base = 3 * torch.randn(16, 50, generator=generator, dtype=torch.float64)
    near = base + 0.01 * torch.randn(16, 50, generator=generator, dtype=torch.float64)
    student, teacher = near.to(student_dtype).requires_grad_(), base.to(teacher_dtype)
    value = DIVERGENCES[name](student, teacher, **weights)
    assert value.min() >= -1e-7
    weight = next(iter(weights.values()), None)
    truth = [oracle.divergence(name, student[row].tolist(), teacher[row].tolist(), 1.0, weight) for row in range(16)]
    assert value.tolist() == pytest.approx(truth, abs=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    exact = student.detach().double().requires_grad_()
    DIVERGENCES[name](exact, teacher.double(), **weights).sum().backward()
    assert torch.allclose(gradient.double(), exact.grad, atol=1e-6, rtol=2 * torch.finfo(student_dtype).eps)


@every_divergence
@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_p08_nearly_equal_rows_keep_their_leading_digits_in_float32(name, weights, gap):
    """A plain ``sum p log(p/q)`` is rounding noise here, often negative; the values fall with the gap squared."""
    generator = torch.Generator().manual_seed(9)
    teacher = torch.randn(8, 6, generator=generator)
    student = teacher + gap * torch.randn(8, 6, generator=generator)
    value = DIVERGENCES[name](student, teacher, **weights)
    exact = DIVERGENCES[name](student.double(), teacher.double(), **weights)
    assert torch.allclose(value.double(), exact, rtol=2e-5 / gap, atol=1e-14)


@example(seed=0, width=2)
@bounded
@given(seed=st.integers(0, 10**6), width=st.integers(2, 40))
def test_divergences_stand_in_their_known_order(seed, width):
    """JSD <= log 2 (b = 1/2); total variation in [0, 1]; 2 TV^2 <= KL (Pinsker)."""
    student, teacher = make_logits("normal", 3, width, seed), make_logits("normal", 3, width, seed + 1)
    distance = DIVERGENCES["total_variation"](student, teacher)
    assert (distance <= 1 + 1e-12).all()
    assert (DIVERGENCES["jsd"](student, teacher, teacher_mixture_weight=0.5) <= math.log(2) + 1e-12).all()
    for name in ("forward_kl", "reverse_kl"):
        assert (DIVERGENCES[name](student, teacher) >= 2 * distance**2 - 1e-12).all()
