"""Exact arithmetic for quantizers in Triton: order, quotients, scales and codes that equal PyTorch's to the bit.

Division is rounded as IEEE says, integers are rounded half to even by adding 1.5 * 2^23, and maxima are taken of the
bits as integers, which order NaN above infinity: no NaN is lost on the way, and the order of a reduction is of no
consequence. ``div_rn`` takes some 13 instructions, more than the memory leaves time for: numbers that are divided by
one scale share its reciprocal (``quotient``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmeff_kernels import _launch

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: the sum's last bit is worth 1, and its low byte is the integer's
FP8_ROUND = tl.constexpr(24576.0)  # the same for multiples of 2^-9, the step of e4m3 below 2^-6
FP8_NAN = tl.constexpr(0x7F)
INTERPRET = tl.constexpr(_launch.INTERPRET)


@triton.jit
def ordered(x):
    """x as an int32 of the same order; a NaN lies above or below everything, by its sign."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        short = x.to(tl.int16, bitcast=True).to(tl.int32)
        return short ^ ((short >> 31) & 0x7FFF)


@triton.jit
def magnitude(x):
    """|x| as an int32 of the same order, NaN the largest."""
    if x.dtype == tl.float32:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def number_of(key, DTYPE: tl.constexpr):
    """The float32 of what ``ordered`` or ``magnitude`` made key from."""
    if DTYPE.is_fp32():
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        return (key ^ ((key >> 31) & 0x7FFF)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def fused(a, b, c):
    """a * b + c rounded once; Triton's interpreter rounds twice."""
    if INTERPRET:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def quotient(x, scale):
    """x / scale as ``div_rn``, of |x / scale| below 2^20: five instructions for each x, a division for each scale.

    The first correction brings it within an ulp, from where Markstein's theorem says that the second rounds correctly
    (IBM J. Res. Dev. 34 (1990)). A power of two keeps every step among the normal numbers; remainders are then exact
    where |x / scale| > 2^-20, and below that any code is 0 all the same.
    """
    factor = tl.where(scale < 2.0**-60, 2.0**100, tl.where(scale > 2.0**60, 2.0**-80, 1.0))
    scale *= factor
    inverse = tl.div_rn(1.0, scale)
    x = x.to(tl.float32) * factor
    near = x * inverse
    near = fused(fused(near, -scale, x), inverse, near)
    return fused(fused(near, -scale, x), inverse, near)


@triton.jit
def on_fp8_grid(x):
    """Round half to even to what e4m3 holds: Triton's interpreter does not when it casts."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (tl.abs(x) + FP8_ROUND) - FP8_ROUND
    rounded = tl.where(tl.abs(x) < 0.015625, small, normal).to(tl.int32, bitcast=True)
    return (rounded | (x.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def symmetric_scale(largest, LARGEST: tl.constexpr):
    scale = tl.div_rn(largest, LARGEST)
    scale = tl.where(scale == 0, 1.0, scale)
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def symmetric_codes(x, scale, LARGEST: tl.constexpr, FP8: tl.constexpr):
    """Codes as bytes: int8, or the bits of a float8. Where the scale is NaN they are 0, in float8 NaN."""
    ratio = tl.minimum(tl.maximum(quotient(x, scale), -LARGEST), LARGEST)
    if FP8:
        # Of -0.0 the corrections make 0.0, which is another code.
        negative = x.to(tl.float32).to(tl.int32, bitcast=True) & -0x80000000
        ratio = (ratio.to(tl.int32, bitcast=True) | negative).to(tl.float32, bitcast=True)
        if INTERPRET:
            ratio = on_fp8_grid(ratio)
        codes = tl.where(scale == scale, ratio.to(tl.float8e4nv).to(tl.int8, bitcast=True), FP8_NAN)
    else:  # clamped before it is rounded: the same, the bounds are integers
        codes = tl.where(scale == scale, (ratio + ROUND).to(tl.int32, bitcast=True), 0)
    return codes.to(tl.int8)


@triton.jit
def rounded_to(x, DTYPE: tl.constexpr):
    """float32 x to DTYPE, half to even: Triton's interpreter cuts bfloat16 off."""
    if INTERPRET and DTYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(DTYPE)
