"""Intervals and exact tests in closed form, over numpy alone (the scientific stack is slow to import; the tests check
every function here against it)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_ENUMERATED = 16  # up to 2**16 sign patterns are counted one by one; beyond that they are drawn
_DRAWN_FLIPS = 100_000


def normal_cdf(z: float) -> float:
    """P(Z <= z) of a standard normal."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


def normal_quantile(prob: float) -> float:
    """The z with ``normal_cdf(z) = prob``; raises ValueError outside (0, 1)."""
    from statistics import NormalDist

    _check_probability(prob)
    return NormalDist().inv_cdf(prob)


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with ``df`` >= 1 whole degrees of freedom: the finite trigonometric series
    (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    if df < 1:
        raise ValueError(f"degrees of freedom are {df}; expected at least 1")
    angle = math.atan(t / math.sqrt(df))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = df % 2
    term, total = (cos, 0.0) if odd else (1.0, 0.0)
    for k in range(df // 2):
        total += term
        term *= cos * cos * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = 2 / math.pi * (angle + sin * total) if odd else sin * total
    return 0.5 * (1 + inside)


@lru_cache(maxsize=1024)
def t_quantile(prob: float, df: int) -> float:
    """The t with ``t_cdf(t, df) = prob``, by bisection; raises ValueError outside (0, 1)."""
    _check_probability(prob)
    if prob < 0.5:
        return -t_quantile(1 - prob, df)
    low, high = 0.0, 2.0
    while t_cdf(high, df) < prob:
        high *= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if t_cdf(middle, df) < prob else (low, middle)
    return 0.5 * (low + high)


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds: mean, sample SD (n - 1), and Student's t interval of the mean.

    ``sd``, ``low`` and ``high`` are None for a single seed: one run has no spread to show.
    """

    mean: float
    sd: float | None
    n: int
    values: tuple[float, ...]
    low: float | None
    high: float | None


def summarise(values: Sequence[float], confidence: float = 0.95) -> ArmSummary:
    """The summary of one arm; raises ValueError for no values."""
    if not len(values):
        raise ValueError("an arm without a completed run has no summary")
    numbers = tuple(float(value) for value in values)
    n, mean = len(numbers), float(np.mean(numbers))
    if n == 1:
        return ArmSummary(mean, None, 1, numbers, None, None)
    sd = float(np.std(np.array(numbers), ddof=1))
    half = t_quantile(0.5 + confidence / 2, n - 1) * sd / math.sqrt(n)
    return ArmSummary(mean, sd, n, numbers, mean - half, mean + half)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as two shares in [0, 1]."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n}: expected 0 <= successes <= n and n >= 1")
    z = normal_quantile(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_exact(only_first_wrong: int, only_second_wrong: int) -> float:
    """Two-sided exact McNemar p for two given models, from the items that just one of them gets wrong.

    It speaks about these two models on this population of items, not about two methods: training noise is not in it.
    """
    if min(only_first_wrong, only_second_wrong) < 0:
        raise ValueError(f"counts are {only_first_wrong} and {only_second_wrong}; expected both >= 0")
    discordant = only_first_wrong + only_second_wrong
    tail = sum(math.comb(discordant, k) for k in range(min(only_first_wrong, only_second_wrong) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def smallest_significant_net(discordant: int, level: float = 0.05) -> int | None:
    """The smallest net difference among ``discordant`` items with an exact McNemar p below ``level``, or None."""
    for net in range(discordant % 2, discordant + 1, 2):
        fewer = (discordant - net) // 2
        if mcnemar_exact(fewer, discordant - fewer) < level:
            return net
    return None


def sign_flip_p(differences: Sequence[float] | np.ndarray, two_sided: bool = True) -> float:
    """Exact sign-flip permutation p of paired differences against a centre of 0.

    The share of the 2**n sign patterns whose sum is at least as far from 0 (one-sided: at least as large) as the sum
    seen. With n > 16 pairs 100,000 patterns are drawn with a fixed seed, the seen one counted in.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not d.size or not np.isfinite(d).all():
        raise ValueError(f"expected one finite difference per seed; given {d!r}")
    seen = d.sum()
    if d.size <= _ENUMERATED:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
    else:
        signs = np.random.default_rng(0).integers(0, 2, (_DRAWN_FLIPS, d.size)) * 2 - 1
        sums = np.concatenate([[seen], signs @ d])
    tolerance = 1e-9 * float(np.abs(d).sum())  # sums of the same numbers in another order count as equal
    if two_sided:
        return float(np.mean(np.abs(sums) >= abs(seen) - tolerance))
    return float(np.mean(sums >= seen - tolerance))


def smallest_p(n: int, two_sided: bool = True) -> float:
    """The smallest p that a sign-flip test of ``n`` pairs can give: 2/2**n, or 1/2**n one-sided."""
    if n < 1:
        raise ValueError(f"{n} pairs; expected at least 1")
    if n > _ENUMERATED:
        return 1 / (_DRAWN_FLIPS + 1)
    return (2 if two_sided else 1) / 2**n


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down adjusted p-values of one family; a None stays None and is not counted in the family."""
    family = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, name) in enumerate(family):
        largest = max(largest, min(1.0, (len(family) - rank) * p))
        adjusted[name] = largest
    return adjusted


def _check_probability(prob: float) -> None:
    if not 0 < prob < 1:
        raise ValueError(f"probability is {prob}; expected a value strictly between 0 and 1")
