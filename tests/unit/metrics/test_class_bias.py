"""The bias correction against brute force over every interval between steps."""

import itertools

import pytest
import torch

from research.metrics.class_bias import apply_class_bias, fit_class_bias


def disagreements(logits_NV, target_N, classes, bias):
    count = 0
    for row, target in zip(logits_NV.double().tolist(), target_N.tolist(), strict=True):
        moved = [z + bias * (c in classes) for c, z in enumerate(row)]
        count += moved.index(max(moved)) != target
    return count


def brute_force(logits_NV, target_N, classes):
    """The documented offset, by counting disagreements at zero and in the middle of every interval between steps."""
    steps = set()
    for row in logits_NV.double().tolist():
        inside = max(row[c] for c in classes)
        outside = max(z for c, z in enumerate(row) if c not in classes)
        steps.add(outside - inside)
    edges = [min(steps) - 1, *sorted(steps), max(steps) + 1]
    scored = [(disagreements(logits_NV, target_N, classes, 0.0), 0.0, 0.0)]
    for low, high in itertools.pairwise(edges):
        middle = (low + high) / 2
        scored.append((disagreements(logits_NV, target_N, classes, middle), max(low, -high, 1e-300), middle))
    return min(scored)[2]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("classes", [[3], [0, 2], [1, 2, 3, 4]])
def test_brute_force(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(25, 6, generator=generator)
    target_N = torch.randint(6, (25,), generator=generator)
    wanted_N = logits_NV.clone()
    wanted_N[:, classes] += 2 * torch.randn((), generator=generator)
    target_N = torch.where(torch.rand(25, generator=generator) < 0.7, wanted_N.argmax(-1), target_N)
    expected = brute_force(logits_NV, target_N, classes)
    assert fit_class_bias(logits_NV, target_N, classes) == pytest.approx(expected, abs=1e-12)


def test_hand_value_lies_in_the_middle_of_the_gap():
    """Class 1 lags by 3 on the items that should be it, and by 9 on those that should not: b = 6."""
    logits_NV = torch.tensor([[3.0, 0.0], [3.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    assert fit_class_bias(logits_NV, torch.tensor([1, 1, 0, 0]), [1]) == 6.0
    assert fit_class_bias(logits_NV, torch.tensor([1, 1, 0, 0]), [0]) == -6.0


def test_recovers_a_bias_that_was_taken_away():
    """Logits of a good classifier with 3.5 taken from class 3 and then found again, as for the omitted digit."""
    generator = torch.Generator().manual_seed(0)
    target_N = torch.randint(10, (3000,), generator=generator)
    logits_NV = torch.randn(3000, 10, generator=generator)
    logits_NV[torch.arange(3000), target_N] += 7
    lowered_NV = logits_NV.clone()
    lowered_NV[:, 3] -= 5
    bias = fit_class_bias(lowered_NV, target_N, [3])
    repaired_NV = apply_class_bias(lowered_NV, [3], bias)
    errors = [int((x.argmax(-1) != target_N).sum()) for x in (logits_NV, lowered_NV, repaired_NV)]
    assert bias == pytest.approx(5, abs=1)
    assert errors[2] <= errors[0] < errors[1]


def test_ties_stay_at_zero_or_nearest_to_it():
    logits_NV = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_class_bias(logits_NV, torch.tensor([0, 1]), [1]) == 0.0
    # target 2 is never reachable: every bias is as bad, so none is applied
    three_NV = torch.tensor([[5.0, 1.0, 0.0]])
    assert fit_class_bias(three_NV, torch.tensor([1]), [2]) == 0.0
    # equal optima on (1, 2) and (3, 4), separated by one loss and one gain: the nearer one
    gaps_NV = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert fit_class_bias(gaps_NV, torch.tensor([1, 0, 1, 0]), [1]) == 1.5


def test_unbounded_interval_ends_one_past_the_last_step():
    assert fit_class_bias(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([1, 1]), [1]) == 4.5


def test_apply_leaves_other_classes_and_the_input():
    logits_NV = torch.zeros(2, 3)
    assert apply_class_bias(logits_NV, [0, 2], -7.6).tolist() == [[-7.6, 0.0, -7.6]] * 2
    assert logits_NV.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("classes", [[], [0, 0], [3], [-1], [0, 1, 2]])
def test_impossible_classes_are_refused(classes):
    with pytest.raises(ValueError, match="classes="):
        fit_class_bias(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), classes)


def test_no_items_and_non_finite_logits_are_refused():
    with pytest.raises(ValueError, match="at least one item"):
        fit_class_bias(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), [1])
    with pytest.raises(ValueError, match="finite"):
        fit_class_bias(torch.full((1, 3), torch.inf), torch.zeros(1, dtype=torch.int64), [1])
