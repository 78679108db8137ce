"""Latent maps to tokens and back."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(maps: Tensor, patch: int) -> Tensor:
    """[B, C, h p, w q] -> [B, h w, C p q] for p = q = ``patch``; a token's numbers are ordered (c, p, q)."""
    return rearrange(maps, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of ``patchify`` for a grid of ``height`` x ``width`` tokens."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=patch, q=patch)
