"""The controls take away one property of the signal and keep the others."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from research.data.digits import Digits
from research.errors import ConfigError
from research.records import ClassBatch
from research.teachers.frozen import FrozenTeacher, LoadedNetwork
from research.teachers.transforms import PermutedWrongClasses, VirtualTeacher, probability_with_entropy


def permuted(linear: Callable[..., LoadedNetwork], digits: Digits, **options: Any) -> PermutedWrongClasses:
    teacher = PermutedWrongClasses(FrozenTeacher(linear(1)), **options)
    teacher.connect(digits)
    return teacher


def entropy(probs_NV: Tensor) -> Tensor:
    """By its definition, in nats."""
    return -(probs_NV * probs_NV.log()).sum(dim=-1)


@pytest.mark.parametrize("scope", ["per_example", "fixed"])
def test_only_the_order_of_the_wrong_classes_changes(
    linear: Callable[..., LoadedNetwork], live: FrozenTeacher, digits: Digits, batch: ClassBatch, scope: str
) -> None:
    before_NV, after_NV = live.signal(batch).logits_NV, permuted(linear, digits, scope=scope).signal(batch).logits_NV
    rows = torch.arange(len(batch))
    assert torch.equal(before_NV[rows, batch.label_B], after_NV[rows, batch.label_B])
    wrong = [
        torch.stack([row[torch.arange(10) != label] for row, label in zip(z_NV, batch.label_B, strict=True)])
        for z_NV in (before_NV, after_NV)
    ]
    assert torch.equal(wrong[0].sort(dim=-1).values, wrong[1].sort(dim=-1).values)
    assert not torch.equal(wrong[0], wrong[1])
    for temperature in (1.0, 4.0):
        torch.testing.assert_close(
            entropy((before_NV.double() / temperature).softmax(-1)),
            entropy((after_NV.double() / temperature).softmax(-1)),
        )
    # nothing of the teacher's ranking of wrong classes is left: on average about one of nine stays in its place
    assert float((wrong[0] == wrong[1]).double().mean()) < 0.3


def shuffles(teacher: PermutedWrongClasses, live: FrozenTeacher, batch: ClassBatch) -> list[tuple[int, ...]]:
    """For each row, the wrong class from which each wrong class got its logit (all logits of a row differ)."""
    before_NV, after_NV = live.signal(batch).logits_NV, teacher.signal(batch).logits_NV
    return [
        tuple(int((before == value).nonzero()) for value in after)
        for before, after in zip(before_NV, after_NV, strict=True)
    ]


def test_per_example_has_a_shuffle_for_each_row_and_fixed_one_for_each_class(
    linear: Callable[..., LoadedNetwork], live: FrozenTeacher, digits: Digits, batch: ClassBatch
) -> None:
    own = shuffles(permuted(linear, digits, scope="per_example"), live, batch)
    assert len(set(own)) > 190  # 200 rows, 9! shuffles
    fixed = shuffles(permuted(linear, digits, scope="fixed"), live, batch)
    by_class: dict[int, set[tuple[int, ...]]] = {}
    for label, shuffle in zip(batch.label_B.tolist(), fixed, strict=True):
        by_class.setdefault(label, set()).add(shuffle)
    assert {len(found) for found in by_class.values()} == {1}
    assert len(set.union(*by_class.values())) == 10


@pytest.mark.parametrize("scope", ["per_example", "fixed"])
def test_a_shuffle_stays_through_epochs_batches_and_subsets_and_follows_its_seed(
    linear: Callable[..., LoadedNetwork], live: FrozenTeacher, digits: Digits, batch: ClassBatch, scope: str
) -> None:
    first = shuffles(permuted(linear, digits, scope=scope, seed=3), live, batch)
    other_data = Digits(num_train=50, holdout=300, seed=9, split_seed=4)
    reverse = ClassBatch(batch.inputs.flip(0), batch.label_B.flip(0), batch.index_B.flip(0), 200)
    again = shuffles(permuted(linear, other_data, scope=scope, seed=3), live, reverse)
    assert again[::-1] == first
    other_seed = shuffles(permuted(linear, digits, scope=scope, seed=4), live, batch)
    assert sum(left == right for left, right in zip(first, other_seed, strict=True)) < 10


def test_a_permuted_teacher_needs_its_data(linear: Callable[..., LoadedNetwork], batch: ClassBatch) -> None:
    with pytest.raises(ConfigError, match=r"connect\(data\)"):
        PermutedWrongClasses(FrozenTeacher(linear(1))).signal(batch)
    with pytest.raises(ConfigError, match=r"signal_transform\.scope is 'rows'"):
        PermutedWrongClasses(FrozenTeacher(linear(1)), scope="rows")


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_virtual_teacher_is_its_closed_form(live: FrozenTeacher, batch: ClassBatch, temperature: float) -> None:
    signal = VirtualTeacher(live, true_class_probability=0.9, temperature=temperature).signal(batch)
    probs_NV = (signal.logits_NV.double() / temperature).softmax(-1)
    expected = torch.full((len(batch), 10), 0.1 / 9, dtype=torch.float64)
    expected[torch.arange(len(batch)), batch.label_B] = 0.9
    torch.testing.assert_close(probs_NV, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_matched_virtual_teacher_has_the_teacher_s_mean_entropy(
    live: FrozenTeacher, digits: Digits, batch: ClassBatch, temperature: float
) -> None:
    teacher = VirtualTeacher(live, temperature=temperature)
    teacher.connect(digits)
    inputs = digits.split_tensors("train")[0]
    whole = ClassBatch(inputs, *digits.split_tensors("train")[1:], step_rows=len(inputs))
    wanted = entropy((live.signal(whole).logits_NV.double() / temperature).softmax(-1)).mean()
    matched_N = entropy((teacher.signal(batch).logits_NV.double() / temperature).softmax(-1))
    torch.testing.assert_close(matched_N, wanted.expand(len(batch)), atol=1e-6, rtol=0)
    told = teacher.identity.details
    assert told["matched"] == "mean entropy" and told["softened_at"] == temperature
    rest = (1 - told["true_class_probability"]) / 9
    by_hand = -told["true_class_probability"] * math.log(told["true_class_probability"]) - 9 * rest * math.log(rest)
    assert by_hand == pytest.approx(float(wanted), abs=1e-9)


def test_the_identity_tells_what_changes_the_virtual_signal(live: FrozenTeacher) -> None:
    options = [(0.9, 1.0), (0.8, 1.0), (0.9, 4.0), (None, 1.0)]
    marks = [VirtualTeacher(live, true_class_probability=a, temperature=t).identity.details for a, t in options]
    assert len({str(details) for details in marks}) == len(marks)


def test_the_virtual_teacher_is_not_charged_for_scoring(live: FrozenTeacher) -> None:
    assert live.flops_per_row() == 2 * 64 * 10 and VirtualTeacher(live).flops_per_row() == 0


@pytest.mark.parametrize("probability", [0.1, 1.0, 0.05, float("nan"), -1.0])
def test_a_probability_that_is_no_peak_is_refused(live: FrozenTeacher, probability: float) -> None:
    with pytest.raises(ConfigError, match=r"signal_transform\.true_class_probability"):
        VirtualTeacher(live, true_class_probability=probability)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bad_temperature_is_refused(live: FrozenTeacher, temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"signal_transform\.temperature"):
        VirtualTeacher(live, temperature=temperature)


def test_a_matched_virtual_teacher_needs_its_data(live: FrozenTeacher, batch: ClassBatch) -> None:
    with pytest.raises(ConfigError, match=r"connect\(data\)"):
        VirtualTeacher(live).signal(batch)


def test_probability_with_entropy_inverts_the_entropy() -> None:
    for num_classes in (2, 10, 1000):
        for probability in (0.999, 0.7, 1.2 / num_classes):
            rest = (1 - probability) / (num_classes - 1)
            nats = -probability * math.log(probability) - (num_classes - 1) * rest * math.log(rest)
            assert probability_with_entropy(nats, num_classes) == pytest.approx(probability, abs=1e-6)
    for impossible in (0.0, -1.0, math.log(10), 5.0, float("nan")):
        with pytest.raises(ConfigError, match="entropy"):
            probability_with_entropy(impossible, 10)
