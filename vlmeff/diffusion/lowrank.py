"""SVDQuant: a low-rank branch in high precision takes the outliers, 4-bit codes the rest (arXiv 2411.05007).

W s = up down + R, rank r; only R is quantized. Shape letters: N outputs, K inputs, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmeff.diffusion import quantizers
from vlmeff.diffusion.schemes import LayerSpec

EXACT_UP_TO = 1024  # smaller matrices get the whole SVD
OVERSAMPLING, POWER_ITERATIONS = 10, 4


def truncated_svd(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, r], S [r], V [K, r] of the best rank-r approximation; large matrices by a seeded random projection.

    The projection is the range finder of Halko, Martinsson and Tropp (arXiv 0909.4061) with a generator of its own, so
    that the global one is not touched and the result is the same each time.
    """
    rank = min(rank, *w.shape)
    if min(w.shape) <= max(EXACT_UP_TO, 2 * rank):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    generator = torch.Generator(device="cpu").manual_seed(0)
    guess = torch.randn(w.shape[1], rank + OVERSAMPLING, generator=generator).to(w)
    basis = torch.linalg.qr(w @ guess).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(w @ torch.linalg.qr(w.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ w, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank].T


def split_low_rank(
    w: Tensor, spec: LayerSpec, *, rounds: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Split smoothed weights [N, K] into a branch and what is to be quantized.

    Args:
        rounds: how often the branch is fitted again, to what the codes of the remainder leave; the best round wins, so
            that more rounds are never worse in ``||W - branch - codes||``.
        dtype: in which the branch is stored; it is rounded first, so that the codes make up for the rounding.
    Returns:
        (down [r, K], up [N, r], remainder [N, K]), float32.
    """
    target, best, least = w, None, torch.inf
    for _ in range(rounds + 1):
        u, s, v = truncated_svd(target, spec.rank)
        up, down = (u * s).to(dtype).float(), v.T.to(dtype).float()
        rest = w - up @ down
        codes, scale = quantizers.symmetric(rest, spec.w_bits, spec.group, scale_dtype=spec.scale_dtype)
        quantized = quantizers.dequantize(codes, scale, group=spec.group)
        error = float((rest - quantized).square().sum())
        if best is None or error < least:
            best, least = (down, up, rest), error
        target = w - quantized
    assert best is not None
    return best
