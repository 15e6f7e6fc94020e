"""Objectives on tokens that the student drew itself: what an advantage, or a teacher, does to their probability.

Everything here works place by place, on natural-log probabilities of the tokens that were drawn: ``logprob_N`` of the
student as it is now (with gradient), ``sampler_logprob_N`` of the policy they were drawn from. The functions return
losses to be *minimised*, per place; sums and counts are taken by ``reduce.py``.
"""

import math

import torch
from torch import Tensor

from research.losses.logprobs import working_dtype

CREDITS = ("token", "sequence")
KL_ESTIMATORS = ("k2", "k3")


def clipped_surrogate(
    logprob_N: Tensor, sampler_logprob_N: Tensor, advantage_N: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``, ``r = exp(logprob - sampler_logprob)``.

    The gradient at ``r = 1`` is ``-A`` times that of ``logprob``: the policy gradient. Advantage and sampler are
    detached. ``clip_high`` may be ``inf`` and ``clip_low`` 1: then nothing is clipped and ``r`` corrects for the
    difference of policies alone. Schulman et al. 2017 (arXiv:1707.06347), equation 7; two bounds as in DAPO
    (arXiv:2503.14476).

    Raises ValueError on bounds outside ``0 < clip_low <= 1`` and ``0 < clip_high``.
    """
    check_clip(clip_low, clip_high)
    advantage_N = advantage_N.detach()
    ratio_N = (logprob_N - sampler_logprob_N.detach()).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)


def clipped_share(
    logprob_N: Tensor, sampler_logprob_N: Tensor, advantage_N: Tensor, *, clip_low: float, clip_high: float
) -> float:
    """Share of places at which :func:`clipped_surrogate` has no gradient because its ratio went beyond the bound."""
    ratio_N = (logprob_N.detach() - sampler_logprob_N).exp()
    beyond_N = ((advantage_N > 0) & (ratio_N > 1 + clip_high)) | ((advantage_N < 0) & (ratio_N < 1 - clip_low))
    return float(beyond_N.float().mean())


def teacher_advantage(
    logprob_BT: Tensor, teacher_logprob_BT: Tensor, mask_BT: Tensor, *, credit: str, bound: float = math.inf
) -> Tensor:
    """``log p - log q`` of every drawn token, or of it and all that follow it: minus the sampled reverse KL, [B, T].

    ``logprob_BT`` is of the student as it is now, not of the sampler: the advantage is then 0 where the student has
    become the teacher, however old the samples. With :func:`clipped_surrogate`, unclipped, the expected gradient is,
    under

    token      the sum over places of the gradient of KL(student || teacher) given the prefix, the sampler's prefixes
               held fixed: what the reverse KL over the full vocabulary has, from one token instead of all
    sequence   where the sampler is the student itself, the gradient of KL(student || teacher) over whole completions:
               a token also answers for where it leads

    One document a row; places outside ``mask_BT`` add nothing and get 0. ``bound`` clips each token's own difference to
    ``[-bound, bound]`` nats, since one impossible token would else outweigh a batch. Nothing carries gradient.

    Raises ValueError for an unknown credit or a bound that is not positive.
    """
    if credit not in CREDITS:
        raise ValueError(f"credit={credit!r}: expected one of {', '.join(CREDITS)}")
    if not bound > 0:
        raise ValueError(f"bound={bound!r}: expected a positive number of nats, or inf for none")
    difference_BT = (teacher_logprob_BT - logprob_BT).detach().clamp(-bound, bound)
    difference_BT = torch.where(mask_BT, difference_BT, torch.zeros_like(difference_BT))
    if credit == "token":
        return difference_BT
    ahead_BT = difference_BT.flip(-1).cumsum(-1).flip(-1)
    return torch.where(mask_BT, ahead_BT, torch.zeros_like(ahead_BT))


def group_advantage(reward_PG: Tensor, *, normalise: bool, epsilon: float = 1e-6) -> Tensor:
    """Each sample's reward less the mean of its problem's group, [P, G]; exactly 0 where a group's rewards are equal.

    normalise  True: divided by the group's standard deviation (with G - 1 in its denominator) plus ``epsilon``: GRPO
               (arXiv:2402.03300). False: left as it is, since the division gives problems that are almost always or
               almost never solved the larger steps (arXiv:2503.20783)

    Raises ValueError for groups of one, which have no advantage.
    """
    if reward_PG.shape[-1] < 2:
        raise ValueError(f"groups of {reward_PG.shape[-1]}: an advantage needs at least 2 samples of each problem")
    centred_PG = reward_PG - reward_PG.mean(dim=-1, keepdim=True)
    equal_P1 = (reward_PG == reward_PG[..., :1]).all(dim=-1, keepdim=True)
    centred_PG = centred_PG.masked_fill(equal_P1, 0.0)
    return centred_PG / (reward_PG.std(dim=-1, keepdim=True) + epsilon) if normalise else centred_PG


def kl_penalty(name: str, logprob_N: Tensor, reference_logprob_N: Tensor) -> Tensor:
    """A penalty on drawn tokens for leaving a reference policy. Both average to KL(student || reference) in value.

    Used as a loss on tokens that the student drew, with prefixes held fixed, their expected gradients differ:

    k2   ``(log q - log p)^2 / 2``: the gradient of the *reverse* KL, KL(student || reference); its value is the KL only
         to second order
    k3   ``p/q - 1 - log(p/q)``: the gradient of the *forward* KL, KL(reference || student); its value is unbiased.
         GRPO's (arXiv:2402.03300)

    ``k1 = log q - log p`` is refused: as a loss its expected gradient is zero, whatever the reference. Estimators by
    J. Schulman, "Approximating KL divergence" (2020).
    """
    if name not in KL_ESTIMATORS:
        hint = "; k1 as a loss has an expected gradient of zero" if name == "k1" else ""
        raise ValueError(f"kl_estimator={name!r}: expected one of {', '.join(KL_ESTIMATORS)}{hint}")
    difference_N = reference_logprob_N.detach() - logprob_N  # log p/q
    return difference_N.square() / 2 if name == "k2" else difference_N.expm1() - difference_N


def entropy(logits_NV: Tensor) -> Tensor:
    """``-sum q log q`` of every row, nats; 0 for a class of probability zero."""
    logprobs_NV = torch.log_softmax(logits_NV.to(working_dtype(logits_NV)), dim=-1)
    return torch.special.entr(logprobs_NV.exp()).sum(dim=-1)


def check_clip(clip_low: float, clip_high: float) -> None:
    """Raise ValueError for bounds that no ratio could respect."""
    if not 0 < clip_low <= 1 or not clip_high > 0:
        raise ValueError(
            f"clip_low={clip_low!r}, clip_high={clip_high!r}: expected 0 < clip_low <= 1 (1: no bound below) and "
            "clip_high > 0 (inf: none above)"
        )
