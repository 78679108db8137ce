"""``MARConfig``: the geometry of a MAR image generator, its diffusion head and its latents (arXiv 2406.11838)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vlmeff.errors import CheckpointError, ConfigError, UnknownNameError

CODECS = ("kl16", "identity")
SCHEDULES = ("cosine",)


@dataclass(frozen=True, kw_only=True)
class MARConfig:
    """Sizes of one model; presets by ``MARConfig.named``. Defaults are those that the released models share.

    L = ``seq_len`` positions, D = ``token_dim`` numbers per token, E = ``encoder_dim``, Dd = ``decoder_dim``,
    W = ``head_width``, T = ``num_sampling_steps``. The defaults of the official class (head 3 x 1024) are not those of
    the released checkpoints.
    """

    encoder_dim: int
    encoder_depth: int
    encoder_heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    head_width: int
    head_depth: int
    img_size: int = 256
    vae_stride: int = 16
    vae_embed_dim: int = 16
    patch_size: int = 1
    mlp_ratio: float = 4.0
    buffer_size: int = 64
    class_num: int = 1000
    label_drop_prob: float = 0.1
    mask_ratio_min: float = 0.7
    dropout: float = 0.1  # of attention weights and projections, in training
    num_sampling_steps: int = 100
    noise_schedule: str = "cosine"
    train_steps: int = 1000
    diffusion_batch_mul: int = 4
    latent_scale: float = 0.2325  # latent = (codec's sample - latent_shift) * latent_scale
    latent_shift: float = 0.0
    codec: str = "kl16"
    clip_x0: float | None = None  # clamp of the head's x0; briefly trained models need it, official ones not

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < (0 if field.name == "buffer_size" else 1)):
                raise ConfigError(f"MARConfig: {field.name}={value!r} must be a positive int.")
        for dim, heads in (("encoder_dim", "encoder_heads"), ("decoder_dim", "decoder_heads")):
            if getattr(self, dim) % getattr(self, heads):
                raise ConfigError(
                    f"MARConfig: {dim}={getattr(self, dim)} is not a multiple of {heads}={getattr(self, heads)}."
                )
        if self.img_size % (self.vae_stride * self.patch_size):
            raise ConfigError(
                f"MARConfig: img_size={self.img_size} is not a multiple of vae_stride * patch_size = "
                f"{self.vae_stride * self.patch_size}."
            )
        if not 1 <= self.num_sampling_steps <= self.train_steps:
            raise ConfigError(
                f"MARConfig: num_sampling_steps={self.num_sampling_steps} must lie in [1, train_steps="
                f"{self.train_steps}]."
            )
        if self.noise_schedule not in SCHEDULES:
            raise ConfigError(f"MARConfig: noise_schedule={self.noise_schedule!r} must be one of {SCHEDULES}.")
        if self.codec not in CODECS:
            raise ConfigError(f"MARConfig: codec={self.codec!r} must be one of {CODECS}.")
        if self.clip_x0 is not None and not self.clip_x0 > 0:
            raise ConfigError(f"MARConfig: clip_x0={self.clip_x0!r} must be positive, or None for no clamp.")
        if not self.latent_scale > 0:
            raise ConfigError(f"MARConfig: latent_scale={self.latent_scale!r} must be positive.")

    # -- derived ------------------------------------------------------------------------------------------------------

    @property
    def seq_h(self) -> int:
        return self.img_size // self.vae_stride // self.patch_size

    @property
    def seq_w(self) -> int:
        return self.seq_h

    @property
    def seq_len(self) -> int:
        """L, positions of an image."""
        return self.seq_h * self.seq_w

    @property
    def token_dim(self) -> int:
        """D, numbers of one token."""
        return self.vae_embed_dim * self.patch_size**2

    # -- presets and files --------------------------------------------------------------------------------------------

    @classmethod
    def named(cls, name: str, **changes: Any) -> MARConfig:
        """A preset, with fields changed: ``MARConfig.named("mar_base", num_sampling_steps=50)``.

        Raises:
            UnknownNameError: no such preset.  ConfigError: a change cannot work.
        """
        if name not in PRESETS:
            raise UnknownNameError("MAR configuration", name, PRESETS)
        return cls(**PRESETS[name]).changed(**changes)

    def changed(self, **changes: Any) -> MARConfig:
        _check_names(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MARConfig:
        """The inverse of ``to_dict``. Raises CheckpointError for unknown or missing fields."""
        try:
            _check_names(values)
            return cls(**values)
        except (TypeError, ConfigError) as error:
            raise CheckpointError(f"This is not the configuration of a MAR model: {error}") from error


def _check_names(values: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(MARConfig)]
    for name in values:
        if name not in known:
            raise ConfigError(f"MARConfig has no field {name!r}; its fields: {', '.join(known)}.")


def _official(dim: int, depth: int, heads: int, head_depth: int, head_width: int) -> dict[str, Any]:
    return {
        **{"encoder_dim": dim, "encoder_depth": depth, "encoder_heads": heads},
        **{"decoder_dim": dim, "decoder_depth": depth, "decoder_heads": heads},
        **{"head_depth": head_depth, "head_width": head_width},
    }


# 8 x 8 pictures as 16 tokens of 2 x 2 pixels. scikit-learn's digits v in 0..16 have mean 0.3053 and standard deviation
# 0.3761 of v / 16; a codec's samples lie in [-1, 1].
_DIGITS: dict[str, Any] = {
    **{"img_size": 8, "vae_stride": 1, "vae_embed_dim": 1, "patch_size": 2, "class_num": 10, "buffer_size": 4},
    **{"num_sampling_steps": 25, "clip_x0": 2.5, "dropout": 0.0, "diffusion_batch_mul": 2},
    **{"codec": "identity", "latent_shift": 2 * 0.3053 - 1, "latent_scale": 0.5 / 0.3761},
}

PRESETS: dict[str, dict[str, Any]] = {
    "mar_base": _official(768, 12, 12, 6, 1024),
    "mar_large": _official(1024, 16, 16, 8, 1280),
    "mar_huge": _official(1280, 20, 16, 12, 1536),
    "mar_tiny_digits": _official(64, 3, 4, 3, 96) | _DIGITS,
    "mar_nano_digits": _official(32, 1, 4, 2, 48) | _DIGITS,
}
