"""Log ratio of the densities of two Markov chains with diagonal Gaussian steps: what speculative sampling accepts by.

Shape letters: T steps, N tokens (paths), D values of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmeff.ops._dispatch import dispatch, operator


@operator
def gaussian_path_log_ratio(
    x: Tensor,
    mean_p: Tensor,
    log_std_p: Tensor,
    mean_q: Tensor,
    log_std_q: Tensor,
    *,
    softening: float = 1.0,
) -> Tensor:
    """Log p/q of paths: sum over t and d of log N(x; mean_p, std_p^2) - log N(x; mean_q, std_q^2).

    sum_{t,d} [ -(x - mean_p)^2 / (2 lam^2 s_p^2) - log s_p + (x - mean_q)^2 / (2 lam^2 s_q^2) + log s_q ]

    In log space throughout: products of densities leave float32 from some 18 values a token on. Each term is computed
    in the dtype of the tensors (float32 for narrower ones), where equal models give exactly 0, and the terms are
    accumulated in float64, because a path has thousands of them and the sum is held against the logarithm of a uniform
    number. No back end but this reference: what it costs is nothing beside the networks that made its arguments.

    Args:
        x: [T, N, D], the states after each step.
        mean_p, mean_q: [T, N, D], of each step from the state before it.
        log_std_p, log_std_q: [T, N, D], natural logarithms; what takes part must be finite.
        softening: lam, divides distances and not volumes (CSpD's "inner temperature"; 1 gives the densities' ratio).
    Returns:
        [N] float64; 0 for T = 0. NaN where an argument of the path is NaN.
    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: "Accelerated Diffusion Models via Speculative Sampling", arXiv 2501.05370 (ratios of paths); "Continuous
    Speculative Decoding for Autoregressive Image Generation", arXiv 2411.11925, official code (softening).
    """
    arguments = {"x": x, "mean_p": mean_p, "log_std_p": log_std_p, "mean_q": mean_q, "log_std_q": log_std_q}
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"gaussian_path_log_ratio: {name} must be a float tensor, got {got}")
        if value.ndim != 3 or value.shape != x.shape:
            wanted = "[T, N, D]" if name == "x" else f"{list(x.shape)} (from x)"
            raise ValueError(f"gaussian_path_log_ratio: {name} must be {wanted}, got {tuple(value.shape)}")
    if not 0 < softening < math.inf:
        raise ValueError(f"gaussian_path_log_ratio: softening must be a finite number above 0, got {softening!r}")
    return dispatch("gaussian_path_log_ratio", _reference, **arguments, softening=float(softening))


def _reference(
    *, x: Tensor, mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor, softening: float
) -> Tensor:
    x, mean_p, log_std_p, mean_q, log_std_q = map(_wide, (x, mean_p, log_std_p, mean_q, log_std_q))
    p, q = (x - mean_p) * torch.exp(-log_std_p) / softening, (x - mean_q) * torch.exp(-log_std_q) / softening
    # q^2 - p^2 as a product: squares of far distances would overflow, and near ones lose their difference.
    return ((0.5 * (q + p)) * (q - p) + (log_std_q - log_std_p)).sum((0, 2), dtype=torch.float64)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
