"""The resampler against moments in closed form and against a plain loop; coverage of its intervals by simulation."""

import math

import numpy as np
import pytest

from research.results.bootstrap import (
    ItemResampler,
    effective_df,
    percentile_interval,
    ratio_draws,
    seed_weights,
    unbiased_weights,
)


def _wrong(num_items: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    hard = rng.random(num_items) < 0.3
    soft = hard & (rng.random(num_items) < 0.6) | (rng.random(num_items) < 0.02)
    return {"hard": hard, "soft": soft, "perfect": np.zeros(num_items, dtype=bool)}


def test_item_totals_have_the_moments_of_drawing_with_replacement() -> None:
    wrong = _wrong()
    resampler = ItemResampler(wrong, draws=20_000)
    matrix = np.stack([resampler.totals(key) for key in wrong])
    stacked = np.stack(list(wrong.values())).astype(float)
    centred = stacked - stacked.mean(axis=1, keepdims=True)
    assert matrix.mean(axis=1) == pytest.approx(stacked.sum(axis=1), rel=0.01, abs=1e-9)
    assert np.cov(matrix) == pytest.approx(centred @ centred.T, rel=0.05, abs=0.5)  # paired: same items for every run
    assert not resampler.totals("perfect").any()


def test_item_totals_agree_with_a_plain_loop_in_distribution() -> None:
    wrong = _wrong()
    fast = ItemResampler(wrong, draws=10_000)
    rng, plain = np.random.default_rng(9), []
    for _ in range(10_000):
        chosen = rng.integers(0, 400, 400)
        plain.append(float(wrong["hard"][chosen].sum()) - float(wrong["soft"][chosen].sum()))
    quantiles = [0.01, 0.025, 0.25, 0.5, 0.75, 0.975, 0.99]
    difference = np.quantile(fast.totals("hard") - fast.totals("soft"), quantiles)
    assert difference == pytest.approx(np.quantile(plain, quantiles), abs=1.5)


def test_item_totals_do_not_depend_on_items_that_every_run_gets_right() -> None:
    wrong = _wrong()
    shuffled = {key: np.roll(column, 17) for key, column in wrong.items()}
    assert ItemResampler(wrong, 2000).totals("hard").std() == pytest.approx(
        ItemResampler(shuffled, 2000).totals("hard").std(), rel=0.1
    )
    assert not ItemResampler({"a": np.zeros(5, bool)}, 10).totals("a").any()
    with pytest.raises(ValueError, match="same items"):
        ItemResampler({"a": np.zeros(5, bool), "b": np.zeros(6, bool)})


def test_resampling_is_the_same_every_time() -> None:
    wrong = _wrong()
    assert np.array_equal(ItemResampler(wrong).totals("soft"), ItemResampler(wrong).totals("soft"))
    assert np.array_equal(seed_weights(6), seed_weights(6))


def test_seed_weights_are_those_of_drawing_with_replacement() -> None:
    weights = seed_weights(5, draws=40_000)
    assert weights.sum(axis=1) == pytest.approx(1.0)
    assert np.cov(weights.T) == pytest.approx((np.eye(5) - 0.2) / 25, abs=0.002)  # multinomial(5, 1/5) / 5
    values = np.array([3.0, 1.0, 4.0, 1.0, 9.0])
    spread = (unbiased_weights(weights) @ values).std()
    assert spread == pytest.approx(values.std(ddof=1) / math.sqrt(5), rel=0.02)


def test_percentile_interval_of_a_mean_agrees_with_students_t() -> None:
    values = np.random.default_rng(5).normal(10, 3, 30)
    draws = unbiased_weights(seed_weights(30, 40_000)) @ values
    half = 2.0452 * values.std(ddof=1) / math.sqrt(30)
    low, high = percentile_interval(draws, draws, df=29)
    assert low == pytest.approx(values.mean() - half, abs=0.15)
    assert high == pytest.approx(values.mean() + half, abs=0.15)


@pytest.mark.parametrize("n", [6, 10])
def test_coverage_over_seeds_alone(n: int) -> None:
    rng = np.random.default_rng(n)
    weights = unbiased_weights(seed_weights(n, 2000))
    inside = 0
    for _ in range(600):
        draws = weights @ rng.normal(0, 1, n)
        low, high = percentile_interval(draws, draws, df=n - 1)
        inside += low <= 0 <= high
    assert 0.92 <= inside / 600 <= 0.98


def test_coverage_over_seeds_and_items() -> None:
    """Two arms whose items differ in difficulty; the truth is the difference over all items that could be drawn."""
    n, num_items, inside = 6, 250, 0
    rng = np.random.default_rng(1)
    raw, unbiased = seed_weights(n, 1000), unbiased_weights(seed_weights(n, 1000))
    for _ in range(300):
        hard, soft = rng.beta(0.3, 1.2, num_items), rng.beta(0.3, 1.5, num_items)
        truth = num_items * (0.3 / 1.5 - 0.3 / 1.8)
        shift = rng.normal(0, 0.02, (2, n))  # training noise
        wrong = {
            (arm, s): rng.random(num_items) < p * (1 + shift[arm, s])
            for arm, p in ((0, hard), (1, soft))
            for s in range(n)
        }
        resampler = ItemResampler({str(key): column for key, column in wrong.items()}, 1000, rng_seed=3)
        values = np.array([float(wrong[0, s].sum()) - float(wrong[1, s].sum()) for s in range(n)])
        resampled = np.stack([resampler.totals(str((0, s))) - resampler.totals(str((1, s))) for s in range(n)], axis=1)
        by_seed, draws = unbiased @ values, (unbiased * resampled).sum(axis=1)
        low, high = percentile_interval(draws, draws, effective_df(n, by_seed, draws))
        inside += low <= truth <= high
    assert raw.shape == (1000, n)
    assert inside / 300 >= 0.93


def test_effective_degrees_of_freedom() -> None:
    rng = np.random.default_rng(0)
    seeds, items = rng.normal(0, 1, 50_000), rng.normal(0, 1, 50_000)
    assert effective_df(6, seeds, seeds) == 5
    assert effective_df(6, seeds, seeds + items) == pytest.approx(20, abs=1)  # 5 (2/1)^2
    assert effective_df(6, np.zeros(100), items) == 1000
    assert effective_df(6, np.full(100, -np.inf), items) == 5


def test_ratio_draws_count_against_both_ends_where_the_gap_is_not_positive() -> None:
    low, high = ratio_draws(np.array([1.0, 2.0, 3.0]), np.array([2.0, -1.0, 0.0]))
    assert low.tolist() == [0.5, -np.inf, -np.inf]
    assert high.tolist() == [0.5, np.inf, np.inf]
    assert percentile_interval(low, high, df=5) == (None, None)
