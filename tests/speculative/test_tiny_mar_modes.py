"""The shipped pair decodes inside the bands that were measured for it (a quarter of the reference, twice the RMS)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmeff.models.mar.loading import load_draft, load_mar, shipped
from vlmeff.speculative.continuous import Continuous
from vlmeff.speculative.wrapped import rms

pytestmark = pytest.mark.skipif(not (shipped() / "model.safetensors").is_file(), reason="the pair is not trained yet")

LABELS = torch.arange(60) % 10
ONE_STEP = 1 / 16


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return load_mar(shipped()).requires_grad_(False), load_draft().requires_grad_(False)


@pytest.fixture(scope="module")
def plain(pair: Any) -> torch.Tensor:
    return pair[0].sample(LABELS).latents


def run(pair: Any, plain: torch.Tensor, **config: Any) -> tuple[Any, float]:
    mode = Continuous(**config)
    out = pair[0].sample(LABELS, mode=mode, draft=pair[1] if mode.needs_draft else None)
    return out.stats, rms(out.latents, plain)


def test_coupled_reaches_its_goal(pair: Any, plain: torch.Tensor) -> None:
    stats, deviation = run(pair, plain, mode="coupled", window=8, delta=0.02)
    assert stats.tokens_per_round >= 2.7
    assert deviation <= 0.004
    assert stats.target_passes <= 9


@pytest.mark.parametrize(
    ("window", "delta", "tokens", "deviation"),
    [(4, 0.1, 2.7, 0.005), (8, 0.1, 3.6, 0.005)],
)
def test_coupled_is_inside_its_bands(
    pair: Any, plain: torch.Tensor, window: int, delta: float, tokens: float, deviation: float
) -> None:
    stats, found = run(pair, plain, mode="coupled", window=window, delta=delta)
    assert stats.tokens_per_round == pytest.approx(tokens, rel=0.25)
    assert deviation / 2 <= found <= 2 * deviation


def test_coupled_stays_nearer_to_plain_decoding_than_fewer_steps_do(pair: Any, plain: torch.Tensor) -> None:
    deviations = [run(pair, plain, mode="coupled", delta=delta)[1] for delta in (1e-4, 0.02, 0.1)]
    assert deviations == sorted(deviations)
    assert deviations[0] < 1e-3
    quarter = rms(pair[0].sample(LABELS, num_iter=4).latents, plain)
    half = rms(pair[0].sample(LABELS, num_iter=8).latents, plain)
    assert quarter > half > 4 * deviations[-1]


def test_the_published_scheme_is_inside_its_bands(pair: Any, plain: torch.Tensor) -> None:
    stats, deviation = run(pair, plain, mode="cspd", gamma=4, prefill=ONE_STEP)
    assert stats.acceptance_rate == pytest.approx(0.53, rel=0.25)
    assert stats.tokens_per_round == pytest.approx(2.6, rel=0.25)
    assert 0.13 / 2 <= deviation <= 2 * 0.13


def test_the_published_code_is_inside_its_bands(pair: Any, plain: torch.Tensor) -> None:
    stats, deviation = run(pair, plain, mode="cspd", variant="official", gamma=4, prefill=0.0)
    assert stats.target_passes == 5
    assert stats.tokens_per_round == 3.75
    assert 0.10 / 2 <= deviation <= 2 * 0.10
    # Acceptance hardly matters to it: parallel prediction of four tokens is what comes out.
    assert stats.acceptance_rate < 0.3


def test_exact_accepts_some_paths(pair: Any, plain: torch.Tensor) -> None:
    stats, _ = run(pair, plain, mode="exact", gamma=2, prefill=ONE_STEP)
    assert stats.conditional_rate == pytest.approx(0.26, rel=0.35)
    assert stats.residual_draws / (stats.accepted + stats.rejections) == pytest.approx(1.0, abs=0.25)
    assert stats.context_gap_max < 0.05
