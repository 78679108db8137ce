"""Triton back end of the attention of one new token per row over keys and values stored in 8, 4 or 2 bits.

    out[b, h] = sum_j p_j v_j      p = softmax_j(scale * <q[b, h], k_j>)      k, v = code * scale + zero, then the rest

Flash decoding: the columns of a (row, key head) are cut into splits, a program takes one split for all G query heads of
the key head and writes the maximum of its logits, the sum of its exponentials and the values weighted with them; a
second kernel combines the splits, always in the same order. Codes are unpacked in registers and rounded to the dtype of
the model, so that products see what the reference sees. Columns of which keys and values are both packed are one kind
of split; the few behind them, where either is in full precision, are another.

Letters: B rows, H key heads, G query heads of each, C columns, D head dim of the keys, E of the values.
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
from vlmeff_kernels.logits import base_2, scales, subtrahend

LEAST_DOT = 16  # rows, columns and depth of the smallest tensor-core product
# Head dim up to -> logits (query heads of a key head, at least 16, times the columns of a tile) that a program has room
# for: with more of them it spills, on sm_80 and sm_90 alike (compiled with a mask and a soft cap). What is left takes
# 96 KiB of shared memory at most, which every GPU has, or 124 KiB where wide heads have a scale for a few keys each.
MOST_LOGITS = {128: 2048, 256: 512}
MOST_LOGITS_FLOAT32 = {64: 512}
LEAST_WIDE_GROUP = 8
LARGEST_GROUP = 64  # tokens of a group of keys: a tile holds whole groups
LONG = 2048  # columns from which a cache counts as long
MOST_SPLITS = 128
LEAST_SPLIT = 128  # columns: shorter splits cost more in the second kernel than they hide
TAIL_SPLIT = 64  # columns of a split that may be in full precision: it loads both forms
MOST_TAIL_SPLITS = _launch.MOST_BLOCKS // 2
CHUNK = 16  # splits that are combined at a time

# compute capability -> (columns a tile, warps, stages)
TILES: dict[_launch.Capability, tuple[int, int, int]] = {}
DEFAULT_TILE = (32, 4, 2)  # 128 to 168 registers at D = 128; 64 columns spill or take 80 KB of shared memory
INTERPRETED_TILE = (32, 4, 1)


@triton.jit
def as_float(code):
    """Exact float32 of int32 codes below 256, from the bits of 2^23 + code: a conversion has a quarter of the rate."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def unpacked(packed, BITS: tl.constexpr):
    """[N, W] bytes -> [N, W * 8 / BITS] codes in float32, the first of a byte in its lowest bits."""
    byte = packed.to(tl.int32)
    if BITS == 8:
        return as_float(byte)
    elif BITS == 4:
        return tl.interleave(as_float(byte & 15), as_float(byte >> 4))
    else:  # places 0 and 2 of a byte, places 1 and 3, then the two of them
        even = tl.interleave(as_float(byte & 3), as_float((byte >> 4) & 3))
        odd = tl.interleave(as_float((byte >> 2) & 3), as_float(byte >> 6))
        return tl.interleave(even, odd)


@triton.jit
def packed_keys(
    codes, scale, zero, start, length, groups, width, dim,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """float32 [COLUMNS, D] of the columns from ``start``, a multiple of GROUP."""
    column, byte, d = start + tl.arange(0, COLUMNS), tl.arange(0, D * BITS // 8), tl.arange(0, D)
    inside = (column < length)[:, None] & (byte < width)[None]
    code = tl.load(codes + column[:, None].to(tl.int64) * width + byte[None], mask=inside, other=0)
    group = start // GROUP + tl.arange(0, COLUMNS // GROUP)
    known = (group < groups)[:, None] & (d < dim)[None]
    at = group[:, None].to(tl.int64) * dim + d[None]
    s = tl.load(scale + at, mask=known, other=0.0).to(tl.float32)
    z = tl.load(zero + at, mask=known, other=0.0).to(tl.float32)
    x = unpacked(code, BITS).reshape(COLUMNS // GROUP, GROUP, D)
    return (x * s[:, None] + z[:, None]).reshape(COLUMNS, D)


@triton.jit
def packed_values(
    codes, scale, zero, start, length, groups, width,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """float32 [COLUMNS, E] of the columns from ``start``."""
    column, byte, group = start + tl.arange(0, COLUMNS), tl.arange(0, E * BITS // 8), tl.arange(0, E // GROUP)
    held = (column < length)[:, None]
    code = tl.load(codes + column[:, None].to(tl.int64) * width + byte[None], mask=held & (byte < width)[None], other=0)
    known, at = held & (group < groups)[None], column[:, None].to(tl.int64) * groups + group[None]
    s = tl.load(scale + at, mask=known, other=0.0).to(tl.float32)
    z = tl.load(zero + at, mask=known, other=0.0).to(tl.float32)
    x = unpacked(code, BITS).reshape(COLUMNS, E // GROUP, GROUP)
    return (x * s[:, :, None] + z[:, :, None]).reshape(COLUMNS, E)


@triton.jit
def rest_states(rest, start, border, total, dim, r_t, COLUMNS: tl.constexpr, D: tl.constexpr):
    """float32 [COLUMNS, D]; 0 for the columns before ``border``, which are packed, and from ``total`` on."""
    column, d = start + tl.arange(0, COLUMNS), tl.arange(0, D)
    inside = ((column >= border) & (column < total))[:, None] & (d < dim)[None]
    at = (column - border)[:, None].to(tl.int64) * r_t + d[None]
    return tl.load(rest + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 x to DTYPE, to nearest and even; with UPCAST its value in float32 (the interpreter truncates bfloat16 and
    cannot compute with it)."""
    if not UPCAST:
        return x.to(DTYPE)
    elif DTYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE).to(tl.float32)


@triton.jit
def attended(q, k, v, seen, highest, total, acc, factor, cap, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Take the columns k, v [COLUMNS, .] into (highest logit, sum of exponentials, weighted values) of each row.

    The weights go through the tensor cores as two numbers of half precision, p rounded and what that left of it.
    """
    k, v = rounded(k, DTYPE, UPCAST), rounded(v, DTYPE, UPCAST)
    z = base_2(tl.dot(q, tl.trans(k), input_precision="ieee"), factor, cap)
    z = tl.where(seen[None], z, float("-inf"))
    higher = tl.maximum(highest, tl.max(z, 1))
    base = subtrahend(higher)
    p, shrink = tl.exp2(z - base[:, None]), tl.exp2(highest - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if UPCAST or DTYPE.is_fp32():
        acc = tl.dot(p, v, acc, input_precision="ieee")
    else:
        high = p.to(DTYPE)
        acc = tl.dot(high, v, acc)
        acc = tl.dot((p - high.to(tl.float32)).to(DTYPE), v, acc)
    return higher, total, acc


# These differ from step to step. Triton compiles anew for a size that is 1 or a multiple of 16 unless told not to; the
# widths of rows, which wide loads depend on, stay as they are.
VARYING = ("columns", "key_length", "value_length", "key_groups", "packed_columns", "per_split", "per_tail",
           "packed_splits", "valid_b")  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def decode_split(
    q, key_codes, key_scale, key_zero, key_rest, value_codes, value_scale, value_zero, value_rest, valid,
    highest_out, total_out, acc_out,
    heads, group, dim, value_dim, columns, key_length, value_length, key_groups, value_groups, key_width, value_width,
    packed_splits, packed_columns, per_split, per_tail,
    q_b, q_h, kr_b, kr_h, kr_t, vr_b, vr_h, vr_t, valid_b,
    factor, cap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    state, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    batch, head = state // heads, state % heads
    row, d, e = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, E)
    asked = (row < group)[:, None] & (d < dim)[None]
    q_rows = q + batch * q_b + (head * group + row)[:, None] * q_h + d[None]
    q_tile = rounded(tl.load(q_rows, mask=asked, other=0.0).to(tl.float32), DTYPE, UPCAST)
    key_codes += state * key_length * key_width
    key_scale += state * key_groups * dim
    key_zero += state * key_groups * dim
    key_rest += batch * kr_b + head * kr_h
    value_codes += state * value_length * value_width
    value_scale += state * value_length * value_groups
    value_zero += state * value_length * value_groups
    value_rest += batch * vr_b + head * vr_h
    highest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, E], tl.float32)

    if split < packed_splits:
        first = split * per_split
        for start in range(first, tl.minimum(first + per_split, packed_columns), COLUMNS):
            k = packed_keys(key_codes, key_scale, key_zero, start, key_length, key_groups, key_width, dim,
                            COLUMNS, KEY_BITS, KEY_GROUP, D)  # fmt: skip
            v = packed_values(value_codes, value_scale, value_zero, start, value_length, value_groups, value_width,
                              COLUMNS, VALUE_BITS, VALUE_GROUP, E)  # fmt: skip
            seen = start + tl.arange(0, COLUMNS) < packed_columns
            if valid is not None:
                at = batch * valid_b + start + tl.arange(0, COLUMNS)
                seen = seen & (tl.load(valid + at, mask=seen, other=0) != 0)
            highest, total, acc = attended(q_tile, k, v, seen, highest, total, acc, factor, cap, DTYPE, UPCAST)
    else:
        first = packed_columns + (split - packed_splits) * per_tail
        for start in range(first, tl.minimum(first + per_tail, columns), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            k = packed_keys(key_codes, key_scale, key_zero, start, key_length, key_groups, key_width, dim,
                            COLUMNS, KEY_BITS, KEY_GROUP, D)  # fmt: skip
            rest = rest_states(key_rest, start, key_length, columns, dim, kr_t, COLUMNS, D)
            k = tl.where((column < key_length)[:, None], k, rest)
            v = packed_values(value_codes, value_scale, value_zero, start, value_length, value_groups, value_width,
                              COLUMNS, VALUE_BITS, VALUE_GROUP, E)  # fmt: skip
            rest = rest_states(value_rest, start, value_length, columns, value_dim, vr_t, COLUMNS, E)
            v = tl.where((column < value_length)[:, None], v, rest)
            seen = column < columns
            if valid is not None:
                seen = seen & (tl.load(valid + batch * valid_b + column, mask=seen, other=0) != 0)
            highest, total, acc = attended(q_tile, k, v, seen, highest, total, acc, factor, cap, DTYPE, UPCAST)

    place = ((state * group + row) * splits + split).to(tl.int64)
    real = row < group
    tl.store(highest_out + place, highest, mask=real)
    tl.store(total_out + place, total, mask=real)
    tl.store(acc_out + place[:, None] * value_dim + e[None], acc, mask=real[:, None] & (e < value_dim)[None])


@triton.jit(do_not_specialize=["splits"])
def combine_splits(
    highest, total, acc, out, splits, value_dim,
    CHUNK: tl.constexpr, E: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, E)
    top, sums, values = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32), tl.zeros([E], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        there = split < splits
        tops = tl.load(highest + row * splits + split, mask=there, other=float("-inf"))
        parts = tl.load(total + row * splits + split, mask=there, other=0.0)
        tile = tl.load(acc + (row * splits + split)[:, None] * value_dim + e[None],
                       mask=there[:, None] & (e < value_dim)[None], other=0.0)  # fmt: skip
        higher = tl.maximum(top, tl.max(tops, 0))
        base = subtrahend(higher)
        weight, shrink = tl.exp2(tops - base), tl.exp2(top - base)
        sums = sums * shrink + tl.sum(parts * weight, 0)
        values = values * shrink + tl.sum(tile * weight[:, None], 0)
        top = higher
    result = values / tl.where(sums == 0, 1.0, sums)  # nothing to see: 0 / 1
    tl.store(out + row * value_dim + e, rounded(result, out.dtype.element_ty, UPCAST), mask=e < value_dim)


def _decode(
    q: Tensor, key_codes: Tensor, key_scale: Tensor, key_zero: Tensor, key_rest: Tensor,
    value_codes: Tensor, value_scale: Tensor, value_zero: Tensor, value_rest: Tensor, valid: Tensor | None,
    key_bits: int, value_bits: int, key_group: int, value_group: int, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    batch, heads_q, _, dim = q.shape
    heads, key_length, key_width = key_codes.shape[1:]
    value_length, value_width = value_codes.shape[2:]
    value_dim, columns = value_rest.shape[3], key_length + key_rest.shape[2]
    out = q.new_empty((batch, heads_q, 1, value_dim))
    if not out.numel():
        return out
    tile, warps, stages = _tile(q.device, key_group)
    # What is packed is contiguous as a rule: a cache joins and picks, which makes new tensors.
    packed = [t.contiguous() for t in (key_codes, key_scale, key_zero, value_codes, value_scale, value_zero)]
    packed_columns = min(key_length, value_length) // tile * tile
    per_split = _per_split(packed_columns, batch * heads, tile, q.device)
    packed_splits = _launch.cdiv(packed_columns, per_split)
    tail = columns - packed_columns
    per_tail = _launch.cdiv(max(TAIL_SPLIT, _launch.cdiv(tail, MOST_TAIL_SPLITS)), tile) * tile
    splits = packed_splits + _launch.cdiv(tail, per_tail)
    highest, total = (q.new_empty((batch * heads_q, splits), dtype=torch.float32) for _ in range(2))
    acc = q.new_empty((batch * heads_q, splits, value_dim), dtype=torch.float32)
    factor, cap = scales(scale, softcap)
    wide = _power_of_2(value_dim)
    _launch.launch(
        decode_split, (batch * heads, splits),
        q, *packed[:3], key_rest, *packed[3:], value_rest, None if valid is None else valid.view(torch.uint8),
        highest, total, acc,
        heads, heads_q // heads, dim, value_dim, columns, key_length, value_length,
        key_scale.shape[2], value_scale.shape[3], key_width, value_width,
        packed_splits, packed_columns, per_split, per_tail,
        q.stride(0), q.stride(1), *key_rest.stride()[:3], *value_rest.stride()[:3],
        0 if valid is None else valid.stride(0),
        factor, cap,
        warps=warps, stages=stages,
        ROWS=max(LEAST_DOT, _launch.next_power_of_2(heads_q // heads)), COLUMNS=tile, D=_power_of_2(dim), E=wide,
        KEY_BITS=key_bits, VALUE_BITS=value_bits, KEY_GROUP=key_group, VALUE_GROUP=value_group,
        UPCAST=_launch.INTERPRET,
    )  # fmt: skip
    _launch.launch(
        combine_splits, (batch * heads_q,), highest, total, acc, out, splits, value_dim,
        warps=4, CHUNK=CHUNK, E=wide, UPCAST=_launch.INTERPRET,
    )  # fmt: skip
    return out


def _fake(q: Tensor, *arguments: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], arguments[7].shape[3]))


def _power_of_2(dim: int) -> int:
    return max(LEAST_DOT, _launch.next_power_of_2(dim))


def _tile(device: torch.device, key_group: int) -> tuple[int, int, int]:
    """(columns, warps, stages); a tile holds whole groups of keys."""
    interpreted = _launch.INTERPRET and not _launch.is_recording()
    tile = INTERPRETED_TILE if interpreted else TILES.get(_launch.capability_of(device), DEFAULT_TILE)
    return max(tile[0], key_group), *tile[1:]


def _per_split(columns: int, states: int, tile: int, device: torch.device) -> int:
    """Columns of a split: two programs a processor where that leaves enough to do for each; a multiple of the tile."""
    least = tile if _launch.INTERPRET and not _launch.is_recording() else LEAST_SPLIT
    wanted = min(MOST_SPLITS, _launch.cdiv(2 * _launch.processors(device), states))
    return _launch.cdiv(max(least, _launch.cdiv(columns, wanted)), tile) * tile


define(
    "decode_attention",
    "(Tensor q, Tensor key_codes, Tensor key_scale, Tensor key_zero, Tensor key_rest, Tensor value_codes,"
    " Tensor value_scale, Tensor value_zero, Tensor value_rest, Tensor? valid, int key_bits, int value_bits,"
    " int key_group, int value_group, float scale, float? softcap) -> Tensor",
    _decode,
    _fake,
)


class DecodeAttention(Kernel):
    """Two launches a layer: the splits, and what combines them."""

    op = "quantized_decode_attention"

    def refuses(
        self, *, q: Tensor, keys: list[Tensor], values: list[Tensor], key_group: Any, value_group: int, **_: Any
    ) -> str | None:
        if q.dtype == torch.float64:
            return "it computes in float32, and the inputs are float64"
        if not isinstance(key_group, int):
            return "the groups of keys are of different sizes, as they are once entries have been taken out of them"
        if key_group > LARGEST_GROUP or _launch.next_power_of_2(key_group) != key_group:
            return f"it takes groups of keys of a power of two up to {LARGEST_GROUP} tokens, got {key_group}"
        if _launch.next_power_of_2(value_group) != value_group:
            return f"it takes groups of values of a power of two of channels, got {value_group}"
        limits = MOST_LOGITS_FLOAT32 if q.dtype == torch.float32 else MOST_LOGITS
        dim = max(q.shape[-1], values[3].shape[-1])
        if dim > max(limits):
            return f"it takes head dims up to {max(limits)} of {q.dtype}, got {dim}"
        heads = q.shape[1] // keys[3].shape[1]
        logits = max(LEAST_DOT, _launch.next_power_of_2(heads)) * max(DEFAULT_TILE[0], key_group)
        if logits > next(most for largest, most in limits.items() if dim <= largest):
            return (
                f"it has no room for {heads} query heads on a key head of {dim} channels of {q.dtype} with keys in "
                f"groups of {key_group} tokens"
            )
        if dim > 128 and key_group < LEAST_WIDE_GROUP and _launch.shared_memory(q.device) == _launch.SMALL:
            return (
                f"with {_launch.SMALL} KiB of shared memory and {dim} channels it takes groups of keys of at least "
                f"{LEAST_WIDE_GROUP} tokens, got {key_group}"
            )
        return None

    def bucket(
        self, *, q: Tensor, keys: list[Tensor], values: list[Tensor], key_bits: int, value_bits: int, key_group: Any,
        **_: Any,
    ) -> str:  # fmt: skip
        """Bits, groups, head dim and dtype, which all make another kernel; whether heads share keys; the length."""
        dim = max(64, _launch.next_power_of_2(max(q.shape[-1], values[3].shape[-1])))
        shared = "grouped heads" if q.shape[1] > keys[3].shape[1] else "single heads"
        length = "short" if keys[0].shape[2] + keys[3].shape[2] < LONG else "long"
        bits = f"int{key_bits}" if key_bits == value_bits else f"int{key_bits} keys, int{value_bits} values"
        wide = ", float32" if q.dtype == torch.float32 else ""
        return f"{bits}, groups of {key_group}, head dim up to {dim}, {shared}, {length}{wide}"

    def run(
        self, *, q: Tensor, keys: list[Tensor], values: list[Tensor], key_bits: int, value_bits: int, key_group: int,
        value_group: int, scale: float, valid: Tensor | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        result: Tensor = call(
            "decode_attention", q, *keys, *values, valid, key_bits, value_bits, key_group, value_group, float(scale),
            None if softcap is None else float(softcap),
        )  # fmt: skip
        return result


DECODE_ATTENTION = DecodeAttention()
