"""Triton back end of the gathers: exact copies of rows of a tensor.

    out[b, h, i, :] = x[b, h, index[b, h', i], :]      h' = h, or 0 where the heads share an index

Values are moved as integers of their size, so that no bit of a NaN changes and float8 needs no arithmetic. A program
copies ROWS rows of one (batch, head). Keys and values of a layer go in one launch, as two halves of the grid.

Shape letters: B batch, H heads, S tokens, D channels of a row, K rows taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch
from vlmeff_kernels._backend import Kernel
from vlmeff_kernels._library import call, define

COLUMNS, ELEMENTS = 1024, 4096  # channels a program takes at most, and elements in all
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Triton compiles anew for a size that is 1 or a multiple of 16: not for those that differ from call to call.
@triton.jit(do_not_specialize=["kept", "tiles", "i_b", "i_h"])
def gather_rows(
    x, y, index, x_out, y_out,
    heads, kept, tiles, x_width, y_width,
    x_b, x_h, x_s, y_b, y_h, y_s, i_b, i_h,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Keys in even, values in odd planes of the grid.
    second = tl.program_id(1) % 2
    row, at = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1) // 2
    batch, head = row // heads, row % heads
    i = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    taken = tl.load(index + batch * i_b + head * i_h + i, mask=i < kept, other=0)
    column = at * COLUMNS + tl.arange(0, COLUMNS)
    if second == 0:
        inside = (i < kept)[:, None] & (column < x_width)[None]
        source = x + batch * x_b + head * x_h + taken[:, None] * x_s + column[None]
        tl.store(x_out + (row * kept + i)[:, None] * x_width + column[None], tl.load(source, mask=inside), mask=inside)
    else:
        inside = (i < kept)[:, None] & (column < y_width)[None]
        source = y + batch * y_b + head * y_h + taken[:, None] * y_s + column[None]
        tl.store(y_out + (row * kept + i)[:, None] * y_width + column[None], tl.load(source, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["kept", "tiles", "i_b", "i_h"])
def gather_one(
    x, index, out,
    heads, kept, tiles, width,
    x_b, x_h, x_s, i_b, i_h,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = row // heads, row % heads
    i = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    taken = tl.load(index + batch * i_b + head * i_h + i, mask=i < kept, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < kept)[:, None] & (column < width)[None]
    source = x + batch * x_b + head * x_h + taken[:, None] * x_s + column[None]
    tl.store(out + (row * kept + i)[:, None] * width + column[None], tl.load(source, mask=inside), mask=inside)


def _blocks(width: int) -> tuple[int, int]:
    """(ROWS, COLUMNS)."""
    columns = min(COLUMNS, _launch.next_power_of_2(width))
    return max(1, ELEMENTS // columns), columns


def _as_integers(x: Tensor) -> Tensor:
    return x.view(INTEGERS[x.dtype.itemsize])


def _gather_kv(keys: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    keys_out, values_out = _gather_kv_fake(keys, values, index)
    x, y, x_out, y_out = (_as_integers(t) for t in (keys, values, keys_out, values_out))
    (batch, heads, _, width), kept = keys.shape, index.shape[2]
    widest = max(width, values.shape[3])
    rows, columns = _blocks(widest)
    tiles = _launch.cdiv(kept, rows)
    grid = (batch * heads * tiles, 2 * _launch.cdiv(widest, columns))
    _launch.launch(
        gather_rows, grid, x, y, index, x_out, y_out, heads, kept, tiles, width, values.shape[3],
        *x.stride()[:3], *y.stride()[:3], index.stride(0), index.stride(1) if index.shape[1] > 1 else 0,
        warps=4, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return keys_out, values_out


def _gather_kv_fake(keys: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    kept = (*keys.shape[:2], index.shape[2])
    return keys.new_empty((*kept, keys.shape[3])), values.new_empty((*kept, values.shape[3]))


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    out = _gather_tokens_fake(x, index)
    (batch, _, width), kept = x.shape, index.shape[1]
    rows, columns = _blocks(width)
    tiles = _launch.cdiv(kept, rows)
    _launch.launch(
        gather_one, (batch * tiles, _launch.cdiv(width, columns)),
        _as_integers(x), index, _as_integers(out), 1, kept, tiles, width,
        x.stride(0), 0, x.stride(1), index.stride(0), 0,
        warps=4, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return out


def _gather_tokens_fake(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


define("gather_kv", "(Tensor keys, Tensor values, Tensor index) -> (Tensor, Tensor)", _gather_kv, _gather_kv_fake)
define("gather_tokens", "(Tensor x, Tensor index) -> Tensor", _gather_tokens, _gather_tokens_fake)


class GatherTokens(Kernel):
    op = "gather_tokens"

    def refuses(self, *, x: Tensor, index: Tensor) -> str | None:
        return _size_refusal(x)

    def bucket(self, *, x: Tensor, index: Tensor) -> str:
        return "rows of 256 bytes or more" if x.shape[-1] * x.dtype.itemsize >= 256 else "narrow rows"

    def run(self, *, x: Tensor, index: Tensor) -> Tensor:
        if x.ndim == 2:
            return self.run(x=x[None], index=index[None])[0]
        return call("gather_tokens", x, index)


class GatherKV(Kernel):
    """One launch a layer for keys and values; the CUDA back end takes all layers in one."""

    op = "gather_kv"

    def refuses(self, *, keys: list[Tensor], values: list[Tensor], index: list[Tensor]) -> str | None:
        return next(filter(None, map(_size_refusal, keys)), None)

    def run(
        self, *, keys: list[Tensor], values: list[Tensor], index: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        layers = zip(keys, values, index, strict=True)
        taken = [call("gather_kv", k, v, i if i.ndim == 3 else i[:, None]) for k, v, i in layers]
        return [k for k, _ in taken], [v for _, v in taken]


def _size_refusal(x: Tensor) -> str | None:
    return None if x.dtype.itemsize in INTEGERS else f"it copies elements of 1, 2, 4 or 8 bytes, not {x.dtype}"


GATHER_TOKENS, GATHER_KV = GatherTokens(), GatherKV()
