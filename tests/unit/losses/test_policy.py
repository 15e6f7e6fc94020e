"""Objectives on drawn tokens, against the exact divergence: every sequence of a tiny vocabulary is enumerated."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from research.losses.policy import (
    clipped_share,
    clipped_surrogate,
    entropy,
    group_advantage,
    kl_penalty,
    teacher_advantage,
)

V = 3
UNCLIPPED = {"clip_low": 1.0, "clip_high": math.inf}
Logits = dict[tuple[int, ...], Tensor]  # by prefix


def policy(seed: int, length: int) -> tuple[Tensor, Logits]:
    """Free logits for every prefix: all of them in one row (a leaf), and each prefix's own."""
    prefixes = [prefix for size in range(length) for prefix in itertools.product(range(V), repeat=size)]
    generator = torch.Generator().manual_seed(seed)
    flat_PV = torch.randn(len(prefixes), V, generator=generator, dtype=torch.float64).requires_grad_()
    return flat_PV, {prefix: flat_PV[row].log_softmax(-1) for row, prefix in enumerate(prefixes)}


def sequences(length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(V), repeat=length))


def logprobs(policy: Logits, length: int) -> Tensor:
    """log-probability of every token of every sequence, [V ** length, length]."""
    rows = [[policy[y[:t]][y[t]] for t in range(length)] for y in sequences(length)]
    return torch.stack([torch.stack(row) for row in rows])


def token_divergence(q: Logits, p: Logits, weight_q: Logits, length: int, forward: bool = False) -> Tensor:
    """The divergence at every prefix, prefixes drawn from ``weight_q`` and held fixed, summed over places."""
    total = torch.zeros((), dtype=torch.float64)
    for prefix in (prefix for size in range(length) for prefix in itertools.product(range(V), repeat=size)):
        reach = math.exp(sum(float(weight_q[prefix[:t]][prefix[t]].detach()) for t in range(len(prefix))))
        inner, outer = (q[prefix], p[prefix]) if forward else (p[prefix], q[prefix])
        total = total + reach * (outer.exp() * (outer - inner)).sum()
    return total


def sequence_reverse_kl(q: Logits, p: Logits, length: int) -> Tensor:
    q_Y, p_Y = logprobs(q, length).sum(-1), logprobs(p, length).sum(-1)
    return (q_Y.exp() * (q_Y - p_Y)).sum()


def expected(per_token_YT: Tensor, sampler: Logits, length: int) -> Tensor:
    """The mean over the sampler's sequences of a per-token loss, summed over places; drawing is not differentiated."""
    weight_Y = logprobs(sampler, length).sum(-1).exp().detach()
    return (weight_Y[:, None] * per_token_YT).sum()


def advantage_loss(q: Logits, p: Logits, sampler: Logits, length: int, credit: str) -> Tensor:
    q_YT, p_YT, sampler_YT = (logprobs(one, length) for one in (q, p, sampler))
    advantage_YT = teacher_advantage(q_YT, p_YT, torch.ones_like(p_YT, dtype=torch.bool), credit=credit)
    assert not advantage_YT.requires_grad
    return expected(clipped_surrogate(q_YT, sampler_YT, advantage_YT, **UNCLIPPED), sampler, length)


def assert_same_gradient(loss: Tensor, truth: Tensor, leaf_PV: Tensor, *, differ: bool = False) -> None:
    (given,) = grad(loss, leaf_PV, retain_graph=True)
    (wanted,) = grad(truth, leaf_PV, retain_graph=True)
    assert float(wanted.abs().max()) > 1e-2
    assert torch.allclose(given, wanted, rtol=0, atol=1e-10) != differ


@pytest.mark.parametrize("length", [2, 3])
def test_p58_each_credit_has_the_gradient_of_its_own_reverse_kl(length: int) -> None:
    (leaf, q), (_, p) = policy(1, length), policy(2, length)
    whole, by_token = sequence_reverse_kl(q, p, length), token_divergence(q, p, q, length)
    assert whole.item() == pytest.approx(by_token.item(), abs=1e-12)  # the chain rule: one value
    assert_same_gradient(advantage_loss(q, p, q, length, "sequence"), whole, leaf)
    assert_same_gradient(advantage_loss(q, p, q, length, "token"), by_token, leaf)
    assert_same_gradient(advantage_loss(q, p, q, length, "token"), whole, leaf, differ=True)


def test_p58_a_stale_sampler_is_corrected_for_token_by_token() -> None:
    """The ratio turns the sampler's tokens into the student's own; prefixes stay the sampler's."""
    (leaf, q), (_, p), (_, sampler) = policy(1, 2), policy(2, 2), policy(3, 2)
    truth = token_divergence(q, p, sampler, 2)
    assert_same_gradient(advantage_loss(q, p, sampler, 2, "token"), truth, leaf)
    stale_YT = teacher_advantage(
        logprobs(sampler, 2), logprobs(p, 2), torch.ones(9, 2, dtype=torch.bool), credit="token"
    )
    stale = expected(clipped_surrogate(logprobs(q, 2), logprobs(sampler, 2), stale_YT, **UNCLIPPED), sampler, 2)
    assert_same_gradient(stale, truth, leaf, differ=True)  # an advantage of the sampler's has another fixed point


def test_p58_backpropagation_through_the_log_ratio_teaches_nothing() -> None:
    (leaf, q), (_, p) = policy(1, 2), policy(2, 2)
    (given,) = grad(expected(logprobs(q, 2) - logprobs(p, 2), q, 2), leaf)
    assert float(given.abs().max()) < 1e-12


@pytest.mark.parametrize(("name", "forward"), [("k2", False), ("k3", True)])
def test_p59_k2_follows_the_reverse_kl_and_k3_the_forward(name: str, forward: bool) -> None:
    (leaf, q), (_, p) = policy(1, 2), policy(2, 2)
    loss = expected(kl_penalty(name, logprobs(q, 2), logprobs(p, 2)), q, 2)
    assert_same_gradient(loss, token_divergence(q, p, q, 2, forward=forward), leaf)
    assert_same_gradient(loss, token_divergence(q, p, q, 2, forward=not forward), leaf, differ=True)


def test_p59_values() -> None:
    """k3 averages to KL(student || reference) exactly; k2 to second order, so that it does near the reference."""
    (_, q), (_, p) = policy(1, 2), policy(2, 2)
    k3 = expected(kl_penalty("k3", logprobs(q, 2), logprobs(p, 2)), q, 2)
    assert k3.item() == pytest.approx(token_divergence(q, p, q, 2).item(), abs=1e-12)
    near = {prefix: (row + 1e-3 * torch.arange(V)).log_softmax(-1) for prefix, row in p.items()}
    k2 = expected(kl_penalty("k2", logprobs(near, 2), logprobs(p, 2)), near, 2)
    assert k2.item() == pytest.approx(token_divergence(near, p, near, 2).item(), rel=1e-2)
    logprob_N, reference_N = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5])  # log p/q = -1, .5
    assert kl_penalty("k2", logprob_N, reference_N).tolist() == pytest.approx([0.5, 0.125])
    assert kl_penalty("k3", logprob_N, reference_N).tolist() == pytest.approx([math.exp(-1), math.exp(0.5) - 1.5])
    assert kl_penalty("k3", logprob_N, logprob_N).tolist() == [0, 0]


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_p55_padding_changes_no_advantage(credit: str) -> None:
    """Rows of 2 and 3 drawn tokens behind prompts, with 0 and 7 places of padding that hold whatever they hold."""
    logprob_BT = torch.tensor([[9.0, -1.0, -2.0, 9.0], [9.0, -0.5, -1.5, -3.0]])
    teacher_BT = torch.tensor([[9.0, -0.5, -4.0, 9.0], [-9.0, -2.5, -1.0, -1.0]])
    mask_BT = torch.tensor([[False, True, True, False], [False, True, True, True]])
    by_hand = {
        "token": [[0, 0.5, -2, 0], [0, -2, 0.5, 2]],
        "sequence": [[0, -1.5, -2, 0], [0, 0.5, 2.5, 2]],
    }[credit]
    given = teacher_advantage(logprob_BT, teacher_BT, mask_BT, credit=credit)
    assert torch.allclose(given, torch.tensor(by_hand), atol=1e-6)
    for filler in (0.0, -100.0, math.nan, -math.inf):
        pad_BT = torch.full((2, 7), filler)
        padded = teacher_advantage(
            torch.cat([logprob_BT, pad_BT], 1),
            torch.cat([teacher_BT, torch.ones(2, 7)], 1),
            torch.cat([mask_BT, torch.zeros(2, 7, dtype=torch.bool)], 1),
            credit=credit,
        )
        assert torch.equal(padded[:, :4], given) and not padded[:, 4:].any()


def test_an_advantage_is_bounded_token_by_token() -> None:
    zeros, teacher = torch.zeros(1, 3), torch.tensor([[-math.inf, -0.25, -2.0]])
    ones = torch.ones(1, 3, dtype=torch.bool)
    assert teacher_advantage(zeros, teacher, ones, credit="token", bound=1.0).tolist() == [[-1, -0.25, -1]]
    assert teacher_advantage(zeros, teacher, ones, credit="sequence", bound=1.0).tolist() == [[-2.25, -1.25, -1]]


# ratio, advantage -> the loss, and whether it has a gradient, at bounds .8 and 1.3
CASES = [
    (1.0, 2.0, -2.0, True),
    (1.5, 2.0, -2.6, False),  # good, and made more likely enough
    (0.5, 2.0, -1.0, True),  # good, and less likely than it was: still to be raised
    (0.5, -2.0, 1.6, False),  # bad, and made less likely enough
    (1.5, -2.0, 3.0, True),  # bad, and more likely than it was: still to be lowered
    (1.5, 0.0, 0.0, True),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "has_gradient"), CASES)
def test_the_four_cases_of_clipping(ratio: float, advantage: float, loss: float, has_gradient: bool) -> None:
    sampler_N = torch.tensor([-1.25], dtype=torch.float64, requires_grad=True)
    logprob_N = (sampler_N.detach() + math.log(ratio)).requires_grad_()
    advantage_N = torch.tensor([advantage], dtype=torch.float64, requires_grad=True)
    given = clipped_surrogate(logprob_N, sampler_N, advantage_N, clip_low=0.2, clip_high=0.3)
    assert given.item() == pytest.approx(loss, abs=1e-12)
    given.sum().backward()
    assert logprob_N.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0, abs=1e-12)
    assert sampler_N.grad is None and advantage_N.grad is None
    told = clipped_share(logprob_N, sampler_N, advantage_N, clip_low=0.2, clip_high=0.3)
    assert told == float(not has_gradient)


def test_without_bounds_nothing_is_clipped() -> None:
    logprob_N, sampler_N = torch.tensor([0.0, -9.0]), torch.tensor([-9.0, 0.0])
    given = clipped_surrogate(logprob_N, sampler_N, torch.tensor([1.0, -1.0]), **UNCLIPPED)
    assert given.tolist() == pytest.approx([-math.exp(9), math.exp(-9)])


def test_group_advantages_by_hand() -> None:
    """TRL: (r - mean) / (std + 1e-4), std with G - 1; here the epsilon is 1e-6 and equal groups are exactly 0."""
    reward_PG = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    plain = group_advantage(reward_PG, normalise=False)
    assert plain.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0] * 4, [0] * 4]
    scaled = group_advantage(reward_PG, normalise=True)
    assert scaled[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)  # std .5
    assert scaled[1].tolist() == pytest.approx([0.866025, 0.866025, -0.866025, -0.866025], abs=1e-5)  # std sqrt(1/3)
    assert not scaled[2:].any()
    trl = (reward_PG - reward_PG.mean(1, keepdim=True)) / (reward_PG.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(scaled, trl, rtol=1e-3, atol=1e-12)


def test_entropy_by_hand() -> None:
    logits_NV = torch.tensor([[0.0, 0, 0, 0], [0, 0, -math.inf, -math.inf], [0, -1e4, -1e4, -1e4]])
    assert entropy(logits_NV).tolist() == pytest.approx([math.log(4), math.log(2), 0.0])
    assert entropy(logits_NV.double()).dtype == torch.float64 and entropy(logits_NV.bfloat16()).dtype == torch.float32


ONES = torch.ones(1, 2)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: clipped_surrogate(ONES, ONES, ONES, clip_low=0.0, clip_high=1.0), "clip_low=0.0"),
    (lambda: clipped_surrogate(ONES, ONES, ONES, clip_low=1.5, clip_high=1.0), "clip_low=1.5"),
    (lambda: clipped_surrogate(ONES, ONES, ONES, clip_low=0.2, clip_high=0.0), "clip_high=0.0"),
    (lambda: clipped_surrogate(ONES, ONES, ONES, clip_low=math.nan, clip_high=1.0), "clip_low=nan"),
    (lambda: teacher_advantage(ONES, ONES, ONES > 0, credit="episode"), "credit='episode'"),
    (lambda: teacher_advantage(ONES, ONES, ONES > 0, credit="token", bound=0.0), "bound=0.0"),
    (lambda: group_advantage(torch.ones(3, 1), normalise=True), "groups of 1"),
    (lambda: kl_penalty("k1", ONES, ONES), "expected gradient of zero"),
    (lambda: kl_penalty("k4", ONES, ONES), "kl_estimator='k4': expected one of k2, k3$"),
]


@pytest.mark.parametrize(("call", "told"), BAD, ids=[told for _, told in BAD])
def test_bad_values_are_refused(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize("samples", [2, 3])
def test_group_advantages_give_the_gradient_of_the_expected_reward(samples: int) -> None:
    """Every group that can be drawn, each with its probability: Dr. GRPO's mean is (G - 1)/G of the exact gradient.

    The rest of a reward's share goes into its own baseline. Divided by the group's deviation the estimator has another
    mean: GRPO's, which is no multiple of it where problems differ in difficulty.
    """
    reward_PV = torch.tensor([[1.0, 0.0, 0.25], [0.0, 0.0, 1.0]], dtype=torch.float64)
    logits_PV = torch.tensor([[0.3, -0.2, 0.5], [1.5, 0.1, -1.0]], dtype=torch.float64, requires_grad=True)
    (exact_PV,) = grad((logits_PV.softmax(-1) * reward_PV).sum(), logits_PV)
    found = {}
    for normalise in (False, True):
        total = torch.zeros((), dtype=torch.float64)
        for problem in range(2):
            logprob_V = logits_PV[problem].log_softmax(-1)
            for group in itertools.product(range(3), repeat=samples):
                drawn_G = logprob_V[list(group)]
                advantage_PG = group_advantage(reward_PV[problem][list(group)][None], normalise=normalise)
                surrogate_G = clipped_surrogate(drawn_G, drawn_G.detach(), advantage_PG[0], clip_low=0.2, clip_high=0.2)
                total = total + drawn_G.detach().sum().exp() * surrogate_G.mean()
        (found[normalise],) = grad(-total, logits_PV)
    torch.testing.assert_close(found[False], exact_PV * (samples - 1) / samples)
    ratio_P = (found[True] * exact_PV).sum(-1) / (exact_PV**2).sum(-1)
    assert float(ratio_P.max() / ratio_P.min()) > 1.1, "GRPO weighs problems by how often they are solved"
