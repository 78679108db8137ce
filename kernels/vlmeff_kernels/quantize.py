"""Triton back ends of the per-token quantizers: codes and scales equal the reference's bit for bit.

    symmetric:  s = max|x| / P,                    q = clamp(rne(x / s), -P, P)             int8, or float8 with P = 448
    unsigned:   s = max((hi - lo) / P, 1e-6),      q = clamp(rne(x / s) + z, 0, P),   z = clamp(rne(-lo / s), 0, P)

A program owns a row. Up to ONE_PASS channels it is read once, as two blocks: HEAD, the largest power of two that fits
and needs no mask, and TAIL, what is left; one block of the next power of two would compute on up to half its lanes for
nothing (5120 = 4096 + 1024). Longer rows are read twice. Scales per group take tiles of GROUPS x GROUP channels.

``rounding`` has what makes it exact. Kernel arguments: pointers, sizes, strides, constexprs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch
from vlmeff_kernels._backend import Kernel
from vlmeff_kernels._library import call, define
from vlmeff_kernels.rounding import ROUND, magnitude, number_of, ordered, symmetric_codes, symmetric_scale

SMALLEST_SCALE = tl.constexpr(1e-6)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ONE_PASS, BLOCK = 16384, 4096  # channels: the longest row that stays in registers, and a step of the two passes
INTERPRETED_ONE_PASS, INTERPRETED_BLOCK = 128, 64
GROUP_TILE = 1024  # channels of a program with scales per group


@triton.jit
def channels_of(x, k, inside):
    """Channels k of a row, 0 outside; ``inside`` None: all are inside.

    They stay in the dtype of x until their codes are computed: half as many registers for a row of 16-bit numbers.
    """
    return tl.load(x + k) if inside is None else tl.load(x + k, mask=inside, other=0.0)


@triton.jit
def smoothed(x, smooth, k, inside, SMOOTH: tl.constexpr):
    """``channels_of``, divided by their smoothing factors."""
    values = channels_of(x, k, inside)
    if SMOOTH:
        factors = tl.load(smooth + k) if inside is None else tl.load(smooth + k, mask=inside, other=1.0)
        return tl.div_rn(values.to(tl.float32), factors)
    else:
        return values


@triton.jit
def unsigned_range(lo, hi, clip, LARGEST: tl.constexpr, CLIP: tl.constexpr, CONTAIN: tl.constexpr):
    """(scale, zero-point as a float) of a row."""
    sound = (lo > float("-inf")) & (hi < float("inf"))  # false of a NaN
    if CONTAIN:
        lo, hi = tl.minimum(lo, 0.0), tl.maximum(hi, 0.0)
    if CLIP:
        lo, hi = lo * tl.load(clip), hi * tl.load(clip + 1)
    # These choices also stand between the products and the difference, which must not become one fma.
    lo, hi = tl.where(sound, lo, float("nan")), tl.where(sound, hi, float("nan"))
    scale = tl.maximum(tl.div_rn(hi - lo, LARGEST), SMALLEST_SCALE)
    scale = tl.where(hi - lo < float("inf"), scale, float("nan"))
    zero = (tl.div_rn(-lo, scale) + ROUND) - ROUND
    zero = tl.minimum(tl.maximum(zero, 0.0), LARGEST)
    return scale, tl.where(scale == scale, zero, 0.0)


@triton.jit
def unsigned_codes(x, scale, zero, LARGEST: tl.constexpr):
    """int32. Ratios of 2^22 and more are not rounded exactly, and are clamped."""
    codes = ((tl.div_rn(x.to(tl.float32), scale) + ROUND) - ROUND) + zero
    codes = tl.minimum(tl.maximum(codes, 0.0), LARGEST)
    return tl.where(scale == scale, (codes + ROUND).to(tl.int32, bitcast=True) & 0xFF, 0)


@triton.jit
def symmetric_row(
    x, smooth, codes, scales, channels, x_m,
    LARGEST: tl.constexpr, FP8: tl.constexpr, SMOOTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_m
    codes += row * channels
    k = tl.arange(0, HEAD)
    head = smoothed(x, smooth, k, None, SMOOTH)
    largest = tl.max(magnitude(head))
    if TAIL:
        rest = HEAD + tl.arange(0, TAIL)
        tail = smoothed(x, smooth, rest, rest < channels, SMOOTH)
        largest = tl.maximum(largest, tl.max(magnitude(tail)))
    scale = symmetric_scale(number_of(largest, head.dtype), LARGEST)
    tl.store(scales + row, scale)
    tl.store(codes + k, symmetric_codes(head, scale, LARGEST, FP8))
    if TAIL:
        tl.store(codes + rest, symmetric_codes(tail, scale, LARGEST, FP8), mask=rest < channels)


@triton.jit
def symmetric_long_row(
    x, smooth, codes, scales, channels, x_m,
    LARGEST: tl.constexpr, FP8: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_m
    codes += row * channels
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, channels, BLOCK):
        k = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, magnitude(smoothed(x, smooth, k, k < channels, SMOOTH)))
    dtype: tl.constexpr = tl.float32 if SMOOTH else x.dtype.element_ty
    scale = symmetric_scale(number_of(tl.max(largest), dtype), LARGEST)
    tl.store(scales + row, scale)
    for start in range(0, channels, BLOCK):
        k = start + tl.arange(0, BLOCK)
        values = smoothed(x, smooth, k, k < channels, SMOOTH)
        tl.store(codes + k, symmetric_codes(values, scale, LARGEST, FP8), mask=k < channels)


@triton.jit
def symmetric_groups(
    x, smooth, codes, scales, channels, group, groups, x_m,
    LARGEST: tl.constexpr, SMOOTH: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, GROUP)
    k = g[:, None] * group + place[None]
    inside = (place[None] < group) & (k < channels)
    values = smoothed(x + row * x_m, smooth, k, inside, SMOOTH)
    scale = symmetric_scale(number_of(tl.max(magnitude(values), axis=1), values.dtype), LARGEST)
    tl.store(scales + row * groups + g, scale, mask=g < groups)
    tl.store(codes + row * channels + k, symmetric_codes(values, scale[:, None], LARGEST, False), mask=inside)


@triton.jit
def unsigned_row(
    x, clip, codes, scales, zeros, sums, channels, x_m,
    LARGEST: tl.constexpr, CLIP: tl.constexpr, CONTAIN: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_m
    codes += row * channels
    k = tl.arange(0, HEAD)
    head = channels_of(x, k, None)
    lo, hi = tl.min(ordered(head)), tl.max(ordered(head))
    if TAIL:
        rest = HEAD + tl.arange(0, TAIL)
        inside = rest < channels
        tail = channels_of(x, rest, inside)
        lo = tl.minimum(lo, tl.min(tl.where(inside, ordered(tail), 0x7FFFFFFF)))
        hi = tl.maximum(hi, tl.max(tl.where(inside, ordered(tail), -0x7FFFFFFF)))
    lo, hi = number_of(lo, head.dtype), number_of(hi, head.dtype)
    scale, zero = unsigned_range(lo, hi, clip, LARGEST, CLIP, CONTAIN)
    q = unsigned_codes(head, scale, zero, LARGEST)
    tl.store(codes + k, q.to(tl.uint8))
    total = tl.sum(q)
    if TAIL:
        q_tail = unsigned_codes(tail, scale, zero, LARGEST)
        tl.store(codes + rest, q_tail.to(tl.uint8), mask=inside)
        total += tl.sum(tl.where(inside, q_tail, 0))
    tl.store(scales + row, scale)
    tl.store(zeros + row, zero.to(tl.int32))
    tl.store(sums + row, total)


@triton.jit
def unsigned_long_row(
    x, clip, codes, scales, zeros, sums, channels, x_m,
    LARGEST: tl.constexpr, CLIP: tl.constexpr, CONTAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_m
    codes += row * channels
    lo, hi = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32), tl.full((BLOCK,), -0x7FFFFFFF, tl.int32)
    for start in range(0, channels, BLOCK):
        k = start + tl.arange(0, BLOCK)
        key = ordered(channels_of(x, k, k < channels))
        lo = tl.minimum(lo, tl.where(k < channels, key, 0x7FFFFFFF))
        hi = tl.maximum(hi, tl.where(k < channels, key, -0x7FFFFFFF))
    lowest, highest = number_of(tl.min(lo), x.dtype.element_ty), number_of(tl.max(hi), x.dtype.element_ty)
    scale, zero = unsigned_range(lowest, highest, clip, LARGEST, CLIP, CONTAIN)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, channels, BLOCK):
        k = start + tl.arange(0, BLOCK)
        q = unsigned_codes(channels_of(x, k, k < channels), scale, zero, LARGEST)
        tl.store(codes + k, q.to(tl.uint8), mask=k < channels)
        total += tl.where(k < channels, q, 0)
    tl.store(scales + row, scale)
    tl.store(zeros + row, zero.to(tl.int32))
    tl.store(sums + row, tl.sum(total))


def row_blocks(channels: int) -> dict[str, int]:
    """HEAD and TAIL for a row of this length, which is not 0."""
    head = 1 << (channels.bit_length() - 1)
    tail = _launch.next_power_of_2(channels - head) if channels > head else 0
    return {"HEAD": head, "TAIL": tail}


def row_warps(channels: int) -> int:
    """32 to 64 channels a thread, in at most 8 warps."""
    return max(1, min(8, 1 << (channels // 1024).bit_length() >> 1))


def _passes(channels: int) -> tuple[bool, dict[str, int], int]:
    """(whether one pass is enough, constexprs, warps)."""
    small = _launch.INTERPRET and not _launch.is_recording()
    if channels <= (INTERPRETED_ONE_PASS if small else ONE_PASS):
        return True, row_blocks(channels), row_warps(channels)
    return False, {"BLOCK": INTERPRETED_BLOCK if small else BLOCK}, 8


def _symmetric(x: Tensor, smooth: Tensor | None, codes: Tensor, scales: Tensor, largest: float) -> None:
    """One scale a row."""
    rows, channels = x.shape
    if not channels:
        scales.fill_(1.0)
        return
    once, blocks, warps = _passes(channels)
    _launch.launch(
        symmetric_row if once else symmetric_long_row, (rows,),
        x, smooth, codes.view(torch.int8), scales, channels, x.stride(0),
        warps=warps, LARGEST=largest, FP8=codes.dtype == FP8, SMOOTH=smooth is not None, **blocks,
    )  # fmt: skip


def _int8(x: Tensor, smooth: Tensor | None, bits: int, group: int) -> tuple[Tensor, Tensor]:
    codes, scales = _int8_fake(x, smooth, bits, group)
    (rows, channels), groups, largest = x.shape, scales.shape[1], float(2 ** (bits - 1) - 1)
    if groups == 1:
        _symmetric(x, smooth, codes, scales, largest)
        return codes, scales
    width = _launch.next_power_of_2(group)
    together = max(1, min(GROUP_TILE // width, _launch.next_power_of_2(groups)))
    _launch.launch(
        symmetric_groups, (rows, _launch.cdiv(groups, together)),
        x, smooth, codes, scales, channels, group, groups, x.stride(0),
        warps=max(2, row_warps(width)), LARGEST=largest, SMOOTH=smooth is not None, GROUPS=together, GROUP=width,
    )  # fmt: skip
    return codes, scales


def _int8_fake(x: Tensor, smooth: Tensor | None, bits: int, group: int) -> tuple[Tensor, Tensor]:
    rows, channels = x.shape
    groups = _launch.cdiv(channels, group) if 0 < group < channels else 1
    return x.new_empty((rows, channels), dtype=torch.int8), x.new_empty((rows, groups), dtype=torch.float32)


def _fp8(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scales = _fp8_fake(x, smooth)
    _symmetric(x, smooth, codes, scales, FP8_MAX)
    return codes, scales


def _fp8_fake(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(tuple(x.shape), dtype=FP8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _uint(x: Tensor, bits: int, clip: Tensor | None, contain_zero: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scales, zeros, sums = _uint_fake(x, bits, clip, contain_zero)
    rows, channels = x.shape
    if not channels:
        scales.fill_(SMALLEST_SCALE.value)
        zeros.zero_()
        sums.zero_()
        return codes, scales, zeros, sums
    once, blocks, warps = _passes(channels)
    _launch.launch(
        unsigned_row if once else unsigned_long_row, (rows,), x, clip, codes, scales, zeros, sums, channels,
        x.stride(0), warps=warps, LARGEST=float(2**bits - 1), CLIP=clip is not None, CONTAIN=contain_zero, **blocks,
    )  # fmt: skip
    return codes, scales, zeros, sums


def _uint_fake(x: Tensor, bits: int, clip: Tensor | None, contain_zero: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    zeros, sums = (x.new_empty((x.shape[0], 1), dtype=torch.int32) for _ in range(2))
    return x.new_empty(tuple(x.shape), dtype=torch.uint8), scales, zeros, sums


define("act_quant_int8", "(Tensor x, Tensor? smooth, int bits, int group) -> (Tensor, Tensor)", _int8, _int8_fake)
define("act_quant_fp8", "(Tensor x, Tensor? smooth) -> (Tensor, Tensor)", _fp8, _fp8_fake)
define(
    "act_quant_uint",
    "(Tensor x, int bits, Tensor? clip, bool contain_zero) -> (Tensor, Tensor, Tensor, Tensor)",
    _uint,
    _uint_fake,
)


class ActQuantInt8(Kernel):
    op = "act_quant_int8"

    def refuses(self, *, x: Tensor, smooth: Tensor | None, bits: int, group: int) -> str | None:
        if ONE_PASS < group < x.shape[1]:
            return f"it takes groups of at most {ONE_PASS} channels, not {group}"
        return dtype_refusal(x, smooth=smooth)

    def bucket(self, *, x: Tensor, smooth: Tensor | None, bits: int, group: int) -> str:
        if 0 < group < x.shape[1]:
            scales = f"a scale for up to {_launch.next_power_of_2(group)} channels"
        else:
            scales = f"a scale per token{passes(x)}"
        return f"{size_of(x)}, {scales}{and_smoothed(smooth)}"

    def run(self, *, x: Tensor, smooth: Tensor | None, bits: int, group: int) -> Any:
        return call("act_quant_int8", x, smooth, bits, group)


class ActQuantFp8(Kernel):
    op = "act_quant_fp8"
    least = (8, 9)

    def refuses(self, *, x: Tensor, smooth: Tensor | None) -> str | None:
        return dtype_refusal(x, smooth=smooth)

    def bucket(self, *, x: Tensor, smooth: Tensor | None) -> str:
        return size_of(x) + passes(x) + and_smoothed(smooth)

    def run(self, *, x: Tensor, smooth: Tensor | None) -> Any:
        return call("act_quant_fp8", x, smooth)


class ActQuantUint(Kernel):
    op = "act_quant_uint"

    def refuses(self, *, x: Tensor, bits: int, clip: Tensor | None, contain_zero: bool) -> str | None:
        return dtype_refusal(x, clip=clip)

    def bucket(self, *, x: Tensor, bits: int, clip: Tensor | None, contain_zero: bool) -> str:
        return size_of(x) + passes(x) + ("" if clip is None else ", clipped")

    def run(self, *, x: Tensor, bits: int, clip: Tensor | None, contain_zero: bool) -> Any:
        return call("act_quant_uint", x, bits, clip, contain_zero)


def size_of(x: Tensor) -> str:
    """Of a bucket: the dtype, and the size. Below some 8 million numbers the whole input stays in the GPU's cache."""
    return f"{'large' if x.numel() >= 2**23 else 'small'}, {str(x.dtype).removeprefix('torch.')}"


def passes(x: Tensor) -> str:
    """Of a bucket: rows that do not fit in registers are read twice."""
    return "" if x.shape[-1] <= ONE_PASS else ", two passes"


def and_smoothed(smooth: Tensor | None) -> str:
    return "" if smooth is None else ", smoothed"


def dtype_refusal(x: Tensor, **factors: Tensor | None) -> str | None:
    """Why x, or float32 vectors beside it, are of a dtype that the kernels do not take."""
    if x.dtype not in FLOATS:
        return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    for name, factor in factors.items():
        if factor is not None and factor.dtype != torch.float32:
            return f"it takes {name} in float32, not {factor.dtype}"
    return None


ACT_QUANT_INT8, ACT_QUANT_FP8, ACT_QUANT_UINT = ActQuantInt8(), ActQuantFp8(), ActQuantUint()
