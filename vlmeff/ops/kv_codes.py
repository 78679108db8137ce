"""Codes of quantized keys and values: how they are packed into bytes, and what they stand for.

Letters: B rows, H key/value heads, T tokens, D channels, W bytes that hold the D codes of a token, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """[..., D] uint8 codes below 2^bits -> [..., ceil(D * bits / 8)] uint8."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    packed = codes[..., ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << place * bits
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """[..., W] -> [..., W * 8 / bits] uint8 codes."""
    if bits == 8:
        return packed
    return torch.stack([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)], -1).flatten(-2)


def dequantize_keys(
    codes: Tensor, scale: Tensor, zero: Tensor, *, sizes: Sequence[int], bits: int, dtype: torch.dtype
) -> Tensor:
    """Keys [B, H, T, D] in ``dtype``; group g is ``sizes[g]`` consecutive tokens of a channel.

    x = q * scale + zero in float32 at least, rounded once. codes [B, H, T, W]; scale, zero [B, H, G, D].
    """
    head_dim = scale.shape[-1]
    parts = [unpack(codes[:, :, :0], bits)[..., :head_dim].to(dtype)] if not sizes else []
    for tokens, groups, size in _runs(sizes):
        part = unpack(codes[:, :, tokens], bits)[..., :head_dim].unflatten(2, (-1, size))
        parts.append(_entries(part, scale[:, :, groups, None], zero[:, :, groups, None], dtype).flatten(2, 3))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def dequantize_values(
    codes: Tensor, scale: Tensor, zero: Tensor, *, head_dim: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """Values [B, H, T, D] in ``dtype``; a group is D / G consecutive channels of a token.

    As ``dequantize_keys``; scale, zero [B, H, T, G].
    """
    grouped = unpack(codes, bits)[..., :head_dim].unflatten(-1, (scale.shape[-1], -1))
    return _entries(grouped, scale[..., None], zero[..., None], dtype).flatten(-2)


def _entries(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return torch.addcmul(zero.to(wide), codes.to(wide), scale.to(wide)).to(dtype)


def _runs(sizes: Sequence[int]) -> Iterator[tuple[slice, slice, int]]:
    """(tokens, groups, size) of each stretch of groups of one size."""
    token = group = 0
    for size, members in groupby(sizes):
        count = len(list(members))
        yield slice(token, token + count * size), slice(group, group + count), size
        token, group = token + count * size, group + count
