"""Triton back end of ``linear_wna16``: 8-bit or packed 4-bit weights, read as they lie in the file.

    y[m, n] = sum_k x[m, k] r(ws[n, g] (code[n, k] - wz[n, g])) + bias[n]      g = k // group,  r: to the dtype of x

A weight is made in registers, in float32, rounded as the reference rounds it, and is the left operand of the transposed
product on tensor cores. Two regimes:

- M <= 16 ("at most 16 rows"): each weight is read once, and that is what bounds it. Rows are filled up to 16, which
  costs nothing that counts; plain arithmetic in its place (a vector kernel for one row) needs a third more instructions
  for a weight, because conversions to bfloat16 then come one by one. Outputs alone give too few programs, so K is cut,
  and ``add_parts`` adds the float32 parts in their order: no atomics.
- Above some dozens of rows it is bound by arithmetic and no faster than a product of the unquantized layer, to which it
  adds the expansion of the weights for every tile of rows: it saves memory only.

In float32 there are no tensor cores (``input_precision="ieee"``): correct, and slow.

Kernel arguments: pointers, sizes, strides, group, constexprs. Shape letters: M rows, N outputs, K inputs, g groups.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch
from vlmeff_kernels._backend import Kernel
from vlmeff_kernels._library import call, define

MEMORY_BOUND = 64  # rows up to which memory is taken to be the bound
UNMASKED = 128  # K that is a multiple of it is cut into whole tiles, whatever their size
TOGETHER = 8  # tiles of weights that go over all rows before the next ones
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # the format is unknown to the compiler below
BYTES = (torch.int8, torch.uint8, FP8)
PROGRAMS = 4  # wanted on each processor where memory is the bound


@triton.jit
def rounded(w, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 -> DTYPE, to nearest and even. The interpreter truncates to bfloat16: its bits are rounded first."""
    if UPCAST and tl.bfloat16 == DTYPE:
        bits = w.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        w = tl.where(w == w, bits.to(tl.float32, bitcast=True), w)
    return w.to(DTYPE)


@triton.jit
def as_float(byte, less: tl.constexpr):
    """Exact float32 of byte - less: from the bits of 2^23 + byte, where a conversion runs at a quarter of the rate."""
    return (byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + less)


@triton.jit
def byte_code(raw):
    """float32 codes of 8 bits, exactly."""
    if raw.dtype == tl.int8:
        return as_float(raw.to(tl.uint8, bitcast=True) ^ 128, 128)
    if raw.dtype == tl.uint8:
        return as_float(raw, 0)
    return raw.to(tl.float32)


@triton.jit
def weights(
    wq, ws, wz, n, first, N, K, stored, wq_n, ws_n, wz_n, group,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, GROUPED: tl.constexpr,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[OUTPUTS, INPUTS] weights of inputs ``first``... in DTYPE (float32 of them in the interpreter).

    Beyond K they are finite where the scale is, and meet zeros of x.
    """
    row = n.to(tl.int64)[:, None]
    WIDTH: tl.constexpr = INPUTS if BITS == 8 else INPUTS // 2
    at = (first if BITS == 8 else first // 2) + tl.arange(0, WIDTH)
    inside = (n < N)[:, None] if EVEN else (n < N)[:, None] & (at < stored)[None]
    raw = tl.load(wq + row * wq_n + at[None], mask=inside, other=0.0)
    if BITS == 8:
        code = byte_code(raw)
    else:
        low, high = as_float(raw & 15, 8 if wz is None else 0), as_float(raw >> 4, 8 if wz is None else 0)
        code = tl.reshape(tl.join(low, high), (OUTPUTS, INPUTS))

    # One scale for SPAN neighbours, which lie in one group.
    start = first + SPAN * tl.arange(0, INPUTS // SPAN)
    g = start // group if GROUPED else start * 0
    there = (n < N)[:, None] & (start < K)[None]
    if wz is not None:
        zero = tl.load(wz + row * wz_n + g[None], mask=there, other=0.0).to(tl.float32)
        code = code - over(zero, OUTPUTS, INPUTS, SPAN)
    scale = tl.load(ws + row * ws_n + g[None], mask=there, other=0.0).to(tl.float32)
    w = rounded(code * over(scale, OUTPUTS, INPUTS, SPAN), DTYPE, UPCAST)
    return w.to(tl.float32) if UPCAST else w


@triton.jit
def over(s, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SPAN: tl.constexpr):
    """[OUTPUTS, INPUTS / SPAN] -> [OUTPUTS, INPUTS], each repeated SPAN times."""
    if SPAN == INPUTS:
        return tl.broadcast_to(s, (OUTPUTS, INPUTS))
    return tl.reshape(tl.broadcast_to(s[:, :, None], (OUTPUTS, INPUTS // SPAN, SPAN)), (OUTPUTS, INPUTS))


@triton.jit(do_not_specialize=["M"])  # batches are of any size; wide loads need to know that ``each`` is a multiple
def expand_and_multiply(
    x, wq, ws, wz, bias, out,
    M, N, K, stored, each, x_m, wq_n, ws_n, wz_n, group,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SPAN: tl.constexpr, TOGETHER: tl.constexpr,
    BITS: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (i, part): a tile of ROWS x OUTPUTS, inputs part each ...; ``out`` [parts, M, N]."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    # TOGETHER tiles of weights go over all rows before the next ones: both stay in the cache.
    row_tiles, tiles = tl.cdiv(M, ROWS), tl.cdiv(N, OUTPUTS)
    band = tl.program_id(0) // (TOGETHER * row_tiles)
    here = min(tiles - band * TOGETHER, TOGETHER)
    rest = tl.program_id(0) % (TOGETHER * row_tiles)
    n = (band * TOGETHER + rest % here) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = (rest // here) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * each
    sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for first in range(begin, min(begin + each, K), INPUTS):
        w = weights(wq, ws, wz, n, first, N, K, stored, wq_n, ws_n, wz_n, group,
                    OUTPUTS, INPUTS, SPAN, BITS, GROUPED, EVEN, DTYPE, UPCAST)  # fmt: skip
        k = first + tl.arange(0, INPUTS)
        taken = (m < M)[None] if EVEN else (k < K)[:, None] & (m < M)[None]
        rows = tl.load(x + m.to(tl.int64)[None] * x_m + k[:, None], mask=taken, other=0.0)
        if UPCAST:
            rows = rows.to(tl.float32)
        sums = tl.dot(w, rows, sums, input_precision="ieee")
    inside = (n < N)[:, None] & (m < M)[None]
    if bias is not None:
        sums += rounded(tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32), DTYPE, UPCAST).to(tl.float32)[:, None]
    place = (tl.program_id(1).to(tl.int64) * M + m.to(tl.int64)[None]) * N + n[:, None]
    tl.store(out + place, rounded(sums, out.dtype.element_ty, UPCAST), mask=inside)


@triton.jit(do_not_specialize=["count"])
def add_parts(parts, bias, out, count, size, N, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """out[i] = sum over the parts, in their order, + bias; ``parts`` [count, size] float32, ``out`` [size]."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(0, count):
        y += tl.load(parts + part * size + i, mask=i < size, other=0.0)
    if bias is not None:
        y += rounded(tl.load(bias + i % N, mask=i < size, other=0.0).to(tl.float32), DTYPE, UPCAST).to(tl.float32)
    tl.store(out + i, rounded(y, DTYPE, UPCAST), mask=i < size)


# (there is wgmma, x is float32), at most so many rows -> (ROWS, OUTPUTS, INPUTS, warps, stages) of expand_and_multiply
TILES = {
    (True, False): {16: (16, 64, 128, 4, 4), 64: (64, 64, 64, 4, 4), 0: (128, 128, 64, 8, 3)},
    (False, False): {16: (16, 64, 128, 4, 4), 64: (64, 64, 64, 4, 3), 0: (128, 128, 32, 8, 3)},
    (True, True): {16: (16, 64, 32, 4, 3), 0: (64, 64, 32, 4, 3)},
    (False, True): {16: (16, 64, 32, 4, 3), 0: (64, 64, 32, 4, 3)},
}


def _tile(x: Tensor) -> tuple[int, int, int, int, int]:
    if _interpreted():
        return 16, 16, 32, 4, 2
    table = TILES[_launch.has_wgmma(x.device), x.dtype == torch.float32]
    return table[next((most for most in table if x.shape[0] <= most), 0)]


def _interpreted() -> bool:
    return _launch.INTERPRET and not _launch.is_recording()


def _cut(programs: int, rows: int, k: int, inputs: int, device: torch.device) -> tuple[int, int]:
    """(parts of K, inputs of each): enough programs for every processor, each with two steps at least."""
    steps = max(1, _launch.cdiv(k, inputs))
    wanted = _launch.processors(device) * (PROGRAMS if rows <= MEMORY_BOUND else 1)
    if _interpreted():
        wanted = (1 + rows % 3) * programs  # some of each
    parts = max(1, min(wanted // max(1, programs), steps // 2))
    each = _launch.cdiv(steps, parts)
    return _launch.cdiv(steps, each), each * inputs


def _linear_wna16(
    x: Tensor, wq: Tensor, ws: Tensor, wz: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    out = _linear_wna16_fake(x, wq, ws, wz, bias, bits, group)
    (rows, k), outputs, grouped = x.shape, len(wq), ws.shape[1] > 1
    tile_m, tile_n, tile_k, warps, stages = _tile(x)
    programs = _launch.cdiv(rows, tile_m) * _launch.cdiv(outputs, tile_n)
    parts, each = _cut(programs, rows, k, tile_k, x.device)
    target = out if parts == 1 else x.new_empty((parts, rows, outputs), dtype=torch.float32)
    _launch.launch(
        expand_and_multiply, (programs, parts), x, wq, ws, wz, bias if parts == 1 else None, target,
        rows, outputs, k, wq.shape[1], each,
        x.stride(0), wq.stride(0), ws.stride(0), 0 if wz is None else wz.stride(0), group,
        warps=warps, stages=stages, ROWS=tile_m, OUTPUTS=tile_n, INPUTS=tile_k,
        SPAN=math.gcd(tile_k, group) if grouped else tile_k, TOGETHER=TOGETHER, BITS=8 if bits == 8 else 4,
        GROUPED=grouped, EVEN=k % tile_k == 0, UPCAST=_interpreted(),
    )  # fmt: skip
    if parts > 1:
        block = 64 if _interpreted() else 512
        _launch.launch(
            add_parts, (_launch.cdiv(rows * outputs, block),), target, bias, out, parts, rows * outputs, outputs,
            warps=4, BLOCK=block, UPCAST=_interpreted(),
        )  # fmt: skip
    return out


def _linear_wna16_fake(
    x: Tensor, wq: Tensor, ws: Tensor, wz: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    return x.new_empty((x.shape[0], wq.shape[0]))


define(
    "linear_wna16",
    "(Tensor x, Tensor wq, Tensor ws, Tensor? wz, Tensor? bias, int bits, int group) -> Tensor",
    _linear_wna16,
    _linear_wna16_fake,
)


def _is_odd(x: Tensor, wq: Tensor) -> bool:
    """Whether tiles go past the end of a row, or rows start where no wide load may."""
    return bool(x.shape[1] % UNMASKED or x.stride(0) % 16 or wq.stride(0) % 16)


class LinearWNA16(Kernel):
    """Weight-only linear layer. At many rows it saves memory and no time."""

    op = "linear_wna16"

    def refuses(
        self, *, x: Tensor, wq: Tensor, ws: Tensor, wz: Tensor | None, bias: Tensor | None, bits: int, group: int
    ) -> str | None:
        if x.dtype not in DTYPES:
            return f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}"
        if wq.dtype not in (BYTES if bits == 8 else (torch.uint8,)):
            stored = "int8, uint8 or float8_e4m3fn" if bits == 8 else "uint8"
            return f"codes of {bits} bits must lie in {stored}, got {wq.dtype}"
        capability = _launch.capability_of(x.device)
        if wq.dtype == FP8 and capability < FP8_CAPABILITY:
            return f"float8_e4m3fn needs compute capability 8.9, the GPU has {capability[0]}.{capability[1]}"
        return None

    def bucket(
        self, *, x: Tensor, wq: Tensor, ws: Tensor, wz: Tensor | None, bias: Tensor | None, bits: int, group: int
    ) -> str:
        most = next((most for most in (1, 16, MEMORY_BOUND) if len(x) <= most), None)
        rows = f"more than {MEMORY_BOUND} rows" if most is None else f"at most {most} rows"
        kind = "float8 weights" if wq.dtype == FP8 else f"{8 if bits == 8 else 4}-bit weights"
        # All that makes another kernel: how far a scale reaches, zero-points, rows that are read masked.
        groups = f", groups of {group}" if ws.shape[1] > 1 else ""
        odd = ", unaligned" if _is_odd(x, wq) else ""
        wide = ", float32" if x.dtype == torch.float32 else ""
        return f"{kind}, {rows}{groups}{'' if wz is None else ', zeros'}{odd}{wide}"

    def run(
        self, *, x: Tensor, wq: Tensor, ws: Tensor, wz: Tensor | None, bias: Tensor | None, bits: int, group: int
    ) -> Tensor:
        return call("linear_wna16", x, wq, ws, wz, bias, bits, group)


WNA16 = LinearWNA16()
