"""The fitted temperature against a dense search and closed forms; cross-fitting against a leak."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from research.metrics.base import UndefinedMetric
from research.metrics.classification import negative_log_likelihood
from research.metrics.temperature_scaling import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    cross_fitted_logits,
    fit_temperature,
    half_of,
)


def calibrated(num_items=4000, num_classes=5, seed=0):
    """Logits and labels drawn from their own softmax, so that the best temperature is near 1."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = 2 * torch.randn(num_items, num_classes, generator=generator, dtype=torch.float64)
    return logits_NV, torch.multinomial(logits_NV.softmax(-1), 1, generator=generator).squeeze(1)


def nll(logits_NV, label_N):
    return float(negative_log_likelihood(logits_NV, label_N).mean())


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0, 30.0])
def test_minimum_against_a_bounded_search(factor):
    logits_NV, label_N = calibrated()
    logits_NV = logits_NV * factor
    found = minimize_scalar(
        lambda u: nll(logits_NV / math.exp(u), label_N), bounds=(-4, 4.6), method="bounded", options={"xatol": 1e-9}
    )
    fitted = fit_temperature(logits_NV, label_N)
    assert fitted == pytest.approx(math.exp(found.x), rel=1e-5)
    assert fitted == pytest.approx(factor * fit_temperature(logits_NV / factor, label_N), rel=1e-9)
    assert fitted / factor == pytest.approx(1, abs=0.1)


def test_closed_form_of_two_classes():
    """Margin m, share r right: the optimum has sigmoid(m / T) = r."""
    logits_NV = torch.tensor([[4.0, 0.0]]).repeat(10, 1)
    label_N = torch.tensor([0] * 8 + [1] * 2)
    assert fit_temperature(logits_NV, label_N) == pytest.approx(4 / math.log(0.8 / 0.2), rel=1e-10)


def test_ends_are_bounded():
    logits_NV = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert fit_temperature(logits_NV, torch.tensor([0, 1])) == MIN_TEMPERATURE
    assert fit_temperature(logits_NV, torch.tensor([1, 0])) == MAX_TEMPERATURE
    assert fit_temperature(torch.zeros(2, 3), torch.tensor([0, 1])) == 1.0


def test_row_constants_do_not_matter():
    logits_NV, label_N = calibrated(200)
    shifted_NV = logits_NV + torch.linspace(-1e4, 1e4, 200, dtype=torch.float64)[:, None]
    assert fit_temperature(shifted_NV, label_N) == pytest.approx(fit_temperature(logits_NV, label_N), rel=1e-8)


def test_each_half_is_scaled_by_the_temperature_of_the_other():
    logits_NV, label_N = calibrated(500)
    index_N = torch.arange(1000, 1500)
    half_N = torch.tensor([half_of(i) for i in index_N.tolist()])
    logits_NV[half_N] *= 5  # one half is overconfident: the fault of fitting on the scored half shows at once
    scaled_NV = cross_fitted_logits(logits_NV, label_N, index_N)
    ratio_N = (logits_NV / scaled_NV)[:, 0]
    on_false = fit_temperature(logits_NV[~half_N], label_N[~half_N])
    on_true = fit_temperature(logits_NV[half_N], label_N[half_N])
    assert on_true > 3 * on_false
    torch.testing.assert_close(ratio_N[half_N], torch.full_like(ratio_N[half_N], on_false))
    torch.testing.assert_close(ratio_N[~half_N], torch.full_like(ratio_N[~half_N], on_true))


def test_own_label_does_not_enter_an_items_scale():
    logits_NV, label_N = calibrated(60)
    index_N = torch.arange(60)
    before_NV = cross_fitted_logits(logits_NV, label_N, index_N)
    half_N = torch.tensor([half_of(i) for i in range(60)])
    changed_N = torch.where(half_N, (label_N + 1) % 5, label_N)
    after_NV = cross_fitted_logits(logits_NV, changed_N, index_N)
    assert torch.equal(before_NV[half_N], after_NV[half_N])
    assert not torch.equal(before_NV[~half_N], after_NV[~half_N])


def test_halves_hang_on_the_index_alone_and_are_even():
    halves = [half_of(i) for i in range(10_000)]
    assert abs(sum(halves) - 5000) < 200
    assert abs(sum(halves[::2]) - 2500) < 150  # no parity: even ids (say, one augmentation of two) fall into both
    logits_NV, label_N = calibrated(80)
    order_N = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    direct_NV = cross_fitted_logits(logits_NV, label_N, torch.arange(80))
    torch.testing.assert_close(
        cross_fitted_logits(logits_NV[order_N], label_N[order_N], order_N), direct_NV[order_N], rtol=1e-9, atol=0
    )


def test_undefined_and_refused():
    with pytest.raises(UndefinedMetric, match="one half"):
        cross_fitted_logits(torch.randn(1, 3), torch.tensor([0]), torch.tensor([7]))
    with pytest.raises(ValueError, match="at least one item"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))
