"""What a video transformer costs by component, and what faster linear layers can gain at most.

Shape letters: M tokens of a sequence (video, and text where both are joined), T text tokens, d width of the model.
A linear layer of N x K costs 2 M N K floating point operations, attention of M queries over S keys 4 M S d. Embedders,
norms and modulation are left out: together they are below 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vlmeff.diffusion.families import Family, family_of
from vlmeff.errors import ConfigError

# Attention kernels reach a smaller share of the peak than matrix products do.
ATTENTION_RATE = 0.75
# (frames, height, width) of pixels for one latent, and text tokens of the pipelines' defaults.
VAE_SCALE = {"wan": (4, 8, 8), "cogvideox": (4, 8, 8), "hunyuan_video": (4, 8, 8), "ltx_video": (8, 32, 32)}
WAN_HIGH_COMPRESSION_CHANNELS = 48  # Wan 2.2 TI2V-5B, whose VAE has 4 x 16 x 16
TEXT_TOKENS = {"wan": 512, "cogvideox": 226, "hunyuan_video": 256, "ltx_video": 128}
IMAGE_TOKENS = 257  # of the CLIP encoder of Wan 2.1 I2V


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component of a kind of block: ``flops`` of one block, of which the model runs ``blocks``."""

    name: str
    kind: Literal["linear", "attention"]
    flops: float
    blocks: int

    @property
    def total(self) -> float:
        """Operations of all blocks."""
        return self.flops * self.blocks


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Operations of one forward pass of one sample, and the gains they allow; ``str()`` prints the table.

    Attributes:
        tokens: video tokens.  text_tokens: as the pipeline pads them.
        calls: forward passes (or rows) of a step with guidance: the conditional and the unconditional one.
    """

    model: str
    num_frames: int
    height: int
    width: int
    tokens: int
    text_tokens: int
    parts: tuple[Part, ...]
    calls: int = 2

    @property
    def flops(self) -> float:
        """Operations of one forward pass."""
        return sum(part.total for part in self.parts)

    @property
    def linear_flops(self) -> float:
        """Operations of the linear layers in one forward pass."""
        return sum(part.total for part in self.parts if part.kind == "linear")

    @property
    def linear_share(self) -> float:
        """Share of the linear layers in the operations."""
        return self.linear_flops / self.flops

    @property
    def linear_time_share(self) -> float:
        """Share of the linear layers in the time, with attention at 75 % of the rate of matrix products."""
        attention = (self.flops - self.linear_flops) / ATTENTION_RATE
        return self.linear_flops / (self.linear_flops + attention)

    def gain(self, *, linears: float = 1.0, attention: float = 1.0) -> float:
        """Bound of the speed-up of a forward pass whose linear layers and attention get this many times faster."""
        if linears <= 0 or attention <= 0:
            raise ConfigError(f"gain: linears={linears}, attention={attention} must be positive.")
        share = self.linear_time_share
        return 1 / (share / linears + (1 - share) / attention)

    def seconds(self, tflops_per_s: float) -> float:
        """Seconds of a forward pass on a device that reaches this rate in matrix products."""
        return self.flops * (1 - self.linear_share * (1 - ATTENTION_RATE)) / ATTENTION_RATE / (tflops_per_s * 1e12)

    def gains(self) -> dict[str, float]:
        """The bounds that are printed: for what is made faster, how much the whole forward pass gains."""
        return {
            "weights only (16-bit activations)": 1.0,
            "linears 1.6x (8 bit, realistic)": self.gain(linears=1.6),
            "linears 2x (8 bit, ideal)": self.gain(linears=2),
            "linears 4x (4 bit, not on Hopper)": self.gain(linears=4),
            "attention 2x": self.gain(attention=2),
            "linears 2x and attention 2x": self.gain(linears=2, attention=2),
        }

    def to_dict(self) -> dict[str, Any]:
        """The forecast as plain JSON values."""
        return {
            "model": self.model,
            "num_frames": self.num_frames,
            "height": self.height,
            "width": self.width,
            "tokens": self.tokens,
            "text_tokens": self.text_tokens,
            "tflops": self.flops / 1e12,
            "linear_share": self.linear_share,
            "linear_time_share": self.linear_time_share,
            "parts": [vars(part) for part in self.parts],
            "gains": self.gains(),
        }

    def __str__(self) -> str:
        head = (
            f"{self.model}, {self.num_frames} frames of {self.height} x {self.width}: {self.tokens:,} video tokens, "
            f"{self.text_tokens} text tokens, {_tera(self.flops)} a forward pass"
        )
        width = max(len(part.name) for part in self.parts)
        rows = [
            f"  {part.name:<{width}}  {part.kind:<9}  {_tera(part.flops):>10} x {part.blocks:<3} "
            f"{part.total / self.flops:>6.1%}"
            for part in self.parts
        ]
        share = (
            f"linear layers: {self.linear_share:.0%} of the operations, {self.linear_time_share:.0%} of the time "
            f"(attention at {ATTENTION_RATE:.0%} of their rate)"
        )
        bounds = [f"  {name:<34} {gain:.2f}x" for name, gain in self.gains().items()]
        return "\n".join([head, *rows, share, "at most, end to end (computed, not measured):", *bounds])


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g} TF" if flops >= 1e9 else f"{flops / 1e9:.3g} GF"


def latent_grid(
    family: Family, config: Any, num_frames: int, height: int, width: int, vae_scale: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """Token grid (frames, rows, columns) of a video, as the family's pipelines make it.

    Raises:
        ConfigError: sizes below one patch, or rows and columns that patches do not divide.
    """
    scale = vae_scale or VAE_SCALE[family.name]
    if vae_scale is None and family.name == "wan" and config.in_channels == WAN_HIGH_COMPRESSION_CHANNELS:
        scale = (4, 16, 16)
    patch = config.patch_size
    p_t, p_h, p_w = patch if isinstance(patch, (tuple, list)) else (config.get("patch_size_t") or 1, patch, patch)
    if num_frames < 1:
        raise ConfigError(f"forecast: num_frames={num_frames} must be 1 or more.")
    for name, size, step in (("height", height, scale[1] * p_h), ("width", width, scale[2] * p_w)):
        if size < step or size % step:
            raise ConfigError(f"forecast: {name}={size} must be a multiple of {step} for {family.name}.")
    frames = (num_frames - 1) // scale[0] + 1
    return math.ceil(frames / p_t), height // (scale[1] * p_h), width // (scale[2] * p_w)


def forecast(
    transformer: nn.Module,
    num_frames: int,
    height: int,
    width: int,
    *,
    text_tokens: int | None = None,
    vae_scale: tuple[int, int, int] | None = None,
) -> Forecast:
    """Operations of a forward pass over a video of this size in pixels, by component.

    Counts the blocks that the transformer has now (fewer after ``drop_blocks``).

    Args:
        transformer: of a known family, on any device, the meta device included.
        text_tokens: as the pipeline pads the prompt; the pipeline's default if None.
        vae_scale: pixels (frames, height, width) of one latent; the family's if None.
    Raises:
        UnsupportedModelError: the class is not known.  ConfigError: the size cannot be cut into patches.
    """
    family, config = family_of(transformer), transformer.config
    grid = latent_grid(family, config, num_frames, height, width, vae_scale)
    tokens = math.prod(grid)
    text = TEXT_TOKENS[family.name] if text_tokens is None else text_tokens
    if text < 0:
        raise ConfigError(f"forecast: text_tokens={text} must be 0 or more.")
    counts = {name: len(blocks) for name, blocks in family.block_lists(transformer).items()}
    return Forecast(
        model=type(transformer).__name__,
        num_frames=num_frames,
        height=height,
        width=width,
        tokens=tokens,
        text_tokens=text,
        parts=tuple(_PARTS[family.name](config, counts, tokens, text)),
    )


def _linear(name: str, blocks: int, rows: int, params: float) -> Part:
    return Part(name=name, kind="linear", flops=2.0 * rows * params, blocks=blocks)


def _attention(name: str, blocks: int, queries: int, keys: int, d: int) -> Part:
    return Part(name=name, kind="attention", flops=4.0 * queries * keys * d, blocks=blocks)


def _cross_blocks(blocks: int, m: int, t: int, d: int, ffn: int, images: int) -> Iterator[Part]:
    yield _linear("self q,k,v,o", blocks, m, 4 * d * d)
    yield _linear("cross q,o", blocks, m, 2 * d * d)
    yield _linear("cross k,v", blocks, t + images, 2 * d * d)
    yield _linear("ffn", blocks, m, 2 * d * ffn)
    yield _attention("self-attention", blocks, m, m, d)
    yield _attention("cross-attention", blocks, m, t + images, d)


def _wan(config: Any, counts: dict[str, int], m: int, t: int) -> Iterator[Part]:
    d = config.num_attention_heads * config.attention_head_dim
    images = IMAGE_TOKENS if config.added_kv_proj_dim is not None else 0
    yield from _cross_blocks(sum(counts.values()), m, t, d, config.ffn_dim, images)
    if counts.get("vace_blocks"):
        # proj_out of each control block, proj_in of the first
        yield _linear("control projections", counts["vace_blocks"] + 1, m, d * d)


def _ltx(config: Any, counts: dict[str, int], m: int, t: int) -> Iterator[Part]:
    d = config.num_attention_heads * config.attention_head_dim
    yield from _cross_blocks(sum(counts.values()), m, t, d, 4 * d, 0)


def _cogvideox(config: Any, counts: dict[str, int], m: int, t: int) -> Iterator[Part]:
    d, blocks = config.num_attention_heads * config.attention_head_dim, sum(counts.values())
    yield _linear("joint q,k,v,o", blocks, m + t, 4 * d * d)
    yield _linear("ffn", blocks, m + t, 8 * d * d)
    yield _attention("joint attention", blocks, m + t, m + t, d)


def _hunyuan(config: Any, counts: dict[str, int], m: int, t: int) -> Iterator[Part]:
    d, dual, single = (
        config.num_attention_heads * config.attention_head_dim,
        counts.get("transformer_blocks", 0),
        counts.get("single_transformer_blocks", 0),
    )
    mlp = config.mlp_ratio * d * d
    yield _linear("dual: video q,k,v,o", dual, m, 4 * d * d)
    yield _linear("dual: video ffn", dual, m, 2 * mlp)
    yield _linear("dual: text", dual, t, 4 * d * d + 2 * mlp)
    yield _attention("dual: joint attention", dual, m + t, m + t, d)
    yield _linear("single: q,k,v", single, m + t, 3 * d * d)
    yield _linear("single: mlp and out", single, m + t, 2 * mlp + d * d)
    yield _attention("single: attention", single, m + t, m + t, d)


_PARTS = {"wan": _wan, "cogvideox": _cogvideox, "hunyuan_video": _hunyuan, "ltx_video": _ltx}
