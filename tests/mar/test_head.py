"""The diffusion head against a slow formulation in numpy, step by step and token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.head import DiffusionHead, sinusoids
from vlmeff.models.mar.schedule import cosine_betas

STEPS = 6
CONFIG = MARConfig.named("mar_nano_digits", num_sampling_steps=STEPS, clip_x0=None)
CLOSE = 2e-4  # relative to values that the untrained head lets grow to hundreds


def head(config: MARConfig = CONFIG) -> DiffusionHead:
    torch.manual_seed(3)
    made = DiffusionHead(config).eval()
    made.net.initialize()
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def noise(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    z, other = torch.randn(2, count, CONFIG.decoder_dim, generator=g)
    return z, other, torch.randn(count, 4, generator=g), torch.randn(count, STEPS, 4, generator=g)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def slow_net(made: DiffusionHead, x: np.ndarray, t: int, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token in float64: (epsilon, v)."""
    s = {name: value.double().numpy() for name, value in made.net.state_dict().items()}

    def linear(v: np.ndarray, name: str) -> np.ndarray:
        return s[f"{name}.weight"] @ v + s[f"{name}.bias"]

    angles = [t * math.exp(-math.log(10000) * k / 128) for k in range(128)]
    embedding = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    y = linear(silu(linear(embedding, "time_embed.mlp.0")), "time_embed.mlp.2") + linear(z, "cond_embed")
    h = linear(x, "input_proj")
    for j in range(made.config.head_depth):
        block = f"res_blocks.{j}"
        shift, scale, gate = np.split(linear(silu(y), f"{block}.adaLN_modulation.1"), 3)
        inner = norm(h) * s[f"{block}.in_ln.weight"] + s[f"{block}.in_ln.bias"]
        inner = inner * (1 + scale) + shift
        h = h + gate * linear(silu(linear(inner, f"{block}.mlp.0")), f"{block}.mlp.2")
    shift, scale = np.split(linear(silu(y), "final_layer.adaLN_modulation.1"), 2)
    out = linear(norm(h) * (1 + scale) + shift, "final_layer.linear")
    return out[:4], out[4:]


def slow_run(
    made: DiffusionHead, z: np.ndarray, x: np.ndarray, eps: np.ndarray, *, other: Any, weight: float, tau: float
) -> dict[str, Any]:
    """One token's run: DDPM with learned variances, in float64."""
    abar_all = np.cumprod([1 - beta for beta in cosine_betas(1000)])
    stamps = [round(i * 999 / (STEPS - 1)) for i in range(STEPS)]
    abar = abar_all[stamps]
    out: dict[str, Any] = {"path": [], "means": [], "log_sigmas": []}
    for i in reversed(range(STEPS)):
        before = abar[i - 1] if i else 1.0
        beta = 1 - abar[i] / before
        tilde = beta * (1 - before) / (1 - abar[i])
        if i == 0:
            tilde = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1])
        epsilon, v = slow_net(made, x, stamps[i], z)
        if other is not None:
            unconditional, _ = slow_net(made, x, stamps[i], other)
            epsilon = unconditional + weight * (epsilon - unconditional)
        x0 = (x - np.sqrt(1 - abar[i]) * epsilon) / np.sqrt(abar[i])
        if made.config.clip_x0 is not None:
            x0 = np.clip(x0, -made.config.clip_x0, made.config.clip_x0)
        mean = beta * np.sqrt(before) / (1 - abar[i]) * x0 + (1 - before) * np.sqrt(1 - beta) / (1 - abar[i]) * x
        log_sigma = 0.5 * ((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(tilde))
        out["path"].append(x)
        out["means"].append(mean)
        out["log_sigmas"].append(log_sigma)
        x = mean + (tau * np.exp(log_sigma) * eps[STEPS - 1 - i] if i else 0)
    return out | {"x0": x}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("clip", [None, 2.5])
def test_run_is_the_slow_formulation(guided, clip):
    made = head(CONFIG.changed(clip_x0=clip))
    z, other, x_T, eps = noise(3)
    weights = torch.tensor([0.5, 2.0, 3.5])
    z_uncond = other if guided else None
    run = made.sample(z, x_T, eps, z_uncond=z_uncond, cfg=weights, temperature=0.9, keep_path=True)
    forced = made.path_stats(z, run.path, z_uncond=z_uncond, cfg=weights)
    split = made.path_stats(z, run.path, z_uncond=z_uncond, cfg=weights, max_rows=7)
    for n in range(3):
        slow = slow_run(
            made,
            *(v[n].double().numpy() for v in (z, x_T, eps)),
            other=other[n].double().numpy() if guided else None,
            weight=float(weights[n]),
            tau=0.9,
        )
        scale = max(1.0, float(np.abs(slow["x0"]).max()))
        np.testing.assert_allclose(run.x0[n], slow["x0"], atol=CLOSE * scale)
        np.testing.assert_allclose(run.mean0[n], slow["means"][-1], atol=CLOSE * scale)
        np.testing.assert_allclose(run.log_sigma0[n], slow["log_sigmas"][-1], atol=CLOSE)
        np.testing.assert_allclose(run.sum_log_sigma[n], np.sum(slow["log_sigmas"][:-1], 0), atol=5 * CLOSE)
        for own, name in ((run.path, "path"), (run.means, "means"), (run.log_sigmas, "log_sigmas")):
            wanted = np.array(slow[name])
            np.testing.assert_allclose(own[:, n], wanted, atol=CLOSE * max(1.0, np.abs(wanted).max()))
    # Teacher forcing on the run's own path gives the run's own means, in one batch or several.
    for means, log_sigmas in (forced, split):
        torch.testing.assert_close(means, run.means, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(log_sigmas, run.log_sigmas, rtol=1e-4, atol=1e-4)


def test_shapes_without_a_path_and_with_no_tokens():
    made = head()
    z, _, x_T, eps = noise(2)
    run = made.sample(z, x_T, eps)
    assert run.path is None
    assert run.x0.shape == (2, 4)
    assert made.sample(z[:0], x_T[:0], eps[:0]).x0.shape == (0, 4)


def test_last_noise_and_noise_at_temperature_zero_have_no_effect():
    made = head()
    z, _, x_T, eps = noise(2)
    other = eps.clone()
    other[:, -1] = 7.0
    assert torch.equal(made.sample(z, x_T, eps).x0, made.sample(z, x_T, other).x0)
    other[:, 0] = 7.0
    assert not torch.equal(made.sample(z, x_T, eps).x0, made.sample(z, x_T, other).x0)
    still = [made.sample(z, x_T, e, temperature=0.0).x0 for e in (eps, other)]
    assert torch.equal(*still)


def test_weight_one_is_no_guidance():
    made = head()
    z, other, x_T, eps = noise(2)
    guided = made.sample(z, x_T, eps, z_uncond=other, cfg=1.0).x0
    torch.testing.assert_close(guided, made.sample(z, x_T, eps).x0, rtol=1e-3, atol=1e-3)


def test_fresh_head_predicts_no_noise():
    """Every modulation and the output start at zero, as in the official code."""
    torch.manual_seed(0)
    made = DiffusionHead(CONFIG)
    made.net.initialize()
    z, _, x_T, _ = noise(4)
    assert torch.equal(made.net(x_T, torch.tensor([0, 10, 500, 999]), z), torch.zeros(4, 8))


def test_sinusoids_are_cosines_then_sines():
    row = sinusoids(torch.tensor([7]), dim=6)[0]
    rates = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    np.testing.assert_allclose(row[:3], [math.cos(7 * r) for r in rates], rtol=1e-5)
    np.testing.assert_allclose(row[3:], [math.sin(7 * r) for r in rates], rtol=1e-5)


def test_half_precision_network_keeps_the_diffusion_in_float32():
    made = head(CONFIG.changed(clip_x0=2.5)).to(torch.bfloat16)
    z, other, x_T, eps = noise(2)
    run = made.sample(z.bfloat16(), x_T, eps, z_uncond=other.bfloat16(), cfg=2.0)
    assert run.x0.dtype == run.log_sigma0.dtype == torch.float32
    assert run.x0.isfinite().all()
