"""Densities of diagonal Gaussians, paths of them, and speculative sampling from any two densities. Pure functions.

D is the last axis of every tensor; densities are sums over it. Arithmetic stays in the tensors' dtype and sums are
taken in float64, because a path adds thousands of terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def log_normal(x: Tensor, mean: Tensor, log_sigma: Tensor, *, softening: float = 1.0) -> Tensor:
    """log N(x; mean, sigma^2) over the last axis, without the constant D/2 log 2 pi.

    -|(x - mean) / (softening sigma)|^2 / 2 - sum log sigma. Finite for small sigma and large D where the density itself
    leaves float32 (sigma = 0.0064 from about D = 18).

    Args:
        x, mean, log_sigma: [..., D].  softening: divides distances only, as CSpD's "inner temperature" does.
    Returns:
        [...] float64.
    """
    scaled = (x - mean) * torch.exp(-log_sigma) / softening
    return (-0.5 * scaled.square() - log_sigma).sum(-1, dtype=torch.float64)


def log_path_ratio(path: Tensor, after: Tensor | None, p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> Tensor:
    """log p(path) - log q(path) of two Markov chains that start from the same law.

    Args:
        path: [T, N, D], the states (x_T, ..., x_1).
        after: [N, D], x_0, if the last step is random as well; None if it is a fixed map, which takes no part.
        p, q: means and log sigmas [T, N, D] of the steps from those states, temperature included.
    Returns:
        [N] float64. Zero for T = 1 without ``after``.
    """
    end = path[1:] if after is None else torch.cat([path[1:], after[None]])
    steps = len(end)
    (mean_p, log_p), (mean_q, log_q) = ((mean[:steps], log_sigma[:steps]) for mean, log_sigma in (p, q))
    # Terms of equal models cancel before anything is added up.
    exponents = ((end - mean_q) * torch.exp(-log_q)).square() - ((end - mean_p) * torch.exp(-log_p)).square()
    return (0.5 * exponents + (log_q - log_p)).sum((0, 2), dtype=torch.float64)


@dataclass(frozen=True)
class Accepted:
    """``x`` [N, ...] with the law p; ``kept`` [N] bool: the draft stayed; ``draws``: residual proposals in all;
    ``exhausted``: rows that took the last proposal because the tries ran out."""

    x: Tensor
    kept: Tensor
    draws: int
    exhausted: int


def density_accept(
    x: Tensor,
    log_p: Callable[[Tensor], Tensor],
    log_q: Callable[[Tensor], Tensor],
    sample_p: Callable[[int], Tensor],
    *,
    generator: torch.Generator | None = None,
    max_tries: int = 10_000,
) -> Accepted:
    """Turn draws of q into draws of p: speculative sampling with densities.

    Keep x with probability min(1, p/q); otherwise draw from max(0, p - q)/Z by rejection with proposal p and
    acceptance 1 - min(1, q/p), so that Z is not needed. The share kept is 1 - TV(p, q), the most that any exact scheme
    can reach, and the expected number of proposals per row is exactly 1.

    Args:
        x: [N, ...] draws of q.  log_p, log_q: [M, ...] -> [M] log densities up to one common constant.
        sample_p: M -> [M, ...] draws of p.
    """
    out = x.clone()
    uniform = torch.rand(len(x), generator=generator, dtype=torch.float64)
    kept = uniform.log() < log_p(x) - log_q(x)
    left = (~kept).nonzero().squeeze(1)
    draws = tries = 0
    while len(left) and tries < max_tries:
        proposal = sample_p(len(left))
        draws, tries = draws + len(left), tries + 1
        stay = torch.rand(len(left), generator=generator, dtype=torch.float64) < residual_acceptance(
            log_q(proposal) - log_p(proposal)
        )
        out[left] = proposal  # the last proposal stays where the tries run out
        left = left[~stay]
    return Accepted(out, kept, draws, len(left))


def residual_acceptance(log_q_over_p: Tensor) -> Tensor:
    """1 - min(1, q/p): the share of a proposal of p that the residual max(0, p - q) keeps."""
    return -torch.expm1(log_q_over_p.clamp(max=0.0))


def reflection_couple(
    mean_p: Tensor, mean_q: Tensor, sigma: Tensor | float, noise: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Maximal coupling of N(mean_p, s^2 I) with a draw mean_q + s noise of the draft: one draw, no residual loop.

    Keep the draft with probability min(1, p/q); else output mean_p + s (I - 2 u u^T) noise with
    u = (mean_p - mean_q) / |mean_p - mean_q|. Exact for one Gaussian step with equal, isotropic variances only; it does
    not extend to paths or to learned variances.

    Args:
        mean_p, mean_q, noise: [N, D].  sigma: a number or [N, 1].  uniform: [N] in [0, 1).
    Returns:
        (x [N, D] with the law of p, kept [N] bool).

    Source: "Accelerated Diffusion Models via Speculative Sampling", arXiv 2501.05370.
    """
    gap = (mean_p - mean_q) / sigma
    length = gap.norm(dim=-1, keepdim=True)
    # log p/q at mean_q + s noise, from x - mean_p = s (noise - gap).
    log_ratio = (gap * noise).sum(-1) - 0.5 * gap.square().sum(-1)
    kept = uniform.log() < log_ratio
    u = torch.where(length > 0, gap / length.clamp(min=torch.finfo(gap.dtype).tiny), torch.zeros_like(gap))
    reflected = noise - 2 * u * (u * noise).sum(-1, keepdim=True)
    return torch.where(kept[:, None], mean_q + sigma * noise, mean_p + sigma * reflected), kept


def with_temperature(log_sigma: Tensor, temperature: float) -> Tensor:
    """log(temperature sigma)."""
    return log_sigma if temperature == 1.0 else log_sigma + math.log(temperature)
