"""Constants of the noise schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmeff.errors import ConfigError
from vlmeff.models.mar.schedule import cosine_betas, schedule


def test_steps_of_training_are_spaced_evenly_and_told_to_the_network():
    steps = schedule(100).timesteps.tolist()
    assert steps[:3] == [0, 10, 20]
    assert steps[-2:] == [989, 999]
    assert schedule(1).timesteps.tolist() == [0]
    assert schedule(1000).timesteps.tolist() == list(range(1000))


def test_sigma_of_the_last_step_is_pinned():
    for count, low, high in [(100, 0.00624, 0.00643), (25, 0.00640, 0.00643)]:
        tables = schedule(count)
        ends = sorted([math.exp(0.5 * float(tables.log_beta[0])), math.exp(0.5 * float(tables.log_beta_tilde[0]))])
        assert ends[0] == pytest.approx(low, abs=6e-6)
        assert ends[1] == pytest.approx(high, abs=6e-6)


@pytest.mark.parametrize(("count", "factor"), [(100, 316), (50, 632), (25, 1327), (10, 3493)])
def test_an_error_of_the_first_epsilon_is_multiplied(count, factor):
    tables = schedule(count)
    assert float(tables.coef_x0[-1] * tables.sqrt_recipm1_abar[-1]) == pytest.approx(factor, rel=2e-3)


@pytest.mark.parametrize("count", [2, 25, 100, 1000])
def test_posterior_follows_from_the_marginals(count):
    """q(x_{i-1} | x_i, x0) by Bayes' rule for Gaussians, in float64, against the tables."""
    alphas = np.cumprod([1 - beta for beta in cosine_betas(1000)])
    picked = alphas[[round(i * 999 / (count - 1)) for i in range(count)]]
    before = np.concatenate([[1.0], picked[:-1]])
    step = picked / before  # x_i = sqrt(step) x_{i-1} + sqrt(1 - step) noise
    tables = schedule(count)
    precision = step / (1 - step) + 1 / np.maximum(1 - before, 1e-300)
    variance = 1 / precision
    np.testing.assert_allclose(tables.coef_x0[1:], (np.sqrt(before) / (1 - before + 1e-300) * variance)[1:], rtol=1e-5)
    np.testing.assert_allclose(tables.coef_x[1:], (np.sqrt(step) / (1 - step) * variance)[1:], rtol=1e-5)
    np.testing.assert_allclose(tables.log_beta_tilde[1:], np.log(variance[1:]), rtol=1e-5)
    np.testing.assert_allclose(tables.log_beta, np.log(1 - step), rtol=1e-5)
    np.testing.assert_allclose(tables.sqrt_recip_abar, 1 / np.sqrt(picked), rtol=1e-5)
    np.testing.assert_allclose(tables.sqrt_recipm1_abar, np.sqrt(1 / picked - 1), rtol=1e-5)
    # The token is x0 of x_1: no share of x_1, no noise.
    assert float(tables.coef_x0[0]) == 1
    assert float(tables.coef_x[0]) == 0
    assert float(tables.log_beta_tilde[0]) == float(tables.log_beta_tilde[1])


@pytest.mark.parametrize("count", [0, 1001])
def test_numbers_of_steps_that_cannot_work(count):
    with pytest.raises(ConfigError, match=f"{count} steps of sampling"):
        schedule(count)
