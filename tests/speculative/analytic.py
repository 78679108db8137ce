"""MAR generators whose law is known: tokens of one number, chained, with the best possible affine denoiser.

For data N(m, s^2) the optimal epsilon-net gives x0_hat = g x + m (1 - g sqrt(abar)) with g = sqrt(abar) s^2 /
(abar s^2 + 1 - abar). A DDPM run with the fixed small variances is then x <- A_i x + B_i + sigma_i eps, B_i
proportional to m, so the sampler's law of a token is N(c m, V) by recursion. With m = a prev + b a chain of tokens is
jointly Gaussian.

Computed in float64 from the formulas, without vlmeff's schedule, and handed over in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRAIN_STEPS = 1000


def _tables(steps: int) -> dict[str, np.ndarray]:
    def abar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - abar((i + 1) / TRAIN_STEPS) / abar(i / TRAIN_STEPS), 0.999) for i in range(TRAIN_STEPS)]
    at = [round(i * (TRAIN_STEPS - 1) / (steps - 1)) for i in range(steps)]
    bars = np.cumprod(1 - np.array(betas))[at]
    before = np.concatenate([[1.0], bars[:-1]])
    beta = 1 - bars / before
    tilde = beta * (1 - before) / (1 - bars)
    tilde[0] = tilde[1]
    return {
        "abar": bars,
        "coef_x0": beta * np.sqrt(before) / (1 - bars),
        "coef_x": (1 - before) * np.sqrt(1 - beta) / (1 - bars),
        "log_sigma": 0.5 * np.log(tilde),
    }


class AnalyticHead:
    """The head of a token N(z, std^2); z [N, 1]. Variances are the fixed small ones times ``widen``."""

    def __init__(self, std: float, steps: int, *, widen: float = 1.0) -> None:
        t = _tables(steps)
        gain = np.sqrt(t["abar"]) * std**2 / (t["abar"] * std**2 + 1 - t["abar"])
        self.steps = steps
        self.A = t["coef_x0"] * gain + t["coef_x"]
        self.B = t["coef_x0"] * (1 - gain * np.sqrt(t["abar"]))  # times m
        self.log_sigma = t["log_sigma"] + math.log(widen)

    def law(self) -> tuple[float, float]:
        """(c, V): a token of data N(m, std^2) is sampled from N(c m, V)."""
        c, variance = 0.0, 1.0
        for i in reversed(range(self.steps)):
            c = self.A[i] * c + self.B[i]
            variance = self.A[i] ** 2 * variance + (math.exp(2 * self.log_sigma[i]) if i else 0.0)
        return c, variance

    def sample(self, z: Tensor, x_T: Tensor, eps: Tensor, **options: Any) -> SimpleNamespace:
        x, path, means = x_T.double(), [], []
        for j in range(self.steps):
            i = self.steps - 1 - j
            path.append(x)
            mean = self.A[i] * x + self.B[i] * z
            means.append(mean)
            x = mean + options["temperature"] * math.exp(self.log_sigma[i]) * eps[:, j].double() if i else mean
        log_sigmas = self._log_sigmas(z)
        keep = options.get("keep_path", False)
        return SimpleNamespace(
            x0=x.float(),
            mean0=x.float(),
            log_sigma0=log_sigmas[-1],
            sum_log_sigma=log_sigmas[:-1].sum(0),
            path=torch.stack(path).float() if keep else None,
            means=torch.stack(means).float() if keep else None,
            log_sigmas=log_sigmas if keep else None,
        )

    def path_stats(self, z: Tensor, path: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        i = [self.steps - 1 - j for j in range(self.steps)]
        A, B = torch.tensor(self.A[i])[:, None, None], torch.tensor(self.B[i])[:, None, None]
        return (A * path.double() + B * z).float(), self._log_sigmas(z)

    def _log_sigmas(self, z: Tensor) -> Tensor:
        return torch.tensor(self.log_sigma[::-1].copy()).float()[:, None, None].expand(-1, *z.shape)


@dataclass
class Chain:
    """A generator of ``length`` tokens in order: token l has data law N(a prev + b, std^2), prev = 0 for the first.

    A token whose predecessor is not visible is conditioned on the predecessor's conditional mean.
    """

    a: float
    b: float
    std: float
    length: int = 3
    steps: int = 40
    widen: float = 1.0

    def __post_init__(self) -> None:
        self.head = AnalyticHead(self.std, self.steps, widen=self.widen)
        self.config = SimpleNamespace(
            seq_len=self.length, token_dim=1, num_sampling_steps=self.steps, class_num=1, clip_x0=None
        )
        self.calls: list[int] = []
        self.device = torch.device("cpu")

    def class_embedding(self, labels: Tensor | None, batch: int) -> Tensor:
        return torch.zeros(batch, 1)

    def trunk(self, tokens: Tensor, visible: Tensor, class_embedding: Tensor) -> Tensor:
        self.calls.append(len(tokens))
        prev = torch.zeros(len(tokens), dtype=torch.float64)
        out = []
        for position in range(self.length):
            mean = self.a * prev + self.b
            out.append(mean)
            prev = torch.where(visible[:, position], tokens[:, position, 0].double(), mean)
        return torch.stack(out, 1)[..., None]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [L] and covariance [L, L] of the tokens that plain decoding samples."""
        c, variance = self.head.law()
        mean, covariance = np.zeros(self.length), np.zeros((self.length, self.length))
        for k in range(self.length):
            before = mean[k - 1] if k else 0.0
            mean[k] = c * (self.a * before + self.b)
            covariance[k, k] = variance + ((c * self.a) ** 2 * covariance[k - 1, k - 1] if k else 0.0)
            for later in range(k):
                covariance[k, later] = covariance[later, k] = c * self.a * covariance[k - 1, later]
        return mean, covariance


def in_order(length: int) -> Tensor:
    """The order that a chain is decoded in."""
    return torch.arange(length)[None]
