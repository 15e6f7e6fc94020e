"""Closed forms against scipy and against hand values."""

import itertools

import numpy as np
import pytest
import scipy.stats

from research.results.statistics import (
    holm,
    mcnemar_exact,
    normal_cdf,
    normal_quantile,
    sign_flip_p,
    smallest_p,
    smallest_significant_net,
    summarise,
    t_cdf,
    t_quantile,
    wilson_interval,
)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 6, 9, 10, 29, 100, 999, 1000])
def test_t_distribution_agrees_with_scipy(df: int) -> None:
    for t in (-8.0, -2.5, -0.3, 0.0, 0.7, 2.0, 12.0):
        assert t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), abs=1e-12)
    for prob in (0.0005, 0.025, 0.3, 0.5, 0.95, 0.975, 0.999):
        assert t_quantile(prob, df) == pytest.approx(scipy.stats.t.ppf(prob, df), rel=1e-8, abs=1e-9)


def test_normal_agrees_with_scipy() -> None:
    for z in (-4.0, -1.96, 0.0, 2.3):
        assert normal_cdf(z) == pytest.approx(scipy.stats.norm.cdf(z), rel=1e-12)
        assert normal_quantile(normal_cdf(z)) == pytest.approx(z, abs=1e-9)


@pytest.mark.parametrize("function", [normal_quantile, lambda prob: t_quantile(prob, 4)])
@pytest.mark.parametrize("prob", [0.0, 1.0, -0.1, float("nan")])
def test_quantiles_refuse_what_is_no_probability(function, prob: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        function(prob)


@pytest.mark.parametrize(("errors", "low", "high"), [(67, 53, 85), (74, 59, 93), (146, 124, 171)])
def test_wilson_interval_of_the_published_error_counts(errors: int, low: int, high: int) -> None:
    interval = [10_000 * end for end in wilson_interval(errors, 10_000)]
    assert [round(end) for end in interval] == [low, high]


def test_wilson_interval_agrees_with_scipy_and_stays_inside_0_and_1() -> None:
    for successes, n in ((0, 12), (1, 12), (12, 12), (300, 1000)):
        oracle = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    with pytest.raises(ValueError, match="13 of 12"):
        wilson_interval(13, 12)


@pytest.mark.parametrize("discordant", [20, 40, 60, 80, 100, 150])
def test_mcnemar_net_difference_needed_for_significance(discordant: int) -> None:
    needed = dict(zip([20, 40, 60, 80, 100, 150], [10, 14, 18, 20, 22, 26], strict=True))
    assert smallest_significant_net(discordant) == needed[discordant]


def test_mcnemar_agrees_with_the_binomial_test() -> None:
    for a, b in ((0, 0), (3, 3), (2, 9), (9, 2), (0, 6), (40, 60)):
        oracle = scipy.stats.binomtest(a, a + b).pvalue if a + b else 1.0
        assert mcnemar_exact(a, b) == pytest.approx(oracle, rel=1e-9)
    assert smallest_significant_net(5) is None  # five of five: .0625


@pytest.mark.parametrize("two_sided", [True, False])
def test_sign_flip_agrees_with_scipy_and_with_a_loop(two_sided: bool) -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 5, 8):
        d = rng.normal(0.4, 1, n)
        flipped = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product((1, -1), repeat=n)]
        far = [abs(x) >= abs(d.sum()) - 1e-12 if two_sided else x >= d.sum() - 1e-12 for x in flipped]
        assert sign_flip_p(d, two_sided) == pytest.approx(np.mean(far))
    d = rng.normal(0.4, 1, 7)
    oracle = scipy.stats.permutation_test(
        (d,),
        np.sum,
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="two-sided" if two_sided else "greater",
    )
    assert sign_flip_p(d, two_sided) == pytest.approx(oracle.pvalue)


def test_p121_five_wins_of_five_give_p_0625() -> None:
    assert sign_flip_p([3.0, 1.0, 8.0, 2.0, 5.0]) == pytest.approx(0.0625)
    assert [smallest_p(n) for n in (5, 6, 8, 10)] == pytest.approx([0.0625, 0.03125, 0.0078125, 0.001953125])
    assert smallest_p(5, two_sided=False) == pytest.approx(0.03125)


def test_sign_flip_with_ties_zeros_and_many_pairs() -> None:
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p([0.1, 0.2, 0.3, -0.3]) == sign_flip_p([1, 2, 3, -3])  # equal sums in floating point stay equal
    many = np.full(40, 1.0)
    assert sign_flip_p(many) == pytest.approx(1 / 100_001)
    assert sign_flip_p(np.tile([1.0, -1.0], 20)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="finite"):
        sign_flip_p([1.0, float("nan")])


def test_summary_of_an_arm() -> None:
    values = [3.0, 5.0, 10.0, 4.0]
    oracle = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    summary = summarise(values)
    assert (summary.mean, summary.n, summary.values) == (5.5, 4, (3.0, 5.0, 10.0, 4.0))
    assert summary.sd == pytest.approx(scipy.stats.tstd(values))
    assert (summary.low, summary.high) == pytest.approx((oracle.low, oracle.high))
    single = summarise([2.0])
    assert (single.mean, single.sd, single.low, single.high) == (2.0, None, None, None)
    with pytest.raises(ValueError, match="no summary"):
        summarise([])


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None, "e": 0.5})
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": None, "e": 0.5})
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
