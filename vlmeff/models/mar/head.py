"""The diffusion head: denoises one token from noise, given the trunk's vector for its position (arXiv 2406.11838).

The network runs in the model's dtype; all arithmetic of the diffusion is float32. Two differences from the official
code, neither of which changes a value beyond rounding: the embeddings of the T time steps are computed once for a run,
and with guidance one state is carried for both halves (the official code copies the conditional half over the other).
"""

# N tokens, D token dim, Dd decoder dim, W head width, T denoising steps; index 0 of a T axis is the step x_T -> x_{T-1}

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.schedule import Schedule, schedule

FREQUENCIES = 256
INIT_STD = 0.02  # of the time embedding's weights
MAX_ROWS = 65536


def sinusoids(timesteps: Tensor, dim: int = FREQUENCIES, max_period: float = 10000.0) -> Tensor:
    """[M] -> [M, dim] float32: cosines, then sines, of t exp(-ln(max_period) k / (dim/2))."""
    half = dim // 2
    rates = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device, dtype=torch.float32) / half)
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(sinusoids(timesteps).to(next(self.parameters()).dtype))


class ResBlock(nn.Module):
    """x + gate mlp(LN(x) (1 + scale) + shift), all three from SiLU(y)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class HeadNet(nn.Module):
    """The network: x [N, D] at time t and z [N, Dd] -> [N, 2 D], epsilon and the variance's v."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        width, dim = config.head_width, config.token_dim
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(config.decoder_dim, width)
        self.input_proj = nn.Linear(dim, width)
        self.res_blocks = nn.ModuleList([ResBlock(width) for _ in range(config.head_depth)])
        self.final_layer = FinalLayer(width, 2 * dim)

    def forward(self, x: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """x [N, D], timesteps [N] of training, z [N, Dd] -> [N, 2 D] in the model's dtype."""
        return self.body(x, self.time_embed(timesteps) + self.cond_embed(z))

    def body(self, x: Tensor, y: Tensor) -> Tensor:
        """The same from y = time_embed(t) + cond_embed(z)."""
        h = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)

    def initialize(self) -> None:
        """Xavier linears, zero modulations and output: an untrained head predicts epsilon = 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=INIT_STD)  # type: ignore[arg-type]
        for block in self.res_blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)  # type: ignore[index, arg-type, union-attr]
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.final_layer.linear.weight)


@dataclass(frozen=True, eq=False)
class HeadRun:
    """One sampling run. All float32; sigmas are the head's own, before ``temperature`` multiplies the noise.

    ``path`` [T, N, D]: the states before each step, x_T ... x_1; ``means`` and ``log_sigmas`` [T, N, D] of the steps
    taken from them. ``sum_log_sigma`` [N, D] leaves the last step out, which adds no noise.
    """

    x0: Tensor
    mean0: Tensor
    log_sigma0: Tensor
    sum_log_sigma: Tensor
    path: Tensor | None = None
    means: Tensor | None = None
    log_sigmas: Tensor | None = None


class DiffusionHead(nn.Module):
    """``diffloss`` of a MAR model."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.net = HeadNet(config)

    def schedule(self) -> Schedule:
        """The tables of sampling, where the weights are."""
        config = self.config
        return schedule(config.num_sampling_steps, config.train_steps, str(self.net.cond_embed.weight.device))

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        x_T: Tensor,
        eps: Tensor,
        *,
        z_uncond: Tensor | None = None,
        cfg: Tensor | float = 1.0,
        temperature: float = 1.0,
        keep_path: bool = False,
    ) -> HeadRun:
        """Denoise N tokens with given noise.

        Args:
            z: [N, Dd] from the trunk.  x_T: [N, D], unit normal.  eps: [N, T, D], unit normal; eps[:, -1] is not used,
                since the last step adds no noise.
            z_uncond: [N, Dd] of the unconditional rows, for guidance.  cfg: guidance weight, [N] or one for all.
            temperature: multiplies the noise of the steps, not x_T.
            keep_path: keep the states, means and sigmas of all steps.
        """
        tables, steps = self.schedule(), self.config.num_sampling_steps
        y_z, weight = self._conditions(z, z_uncond, cfg)
        y_t = self.net.time_embed(tables.timesteps.flip(0))
        x, eps = x_T.float(), eps.float()
        paths: list[tuple[Tensor, Tensor, Tensor]] = []
        sum_log_sigma = torch.zeros_like(x)
        mean = log_sigma = x
        for step in range(steps):
            i = steps - 1 - step
            mean, log_sigma = self._posterior(x, y_t[step] + y_z, tables, i, weight)
            if keep_path:
                paths.append((x, mean, log_sigma))
            if i > 0:
                sum_log_sigma = sum_log_sigma + log_sigma
                x = mean + temperature * log_sigma.exp() * eps[:, step]
        kept = [torch.stack(column) for column in zip(*paths, strict=True)] if keep_path else [None] * 3
        return HeadRun(mean, mean, log_sigma, sum_log_sigma, *kept)

    @torch.no_grad()
    def path_stats(
        self,
        z: Tensor,
        path: Tensor,
        *,
        z_uncond: Tensor | None = None,
        cfg: Tensor | float = 1.0,
        max_rows: int = MAX_ROWS,
    ) -> tuple[Tensor, Tensor]:
        """Means and log sigmas [T, N, D] of all steps from given states, in one batch: no sequential loop.

        Args:
            z, z_uncond, cfg: as in ``sample``.  path: [T, N, D], the states x_T ... x_1.
            max_rows: of one batch; longer ones are split.
        """
        steps, count, dim = path.shape
        tables = self.schedule()
        y_z, weight = self._conditions(z, z_uncond, cfg)
        halves = y_z.unflatten(0, (-1, count))
        y_t = self.net.time_embed(tables.timesteps.flip(0))
        x, index = path.float().reshape(-1, dim), torch.arange(steps * count, device=path.device)
        out: list[tuple[Tensor, Tensor]] = []
        for rows in index.split(max(1, max_rows // halves.shape[0])):
            step, token = rows // count, rows % count
            y = (y_t[step] + halves[:, token]).flatten(0, 1)
            of = weight[token] if isinstance(weight, Tensor) else weight
            out.append(self._posterior(x[rows], y, tables, steps - 1 - step, of))
        means, log_sigmas = (torch.cat(column).view(steps, count, dim) for column in zip(*out, strict=True))
        return means, log_sigmas

    def _conditions(self, z: Tensor, z_uncond: Tensor | None, cfg: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """cond_embed of z, below it that of z_uncond; and the weights [N, 1], None without guidance."""
        if z_uncond is None:
            return self.net.cond_embed(z.to(self.net.cond_embed.weight.dtype)), None
        both = torch.cat([z, z_uncond]).to(self.net.cond_embed.weight.dtype)
        weight = torch.as_tensor(cfg, dtype=torch.float32, device=z.device).expand(z.shape[0])
        return self.net.cond_embed(both), weight[:, None]

    def _posterior(
        self, x: Tensor, y: Tensor, tables: Schedule, i: int | Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log sigma of the step from x [N, D] at index i (one or [N]); y [N or 2 N, W]."""
        out = self.net.body(x if weight is None else x.repeat(2, 1), y).float()
        epsilon, v = out.chunk(2, -1)
        if weight is not None:
            conditional, unconditional = epsilon.chunk(2)
            epsilon, v = unconditional + weight * (conditional - unconditional), v[: x.shape[0]]
        if isinstance(i, Tensor):
            i = i[:, None]
        x0 = tables.sqrt_recip_abar[i] * x - tables.sqrt_recipm1_abar[i] * epsilon
        if self.config.clip_x0 is not None:
            x0 = x0.clamp(-self.config.clip_x0, self.config.clip_x0)
        mean = tables.coef_x0[i] * x0 + tables.coef_x[i] * x
        share = (v + 1) / 2
        return mean, 0.5 * (share * tables.log_beta[i] + (1 - share) * tables.log_beta_tilde[i])
