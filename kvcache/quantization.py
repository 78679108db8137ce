"""Keys and values in 8, 4 or 2 bits with a scale and a zero for each small group (KIVI, arXiv 2402.02750).

    scale = (max - min) / (2^b - 1)      zero = min      q = round(clamp((x - zero) / scale))      x' = q * scale + zero

Keys vary by channel, so a group is ``group`` consecutive tokens of one channel; values vary by token, so a group is
``group`` consecutive channels of one token. Scale and zero take 16 bits each: b + 32 / group bits an entry in all.

Letters: B rows, H key/value heads, T tokens, D head dim, W bytes that hold the D codes of a token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmeff.errors import ConfigError
from vlmeff.ops.decode_attention import StoredStates
from vlmeff.ops.kv_codes import dequantize_keys, dequantize_values, pack
from vlmeff.ops.kv_codes import unpack as unpack  # what is packed here is unpacked there

BITS = {"int8": 8, "int4": 4, "int2": 2}
GROUP = 32
LEAST_VALUE_GROUP = 8  # 32 / 8 bits an entry for scale and zero: smaller groups cost more than they save


def storage_bits(storage: str) -> int:
    """8, 4 or 2. Raises ``ConfigError`` for a storage that does not exist."""
    if storage not in BITS:
        raise ConfigError(f"kv storage={storage!r} must be one of {', '.join(map(repr, BITS))}, or None.")
    return BITS[storage]


def bits_per_entry(bits: int, group: int = GROUP) -> float:
    """Bits that a stored entry takes, its share of scale and zero included."""
    return bits + 32 / group


def value_group(head_dim: int, group: int = GROUP) -> int:
    """Channels of a group of values: the largest divisor of ``head_dim`` up to ``group``.

    Raises:
        ConfigError: there is none of ``LEAST_VALUE_GROUP`` channels or more, as with a large prime ``head_dim``.
    """
    found = max(d for d in range(1, min(group, head_dim) + 1) if head_dim % d == 0)
    if found < min(head_dim, group, LEAST_VALUE_GROUP):
        raise ConfigError(
            f"kv storage: values of head_dim {head_dim} cannot be cut into equal groups of {LEAST_VALUE_GROUP} to "
            f"{group} channels. Store this model's cache unquantized: storage=None."
        )
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """Quantized keys or values of T tokens. Nothing in it is ever quantized a second time.

    ``codes`` [B, H, T, W] uint8: the D codes of a token, 8 / b to a byte, the first in the lowest bits; a last byte is
    filled up with zeros. Keys: ``scale``, ``zero`` [B, H, G, D] and ``sizes``, the tokens of each of the G groups, in
    order. Values: ``scale``, ``zero`` [B, H, T, G], ``sizes`` None. They are bfloat16 where the entries were, else
    float16. ``dtype``: of the entries, before and after.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    sizes: tuple[int, ...] | None
    bits: int
    head_dim: int
    dtype: torch.dtype

    @property
    def length(self) -> int:
        return self.codes.shape[2]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scale, self.zero

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """Apply ``change``, which leaves tokens and channels alone, to every tensor: other rows, another device."""
        return replace(self, codes=change(self.codes), scale=change(self.scale), zero=change(self.zero))

    def joined(self, newer: Packed) -> Packed:
        """With ``newer`` tokens behind these; codes, scales and zeros of both stay what they are."""
        sizes = None if self.sizes is None or newer.sizes is None else self.sizes + newer.sizes
        pairs = zip(self.tensors(), newer.tensors(), strict=True)
        codes, scale, zero = (torch.cat(pair, 2) for pair in pairs)
        return replace(self, codes=codes, scale=scale, zero=zero, sizes=sizes)

    def without(self, start: int, count: int) -> Packed:
        """Less the ``count`` tokens from ``start``. A group of keys that loses some goes on with its scale and zero."""
        cut = _cut(self.codes, start, count)
        if self.sizes is None:
            return replace(self, codes=cut, scale=_cut(self.scale, start, count), zero=_cut(self.zero, start, count))
        sizes, at = [], 0
        for size in self.sizes:
            sizes.append(size - max(0, min(at + size, start + count) - max(at, start)))
            at += size
        gone = [i for i, size in enumerate(sizes) if size == 0]  # consecutive
        first = gone[0] if gone else 0
        scale, zero = (_cut(t, first, len(gone)) for t in (self.scale, self.zero))
        return replace(self, codes=cut, scale=scale, zero=zero, sizes=tuple(size for size in sizes if size))

    def dequantize(self) -> Tensor:
        """[B, H, T, D] in ``dtype``, computed in float32 at least."""
        if self.sizes is None:
            return dequantize_values(*self.tensors(), head_dim=self.head_dim, bits=self.bits, dtype=self.dtype)
        return dequantize_keys(*self.tensors(), sizes=self.sizes, bits=self.bits, dtype=self.dtype)

    def stored(self, rest: Tensor) -> StoredStates:
        """As attention takes them, the tokens ``rest`` [B, H, R, D] in full precision behind these."""
        group = self.head_dim // self.scale.shape[3] if self.sizes is None else self.sizes
        return StoredStates(*self.tensors(), rest=rest, bits=self.bits, group=group)


def quantize_keys(keys: Tensor, *, bits: int, group: int = GROUP, valid: Tensor | None = None) -> Packed:
    """Quantize [B, H, T, D] in groups of ``group`` tokens of a channel; the last group takes what is left.

    ``valid`` [B, T] bool: fillers, False, have no say in the scale and zero of the tokens that they stand among, and
    come back as anything finite.
    """
    count, tail = divmod(keys.shape[2], group)
    whole = count * group
    parts = [(slice(0, whole), (count, group))]
    if tail:
        parts.append((slice(whole, None), (1, tail)))
    codes, scales, zeros = [], [], []
    for tokens, shape in parts:
        known = None if valid is None else valid[:, None, tokens, None].unflatten(2, shape)
        code, scale, zero = _quantized(keys[:, :, tokens].unflatten(2, shape), 3, bits, known)
        codes.append(code.flatten(2, 3))
        scales.append(scale.squeeze(3))
        zeros.append(zero.squeeze(3))
    return Packed(
        codes=pack(torch.cat(codes, 2), bits),
        scale=torch.cat(scales, 2),
        zero=torch.cat(zeros, 2),
        sizes=(group,) * count + (tail,) * (tail > 0),
        bits=bits,
        head_dim=keys.shape[3],
        dtype=keys.dtype,
    )


def quantize_values(values: Tensor, *, bits: int, group: int = GROUP) -> Packed:
    """Quantize [B, H, T, D] in groups of channels of a token, as many as ``value_group`` says."""
    head_dim = values.shape[3]
    channels = value_group(head_dim, group)
    code, scale, zero = _quantized(values.unflatten(3, (head_dim // channels, channels)), 4, bits, None)
    return Packed(
        codes=pack(code.flatten(3), bits),
        scale=scale.squeeze(4),
        zero=zero.squeeze(4),
        sizes=None,
        bits=bits,
        head_dim=head_dim,
        dtype=values.dtype,
    )


def _quantized(x: Tensor, dim: int, bits: int, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the shape of ``x``; scale and zero of size 1 along ``dim``, the axis of a group.

    The 16-bit zero is rounded down and the scale up, so that the levels span the group and no entry is off by more than
    half a scale; to the nearest, as usual, the ends of a group could be cut off by more than that.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    small = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    limit = torch.finfo(small).max
    wide = wide.clamp(-limit, limit)  # float32 has room for more, float16 scales have not
    low_of, high_of = wide, wide
    if valid is not None:
        low_of, high_of = (wide.masked_fill(~valid, end) for end in (torch.inf, -torch.inf))
    low, high = low_of.amin(dim, keepdim=True), high_of.amax(dim, keepdim=True)
    if valid is not None:  # a group of fillers alone
        low, high = (torch.where(end.isfinite(), end, 0.0) for end in (low, high))
    zero = _rounded_down(low, small)
    levels = 2**bits - 1
    scale = -_rounded_down((zero.to(wide.dtype) - high) / levels, small)
    step = torch.where(scale == 0, torch.ones_like(scale), scale).to(wide.dtype)
    codes = ((wide - zero.to(wide.dtype)) / step).clamp(0, levels).round().to(torch.uint8)
    return codes, scale, zero


def _rounded_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of a 16-bit float ``dtype`` that is not above ``x``."""
    near = x.to(dtype)
    bits = near.view(torch.int16)  # sign and magnitude: the next number away from zero is one more, for either sign
    least_negative = torch.full_like(bits, -(2**15) + 1)
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, least_negative))
    return torch.where(near.to(x.dtype) > x, below.view(dtype), near)


def _cut(tensor: Tensor, start: int, count: int) -> Tensor:
    """Less ``count`` entries along dimension 2, in a storage of its own: a slice would keep what it drops."""
    return torch.cat([tensor[:, :, :start], tensor[:, :, start + count :]], 2) if count else tensor
