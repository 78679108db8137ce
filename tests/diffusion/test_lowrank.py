"""The low-rank branch: the best approximation, refinement that is never worse, and the errors of the outlier test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlmeff.diffusion import quantizers
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.lowrank import split_low_rank, truncated_svd
from vlmeff.diffusion.schemes import get_scheme
from vlmeff.diffusion.smoothing import smoothing_vector


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k", "rank"), [(24, 40, 5), (40, 24, 24), (7, 3, 9), (1, 6, 1)])
def test_truncation_is_the_best_approximation(n: int, k: int, rank: int) -> None:
    w = gaussian(n, k)
    u, s, v = truncated_svd(w, rank)
    r = min(rank, n, k)
    assert (u.shape, s.shape, v.shape) == ((n, r), (r,), (k, r))
    uu, ss, vv = np.linalg.svd(w.double().numpy(), full_matrices=False)
    best = (uu[:, :r] * ss[:r]) @ vv[:r]
    assert np.abs((u * s @ v.T).numpy() - best).max() <= 1e-5
    assert np.allclose(s.numpy(), ss[:r], rtol=1e-5)
    torch.testing.assert_close(u.T @ u, torch.eye(r), atol=1e-5, rtol=0)


def test_the_random_projection_finds_it_too_and_touches_no_generator() -> None:
    n, k, rank = 1100, 1030, 16
    left, right = torch.linalg.qr(gaussian(n, 64)).Q, torch.linalg.qr(gaussian(k, 64, seed=1)).Q
    values = 0.8 ** torch.arange(64.0)
    w = left * values @ right.T + 1e-4 * gaussian(n, k, seed=2) / k**0.5  # a decaying spectrum and some noise
    state = torch.get_rng_state()
    u, s, v = truncated_svd(w, rank)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(s, values[:rank], rtol=1e-3, atol=0)
    rest = float((w - u * s @ v.T).norm())
    assert rest <= 1.001 * float(values[rank:].norm() + 1e-4 * n**0.5)
    assert all(torch.equal(a, b) for a, b in zip(truncated_svd(w, rank), (u, s, v), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branch_and_remainder_add_up_and_refining_is_never_worse(dtype: torch.dtype) -> None:
    w, spec = gaussian(48, 96), get_scheme("svdq_w4a16", group=32, rank=8)
    w[:, 5] *= 10
    errors = []
    for rounds in range(5):
        down, up, rest = split_low_rank(w, spec, rounds=rounds, dtype=dtype)
        assert (down.shape, up.shape, rest.shape) == ((8, 96), (48, 8), (48, 96))
        assert torch.equal(down, down.to(dtype).float())  # what is stored is what the remainder was made for
        assert torch.equal(up, up.to(dtype).float())
        torch.testing.assert_close(up @ down + rest, w, rtol=0, atol=1e-4)
        codes, scale = quantizers.symmetric(rest, 4, 32, scale_dtype=spec.scale_dtype)
        errors.append(float((rest - quantizers.dequantize(codes, scale, group=32)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.99 * errors[0]


def test_without_rounds_the_branch_is_the_truncated_svd() -> None:
    w, spec = gaussian(20, 30), get_scheme("svdq_w4a16", rank=4)
    down, up, _ = split_low_rank(w, spec)
    u, s, v = np.linalg.svd(w.double().numpy(), full_matrices=False)
    assert np.abs((up @ down).numpy() - (u[:, :4] * s[:4]) @ v[:4]).max() <= 1e-5


@pytest.fixture(scope="module")
def outliers() -> tuple[nn.Linear, Tensor, Tensor]:
    """Gaussian weights and activations, eight of whose 512 channels are twenty times as large."""
    x, layer = gaussian(256, 512), nn.Linear(512, 512, bias=False)
    x[:, torch.randperm(512, generator=torch.Generator().manual_seed(1))[:8]] *= 20
    with torch.no_grad():
        layer.weight.copy_(gaussian(512, 512, seed=2))
        return layer, x, layer(x)


def error(outliers: tuple[nn.Linear, Tensor, Tensor], name: str, *, smooth: bool = False, **options: int) -> float:
    layer, x, wanted = outliers
    vector = smoothing_vector(x.abs().amax(0), [layer.weight]) if smooth else None
    refine = options.pop("refine", 0)
    quantized = QuantLinear.from_linear(layer, get_scheme(name, **options), smooth=vector, refine=refine)
    return float((quantized(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("w8a16_int8", 0.004, 0.012),
        ("w8a8_int8", 0.01, 0.06),
        ("w8a8_fp8", 0.02, 0.06),
        ("w4a16", 0.05, 0.12),
        ("w4a8_int8", 0.08, 0.2),
        ("svdq_w4a16", 0.05, 0.12),
        ("w4a4_int", 0.25, 0.8),
    ],
)
def test_the_errors_on_outlier_channels_have_their_size(outliers, name: str, least: float, most: float) -> None:
    assert least <= error(outliers, name) <= most


def test_the_branch_and_the_smoothing_help_and_in_this_order(outliers) -> None:
    plain = error(outliers, "svdq_w4a4", rank=0)
    by_rank = [error(outliers, "svdq_w4a4", rank=rank, smooth=True) for rank in (0, 16, 32, 64)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[0] < 0.7 * plain
    assert by_rank[2] < 0.9 * by_rank[0]
    assert error(outliers, "svdq_w4a4", smooth=True, refine=3) < by_rank[2]
    assert error(outliers, "svdq_w4a8", smooth=True) < by_rank[2]
    assert plain < error(outliers, "w4a4_int")
