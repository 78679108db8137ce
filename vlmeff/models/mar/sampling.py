"""Plain sampling of MAR, and what every decoder shares: units, guidance weights, orders and noise.

The noise of a token belongs to its position, so plain decoding is a function of (order, noise). The official code draws
fresh noise in each step: the same law, other samples.
"""

# B batch, L positions, D token dim, T denoising steps, K steps of the transformer, N tokens, R rows

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmeff.errors import ConfigError
from vlmeff.models.mar.trunk import MAR

if TYPE_CHECKING:
    from vlmeff.speculative.statistics import Stats

CFG_SCHEDULES = ("linear", "constant")


def remaining(length: int, steps: int) -> list[int]:
    """Positions that are left before each step, and 0 at the end: K + 1 numbers, from L down.

    m_0 = L, m_{k+1} = max(1, min(m_k - 1, floor(L cos(pi/2 (k+1)/K)))); the last step takes everything left.

    Raises:
        ConfigError: ``steps`` outside [1, length].
    """
    if type(steps) is not int or not 1 <= steps <= length:
        raise ConfigError(
            f"num_iter={steps!r}: the steps of a picture of {length} tokens must be an int in [1, {length}]."
        )
    left = [length]
    for k in range(steps - 1):
        left.append(max(1, min(left[-1] - 1, math.floor(length * math.cos(math.pi / 2 * (k + 1) / steps)))))
    return [*left, 0]


def units(length: int, steps: int) -> list[int]:
    """Tokens of each step, K numbers that sum to L; all 1 for K = L."""
    left = remaining(length, steps)
    return [before - after for before, after in pairwise(left)]


def guidance(length: int, steps: int, cfg: float, cfg_schedule: str = "linear") -> list[float]:
    """The weight of each step: constant, or rising linearly with the tokens that exist after it.

    linear: 1 + (cfg - 1)(L - m_{k+1})/L, where the last step counts m as 1.

    Raises:
        ConfigError: negative ``cfg`` or unknown schedule.
    """
    if not cfg >= 0 or math.isinf(cfg):
        raise ConfigError(f"cfg={cfg!r}: a guidance weight must be 0 or more; 1 is without guidance.")
    if cfg_schedule not in CFG_SCHEDULES:
        raise ConfigError(f"cfg_schedule={cfg_schedule!r} must be one of {', '.join(CFG_SCHEDULES)}.")
    left = remaining(length, steps)
    if cfg_schedule == "constant":
        return [float(cfg)] * steps
    return [1 + (cfg - 1) * (length - max(1, after)) / length for after in left[1:]]


class NoiseBank:
    """Order and noise of every position, drawn before decoding.

    Sample b draws from the seed ``seed + b``: its order, x_T [L, D], eps [L, T, D], so it does not depend on the batch.
    All of it stands in memory: 4 B L (T + 1) D bytes, 13 MB for eight pictures of MAR at T = 100. ``lazy=True`` draws
    the noise of a position when it is asked for, from a seed of (seed + b, position): other samples of the same law.
    A list of seeds, one a sample, is taken as it is.
    """

    def __init__(
        self,
        seed: int | Sequence[int],
        batch: int,
        length: int,
        steps: int,
        dim: int,
        *,
        lazy: bool = False,
        device: Any = "cpu",
    ) -> None:
        self.seeds = _seeds(seed, batch)
        self.batch, self.length, self.steps, self.dim = batch, length, steps, dim
        self.lazy, self.device = lazy, torch.device(device)
        self._noise: tuple[Tensor, Tensor] | None = None
        orders, x_T, eps = [], [], []
        for own in self.seeds:
            generator = torch.Generator().manual_seed(own)
            orders.append(torch.randperm(length, generator=generator))
            if not lazy:
                x_T.append(torch.randn(length, dim, generator=generator))
                eps.append(torch.randn(length, steps, dim, generator=generator))
        self.orders = (torch.stack(orders) if orders else torch.zeros(0, length, dtype=torch.long)).to(self.device)
        if not lazy:
            shape = (0, length, steps, dim)
            first = torch.stack(x_T) if x_T else torch.zeros(0, length, dim)
            self._noise = first.to(self.device), (torch.stack(eps) if eps else torch.zeros(shape)).to(self.device)

    @classmethod
    def given(cls, x_T: Tensor, eps: Tensor, orders: Tensor) -> NoiseBank:
        """Of noise that is there: x_T [B, L, D], eps [B, L, T, D] (step x_T -> x_{T-1} first), orders [B, L].

        Raises:
            ConfigError: the shapes do not fit each other.
        """
        batch, length, dim = x_T.shape
        if eps.ndim != 4 or eps.shape[:2] != (batch, length) or eps.shape[3] != dim or orders.shape != (batch, length):
            raise ConfigError(
                f"noise: x_T {tuple(x_T.shape)}, eps {tuple(eps.shape)} and orders {tuple(orders.shape)} do not fit; "
                "they must be [B, L, D], [B, L, T, D] and [B, L]."
            )
        bank = cls(0, 0, length, eps.shape[2], dim, device=x_T.device)
        bank.batch, bank.orders, bank._noise = batch, orders, (x_T.float(), eps.float())
        return bank

    def _all(self) -> tuple[Tensor, Tensor]:
        if self._noise is None:
            samples = torch.arange(self.batch).repeat_interleave(self.length)
            x_T, eps = self.gather(samples, torch.arange(self.length).repeat(self.batch))
            shape = (self.batch, self.length)
            self._noise = x_T.view(*shape, self.dim), eps.view(*shape, self.steps, self.dim)
        return self._noise

    @property
    def x_T(self) -> Tensor:
        """[B, L, D]"""
        return self._all()[0]

    @property
    def eps(self) -> Tensor:
        """[B, L, T, D], index 0 of T for the step x_T -> x_{T-1}."""
        return self._all()[1]

    def gather(self, samples: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(x_T [N, D], eps [N, T, D]) of N pairs of sample and position."""
        if self._noise is not None:
            return self._noise[0][samples, positions], self._noise[1][samples, positions]
        drawn = []
        for sample, position in zip(samples.tolist(), positions.tolist(), strict=True):
            # Odd multipliers keep the seeds of neighbouring samples and positions apart.
            seed = (self.seeds[sample] * 0x9E3779B97F4A7C15 + (position + 1) * 0xBF58476D1CE4E5B9) % 2**63
            drawn.append(torch.randn(self.steps + 1, self.dim, generator=torch.Generator().manual_seed(seed)))
        noise = torch.stack(drawn).to(self.device)
        return noise[:, 0], noise[:, 1:]


def _seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    """The seed of each sample."""
    if isinstance(seed, list | tuple):
        if len(seed) != batch or any(type(one) is not int or not 0 <= one < 2**63 for one in seed):
            raise ConfigError(f"seed={seed!r} must be {batch} ints in [0, 2**63).")
        return list(seed)
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"seed={seed!r} must be an int of 0 or more.")
    if seed + batch >= 2**63:
        raise ConfigError(f"seed={seed!r}: seed + batch (of {batch}) must be below 2**63.")
    return [seed + sample for sample in range(batch)]


def check_order(order: Tensor, batch: int, length: int) -> Tensor:
    """The order as [B, L] int64; raise ConfigError unless each row is a permutation of the positions."""
    if order.shape != (batch, length):
        raise ConfigError(f"order: shape {tuple(order.shape)}, expected [{batch}, {length}]: a permutation per sample.")
    if not torch.equal(order.sort(1).values, torch.arange(length, device=order.device).expand(batch, -1)):
        raise ConfigError("order: every row must be a permutation of the positions.")
    return order.long()


def batch_size(labels: Tensor | None, batch: int | None) -> int:
    """How many samples; raise ConfigError where the arguments do not say, or contradict each other."""
    if labels is None:
        if batch is None or type(batch) is not int or batch < 1:
            raise ConfigError(f"batch={batch!r}: without labels, say how many pictures to draw (an int of 1 or more).")
        return batch
    if labels.ndim != 1:
        raise ConfigError(f"labels: shape {tuple(labels.shape)}; expected one dimension, a label for each sample.")
    if not labels.shape[0]:
        raise ConfigError("labels: 0 labels; give one for each picture to draw.")
    if batch is not None and batch != labels.shape[0]:
        raise ConfigError(f"batch={batch} and {labels.shape[0]} labels contradict each other; leave batch out.")
    return labels.shape[0]


def check_noise(noise: NoiseBank, batch: int, model: Any) -> NoiseBank:
    """Raise ConfigError unless the bank is of this batch and this model."""
    config = model.config
    has = (noise.batch, noise.length, noise.steps, noise.dim)
    needs = (batch, config.seq_len, config.num_sampling_steps, config.token_dim)
    if has != needs:
        raise ConfigError(f"noise: (B, L, T, D) = {has}, this call needs {needs}.")
    return noise


def uses_guidance(cfg: float, labels: Tensor | None) -> bool:
    """Whether there are two halves; without classes they would be the same, which warns."""
    if cfg != 1 and labels is None:
        warnings.warn(f"cfg={cfg!r} has no effect without labels.", stacklevel=3)
    return cfg != 1 and labels is not None


def guided(model: MAR, tokens: Tensor, visible: Tensor, cond: Tensor, *, guide: bool) -> tuple[Tensor, Tensor | None]:
    """z [R, L, Dd] with the class and, if ``guide``, without, from one trunk call of R or 2 R rows."""
    if not guide:
        return model.trunk(tokens, visible, cond), None
    rows = tokens.shape[0]
    classes = torch.cat([cond, model.class_embedding(None, rows)])
    z, z_uncond = model.trunk(tokens.repeat(2, 1, 1), visible.repeat(2, 1), classes).chunk(2)
    return z, z_uncond


def seconds_since(started: float, device: torch.device) -> float:
    """What ``time.perf_counter`` has counted since, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.no_grad()
def plain(
    model: MAR,
    labels: Tensor | None,
    *,
    num_iter: int | None = None,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    seed: int = 0,
    batch: int | None = None,
    order: Tensor | None = None,
    noise: NoiseBank | None = None,
) -> tuple[Tensor, Stats]:
    """Decode every picture in K steps; arguments as of ``MAR.sample``.

    Returns:
        latents [B, L, D] float32, and what it cost.
    Raises:
        ConfigError: an argument cannot work.  FloatingPointError: a token is not finite.
    """
    from vlmeff.speculative.statistics import Stats

    started = time.perf_counter()
    config, count = model.config, batch_size(labels, batch)
    length, steps = config.seq_len, config.seq_len if num_iter is None else num_iter
    weights = guidance(length, steps, cfg, cfg_schedule)
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature!r} must be 0 or more.")
    cond = model.class_embedding(labels, count)
    if noise is None:
        noise = NoiseBank(seed, count, length, config.num_sampling_steps, config.token_dim, device=model.device)
    noise = check_noise(noise, count, model)
    orders = noise.orders if order is None else check_order(order.to(model.device), count, length)
    guide = uses_guidance(cfg, labels)
    stats = Stats(mode="plain", steps=steps, batch=count, seq_len=length)

    tokens = torch.zeros(count, length, config.token_dim, device=model.device)
    visible = torch.zeros(count, length, dtype=torch.bool, device=model.device)
    rows = torch.arange(count, device=model.device)[:, None]
    done = 0
    for k, size in enumerate(units(length, steps)):
        z, z_uncond = guided(model, tokens, visible, cond, guide=guide)
        positions = orders[:, done : done + size]
        samples = rows.expand_as(positions)
        x_T, eps = noise.gather(samples.flatten(), positions.flatten())
        run = model.head.sample(
            z[samples, positions].flatten(0, 1),
            x_T,
            eps,
            z_uncond=None if z_uncond is None else z_uncond[samples, positions].flatten(0, 1),
            cfg=weights[k],
            temperature=temperature,
        )
        if not run.x0.isfinite().all():
            where = positions.flatten()[~run.x0.isfinite().all(1)][0]
            raise FloatingPointError(f"sample: the token at position {int(where)} is not finite after step {k}.")
        tokens[samples, positions] = run.x0.view(count, size, -1)
        visible[samples, positions] = True
        done += size
        halves = 2 if guide else 1
        stats.target_passes += 1
        stats.target_rows += halves * count
        stats.target_head_calls += config.num_sampling_steps
        stats.target_head_rows += halves * count * size * config.num_sampling_steps
    stats.wall_s = seconds_since(started, model.device)
    return tokens, stats
