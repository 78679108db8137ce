"""Triton back ends of ``linear_w4a8_int8`` and ``linear_wnan_int``: 4-bit weights on 8-bit tokens, in int8 products.

    w4a8:  y[m, n] = sum_g float(sum_{k in g} q[m, k] (c[n, k] - 8)) s[m, g] ws[n, g] + bias[n]
    wnan:  y[m, n] = s[m] ws[n] (inner - wz[n] outer) + bias[n]
           inner = sum_k q[m, k] c[n, k] - z[m] colsum[n]        outer = rowsum[m] - K z[m]        both in int32

Weights are read as they lie in the checkpoint, even k in the low nibble, two bytes at a time. The four nibbles of a
16-bit word are spread to the upper halves of the four bytes of a 32-bit register, where exclusive-or with 0x80 makes
them 16 (c - 8) as int8, and those bytes are four neighbours along K. That is what a thread holds of the left operand of
a tensor instruction: on sm_90 words go from shared memory to registers, are unpacked there, and products start from
registers. Compiled for comparison (sm_90, a tile of 128 x 128 x 128, instructions of the loop; 198 like this): nibbles
of single bytes joined and reshaped, 332, because bytes are shifted and packed one by one; tokens read as pairs and
split into even and odd k, 243, their halves stored to shared memory again, three barriers more; weights as the right
operand, 208, with the same for the weights and one barrier more; codes without the factor 16, 283, since the compiler
then takes the word apart into bytes. On sm_80 all operands are in registers, and fewer warps repeat the unpacking of
a weight if the weights are on the right (187 instructions against 295 with a BK of 64).

The factor 16 leaves sums of up to 2^17 channels in range and is taken out exactly. WNAN uses the same codes:
sum q c = (sum q 16 (c - 8)) / 16 + 8 rowsum, so its rowsum must be the sum of the codes, as it is defined to be.

Words need an even number of bytes in a row; otherwise (K = 1, 2 mod 4, or unaligned views) single bytes are unpacked.
Channels past the end or outside a group are zeros among the tokens, so that weights read there count for nothing.

Argument order: pointers (bias may be None), sizes, row strides, constexprs.
Shape letters: M tokens, K input features, N output features, n_g groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch
from vlmeff_kernels._backend import Kernel
from vlmeff_kernels._library import call, define
from vlmeff_kernels.linear_int8 import (
    BAND,
    LONG,
    MEDIUM,
    SHORT,
    Tile,
    Tiles,
    banded_tile,
    bucket_of,
    output_refusal,
    tile_for,
)

# Upper bound of M -> (BM, BN, BK, warps, stages), by least KiB of shared memory, for one scale per output.
TILES: Tiles = {
    _launch.LARGE: {
        SHORT: (16, 64, 256, 4, 4),
        MEDIUM: (64, 64, 256, 4, 4),
        LONG: (128, 128, 128, 8, 4),
        None: (256, 128, 128, 8, 3),
    },
    _launch.SMALL: {
        SHORT: (16, 64, 128, 4, 4),
        MEDIUM: (64, 64, 128, 4, 3),
        LONG: (64, 128, 64, 4, 3),
        None: (128, 128, 64, 8, 3),
    },
}
# With groups: the sums of a group and the float32 sums of groups are both in registers.
GROUP_TILES: Tiles = {
    _launch.LARGE: {
        SHORT: (16, 64, 128, 4, 4),
        MEDIUM: (64, 64, 128, 4, 4),
        LONG: (128, 64, 128, 4, 4),
        None: (128, 128, 128, 8, 4),
    },
    _launch.SMALL: {
        SHORT: (16, 64, 128, 4, 4),
        MEDIUM: (64, 64, 64, 4, 3),
        LONG: (64, 64, 64, 4, 3),
        None: (128, 64, 64, 4, 3),
    },
}
# Zero-points, sums and scales of 256 tokens do not fit in registers beside a tile of their products.
ZERO_TILES: Tiles = {
    least: {**tiles, None: (128, 128, 128, 8, 4)} if least == _launch.LARGE else tiles for least, tiles in TILES.items()
}
INTERPRETED: Tile = (16, 32, 32, 1, 1)
LEAST_BK = 32  # of an int8 tensor instruction
WIDEST = 2**17 - 1  # channels whose products of -128 and 16 * -8 an int32 holds


@triton.jit
def signed_codes(stored, WORDS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """16 (code - 8) as int8 [BN, BK], from words [BN, BK / 4] or bytes [BN, BK / 2]."""
    if WORDS:
        word = stored.to(tl.uint16, bitcast=True).to(tl.int32)
        apart = ((word << 4) | (word << 12)) & 0x0FF00FF0
        codes = ((apart | (apart << 4)) & -0x0F0F0F10) ^ -0x7F7F7F80  # 0xf0f0f0f0, 0x80808080
        even = tl.join(codes.to(tl.int8), (codes >> 16).to(tl.int8))
        odd = tl.join((codes >> 8).to(tl.int8), (codes >> 24).to(tl.int8))
    else:
        even = ((stored << 4) ^ 0x80).to(tl.int8, bitcast=True)
        odd = ((stored & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    return tl.reshape(tl.join(even, odd), (BN, BK))


@triton.jit
def add_products(
    acc, x_at, w_at, start, first, last, stored,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, WORDS: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """acc plus the products of channels start to start + BK, those of first to last only."""
    PER: tl.constexpr = 4 if WORDS else 2
    if EVEN:
        x, w = tl.load(x_at + start), tl.load(w_at + start // PER)
    else:
        k, at = start + tl.arange(0, BK), start // PER + tl.arange(0, BK // PER)
        x = tl.load(x_at + start, mask=((k >= first) & (k < last))[None], other=0)
        w = tl.load(w_at + start // PER, mask=(at < stored)[None], other=0)
    codes = signed_codes(w, WORDS, BN, BK)
    if LEFT:
        return tl.dot(codes, tl.trans(x), acc, out_dtype=tl.int32)
    else:
        return tl.dot(x, tl.trans(codes), acc, out_dtype=tl.int32)


@triton.jit
def no_products(BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr):
    if LEFT:
        return tl.zeros((BN, BM), tl.int32)
    else:
        return tl.zeros((BM, BN), tl.int32)


@triton.jit
def as_rows(acc, LEFT: tl.constexpr):
    """[BM, BN] from the product, which has the weights as rows if they are the left operand."""
    if LEFT:
        return tl.trans(acc)
    else:
        return acc


@triton.jit
def tile_at(
    q, wq, rows, outputs, q_m, w_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Rows and columns of this program's tile, both also cut to the last one, and pointers to its operands."""
    PER: tl.constexpr = 4 if WORDS else 2
    tile_m, tile_n = banded_tile(tl.cdiv(rows, BM), tl.cdiv(outputs, BN), BAND)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    row, column = tl.minimum(m, rows - 1).to(tl.int64), tl.minimum(n, outputs - 1).to(tl.int64)
    x_at = q + row[:, None] * q_m + tl.arange(0, BK)[None]
    w_at = wq + column[:, None] * w_n + tl.arange(0, BK // PER)[None]
    return m, n, row, column, x_at, w_at


@triton.jit
def store_tile(y, bias, out, m, n, column, rows, outputs):
    if bias is not None:
        y += tl.load(bias + column).to(tl.float32)[None]
    inside = (m < rows)[:, None] & (n < outputs)[None]
    tl.store(out + m.to(tl.int64)[:, None] * outputs + n[None], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def w4a8(
    q, s, wq, ws, bias, out,
    rows, outputs, channels, stored, group, groups,
    q_m, s_m, w_n, ws_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    EVEN: tl.constexpr, WORDS: tl.constexpr, LEFT: tl.constexpr,
    GROUPED: tl.constexpr, ONE_TILE: tl.constexpr, S_GROUPED: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 4 if WORDS else 2
    m, n, row, column, x_at, w_at = tile_at(q, wq, rows, outputs, q_m, w_n, BM, BN, BK, BAND, WORDS)
    s_at, ws_at = s + row * s_m, ws + column * ws_n
    if GROUPED:
        y = tl.zeros((BM, BN), tl.float32)
        for g in range(0, groups):
            first = g * group
            last = tl.minimum(first + group, channels)
            part = no_products(BM, BN, LEFT)
            if ONE_TILE:
                part = add_products(part, x_at, w_at, first, first, last, stored, BM, BN, BK, EVEN, WORDS, LEFT)
            else:
                for start in range(first // PER * PER, last, BK):
                    part = add_products(part, x_at, w_at, start, first, last, stored, BM, BN, BK, EVEN, WORDS, LEFT)
            scale = tl.load(ws_at + g).to(tl.float32) * 0.0625
            if S_GROUPED:
                y += as_rows(part, LEFT).to(tl.float32) * tl.load(s_at + g)[:, None] * scale[None]
            else:
                y += as_rows(part, LEFT).to(tl.float32) * scale[None]
        if not S_GROUPED:
            y *= tl.load(s_at)[:, None]
    else:
        acc = no_products(BM, BN, LEFT)
        for start in range(0, channels, BK):
            acc = add_products(acc, x_at, w_at, start, 0, channels, stored, BM, BN, BK, EVEN, WORDS, LEFT)
        scale = tl.load(ws_at).to(tl.float32) * 0.0625
        y = as_rows(acc, LEFT).to(tl.float32) * tl.load(s_at)[:, None] * scale[None]
    store_tile(y, bias, out, m, n, column, rows, outputs)


@triton.jit(do_not_specialize=["rows"])
def wnan(
    q, s, z, rowsum, wq, ws, wz, colsum, bias, out,
    rows, outputs, channels, stored,
    q_m, s_m, z_m, rowsum_m, w_n, ws_n, wz_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    EVEN: tl.constexpr, WORDS: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    m, n, row, column, x_at, w_at = tile_at(q, wq, rows, outputs, q_m, w_n, BM, BN, BK, BAND, WORDS)
    acc = no_products(BM, BN, LEFT)
    for start in range(0, channels, BK):
        acc = add_products(acc, x_at, w_at, start, 0, channels, stored, BM, BN, BK, EVEN, WORDS, LEFT)
    zero, total = tl.load(z + row * z_m), tl.load(rowsum + row * rowsum_m)
    inner = (as_rows(acc, LEFT) >> 4) + (total * 8)[:, None] - zero[:, None] * tl.load(colsum + column)[None]
    outer = (total - channels * zero).to(tl.float32)
    scale = tl.load(s + row * s_m)[:, None] * tl.load(ws + column * ws_n).to(tl.float32)[None]
    y = scale * (inner.to(tl.float32) - tl.load(wz + column * wz_n).to(tl.float32)[None] * outer[:, None])
    store_tile(y, bias, out, m, n, column, rows, outputs)


def _in_words(wq: Tensor) -> bool:
    """Whether rows can be read as 16-bit words."""
    return bool(wq.shape[1]) and wq.shape[1] % 2 == 0 and wq.stride(0) % 2 == 0 and int(wq.storage_offset()) % 2 == 0


def _words(wq: Tensor) -> Tensor:
    """Rows as 16-bit words where they can be read so, else as they are."""
    return wq.view(torch.int16) if _in_words(wq) else wq


def _left(q: Tensor) -> bool:
    """Whether the weights are the left operand: that of wgmma may come from registers."""
    return _launch.has_wgmma(q.device)


def _w4a8(
    q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype, group: int
) -> Tensor:
    out = _w4a8_fake(q, s, wq, ws, bias, out_dtype, group)
    (rows, channels), (outputs, groups) = q.shape, ws.shape
    tiles = GROUP_TILES if groups > 1 else TILES
    bm, bn, bk, warps, stages = tile_for(tiles, INTERPRETED, rows, q.device, q, wq)
    words = _words(wq)
    width = group if groups > 1 else channels
    if groups > 1:
        bk = min(bk, max(LEAST_BK, width & -width))  # a power of two that divides the group, if it is one of tiles
    _launch.launch(
        w4a8, (_launch.cdiv(rows, bm) * _launch.cdiv(outputs, bn),),
        q, s, words, ws, bias, out, rows, outputs, channels, words.shape[1], width, groups,
        q.stride(0), s.stride(0), words.stride(0), ws.stride(0),
        warps=warps, stages=stages, BM=bm, BN=bn, BK=bk, BAND=BAND,
        EVEN=width % bk == 0 and channels % max(width, 1) == 0, WORDS=words is not wq, LEFT=_left(q),
        GROUPED=groups > 1, ONE_TILE=width <= bk and width % 4 == 0, S_GROUPED=s.shape[1] > 1,
    )  # fmt: skip
    return out


def _w4a8_fake(
    q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype, group: int
) -> Tensor:
    return q.new_empty((q.shape[0], wq.shape[0]), dtype=out_dtype)


def _wnan(
    q: Tensor, s: Tensor, z: Tensor, rowsum: Tensor, wq: Tensor, ws: Tensor, wz: Tensor, colsum: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = _wnan_fake(q, s, z, rowsum, wq, ws, wz, colsum, bias, out_dtype)
    (rows, channels), outputs = q.shape, wq.shape[0]
    bm, bn, bk, warps, stages = tile_for(ZERO_TILES, INTERPRETED, rows, q.device, q, wq)
    words = _words(wq)
    _launch.launch(
        wnan, (_launch.cdiv(rows, bm) * _launch.cdiv(outputs, bn),),
        q.view(torch.int8), s, z, rowsum, words, ws, wz, colsum, bias, out,
        rows, outputs, channels, words.shape[1], q.stride(0),
        *(x.stride(0) for x in (s, z, rowsum, words, ws, wz)),
        warps=warps, stages=stages, BM=bm, BN=bn, BK=bk, BAND=BAND,
        EVEN=channels % bk == 0, WORDS=words is not wq, LEFT=_left(q),
    )  # fmt: skip
    return out


def _wnan_fake(
    q: Tensor, s: Tensor, z: Tensor, rowsum: Tensor, wq: Tensor, ws: Tensor, wz: Tensor, colsum: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], wq.shape[0]), dtype=out_dtype)


define(
    "linear_w4a8_int8",
    "(Tensor q, Tensor s, Tensor wq, Tensor ws, Tensor? bias, ScalarType out_dtype, int group) -> Tensor",
    _w4a8,
    _w4a8_fake,
)
define(
    "linear_wnan_int",
    "(Tensor q, Tensor s, Tensor z, Tensor rowsum, Tensor wq, Tensor ws, Tensor wz, Tensor colsum, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    _wnan,
    _wnan_fake,
)


def _bytes_of(wq: Tensor) -> str:
    """Of a bucket: whether weights are unpacked byte by byte."""
    return "" if _in_words(wq) else ", single bytes"


def _width_refusal(width: int) -> str | None:
    return None if width <= WIDEST else f"it sums at most {WIDEST} channels in one int32, got {width}"


class W4A8Int8(Kernel):
    op = "linear_w4a8_int8"

    def refuses(
        self, *, q: Tensor, ws: Tensor, out_dtype: torch.dtype, group: int, **tensors: Tensor | None
    ) -> str | None:
        return output_refusal(out_dtype) or _width_refusal(group if ws.shape[1] > 1 else q.shape[1])

    def bucket(self, *, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, group: int = 0, **rest: object) -> str:
        groups = f", groups of {group}" if ws.shape[1] > 1 else ""
        tokens_too = ", of tokens too" if s.shape[1] > 1 else ""
        return bucket_of(q.shape[0], q, wq) + groups + tokens_too + _bytes_of(wq)

    def run(
        self,
        *,
        q: Tensor,
        s: Tensor,
        wq: Tensor,
        ws: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        group: int = 0,
    ) -> Tensor:
        out: Tensor = call("linear_w4a8_int8", q, s, wq, ws, bias, out_dtype, group)
        return out


class WNaN(Kernel):
    op = "linear_wnan_int"

    def refuses(self, *, q: Tensor, out_dtype: torch.dtype, **tensors: Tensor | None) -> str | None:
        return output_refusal(out_dtype) or _width_refusal(q.shape[1])

    def bucket(self, *, q: Tensor, wq: Tensor, **rest: object) -> str:
        return bucket_of(q.shape[0], q, wq) + _bytes_of(wq)

    def run(
        self,
        *,
        q: Tensor,
        s: Tensor,
        z: Tensor,
        rowsum: Tensor,
        wq: Tensor,
        ws: Tensor,
        wz: Tensor,
        colsum: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        out: Tensor = call("linear_wnan_int", q, s, z, rowsum, wq, ws, wz, colsum, bias, out_dtype)
        return out


W4A8, WNAN = W4A8Int8(), WNaN()
