"""Triton back end of ``linear_w8a8_int8``: int8 tokens times int8 weights, scaled per token and per output.

    y[m, n] = float(sum_k q[m, k] wq[n, k]) s[m] ws[n] + bias[n]        the sum in int32, exact

A program owns a tile of the output; weights are stored [N, K], so that both operands lie along K, as int8 tensor
instructions want them. Rows past the end are read as the last row and not stored; channels past the end are zeros.

Argument order: pointers (bias may be None), sizes, row strides, constexprs.
Shape letters: M tokens, K input features, N output features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch
from vlmeff_kernels._backend import Kernel
from vlmeff_kernels._library import call, define

SHORT, MEDIUM, LONG = 16, 64, 512  # tokens up to which a narrower tile is taken

# Upper bound of M -> (BM, BN, BK, warps, stages), by least KiB of shared memory. Few rows are bound by reading the
# weights: narrow tiles, so that there are enough programs to ask for them. The large sm_90 tile spills on sm_80.
Tile = tuple[int, int, int, int, int]
Tiles = dict[int, dict[int | None, Tile]]
TILES: Tiles = {
    _launch.LARGE: {
        SHORT: (16, 32, 256, 4, 4),
        MEDIUM: (64, 64, 256, 4, 4),
        LONG: (128, 128, 128, 8, 4),
        None: (128, 256, 128, 8, 3),
    },
    _launch.SMALL: {
        SHORT: (16, 32, 256, 4, 4),
        MEDIUM: (64, 64, 128, 4, 3),
        LONG: (64, 128, 128, 4, 3),
        None: (128, 128, 64, 8, 3),
    },
}
UNALIGNED: Tile = (64, 64, 32, 4, 2)  # operands that come a byte at a time: more of them do not fit in registers
INTERPRETED: Tile = (16, 32, 32, 1, 1)
BAND = 8  # tiles of rows that are worked through together, so that their weights are still in the L2 cache


@triton.jit
def banded_tile(row_tiles, column_tiles, BAND: tl.constexpr):
    """(row tile, column tile) of this program: down a band of rows, then to the next column."""
    program = tl.program_id(0)
    band = program // (BAND * column_tiles)
    inside = program % (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    return band * BAND + inside % height, inside // height


@triton.jit(do_not_specialize=["rows"])  # prompts are of any length: not compiled anew for multiples of 16
def w8a8_int8(
    q, s, wq, ws, bias, out,
    rows, outputs, channels,
    q_m, s_m, w_n, ws_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = banded_tile(tl.cdiv(rows, BM), tl.cdiv(outputs, BN), BAND)
    m, n, k = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    row, column = tl.minimum(m, rows - 1).to(tl.int64), tl.minimum(n, outputs - 1).to(tl.int64)
    x_at, w_at = q + row[:, None] * q_m + k[None], wq + column[None] * w_n + k[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for start in range(0, channels, BK):
        if EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            left = channels - start
            x, w = tl.load(x_at, mask=(k < left)[None], other=0), tl.load(w_at, mask=(k < left)[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    y = acc.to(tl.float32) * tl.load(s + row * s_m)[:, None] * tl.load(ws + column * ws_n).to(tl.float32)[None]
    if bias is not None:
        y += tl.load(bias + column).to(tl.float32)[None]
    inside = (m < rows)[:, None] & (n < outputs)[None]
    tl.store(out + m.to(tl.int64)[:, None] * outputs + n[None], y.to(out.dtype.element_ty), mask=inside)


def tile_for(table: Tiles, interpreted: Tile, rows: int, device: torch.device, *operands: Tensor) -> Tile:
    """The row of a table of tiles for this many tokens, if the operands can be copied 16 bytes at a time."""
    if _launch.INTERPRET and not _launch.is_recording():
        return interpreted
    if not aligned(*operands):
        return UNALIGNED
    shared = _launch.shared_memory(device)
    tiles = table[max(least for least in table if least <= shared)]
    return next(tile for most, tile in tiles.items() if most is None or rows <= most)


def aligned(*operands: Tensor) -> bool:
    """Whether every row of every operand starts at a multiple of 16 elements and ends at one."""
    return not any(x.shape[1] % 16 or x.stride(0) % 16 for x in operands)


def bucket_of(rows: int, *operands: Tensor) -> str:
    """The range of M that is accepted or not as one, and whether the operands are copied 16 bytes at a time."""
    most = next((most for most in (SHORT, MEDIUM, LONG) if rows <= most), None)
    return (f"M > {LONG}" if most is None else f"M <= {most}") + ("" if aligned(*operands) else ", unaligned")


def _launcher(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    out = _fake(q, s, wq, ws, bias, out_dtype)
    (rows, channels), outputs = q.shape, wq.shape[0]
    bm, bn, bk, warps, stages = tile_for(TILES, INTERPRETED, rows, q.device, q, wq)
    _launch.launch(
        w8a8_int8, (_launch.cdiv(rows, bm) * _launch.cdiv(outputs, bn),),
        q, s, wq, ws, bias, out, rows, outputs, channels, q.stride(0), s.stride(0), wq.stride(0), ws.stride(0),
        warps=warps, stages=stages, BM=bm, BN=bn, BK=bk, BAND=BAND, EVEN=channels % bk == 0,
    )  # fmt: skip
    return out


def _fake(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return q.new_empty((q.shape[0], wq.shape[0]), dtype=out_dtype)


define(
    "linear_w8a8_int8",
    "(Tensor q, Tensor s, Tensor wq, Tensor ws, Tensor? bias, ScalarType out_dtype) -> Tensor",
    _launcher,
    _fake,
)


def output_refusal(out_dtype: torch.dtype) -> str | None:
    if out_dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"it writes float32, float16 or bfloat16, not {out_dtype}"


class W8A8Int8(Kernel):
    op = "linear_w8a8_int8"

    def refuses(self, *, out_dtype: torch.dtype, **tensors: Tensor | None) -> str | None:
        return output_refusal(out_dtype)

    def bucket(self, *, q: Tensor, wq: Tensor, **rest: object) -> str:
        return bucket_of(q.shape[0], q, wq)

    def run(
        self, *, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        out: Tensor = call("linear_w8a8_int8", q, s, wq, ws, bias, out_dtype)
        return out


W8A8_INT8 = W8A8Int8()
