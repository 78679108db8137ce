"""KL-16, the VAE of the released MAR models: an LDM-style AutoencoderKL with stride 16 (arXiv 2112.10752, 2406.11838).

Names are those of ``kl16.ckpt``, which loads unchanged: 312 entries, 66.46 M parameters. The decoder's levels run from
the coarsest, ``up.4``, to the finest, ``up.0``, and have no attention; the encoder has it at its last level.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmeff.errors import ConfigError
from vlmeff.models.mar.checkpoint import load_strictly, read_state

CHANNELS = 128
MULTIPLES = (1, 1, 2, 2, 4)
BLOCKS = 2
Z_CHANNELS = 16
GROUPS = 32


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(inner)
        self.conv1 = nn.Conv2d(inner, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if inner != out:
            self.nin_shortcut = nn.Conv2d(inner, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(mixed.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below only, as the weights were trained


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention behind each where ``attend``, then a change of size."""

    def __init__(self, inner: int, out: int, blocks: int, *, attend: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(inner if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out) for _ in range(blocks if attend else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, channels: int, multiples: tuple[int, ...], z_channels: int) -> None:
        super().__init__()
        widths = [channels, *(channels * m for m in multiples)]
        last = len(multiples) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i], widths[i + 1], BLOCKS, attend=i == last) for i in range(len(multiples))
        )
        for i in range(last):
            self.down[i].downsample = Downsample(widths[i + 1])
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, channels: int, multiples: tuple[int, ...], z_channels: int) -> None:
        super().__init__()
        widths = [channels * m for m in multiples]
        last = len(multiples) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(Level(widths[min(i + 1, last)], widths[i], BLOCKS + 1) for i in range(len(multiples)))
        for i in range(1, len(multiples)):
            self.up[i].upsample = Upsample(widths[i])
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class KL16(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to samples [B, 16, H/16, W/16] and back. Scaling is the model's affair."""

    def __init__(
        self, channels: int = CHANNELS, multiples: tuple[int, ...] = MULTIPLES, z_channels: int = Z_CHANNELS
    ) -> None:
        super().__init__()
        self.stride = 2 ** (len(multiples) - 1)
        self.encoder = Encoder(channels, multiples, z_channels)
        self.decoder = Decoder(channels, multiples, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, 16, H/16, W/16] of the posterior.

        Raises:
            ConfigError: sides that are no multiples of the stride.
        """
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise ConfigError(
                f"encode: sides of {tuple(images.shape[-2:])} pixels; multiples of {self.stride} are needed."
            )
        mean, log_variance = self.quant_conv(self.encoder(images.to(self._dtype))).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The posterior's mean; with a generator (of the CPU), a sample of it, which MAR was trained on."""
        mean, log_variance = self.moments(images)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return mean + (0.5 * log_variance).exp() * noise

    def decode(self, samples: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(samples.to(self._dtype)))


def load_vae(file: str | os.PathLike[str]) -> KL16:
    """The VAE of an official ``kl16.ckpt`` (or a bare state dict, or safetensors), in evaluation mode.

    Raises:
        CheckpointError: the file is broken, holds code, or is of another VAE.
    """
    state = read_state(file, prefer=("model", "state_dict"))
    # Files that come from training also carry its loss network.
    state = {name: value for name, value in state.items() if not name.startswith("loss.")}
    with torch.device("meta"):
        vae = KL16()
    vae = vae.to_empty(device="cpu")
    load_strictly(vae, state, str(file))
    return vae.eval()
