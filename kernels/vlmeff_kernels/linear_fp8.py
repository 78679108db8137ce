"""Triton back end of ``linear_w8a8_fp8``: float8 (e4m3) tokens times float8 weights, scaled per token and per output.

    y[m, n] = (sum_k q[m, k] wq[n, k]) s[m] ws[n] + bias[n]

A fallback: ``torch._scaled_mm`` is the back end to measure first. The tensor cores of sm_90 keep fewer bits of a float8
sum than float32 has, so sums over PROMOTE channels are added up in float32; expect 1e-2 of the product, not 1e-6.

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

# As in linear_int8: (BM, BN, BK, warps, stages). Two sets of accumulators leave no room for the tile of 128 x 256.
TILES: Tiles = {
    _launch.LARGE: {
        SHORT: (16, 32, 256, 4, 4),
        MEDIUM: (64, 64, 256, 4, 4),
        LONG: (128, 128, 128, 8, 4),
        None: (128, 128, 128, 8, 4),
    },
    _launch.SMALL: {
        SHORT: (16, 32, 128, 4, 3),
        MEDIUM: (64, 64, 64, 4, 3),
        LONG: (64, 128, 64, 4, 3),
        None: (128, 128, 64, 8, 3),
    },
}
INTERPRETED: Tile = (16, 32, 32, 1, 1)
PROMOTE = 128  # products that are summed within the tensor cores before they go to float32


@triton.jit(do_not_specialize=["rows"])
def w8a8_fp8(
    q, s, wq, ws, bias, out,
    rows, outputs, channels,
    q_m, s_m, w_n, ws_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, EVEN: tl.constexpr,
    PROMOTE: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = banded_tile(tl.cdiv(rows, BM), tl.cdiv(outputs, BN), BAND)
    m, n, k = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    row, column = tl.minimum(m, rows - 1).to(tl.int64), tl.minimum(n, outputs - 1).to(tl.int64)
    x_at, w_at = q + row[:, None] * q_m + k[None], wq + column[None] * w_n + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, channels, BK):
        if EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:  # both: zero times a stray NaN would be NaN
            left = channels - start
            x = tl.load(x_at, mask=(k < left)[None], other=0.0)
            w = tl.load(w_at, mask=(k < left)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, max_num_imprecise_acc=PROMOTE)
        x_at += BK
        w_at += BK
    y = acc * tl.load(s + row * s_m)[:, None] * tl.load(ws + column * ws_n).to(tl.float32)[None]
    if bias is not None:
        y += tl.load(bias + column).to(tl.float32)[None]
    inside = (m < rows)[:, None] & (n < outputs)[None]
    tl.store(out + m.to(tl.int64)[:, None] * outputs + n[None], y.to(out.dtype.element_ty), mask=inside)


def _launcher(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    out = _fake(q, s, wq, ws, bias, out_dtype)
    (rows, channels), outputs = q.shape, wq.shape[0]
    bm, bn, bk, warps, stages = tile_for(TILES, INTERPRETED, rows, q.device, q, wq)
    _launch.launch(
        w8a8_fp8, (_launch.cdiv(rows, bm) * _launch.cdiv(outputs, bn),),
        q, s, wq, ws, bias, out, rows, outputs, channels, q.stride(0), s.stride(0), wq.stride(0), ws.stride(0),
        warps=warps, stages=stages, BM=bm, BN=bn, BK=bk, BAND=BAND, EVEN=channels % bk == 0, PROMOTE=min(PROMOTE, bk),
    )  # fmt: skip
    return out


def _fake(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return q.new_empty((q.shape[0], wq.shape[0]), dtype=out_dtype)


define(
    "linear_w8a8_fp8",
    "(Tensor q, Tensor s, Tensor wq, Tensor ws, Tensor? bias, ScalarType out_dtype) -> Tensor",
    _launcher,
    _fake,
)


class W8A8Fp8(Kernel):
    op = "linear_w8a8_fp8"
    least = (8, 9)

    def refuses(self, *, out_dtype: torch.dtype, **tensors: Tensor | None) -> str | None:
        return output_refusal(out_dtype)

    def bucket(self, *, q: Tensor, wq: Tensor, **rest: object) -> str:
        return bucket_of(q.shape[0], q, wq)

    def run(
        self, *, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        out: Tensor = call("linear_w8a8_fp8", q, s, wq, ws, bias, out_dtype)
        return out


W8A8_FP8 = W8A8Fp8()
