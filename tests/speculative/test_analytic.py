"""The laws of the modes, on generators whose law is known in closed form (tests/speculative/analytic.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.speculative.analytic import Chain, in_order
from vlmeff.models.mar.sampling import NoiseBank
from vlmeff.speculative.continuous import Continuous, decode

KS_P = 1e-4  # with fixed seeds: a correct law fails once in 10,000 seeds
TARGET = {"a": 0.8, "b": 0.2, "std": 0.45}
DRAFT = {"a": 0.7, "b": 0.1, "std": 0.5}


def noise_of(chain: Chain, samples: int, seed: int) -> NoiseBank:
    """Noise of a whole batch from one generator: a generator for each sample takes seconds here."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, chain.length)
    return NoiseBank.given(
        torch.randn(*shape, 1, generator=generator),
        torch.randn(*shape, chain.steps, 1, generator=generator),
        in_order(chain.length).expand(samples, -1),
    )


def draw(target: Chain, draft: Chain | None, samples: int, seed: int, **config: Any) -> tuple[np.ndarray, Any]:
    """([samples, L] tokens, statistics)."""
    out, counts = decode(
        target,
        draft,
        None,
        config=Continuous(**config),
        batch=samples,
        seed=seed,
        noise=noise_of(target, samples, seed),
    )
    return out[..., 0].double().numpy(), counts


def p_values(x: np.ndarray, chain: Chain) -> list[float]:
    """Kolmogorov-Smirnov, of every token's marginal."""
    mean, covariance = chain.moments()
    return [
        stats.kstest(x[:, k], stats.norm(mean[k], np.sqrt(covariance[k, k])).cdf).pvalue for k in range(chain.length)
    ]


def lag_correlations(x: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(x[:, k], x[:, k + 1])[0, 1] for k in range(x.shape[1] - 1)])


def analytic_correlations(chain: Chain) -> np.ndarray:
    _, c = chain.moments()
    return np.array([c[k, k + 1] / np.sqrt(c[k, k] * c[k + 1, k + 1]) for k in range(chain.length - 1)])


def test_plain_decoding_has_the_law_of_the_recursion() -> None:
    chain = Chain(**TARGET)
    x, _ = draw(chain, None, 50_000, 11, mode=None)
    assert min(p_values(x, chain)) > KS_P
    np.testing.assert_allclose(lag_correlations(x), analytic_correlations(chain), atol=0.02)


def test_exact_preserves_the_targets_law() -> None:
    target, draft = Chain(**TARGET), Chain(**DRAFT)
    x, counts = draw(target, draft, 20_000, 12, mode="exact", gamma=3)
    assert min(p_values(x, target)) > KS_P
    assert min(p_values(x, draft)) < 1e-30  # the test sees the difference of the two
    np.testing.assert_allclose(lag_correlations(x), analytic_correlations(target), atol=0.02)
    assert counts.conditional_rate == pytest.approx(0.841, abs=0.01)
    # One target path for every decision, on average: rejections times 1 / (share rejected).
    decisions = counts.accepted + counts.rejections
    assert counts.residual_draws / decisions == pytest.approx(1.0, abs=0.05)
    assert counts.residual_exhausted == 0


def test_exact_with_final_noise_preserves_the_law_with_that_noise() -> None:
    # A last step with much noise, so that leaving it out of the ratio or of one model would show.
    target, draft = Chain(**TARGET, widen=1.3), Chain(**DRAFT, widen=1.3)
    for chain in (target, draft):
        chain.head.log_sigma[0] = np.log(0.3)
    x, counts = draw(target, draft, 20_000, 13, mode="exact", gamma=2, final_noise=True)
    c, variance = target.head.law()
    first = stats.norm(c * target.b, np.sqrt(variance + 0.3**2))
    assert stats.kstest(x[:, 0], first.cdf).pvalue > KS_P
    # A token's mean given the one before it: c (a x + b).
    slope, offset = np.polyfit(x[:, 0], x[:, 1], 1)
    assert slope == pytest.approx(c * target.a, abs=0.03)
    assert offset == pytest.approx(c * target.b, abs=0.03)
    rest = x[:, 1] - c * (target.a * x[:, 0] + target.b)
    assert stats.kstest(rest, stats.norm(0, np.sqrt(variance + 0.3**2)).cdf).pvalue > KS_P
    assert counts.context_gap_max == 0


def test_exact_keeps_the_law_at_another_temperature() -> None:
    target, draft = Chain(**TARGET, length=1), Chain(**DRAFT, length=1)
    out, _ = decode(
        target,
        draft,
        None,
        config=Continuous(mode="exact", gamma=1),
        batch=20_000,
        temperature=0.8,
        noise=noise_of(target, 20_000, 14),
    )
    mean, variance = 0.0, 1.0
    for i in reversed(range(target.steps)):
        mean = target.head.A[i] * mean + target.head.B[i] * target.b
        step = (0.8 * np.exp(target.head.log_sigma[i])) ** 2 if i else 0.0
        variance = target.head.A[i] ** 2 * variance + step
    assert stats.kstest(out[:, 0, 0].double().numpy(), stats.norm(mean, np.sqrt(variance)).cdf).pvalue > KS_P


@pytest.mark.parametrize(
    ("softening", "acceptance", "mean_error", "within"),
    [(1.0, 0.0014, -0.001, 0.005), (42.0, 0.539, -0.139, 0.006), (200.0, 0.969, -0.290, 0.006)],
)
def test_cspd_is_as_biased_as_documented(softening: float, acceptance: float, mean_error: float, within: float) -> None:
    """Must fail if somebody makes the label, or the scheme, lossless."""
    target = Chain(a=0.0, b=0.3, std=0.5, length=1, steps=50)
    draft = Chain(a=0.0, b=0.0, std=0.6, length=1, steps=50)
    x, counts = draw(target, draft, 40_000, 15, mode="cspd", prefill=0.0, softening=softening)
    assert counts.acceptance_rate == pytest.approx(acceptance, abs=0.01)
    mean, _ = target.moments()
    assert x.mean() - mean[0] == pytest.approx(mean_error, abs=within)


def test_cspd_with_width_42_does_not_have_the_targets_law() -> None:
    target = Chain(a=0.0, b=0.3, std=0.5, length=1, steps=50)
    draft = Chain(a=0.0, b=0.0, std=0.6, length=1, steps=50)
    x, _ = draw(target, draft, 40_000, 16, mode="cspd", prefill=0.0)
    mean, covariance = target.moments()
    distance = stats.kstest(x[:, 0], stats.norm(mean[0], np.sqrt(covariance[0, 0])).cdf).statistic
    assert distance == pytest.approx(0.120, abs=0.01)
    assert "Approximate" in Continuous(mode="cspd").guarantee
    assert "law" not in Continuous(mode="cspd").guarantee


@pytest.mark.parametrize("proposal", ["self", "draft"])
@pytest.mark.parametrize("window", [1, 3, 12])
def test_coupled_without_tolerance_is_plain_decoding_bit_for_bit(window: int, proposal: Any) -> None:
    target, draft = Chain(**TARGET, length=12), Chain(**DRAFT, length=12)
    plain, _ = draw(target, None, 500, 17, mode=None)
    chosen = draft if proposal == "draft" else None
    found, counts = draw(target, chosen, 500, 17, mode="coupled", delta=0.0, window=window, proposal=proposal)
    np.testing.assert_array_equal(found, plain)
    assert counts.target_passes <= 12


def test_coupled_with_tolerance_needs_fewer_passes_and_stays_near() -> None:
    weak = Chain(a=0.2, b=0.2, std=0.45, length=12)
    plain, _ = draw(weak, None, 500, 18, mode=None)
    found, counts = draw(weak, None, 500, 18, mode="coupled", delta=0.1, window=6)
    # An error of a token moves the next one by at most 0.2 of it, and of the tolerance.
    assert 0 < np.abs(found - plain).max() < 0.2 * 0.1 / (1 - 0.2)
    assert counts.tokens_per_round > 1.5
    assert counts.context_gap_max <= 0.1
