"""Noise schedule of the diffusion head: cosine betas, respaced to the steps of sampling (spec of arXiv 2406.11838)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from vlmeff.errors import ConfigError

LARGEST_BETA = 0.999


@dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """Coefficients of T steps, [T] each and indexed by i: i = T-1 is the first step of sampling, i = 0 the last.

    A step takes x_i to x_{i-1}:
    x0 = sqrt_recip_abar x - sqrt_recipm1_abar eps;  mean = coef_x0 x0 + coef_x x;
    log variance = f log_beta + (1 - f) log_beta_tilde with f = (v + 1) / 2.
    Calculated in float64, stored in float32. ``timesteps`` [T] int64 is what the network is told.
    """

    timesteps: Tensor
    abar: Tensor
    sqrt_recip_abar: Tensor
    sqrt_recipm1_abar: Tensor
    coef_x0: Tensor
    coef_x: Tensor
    log_beta: Tensor
    log_beta_tilde: Tensor

    @property
    def steps(self) -> int:
        return self.timesteps.numel()

    def to(self, device: torch.device | str) -> Schedule:
        return Schedule(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def cosine_betas(train_steps: int) -> list[float]:
    """beta_i = 1 - abar((i+1)/S) / abar(i/S) with abar(t) = cos^2((t + 0.008)/1.008 * pi/2), at most 0.999."""

    def abar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - abar((i + 1) / train_steps) / abar(i / train_steps), LARGEST_BETA) for i in range(train_steps)]


@lru_cache(maxsize=64)
def training_abar(train_steps: int = 1000) -> Tensor:
    """[train_steps] float64: share of signal variance after each training step. Do not write to it."""
    return torch.cumprod(1 - torch.tensor(cosine_betas(train_steps), dtype=torch.float64), 0)


@lru_cache(maxsize=64)
def schedule(steps: int, train_steps: int = 1000, device: str = "cpu") -> Schedule:
    """The tables of ``steps`` evenly spaced steps out of ``train_steps``. Do not write to them.

    Raises:
        ConfigError: ``steps`` outside [1, train_steps].
    """
    if not 1 <= steps <= train_steps:
        raise ConfigError(f"schedule: {steps} steps of sampling cannot be taken from {train_steps} steps of training.")
    stride = (train_steps - 1) / (steps - 1) if steps > 1 else 0.0
    timesteps = torch.tensor([round(i * stride) for i in range(steps)])
    abar = training_abar(train_steps)[timesteps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / before
    beta_tilde = beta * (1 - before) / (1 - abar)
    # beta_tilde_0 is 0, its logarithm is not: the official tables repeat the next entry.
    beta_tilde[0] = beta_tilde[1] if steps > 1 else beta[0]
    tables = {
        "abar": abar,
        "sqrt_recip_abar": (1 / abar).sqrt(),
        "sqrt_recipm1_abar": (1 / abar - 1).sqrt(),
        "coef_x0": beta * before.sqrt() / (1 - abar),
        "coef_x": (1 - before) * (1 - beta).sqrt() / (1 - abar),
        "log_beta": beta.log(),
        "log_beta_tilde": beta_tilde.log(),
    }
    on = {name: table.to(torch.float32).to(device) for name, table in tables.items()}
    return Schedule(timesteps=timesteps.to(device), **on)
