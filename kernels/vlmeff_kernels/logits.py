"""What the kernels over attention logits share: a tile of inner products, soft capping, segments, and their arguments.

Logits are kept in base 2, so that the exponential is one instruction:

    z2_ij = log2(e) * scale * <q_i, k_j>      or      log2(e) * cap * tanh(scale / cap * <q_i, k_j>)

The head dim D is cut into D0 + D1 channels, powers of two (80 = 64 + 16; 72 = 64 + 16 with 8 of them masked), because
filling 80 up to 128 is 60 % more work. Float32 products are full float32 ones (input_precision="ieee"): TF32 has an
error of 1e-3, and 1e-5 is asked for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch

LARGEST_HEAD_DIM = 256  # a tile of keys has to fit into shared memory whole
FEW_ROWS = 8  # query rows of a key head up to which tensor cores would idle: vector kernels, no tl.dot
WINDOW = 256  # query rows up to which a call counts as one over a last window
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
INT_MAX: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def rows_of(
    x, offset, inside,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[N, WIDTH]: channels FIRST .. FIRST + WIDTH of N rows, 0 beyond DIM and in the rows that are not inside."""
    start = tl.multiple_of(offset[:, None], (ALIGN, ALIGN))
    d = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (d < DIM)[None, :]
    tile = tl.load(x + start + d[None, :], mask=mask, other=0.0)
    if UPCAST:  # the interpreter holds bfloat16 as integers
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def products(a0, a1, b0, b1, D1: tl.constexpr):
    """[M, N] inner products of the rows of a and b, each in two parts; the second is not read if D1 is 0."""
    z = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        z = tl.dot(a1, tl.trans(b1), acc=z, input_precision="ieee")
    return z


@triton.jit
def base_2(product, factor, cap):
    """Inner products to logits in base 2; factor and cap are those of `scales`."""
    z = product * tl.cast(factor, tl.float32)
    if cap is not None:
        # The sigmoid loses what lies below 1e-7, and times cap that is too much: near 0 the power series.
        z_z = z * z
        series = z * (1 + z_z * (-1 / 3 + z_z * (2 / 15 + z_z * (-17 / 315 + z_z * (62 / 2835)))))
        z = tl.cast(cap, tl.float32) * tl.where(tl.abs(z) < 0.3, series, 2 * tl.sigmoid(2 * z) - 1)
    return z


@triton.jit
def log_sum(m, total):
    """Natural logarithm of 2^m * total, m having been replaced by `subtrahend`."""
    return (m + tl.log2(total)) * LN_2


@triton.jit
def subtrahend(m):
    """A maximum that can be subtracted: -inf (nothing yet) and inf would give inf - inf."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def segment_of(bounds, t, segments, tokens, STEPS: tl.constexpr):
    """[start, end) of the segment of each token, by bisection; reads no bound that is not there, whatever they say."""
    at = tl.zeros_like(t)
    for step in tl.static_range(STEPS):
        further = at + (1 << (STEPS - 1 - step))
        bound = tl.load(bounds + further, mask=further <= segments, other=INT_MAX)
        at = tl.where(bound <= t, further, at)
    start = tl.load(bounds + at, mask=at <= segments, other=0)
    end = tl.load(bounds + at + 1, mask=at < segments, other=tokens)
    return tl.maximum(start, 0), tl.minimum(end, tokens)


def scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(factor, cap) of `base_2`."""
    log2_e = 1 / math.log(2)
    return (scale * log2_e, None) if softcap is None else (scale / softcap, softcap * log2_e)


def head_dim_parts(dim: int, *, halve: bool = False) -> tuple[int, int]:
    """(D0, D1): powers of two of at least 16, or D1 = 0, that cover dim with the least work; halve avoids D1 = 0."""
    whole = max(16, _launch.next_power_of_2(dim))
    first = whole // 2
    second = max(16, _launch.next_power_of_2(dim - first))
    fits = first + second < whole or (halve and first + second == whole)
    return (first, second) if first >= 16 and fits else (whole, 0)


def tile_of(tiles: dict[str, tuple[int, int, int, int]], q: Tensor, rows: int) -> tuple[int, int, int, int]:
    """(BM, BN, warps, stages) from a kernel's table, for tiles out of ``rows`` query rows."""
    if _launch.INTERPRET:
        return 16, 16, 4, 1
    wide = q.shape[-1] > 128
    if q.dtype == torch.float32:
        return tiles["float32, wide heads" if wide else "float32"]
    if wide:
        return tiles["wide heads"]
    return next((tiles[str(most)] for most in (16, 32, 64) if rows <= most), tiles["default"])


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Of batch, heads and rows; 0 where there is only one, which keeps an odd stride of no use from narrowing loads."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def alignment(*tensors: Tensor) -> int:
    """ALIGN of `rows_of`: 16 bytes in elements if every row starts at a multiple of them, else 1.

    Triton itself looks for multiples of 16 elements only, and rows of 72 would be loaded in narrow pieces.
    """
    elements = 16 // tensors[0].itemsize
    return elements if all(stride % elements == 0 for x in tensors for stride in strides_of(x)) else 1


def steps_of(bounds: Tensor | None) -> int:
    """STEPS of `segment_of`: a power of two each, so that kernels are compiled for few of them."""
    return 0 if bounds is None else _launch.next_power_of_2((bounds.shape[0] - 1).bit_length())


def batch_stride(x: Tensor | None) -> int:
    """0 where the optional tensor is absent."""
    return 0 if x is None else x.stride(0)


def as_bytes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(torch.uint8)


def few_rows(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether [B, Hq, W, D] queries go to the vector kernels.

    The rows of a key head count, not W: a row costs about 30 float32 operations a key element, in which time some 10
    could have been read, so that beyond FEW_ROWS of them the tensor cores win, half idle as they are.
    """
    return cu_seqlens is None and q.shape[2] * q.shape[1] // k.shape[1] <= FEW_ROWS


def keys_in_registers(dim: int) -> int:
    """Keys that a program of the vector kernels holds: 64 registers a thread, where the head dim leaves the choice."""
    return 16 if _launch.INTERPRET else max(16, min(128, 8192 // _launch.next_power_of_2(dim)))


def refusal_of(q: Tensor) -> str | None:
    if q.dtype == torch.float64:
        return "it computes in float32, and the inputs are float64"
    if q.shape[-1] > LARGEST_HEAD_DIM:
        return f"it takes head dims up to {LARGEST_HEAD_DIM}, got {q.shape[-1]}"
    return None


def bucket_of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> str:
    """Sizes that are measured, and accepted or not, as one."""
    if cu_seqlens is not None:
        kind = "packed"
    elif few_rows(q, k, None):
        kind = "few rows"
    else:
        kind = "window" if q.shape[2] <= WINDOW else "all rows"
    wide = ", wide heads" if q.shape[-1] > 128 else ""
    return f"{kind}{wide}{', float32' if q.dtype == torch.float32 else ''}"


def common(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The constants of a kernel that holds tiles of rows."""
    # Float32: ptxas loads a whole unrolled product ahead, and spills, unless it comes in two.
    d0, d1 = head_dim_parts(q.shape[-1], halve=q.dtype == torch.float32)
    return {"DIM": q.shape[-1], "D0": d0, "D1": d1, "ALIGN": alignment(q, k), "UPCAST": _launch.INTERPRET}
