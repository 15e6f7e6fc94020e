"""Values, directions and gradients of the dense divergences."""

import math

import pytest
import torch

from research.losses.divergences import (
    DIVERGENCES,
    divergence,
    forward_kl,
    jsd,
    normalised_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from research.losses.logprobs import tempered_logprobs

CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"teacher_mixture_weight": 0.5}),
    ("jsd", {"teacher_mixture_weight": 0.3}),
    ("jsd", {"teacher_mixture_weight": 0.7}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.0}),
    ("normalised_jsd", {"teacher_mixture_weight": 0.1}),
    ("normalised_jsd", {"teacher_mixture_weight": 1.0}),
    ("skewed_forward_kl", {"skew_weight": 0.0}),
    ("skewed_forward_kl", {"skew_weight": 0.1}),
    ("skewed_reverse_kl", {"skew_weight": 0.1}),
    ("total_variation", {}),
]
IDS = ["-".join([name, *(str(value) for value in weights.values())]) for name, weights in CASES]


def rows(num, width, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num, width, generator=generator, dtype=torch.float64)).to(dtype)


def pq(oracle, dtype=torch.float64):
    return torch.tensor([oracle.student], dtype=dtype), torch.tensor([oracle.teacher], dtype=dtype)


def test_the_table_of_cases_covers_every_divergence():
    assert {name for name, _ in CASES} == set(DIVERGENCES)


# By hand from teacher (.7,.2,.1) and student (.2,.3,.5), whose even mixture is (.45,.25,.3).
TEACHER_TO_MIXTURE = 0.7 * math.log(0.7 / 0.45) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.3)
STUDENT_TO_MIXTURE = 0.2 * math.log(0.2 / 0.45) + 0.3 * math.log(0.3 / 0.25) + 0.5 * math.log(0.5 / 0.3)
HAND = [
    ("forward_kl", {}, 0.634897),
    ("reverse_kl", {}, 0.675806),
    ("jsd", {"teacher_mixture_weight": 0.5}, 0.151358),
    ("jsd", {"teacher_mixture_weight": 0.3}, 0.127337),
    ("jsd", {"teacher_mixture_weight": 0.7}, 0.129775),
    ("normalised_jsd", {"teacher_mixture_weight": 0.5}, 2 * (TEACHER_TO_MIXTURE + STUDENT_TO_MIXTURE)),
    ("normalised_jsd", {"teacher_mixture_weight": 0.0}, 0.634897),
    ("normalised_jsd", {"teacher_mixture_weight": 1.0}, 0.675806),
    ("skewed_forward_kl", {"skew_weight": 0.5}, TEACHER_TO_MIXTURE),
    ("skewed_reverse_kl", {"skew_weight": 0.5}, STUDENT_TO_MIXTURE),
    ("total_variation", {}, 0.5),
]


@pytest.mark.parametrize(("name", "weights", "value"), HAND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p01_p05_hand_values_fix_direction_and_mixture(oracle, name, weights, value, dtype):
    student, teacher = pq(oracle, dtype)
    assert DIVERGENCES[name](student, teacher, **weights).item() == pytest.approx(value, abs=1e-6)


def test_p01_gradients_fix_the_direction(oracle):
    student, teacher = pq(oracle)
    student.requires_grad_()
    p, q = teacher.exp(), student.detach().exp()
    (forward,) = torch.autograd.grad(forward_kl(student, teacher).sum(), student)
    assert torch.allclose(forward, q - p, atol=1e-10, rtol=0)
    value = reverse_kl(student, teacher)
    (reverse,) = torch.autograd.grad(value.sum(), student)
    assert torch.allclose(reverse, q * ((q / p).log() - value.detach()), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "weights"), CASES, ids=IDS)
def test_p03_two_hundred_random_pairs_are_not_negative(name, weights):
    student, teacher = rows(200, 7, 1, dtype=torch.float32), rows(200, 7, 2, dtype=torch.float32)
    value = DIVERGENCES[name](student, teacher, **weights)
    assert value.min() >= -1e-7
    assert value.median() > 1e-2


@pytest.mark.parametrize(("name", "weights"), CASES, ids=IDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_p03_p04_exactly_zero_with_zero_gradient_at_equality(name, weights, temperature):
    teacher = rows(50, 9, 3, dtype=torch.float32)
    student = teacher.clone().requires_grad_()
    value = DIVERGENCES[name](student, teacher, temperature=temperature, **weights)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(50))
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("name", "weights"), CASES, ids=IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 5.0])
def test_p04_random_logits_match_the_loop_oracle(oracle, name, weights, dtype, tolerance, temperature):
    student, teacher = rows(20, 6, 4, dtype=dtype), rows(20, 6, 5, dtype=dtype)
    value = DIVERGENCES[name](student, teacher, temperature=temperature, **weights)
    assert value.dtype == dtype
    for row in range(20):
        truth = oracle_value(oracle, name, weights, student[row].tolist(), teacher[row].tolist(), temperature)
        assert value[row].item() == pytest.approx(truth, abs=tolerance, rel=tolerance)


def oracle_value(oracle, name, weights, student, teacher, temperature):
    weight = next(iter(weights.values()), None)
    if name == "normalised_jsd" and weight in (0, 1):
        name, weight = ("forward_kl" if weight == 0 else "reverse_kl"), None
    return oracle.divergence(name, student, teacher, temperature, weight)


@pytest.mark.parametrize("student_weight", [0.1, 0.3, 0.9])
def test_p05_a_student_weighted_convention_maps_to_one_minus_the_weight(oracle, student_weight):
    """Projects that write ``a KL(q,m) + (1-a) KL(p,m)``, ``m = a q + (1-a) p``, put the weight on the student."""
    foreign = oracle.divergence("jsd", oracle.teacher, oracle.student, 1.0, student_weight)
    ours = jsd(*pq(oracle), teacher_mixture_weight=1 - student_weight)
    assert ours.item() == pytest.approx(foreign, abs=1e-12)
    assert abs(jsd(*pq(oracle), teacher_mixture_weight=student_weight).item() - foreign) > 1e-4


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-3), (torch.float64, 1e-3)])
def test_p06_jsd_tends_to_the_kls_and_its_normalised_form_reaches_them(oracle, dtype, rel):
    student, teacher = pq(oracle, dtype)
    forward, reverse = forward_kl(student, teacher).item(), reverse_kl(student, teacher).item()
    low = jsd(student, teacher, teacher_mixture_weight=1e-4).item()
    high = jsd(student, teacher, teacher_mixture_weight=1 - 1e-4).item()
    assert low / 1e-4 == pytest.approx(forward, rel=rel)
    assert high / 1e-4 == pytest.approx(reverse, rel=rel)
    assert normalised_jsd(student, teacher, teacher_mixture_weight=0.0).item() == forward
    assert normalised_jsd(student, teacher, teacher_mixture_weight=1.0).item() == reverse
    for tiny in (1e-4, 1e-6, 1e-9):
        assert normalised_jsd(student, teacher, teacher_mixture_weight=tiny).item() == pytest.approx(forward, rel=rel)
    assert normalised_jsd(student, teacher, teacher_mixture_weight=1 - 1e-6).item() == pytest.approx(reverse, rel=rel)


@pytest.mark.parametrize("weight", [0, 1, 0.0, 1.0, -0.1, 1.1, math.nan])
def test_p06_jsd_refuses_its_end_points(oracle, weight):
    with pytest.raises(ValueError, match=r"teacher_mixture_weight=.*strictly between 0 and 1.*normalised_jsd"):
        jsd(*pq(oracle), teacher_mixture_weight=weight)


@pytest.mark.parametrize("weight", [-1e-9, 1.1, math.nan, math.inf])
def test_weights_out_of_range_are_refused_by_name(oracle, weight):
    with pytest.raises(ValueError, match="teacher_mixture_weight="):
        normalised_jsd(*pq(oracle), teacher_mixture_weight=weight)
    for skewed in (skewed_forward_kl, skewed_reverse_kl):
        with pytest.raises(ValueError, match="skew_weight="):
            skewed(*pq(oracle), skew_weight=weight)
        with pytest.raises(ValueError, match="skew_weight=1"):
            skewed(*pq(oracle), skew_weight=1.0)


def test_skew_weight_zero_is_the_plain_kl(oracle):
    pair = pq(oracle)
    assert torch.equal(skewed_forward_kl(*pair, skew_weight=0.0), forward_kl(*pair))
    assert torch.equal(skewed_reverse_kl(*pair, skew_weight=0.0), reverse_kl(*pair))
    assert skewed_forward_kl(*pair, skew_weight=1e-12).item() == pytest.approx(forward_kl(*pair).item(), abs=1e-9)


@pytest.mark.parametrize(("name", "weights"), CASES, ids=IDS)
@pytest.mark.parametrize("temperature", [0.6, 3.0])
def test_gradcheck_in_float64(name, weights, temperature):
    student, teacher = rows(4, 5, 6).requires_grad_(), rows(4, 5, 7)
    assert torch.autograd.gradcheck(
        lambda logits: DIVERGENCES[name](logits, teacher, temperature=temperature, **weights), student
    )
    near = (teacher + 0.01 * rows(4, 5, 8)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: DIVERGENCES[name](logits, teacher, temperature=temperature, **weights), near
    )


@pytest.mark.parametrize(("name", "weights"), CASES, ids=IDS)
def test_the_teacher_never_receives_a_gradient(name, weights):
    student, teacher = rows(3, 4, 8).requires_grad_(), rows(3, 4, 9).requires_grad_()
    DIVERGENCES[name](student, teacher, **weights).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_infinite_only_where_the_second_argument_lacks_a_class():
    full, cut = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, -math.inf, 2.0]])
    assert forward_kl(cut, full).item() == math.inf
    assert reverse_kl(full, cut).item() == math.inf
    student = full.clone().requires_grad_()
    p, q = cut.softmax(-1), full.softmax(-1)
    forward_kl(student, cut).sum().backward()
    assert torch.allclose(student.grad, q - p, atol=1e-6)
    assert forward_kl(full, cut).item() == pytest.approx((p * (p / q).clamp(min=1e-30).log()).sum().item(), abs=1e-6)
    for one_sided in (full, cut):
        other = cut if one_sided is full else full
        assert torch.isfinite(jsd(one_sided, other, teacher_mixture_weight=0.5)).all()
        assert torch.isfinite(skewed_forward_kl(one_sided, other, skew_weight=0.1)).all()
        assert torch.isfinite(skewed_reverse_kl(one_sided, other, skew_weight=0.1)).all()
        assert torch.isfinite(total_variation(one_sided, other)).all()


@pytest.mark.parametrize(("name", "weights"), CASES, ids=IDS)
@pytest.mark.parametrize("extra", [8, 136])
def test_p18_padded_classes_change_nothing_and_other_widths_are_refused(name, weights, extra):
    student, teacher = rows(5, 12, 10), rows(5, 12, 11)
    padding = torch.full((5, extra), -math.inf, dtype=torch.float64)
    function = DIVERGENCES[name]
    padded_student = torch.cat([student, padding], -1).requires_grad_()
    padded = function(padded_student, torch.cat([teacher, padding], -1), **weights)
    assert torch.allclose(padded, function(student, teacher, **weights), atol=1e-12, rtol=0)
    padded.sum().backward()
    assert torch.isfinite(padded_student.grad).all()
    assert torch.equal(padded_student.grad[:, 12:], torch.zeros(5, extra, dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"{12 + extra} classes.*teacher 12"):
        function(padded_student, teacher, **weights)


@pytest.mark.parametrize(("name", "weights"), CASES, ids=IDS)
def test_p48_leading_dimensions_are_kept_and_dead_classes_are_no_denominator(oracle, name, weights):
    student, teacher = rows(10, 11, 12).view(2, 5, 11), rows(10, 11, 13).view(2, 5, 11)
    value = DIVERGENCES[name](student, teacher, temperature=2.0, **weights)
    assert value.shape == (2, 5)
    truth = [
        oracle_value(oracle, name, weights, student[b, t].tolist(), teacher[b, t].tolist(), 2.0)
        for b in range(2)
        for t in range(5)
    ]
    assert value.flatten().tolist() == pytest.approx(truth, abs=1e-12)
    dead = torch.full((2, 5, 300), -200.0, dtype=torch.float64)
    wide = DIVERGENCES[name](torch.cat([student, dead], -1), torch.cat([teacher, dead], -1), temperature=2.0, **weights)
    assert torch.allclose(wide, value, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan, "2", None])
def test_a_temperature_that_is_not_finite_and_positive_is_refused(oracle, temperature):
    with pytest.raises(ValueError, match=r"temperature=.*finite number above 0"):
        forward_kl(*pq(oracle), temperature=temperature)


def test_rows_must_pair_up_and_hold_floats():
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(1, 4\)"):
        forward_kl(torch.zeros(3, 4), torch.zeros(1, 4))
    with pytest.raises(TypeError, match="int64"):
        forward_kl(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64))


def test_lookup_binds_weights_and_names_the_nearest_valid(oracle):
    pair = pq(oracle)
    assert torch.equal(divergence("forward_kl")(*pair, temperature=2.0), forward_kl(*pair, temperature=2.0))
    assert torch.equal(divergence("jsd", teacher_mixture_weight=0.3)(*pair), jsd(*pair, teacher_mixture_weight=0.3))
    with pytest.raises(ValueError, match=r"'reverse_kld' is unknown; did you mean 'reverse_kl'"):
        divergence("reverse_kld")
    with pytest.raises(ValueError, match=r"'jsd' needs teacher_mixture_weight"):
        divergence("jsd")
    with pytest.raises(ValueError, match=r"teacher_mixture_weight=0.5 was given.*'forward_kl' takes no weight"):
        divergence("forward_kl", teacher_mixture_weight=0.5)
    with pytest.raises(ValueError, match=r"'skewed_forward_kl' takes skew_weight"):
        divergence("skewed_forward_kl", teacher_mixture_weight=0.5)


def test_c01_temperature_softens_to_the_known_probabilities():
    """Logits 60/25/3/-3: the share of the wrong classes rises with the temperature, their ratio is exp(dz / T)."""
    logits = torch.tensor([60.0, 25.0, 3.0, -3.0])
    expected = {
        1.0: (1.0, 6.3e-16, 1.8e-25, 4.4e-28),
        6.0: (0.997, 0.00292, 7.46e-5, 2.75e-5),
        20.0: (0.785, 0.136, 0.0454, 0.0336),
    }
    entropies = []
    for temperature, values in expected.items():
        logprobs = tempered_logprobs(logits, temperature, torch.float64)
        probs = logprobs.exp()
        digits = 2e-2 if temperature == 1.0 else 3e-3  # the published T=1 values carry two digits
        assert probs.tolist() == pytest.approx(values, rel=digits)
        assert (probs[1] / probs[2]).item() == pytest.approx(math.exp(22 / temperature), rel=1e-9)
        entropies.append(-(probs * logprobs).sum().item())
    assert entropies[0] < entropies[1] < entropies[2]
    assert entropies[1:] == pytest.approx([0.021, 0.716], abs=1e-3)
