"""Weight quantizers: pure functions from [N, K] weights to codes, scales and zero-points. Computed in float32.

``group`` channels along K share a scale, 0 means a whole row; the last group may be short. Rounding is half to even.
A scale is rounded to the dtype in which it is stored before the codes are computed, so that quantizing what was
dequantized gives the same codes.

Shape letters: N output features, K input features, n_g groups, P the largest code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlmeff.errors import QuantConfigError
from vlmeff.ops.quantize import FP8, FP8_MAX, per_group, spread

SMALLEST_SCALE = 1e-9  # of asymmetric codes: 3.1 of the integer formulas
SHRINKS = 80  # candidates of the range search: 1.00, 0.99, ..., 0.21 of the range
Zero = Literal["integer", "float"]


def symmetric(
    w: Tensor, bits: int, group: int = 0, *, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """s = max|W| / P, q = clamp(rne(W / s), -P, P) with P = 2^(bits-1) - 1; a group of zeros has s = 1.

    Returns:
        (codes [N, K] int8, scale [N, n_g] of scale_dtype).
    """
    _check(w, bits, group)
    largest = 2 ** (bits - 1) - 1
    w = w.float()
    scale = per_group(w.abs(), group).amax(-1) / largest
    scale = torch.where(scale == 0, 1.0, scale).to(scale_dtype)
    codes = (w / spread(scale.float(), group, w.shape[1])).round().clamp(-largest, largest)
    return codes.to(torch.int8), scale


def asymmetric(
    w: Tensor,
    bits: int,
    group: int = 0,
    *,
    zero: Zero = "integer",
    search: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes of a range that contains zero, with an integer or a real-valued zero-point.

    s = max((hi - lo) / P, 1e-9), z = -lo / s (rounded for "integer"), P = 2^bits - 1.

    Args:
        search: shrink the range to where the error is least (``mse_range``) instead of from minimum to maximum.
    Returns:
        (codes [N, K] uint8, scale [N, n_g], zero [N, n_g]), the latter two of scale_dtype.
    """
    _check(w, bits, group)
    if search:
        scale, zeros = mse_range(w, bits, group, zero=zero)
    else:
        scale, zeros = _range(*_low_high(w.float(), group, contain_zero=True), bits, zero)
    scale, zeros = scale.to(scale_dtype), zeros.to(scale_dtype)
    return zero_point_codes(w, scale, zeros, bits, group, zero_kind=zero), scale, zeros


def mse_range(
    w: Tensor, bits: int, group: int = 0, *, zero: Zero = "float", exponent: float = 2.4, contain_zero: bool = True
) -> tuple[Tensor, Tensor]:
    """The best of 80 shrunken ranges per group: p = 1 - i / 100 of (lo, hi), error sum |W^ - W|^exponent.

    Of equal errors the larger range wins. QVGen starts its weights so (arXiv 2505.11497; exponent and grid are its
    code's); its code does not force the range to contain zero (``contain_zero=False``).

    Returns:
        (scale, zero), both [N, n_g] float32.
    """
    _check(w, bits, group)
    w = w.float()
    lo, hi = _low_high(w, group, contain_zero=contain_zero)
    grouped = per_group(w, group)
    inside = per_group(torch.ones_like(w[:1]), group)  # the short last group's filling must not count
    best = torch.full_like(lo, torch.inf)
    scale, zeros = _range(lo, hi, bits, zero)
    for i in range(SHRINKS):
        share = 1 - i / 100
        s, z = _range(share * lo, share * hi, bits, zero)
        codes = _codes(grouped / s[..., None], z[..., None], bits, zero)
        error = ((s[..., None] * (codes - z[..., None]) - grouped).abs().pow(exponent) * inside).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zeros = torch.where(better, s, scale), torch.where(better, z, zeros)
    return scale, zeros


def zero_point_codes(
    w: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int = 0, *, zero_kind: Zero = "integer"
) -> Tensor:
    """The codes [N, K] uint8 of a given scale and zero-point, both [N, n_g]."""
    k = w.shape[1]
    scaled = w.float() / spread(scale.float(), group, k)
    return _codes(scaled, spread(zero.float(), group, k), bits, zero_kind).to(torch.uint8)


def float_zero_codes(w: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int = 0) -> Tensor:
    """q = clamp(rne(W / s + z), 0, P) with a real-valued z (LSQ+, as QVGen uses it): [N, K] uint8."""
    return zero_point_codes(w, scale, zero, bits, group, zero_kind="float")


def fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """s = max|W_row| / 448, q = clamp(W / s, -448, 448) as e4m3: (codes [N, K] float8_e4m3fn, scale [N, 1])."""
    _check(w, 8, 0)
    w = w.float()
    scale = per_group(w.abs(), 0).amax(-1) / FP8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (w / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None, group: int = 0) -> Tensor:
    """W^ = s (q - z): [N, K] float32; ``zero`` None means symmetric codes."""
    values = codes.float()
    if zero is not None:
        values = values - spread(zero.float(), group, codes.shape[1])
    return values * spread(scale.float(), group, codes.shape[1])


def _codes(scaled: Tensor, zero: Tensor, bits: int, kind: Zero) -> Tensor:
    codes = (scaled + zero).round() if kind == "float" else scaled.round() + zero
    return codes.clamp(0, 2**bits - 1)


def _low_high(w: Tensor, group: int, *, contain_zero: bool) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each group, [N, n_g]."""
    if 0 < group < w.shape[1] and w.shape[1] % group and not contain_zero:
        raise QuantConfigError(f"group {group} does not divide K = {w.shape[1]}: the range must then contain zero.")
    grouped = per_group(w, group)  # filled with zeros, which a range that contains zero does not notice
    lo, hi = grouped.amin(-1), grouped.amax(-1)
    return (lo.clamp(max=0), hi.clamp(min=0)) if contain_zero else (lo, hi)


def _range(lo: Tensor, hi: Tensor, bits: int, zero: Zero) -> tuple[Tensor, Tensor]:
    largest = 2**bits - 1
    scale = ((hi - lo) / largest).clamp(min=SMALLEST_SCALE)
    zeros = -lo / scale
    return scale, zeros.round().clamp(0, largest) if zero == "integer" else zeros


def _check(w: Tensor, bits: int, group: int) -> None:
    if w.ndim != 2:
        raise QuantConfigError(f"weights must be [N, K], got {tuple(w.shape)}.")
    if not 2 <= bits <= 8:
        raise QuantConfigError(f"bits={bits} must be 2 to 8.")
    if group < 0:
        raise QuantConfigError(f"group={group} must be 0 (one scale per output) or a number of channels.")
    if not bool(torch.isfinite(w).all()):
        raise QuantConfigError("the weights hold NaN or infinities; they cannot be quantized.")
