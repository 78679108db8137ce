"""Speculative sampling from any two densities, and its residual. Pure functions.

The ratio of two Gaussian paths is an operation of its own: ``vlmeff.ops.gaussian_path_log_ratio``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TRIES_AT_ONCE = 128  # residual proposals of a token that are drawn together where one is cheap


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
    draws = done = 0
    while len(left) and done < max_tries:
        tries = min(TRIES_AT_ONCE, max_tries - done)
        proposals = sample_p(tries * len(left))
        share = residual_acceptance(log_q(proposals) - log_p(proposals)).view(tries, -1)
        uniform = torch.rand(share.shape, generator=generator, dtype=torch.float64)
        found, chosen, looked_at = first_accepted(uniform < share)
        done, draws = done + tries, draws + looked_at
        rows = torch.arange(len(left), device=left.device)
        # The last proposal of a block stays where the tries run out.
        out[left] = proposals.view(tries, len(left), *x.shape[1:])[chosen, rows]
        left = left[~found]
    return Accepted(out, kept, draws, len(left))


def first_accepted(stay: Tensor) -> tuple[Tensor, Tensor, int]:
    """Choose, of proposals that were drawn at once, the one that a loop over tries would have stopped at.

    Args:
        stay: [tries, N] bool.
    Returns:
        ([N] bool, some try was accepted; [N] the first that was, else the last; how many the loop would have looked
        at). What was drawn behind an accepted one is not counted: the loop would not have drawn it.
    """
    tries = len(stay)
    found = stay.any(0)
    chosen = torch.where(found, stay.int().argmax(0), tries - 1)
    return found, chosen, int((chosen + 1).sum())


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
