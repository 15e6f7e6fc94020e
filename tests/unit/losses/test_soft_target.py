"""The soft-target loss: temperature squared, masks, signals, and its high-temperature limit."""

import math

import pytest
import torch

from research.losses.divergences import DIVERGENCES
from research.losses.soft_target import logit_matching, soft_target
from research.losses.supervised import cross_entropy
from research.records import DenseLogits, TopKLogprobs

WEIGHTS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"teacher_mixture_weight": 0.3},
    "normalised_jsd": {"teacher_mixture_weight": 0.3},
    "skewed_forward_kl": {"skew_weight": 0.1},
    "skewed_reverse_kl": {"skew_weight": 0.1},
    "total_variation": {},
}
every_divergence = pytest.mark.parametrize("name", list(DIVERGENCES))


def rows(num, width, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num, width, generator=generator, dtype=torch.float64)


def top_k(logits, kept):
    logprobs, ids = logits.log_softmax(-1).sort(dim=-1, descending=True)
    return TopKLogprobs(ids[:, :kept], logprobs[:, :kept], logprobs[:, kept:].logsumexp(-1), logits.shape[-1])


def gradient(student, teacher, **options):
    leaf = student.clone().requires_grad_()
    soft_target(leaf, DenseLogits(teacher), **options).total.backward()
    return leaf.grad


@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_is_the_sum_of_the_named_divergence_times_temperature_squared(name, temperature):
    student, teacher = rows(6, 5, 1), rows(6, 5, 2)
    plain = DIVERGENCES[name](student, teacher, temperature=temperature, **WEIGHTS[name]).sum()
    options = {"divergence": name, "temperature": temperature, **WEIGHTS[name]}
    loss = soft_target(student, DenseLogits(teacher), **options)
    assert loss.total.item() == pytest.approx((temperature**2 * plain).item(), abs=1e-12)
    assert loss.count.item() == 6
    unscaled = soft_target(student, DenseLogits(teacher), scale_by_temperature_squared=False, **options)
    assert unscaled.total.item() == pytest.approx(plain.item(), abs=1e-12)


def test_c02_unscaled_gradient_is_the_difference_of_probabilities_over_temperature():
    student, teacher = rows(6, 10, 3), rows(6, 10, 4)
    for temperature in (1.0, 2.0, 4.0, 20.0):
        q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        unscaled = gradient(student, teacher, temperature=temperature, scale_by_temperature_squared=False)
        assert torch.allclose(unscaled, (q - p) / temperature, atol=1e-10, rtol=0)
        scaled = gradient(student, teacher, temperature=temperature)
        assert torch.allclose(scaled, temperature * (q - p), atol=1e-10, rtol=0)


def test_c02_p12_the_scaled_gradient_does_not_fade_with_temperature():
    student, teacher = rows(40, 10, 5), rows(40, 10, 6)
    temperatures = torch.logspace(math.log10(20), 3, 12, dtype=torch.float64).tolist()
    norms = [
        gradient(student, teacher, temperature=value, scale_by_temperature_squared=False).norm().item()
        for value in temperatures
    ]
    scaled = [norm * value**2 for norm, value in zip(norms, temperatures, strict=True)]
    assert max(scaled) / min(scaled) < 1.02
    x, y = torch.tensor(temperatures).log(), torch.tensor(norms).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert slope.item() == pytest.approx(-2, abs=0.02)


def test_p12_a_thousand_classes_keep_their_gradient_norm():
    student, teacher = rows(8, 1000, 7), rows(8, 1000, 8)
    low, high = (gradient(student, teacher, temperature=value).norm().item() for value in (20.0, 100.0))
    assert low == pytest.approx(high, rel=0.02)


def test_c06_the_gradient_turns_into_the_centred_logit_difference():
    student, teacher = rows(200, 10, 9), rows(200, 10, 10)
    difference = student - teacher
    centred = difference - difference.mean(-1, keepdim=True)
    cosines = {}
    for temperature in (1.0, 5.0, 20.0, 100.0):
        kd = gradient(student, teacher, temperature=temperature)
        cosines[temperature] = torch.cosine_similarity(kd, centred, dim=-1).mean().item()
    assert cosines[100.0] >= 0.999
    assert cosines[1.0] < cosines[5.0] < cosines[20.0] < cosines[100.0]
    assert cosines[1.0] == pytest.approx(0.70, abs=0.05)


def test_c06_logit_matching_is_the_limit_of_the_scaled_loss_in_value_and_gradient():
    student, teacher = rows(20, 10, 11), rows(20, 10, 12)
    leaf = student.clone().requires_grad_()
    matching = logit_matching(leaf, teacher)
    matching.total.backward()
    limit = soft_target(student, DenseLogits(teacher), temperature=1e5)
    assert matching.total.item() == pytest.approx(limit.total.item(), rel=1e-3)
    assert torch.allclose(leaf.grad, gradient(student, teacher, temperature=1e5), rtol=1e-3, atol=1e-5)


def test_logit_matching_by_hand_and_blind_to_a_constant():
    student = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 5.0, 4.0]], dtype=torch.float64)
    # z - mean = (-2, -1, 3); v - mean = (-3, 2, 1); squares of the differences 1, 9, 4 over 2 * 3 classes.
    assert logit_matching(student, teacher).total.item() == pytest.approx(14 / 6, abs=1e-12)
    assert logit_matching(student + 7, teacher - 100).total.item() == pytest.approx(14 / 6, abs=1e-10)
    assert torch.autograd.gradcheck(lambda logits: logit_matching(logits, teacher).total, student)
    absent = torch.full((1, 4), -math.inf, dtype=torch.float64)
    padded = torch.cat([student.detach(), absent], -1).requires_grad_()
    loss = logit_matching(padded, torch.cat([teacher, absent], -1))
    loss.total.backward()
    assert loss.total.item() == pytest.approx(14 / 6, abs=1e-12)
    assert padded.grad.flatten().tolist() == pytest.approx([1 / 3, -1, 2 / 3, 0, 0, 0, 0], abs=1e-12)


@pytest.mark.parametrize("teacher_filling", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("student_filling", [0.0, math.nan, -math.inf])
@pytest.mark.parametrize("name", [*DIVERGENCES, "top_k", "logit_matching"])
def test_p10_p36_a_ragged_batch_equals_the_loop_over_its_samples(name, student_filling, teacher_filling):
    """Three sequences of 2, 5 and 4 positions padded to 5: value and gradient as if each were alone."""
    lengths = [2, 5, 4]
    mask = torch.tensor([[position < length for position in range(5)] for length in lengths])
    student, teacher = rows(15, 6, 13).view(3, 5, 6), rows(15, 6, 14).view(3, 5, 6)
    total, gradients = 0.0, torch.zeros_like(student)
    for sample, length in enumerate(lengths):
        leaf = student[sample, :length].clone().requires_grad_()
        loss = component(name, leaf, teacher[sample, :length], None)
        loss.total.backward()
        total += loss.total.item()
        gradients[sample, :length] = leaf.grad
    padded = student.masked_fill(~mask.unsqueeze(-1), student_filling).requires_grad_()
    loss = component(name, padded, teacher.masked_fill(~mask.unsqueeze(-1), teacher_filling), mask)
    with torch.autograd.set_detect_anomaly(True):  # no NaN inside the backward pass either
        loss.total.backward()
    assert loss.total.item() == pytest.approx(total, abs=1e-10)
    assert loss.count.item() == 11
    assert torch.allclose(padded.grad, gradients, atol=1e-10, rtol=0)


def component(name, student, teacher, mask):
    if name == "logit_matching":
        return logit_matching(student, teacher, mask)
    if name == "top_k":
        logprobs, ids = teacher.nan_to_num(neginf=-1e9).log_softmax(-1).sort(dim=-1, descending=True)
        kept, tail = logprobs[..., :3], logprobs[..., 3:].logsumexp(-1)
        if mask is not None:
            ids = ids.masked_fill(~mask.unsqueeze(-1), -1)
            kept, tail = kept.masked_fill(~mask.unsqueeze(-1), math.nan), tail.masked_fill(~mask, math.nan)
        signal = TopKLogprobs(ids[..., :3], kept, tail, teacher.shape[-1])
        return soft_target(student, signal, divergence="reverse_kl", temperature=2.0, loss_mask_N=mask)
    options = {"divergence": name, "temperature": 2.0, **WEIGHTS[name]}
    return soft_target(student, DenseLogits(teacher), loss_mask_N=mask, **options)


@pytest.mark.parametrize("name", [*DIVERGENCES, "top_k", "logit_matching"])
def test_p36_nothing_trained_on_is_zero_on_the_graph(name):
    student = torch.full((3, 4), math.nan, requires_grad=True)
    teacher = torch.full((3, 4), -math.inf)
    loss = component(name, student, teacher, torch.zeros(3, dtype=torch.bool))
    assert loss.total.item() == 0 and loss.count.item() == 0
    loss.mean().backward()
    assert torch.equal(student.grad, torch.zeros(3, 4))


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_p13_no_jump_where_a_weight_reaches_zero(name, temperature):
    """The temperature-squared factor belongs to the soft term alone, at every weight."""
    student, teacher, labels = rows(8, 6, 15), rows(8, 6, 16), torch.arange(8) % 6

    def mixed(hard_weight, soft_weight):
        hard = cross_entropy(student, labels).mean()
        soft = soft_target(
            student, DenseLogits(teacher), divergence=name, temperature=temperature, **WEIGHTS[name]
        ).mean()
        return (hard_weight * hard + soft_weight * soft).item()

    assert mixed(0.0, 1.0) == pytest.approx(mixed(1e-6, 1.0), abs=1e-4)
    assert mixed(1.0, 0.0) == pytest.approx(mixed(1.0, 1e-6), abs=1e-4)
    if name in ("normalised_jsd", "skewed_forward_kl", "skewed_reverse_kl"):
        key = next(iter(WEIGHTS[name]))
        for end in (0.0, 1.0) if name == "normalised_jsd" else (0.0,):
            inside = 1e-9 if end == 0.0 else 1 - 1e-9
            values = [
                soft_target(
                    student, DenseLogits(teacher), divergence=name, temperature=temperature, **{key: weight}
                ).mean()
                for weight in (end, inside)
            ]
            assert values[0].item() == pytest.approx(values[1].item(), abs=1e-4)


@every_divergence
def test_top_k_signal_that_keeps_all_classes_equals_the_dense_one(name):
    student, teacher = rows(5, 6, 17), rows(5, 6, 18)
    options = {"divergence": name, "temperature": 3.0, **WEIGHTS[name]}
    dense = soft_target(student, DenseLogits(teacher), **options)
    sparse = soft_target(student, top_k(teacher, 6), **options)
    assert sparse.total.item() == pytest.approx(dense.total.item(), abs=1e-10)
    assert sparse.count.item() == dense.count.item() == 5


def test_bad_arguments_are_refused_by_name():
    student, dense = rows(2, 3), DenseLogits(rows(2, 3, 1))
    for signal in (dense, top_k(rows(2, 3, 1), 2)):
        with pytest.raises(ValueError, match="'forward_kl' takes no weight"):
            soft_target(student, signal, teacher_mixture_weight=0.5)
        with pytest.raises(ValueError, match="'jsd' needs teacher_mixture_weight"):
            soft_target(student, signal, divergence="jsd")
        with pytest.raises(ValueError, match="did you mean 'forward_kl'"):
            soft_target(student, signal, divergence="foward_kl")
        with pytest.raises(ValueError, match="temperature=-1"):
            soft_target(student, signal, temperature=-1.0)
        with pytest.raises(ValueError, match="student has 4 classes"):
            soft_target(rows(2, 4), signal)
        with pytest.raises(ValueError, match=r"loss_mask has shape \(3,\)"):
            soft_target(student, signal, loss_mask_N=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(5, 3\)"):
        soft_target(student, DenseLogits(rows(5, 3)), loss_mask_N=torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="Tensor"):
        soft_target(student, rows(2, 3, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 classes and the teacher 3"):
        logit_matching(rows(2, 4), rows(2, 3))
