"""What stands between latents and pictures: a KL-16 VAE for official models, nothing for models of pixels."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vlmeff.models.mar.config import MARConfig


class Codec(Protocol):
    """``encode`` pictures [B, C, H, W] in [-1, 1] to samples [B, vae_embed_dim, h, w], and ``decode`` back."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, samples: Tensor) -> Tensor: ...


class IdentityCodec:
    """Pictures are their own samples."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, samples: Tensor) -> Tensor:
        return samples


def make_codec(config: MARConfig) -> Codec | None:
    """The codec that needs no weights, or None: a VAE has to be loaded (``vlmeff.models.mar.vae.load_vae``)."""
    return IdentityCodec() if config.codec == "identity" else None
