"""Low-rank factors of the auxiliary module Phi: how they start and how they are sorted again between phases.

Shape letters: N output features, K input features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 1024  # from this min(N, K) on, a randomised decomposition
OVERSAMPLING, POWER_ITERATIONS = 10, 4


def low_rank_factors(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factor a matrix as L R, its best approximation of a rank, with the singular values shared equally.

    L = U_r sqrt(S_r), R = sqrt(S_r) V_r^T. Above ``LARGE`` the decomposition is randomised (Halko et al., arXiv
    0909.4061) with a generator of its own: the global random state stays as it was.

    Args:
        matrix: [N, K], computed in float32.  rank: 1 <= r <= min(N, K).
    Returns:
        (L [N, r], R [r, K]) float32.
    """
    matrix = matrix.float()
    if min(matrix.shape) > LARGE:
        devices = [matrix.device] if matrix.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            width = min(rank + OVERSAMPLING, *matrix.shape)
            u, s, v = torch.svd_lowrank(matrix, q=width, niter=POWER_ITERATIONS)
        right = v.T
    else:
        u, s, right = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * right[:rank]


def re_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate factors so that their columns are sorted by singular value; the product stays.

    L = Q1 A and R^T = Q2 B (QR); A B^T = U S V^T, an r x r decomposition; L' = Q1 U sqrt(S), R' = sqrt(S) V^T Q2^T.
    The N x K product is never formed: 5 (N + K) r^2 operations or so.

    Args:
        left: [N, r].  right: [r, K], r <= min(N, K). Computed in float32.
    Returns:
        (L' [N, r], R' [r, K]) float32.

    Source: arXiv 2505.11497 (whose code decomposes the dense product: mathematically the same).
    """
    q1, a = torch.linalg.qr(left.float())
    q2, b = torch.linalg.qr(right.float().T)
    u, s, vh = torch.linalg.svd(a @ b.T)
    root = s.sqrt()
    return q1 @ (u * root), (root[:, None] * vh) @ q2.T


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius norm of L R from two r x r matrices: ||L R||^2 = trace(L^T L R R^T)."""
    left, right = left.float(), right.float()
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt()
