"""The training loss of MAR (arXiv 2406.11838): masked positions are denoised given the others.

Computed on the masked positions only, which gives the official value and saves about 15 % of the time.
"""

# B batch, L positions, M masked positions of a row, N tokens, D token dim

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmeff.models.mar.head import DiffusionHead
from vlmeff.models.mar.schedule import schedule
from vlmeff.models.mar.trunk import MAR

MASK_CENTRE, MASK_STD = 1.0, 0.25
BIN = 1 / 255  # half the width of a bin of the decoder's likelihood
LEAST = 1e-12


def mask_ratio(least: float, generator: torch.Generator | None = None) -> float:
    """A draw of the normal N(1, 0.25^2) truncated to [least, 1], by inversion."""
    low = 0.5 * (1 + math.erf((least - MASK_CENTRE) / MASK_STD / math.sqrt(2)))
    share = torch.rand((), generator=generator, dtype=torch.float64)
    quantile = low + (0.5 - low) * share  # the centre is the upper end: half of the mass lies below it
    return min(1.0, float(MASK_CENTRE + MASK_STD * torch.special.ndtri(quantile)))


@dataclass(frozen=True, eq=False)
class Draws:
    """The random choices of one loss; given, the loss is a function.

    ``masked`` [B, L] bool with equally many in each row; ``dropped`` [B] bool, samples that lose their class; ``t`` [N]
    and ``noise`` [N, D] for N = diffusion_batch_mul x masked positions, the repeats one after the other.
    """

    masked: Tensor
    dropped: Tensor
    t: Tensor
    noise: Tensor


def draw(model: MAR, batch: int, generator: torch.Generator | None = None) -> Draws:
    """Fresh choices, drawn on the CPU."""
    config = model.config
    count = math.ceil(config.seq_len * mask_ratio(config.mask_ratio_min, generator))
    ranks = torch.rand(batch, config.seq_len, generator=generator).argsort(1).argsort(1)
    tokens = batch * count * config.diffusion_batch_mul
    draws = Draws(
        masked=ranks < count,
        dropped=torch.rand(batch, generator=generator) < config.label_drop_prob,
        t=torch.randint(config.train_steps, (tokens,), generator=generator),
        noise=torch.randn(tokens, config.token_dim, generator=generator),
    )
    return Draws(*(getattr(draws, name).to(model.device) for name in ("masked", "dropped", "t", "noise")))


def training_loss(model: MAR, latents: Tensor, labels: Tensor, draws: Draws) -> Tensor:
    """The mean loss of the masked tokens, a scalar.

    Args:
        latents: [B, L, D].  labels: [B].
    """
    embedding = model.class_embedding(labels, latents.shape[0])
    embedding = torch.where(draws.dropped[:, None], model.fake_latent, embedding)
    z = model.trunk(latents, ~draws.masked, embedding)
    repeats = model.config.diffusion_batch_mul
    x0, z = latents[draws.masked].repeat(repeats, 1), z[draws.masked].repeat(repeats, 1)
    return head_loss(model.diffloss, x0, z, draws.t, draws.noise).mean()


def head_loss(head: DiffusionHead, x0: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Loss [N] of each token: squared error of epsilon plus the variational term in bits, both averaged over D.

    The mean of the variational term is detached, so that it trains the variance alone. At t = 0 it is the likelihood of
    x0 under the last step, elsewhere KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)).

    Args:
        x0: [N, D] tokens.  z: [N, Dd].  t: [N] in 0 .. train_steps - 1.  noise: [N, D].
    """
    steps = head.config.train_steps
    tables, i = schedule(steps, steps, str(x0.device)), t[:, None]
    x0, noise = x0.float(), noise.float()
    x_t = x0 * tables.abar[i].sqrt() + noise * (1 - tables.abar[i]).sqrt()
    epsilon, v = head.net(x_t, t, z).float().chunk(2, -1)

    guess = tables.sqrt_recip_abar[i] * x_t - tables.sqrt_recipm1_abar[i] * epsilon.detach()
    difference = tables.coef_x0[i] * (x0 - guess)  # of the means of q and p: their x_t terms are equal
    share = (v + 1) / 2
    log_variance = share * tables.log_beta[i] + (1 - share) * tables.log_beta_tilde[i]
    narrower = tables.log_beta_tilde[i] - log_variance
    divergence = 0.5 * (narrower.exp() - 1 - narrower + difference.square() * (-log_variance).exp())
    mean = tables.coef_x0[i] * guess + tables.coef_x[i] * x_t
    surprise = -bin_log_likelihood(x0, mean, 0.5 * log_variance)
    bits = torch.where(i == 0, surprise, divergence).mean(-1) / math.log(2)
    return (epsilon - noise).square().mean(-1) + bits


def bin_log_likelihood(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """Log probability of the bin [x - 1/255, x + 1/255] under N(mean, sigma^2); bins at -1 and 1 are open-ended.

    As in DDPM, whose data are pictures in [-1, 1]; the official MAR code keeps it for latents. The normal distribution
    function is exact here, a tanh approximation there (difference below 1e-3).
    """
    inverse = torch.exp(-log_sigma)
    upper = torch.special.ndtr((x + BIN - mean) * inverse)
    lower = torch.special.ndtr((x - BIN - mean) * inverse)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=LEAST).log()


class Averaged:
    """Exponential moving average of a model's parameters: decay min(limit, (1 + n) / (10 + n)) at update n."""

    def __init__(self, model: nn.Module, limit: float = 0.9999) -> None:
        self.limit, self.updates = limit, 0
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.limit, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay)
        self.updates += 1


def optimizer_groups(model: MAR, weight_decay: float = 0.02) -> list[dict[str, object]]:
    """Parameter groups for AdamW: biases, vectors and the diffusion head do not decay."""
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name.endswith(".bias") or name.startswith("diffloss")
        (others if free else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
