"""Hierarchical paired bootstrap: seeds are resampled, then test items, the same items for every run.

All runs of a study are read in the same 10,000 resampled test sets, so every comparison of it is paired by item and
one set of draws serves them all. Resampling both ways counts the noise that is particular to one seed on one item
twice; the intervals err on the wide side (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007).
"""

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from research.results.statistics import normal_cdf, t_quantile

DRAWS = 10_000
RNG_SEED = 150302531
_CHUNK = 500_000  # counts held at once: small enough for the cache of one core
_LARGE_DF = 1000  # from here on Student's t and the normal agree to three digits


def _poisson_table() -> np.ndarray:
    """Poisson(1) counts for each of the 65,536 values of a uniform 16-bit number."""
    cumulative = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])
    return np.searchsorted(cumulative, (np.arange(65536) + 0.5) / 65536).astype(np.float32)


class ItemResampler:
    """The number of wrong items of each run in resampled test sets.

    ``wrong`` maps a run's key to booleans over the same N items. How often each item is drawn is an independent
    Poisson(1) count, and totals are scaled from the size drawn to N: given its size such a set is N draws with
    replacement, and the scaling takes out the size, so the two bootstraps agree to order 1/N. Only items that some run
    gets wrong can change a total; the others are drawn as one number.
    """

    def __init__(self, wrong: Mapping[str, np.ndarray], draws: int = DRAWS, rng_seed: int = RNG_SEED) -> None:
        if len({column.shape for column in wrong.values()}) != 1:
            raise ValueError("expected one boolean per item for every run, over the same items")
        self._column = {key: number for number, key in enumerate(wrong)}
        stacked_IC = np.stack([np.asarray(column, dtype=bool) for column in wrong.values()], axis=1)
        self.num_items = len(stacked_IC)
        self._wrong_MC = stacked_IC[stacked_IC.any(axis=1)]
        self._draws, self._rng_seed = draws, rng_seed

    def totals(self, key: str) -> np.ndarray:
        """float64, one per draw: how many items of the resampled test set the run gets wrong."""
        return np.asarray(self._totals_CD[self._column[key]])

    @cached_property
    def _totals_CD(self) -> np.ndarray:
        num_kept, num_runs = self._wrong_MC.shape
        if not num_kept:
            return np.zeros((num_runs, self._draws))
        rng = np.random.default_rng([self._rng_seed, 1])
        size_D = rng.poisson(self.num_items - num_kept, self._draws).astype(np.float64)
        counts_of, chunk = _poisson_table(), max(1, _CHUNK // num_kept)
        # whole numbers below 2**24 are exact in float32, so the sums do not depend on the order of addition
        columns_MC = np.concatenate([self._wrong_MC, np.ones((num_kept, 1), bool)], axis=1).astype(np.float32)
        parts = []
        for start in range(0, self._draws, chunk):
            rows = min(chunk, self._draws - start)
            drawn = rng.integers(0, 65536, (rows, num_kept), dtype=np.uint16)
            parts.append(counts_of[drawn] @ columns_MC)
        totals_DC = np.concatenate(parts).astype(np.float64)
        size_D += totals_DC[:, -1]
        return np.ascontiguousarray((totals_DC[:, :-1] * (self.num_items / size_D)[:, None]).T)


def seed_weights(n: int, draws: int = DRAWS, rng_seed: int = RNG_SEED) -> np.ndarray:
    """[draws, n], rows sum to 1: the weight of each seed when n seeds are drawn with replacement."""
    rng = np.random.default_rng([rng_seed, 2])
    drawn = rng.integers(0, n, (draws, n)) + np.arange(draws)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n) / n


def unbiased_weights(weights_DS: np.ndarray) -> np.ndarray:
    """The same weights, spread out around 1/n by sqrt(n/(n-1)).

    Drawing n seeds with replacement gives a mean the variance (n-1)/n s^2/n; with these weights it is s^2/n.
    """
    n = weights_DS.shape[1]
    return 1 / n + math.sqrt(n / (n - 1)) * (weights_DS - 1 / n) if n > 1 else weights_DS


def effective_df(n: int, seed_draws_D: np.ndarray, all_draws_D: np.ndarray) -> int:
    """Satterthwaite's degrees of freedom of a spread made of n seeds (n - 1 of them) and many items (no limit).

    (n-1) (total variance / seed variance)^2, rounded down, from the central 68 % of the draws with seeds alone and with
    items too; n - 1 where no items are resampled, or where a spread is not finite.
    """
    seed_spread, spread = _spread(seed_draws_D), _spread(all_draws_D)
    if not math.isfinite(spread) or not math.isfinite(seed_spread) or spread <= seed_spread:
        return n - 1
    if seed_spread == 0:
        return _LARGE_DF
    return min(_LARGE_DF, int((n - 1) * min(spread / seed_spread, 100.0) ** 4))


def _spread(draws_D: np.ndarray) -> float:
    ordered = np.sort(draws_D)
    low, high = ordered[int(0.16 * len(ordered))], ordered[int(0.84 * len(ordered))]
    return float(high - low) / 2 if math.isfinite(low) and math.isfinite(high) else math.inf


def percentile_interval(
    low_D: np.ndarray, high_D: np.ndarray, df: int, confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """The interval from draws for its lower and for its upper end; an end is None where it is not finite.

    The percentiles of a bootstrap are those of a normal. With few seeds the spread itself is uncertain, so the levels
    are moved outwards from those of a normal to those of Student's t with ``df``: Phi(-+ t). A mean's interval then
    agrees with Student's (expanded percentiles: Hesterberg, The American Statistician 69(4), 2015).
    """
    level = normal_cdf(-t_quantile(0.5 + confidence / 2, df))
    # the order statistic just outside, not an interpolation, which inf would turn into nan
    rank = math.floor(level * (len(low_D) - 1))
    low, high = float(np.partition(low_D, rank)[rank]), float(np.partition(high_D, -1 - rank)[-1 - rank])
    return (low if math.isfinite(low) else None), (high if math.isfinite(high) else None)


def ratio_draws(numerator_D: np.ndarray, denominator_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws of a ratio for the lower and for the upper end.

    Where a draw's denominator is not positive the ratio says nothing: it counts as -inf for the lower end and as inf
    for the upper one, so that a gap which is not itself established gives no finite interval.
    """
    valid = denominator_D > 0
    ratio = numerator_D / np.where(valid, denominator_D, 1.0)
    return np.where(valid, ratio, -np.inf), np.where(valid, ratio, np.inf)
