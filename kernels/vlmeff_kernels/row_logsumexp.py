"""Triton back end of ``row_logsumexp``, and the first pass of ``attention_column_mass``.

    lse_i = log sum_{j allowed} exp(z_ij)

A program holds a tile of query rows and goes over the keys with a running maximum and sum. The rows of a key head are
those of its G query heads, one after the other (row g * W + i): G * W of them share each tile of keys, and K is never
repeated. Where the rows alone do not fill the GPU the keys are cut into parts; each part has its own lse, and a second
kernel joins them: no atomics, the same bits every time.

Few rows (W = 1 and the like): a program holds a tile of keys in registers and takes the rows one by one.

Causal tiles that lie beyond every row are skipped only with default positions, because explicit ones may be in any
order. Shape letters: B batch, H query heads, K key heads, G = H // K, W query rows, S keys, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch, logits
from vlmeff_kernels._backend import Kernel
from vlmeff_kernels._library import call, define
from vlmeff_kernels.logits import base_2, common, few_rows, log_sum, products, rows_of, segment_of, subtrahend

FLAT_ROWS = 256  # up to this W, tiles may hold rows of several heads; beyond, they would blur the causal bound
# (BM, BN, warps, stages) by query rows, chosen for their registers and shared memory, and not yet by measurement.
# Two blocks or more fit into a processor, so that one multiplies while another exponentiates.
TILES = {
    "16": (16, 64, 4, 3),
    "32": (32, 64, 4, 3),
    "64": (64, 64, 4, 3),
    "default": (128, 64, 8, 3),
    "wide heads": (64, 64, 4, 2),
    "float32": (32, 64, 8, 2),
    "float32, wide heads": (32, 32, 8, 2),
}
PARTIALS, JOINED_AT_ONCE = 2048, 256  # elements of the tile in which parts are joined, and parts in it at most


# These differ from prompt to prompt. Triton compiles anew for a size that is 1 or a multiple of 16 unless told not to.
VARYING = ("width", "keys", "row_tiles", "part", "parts", "all_rows", "segments", "qp_b", "kp_b", "kv_b")


@triton.jit(do_not_specialize=VARYING)
def lse_of_rows(
    q, k, q_pos, k_pos, key_valid, bounds, out,
    kv_heads, group, width, keys, row_tiles, part, all_rows, segments,
    q_b, q_h, q_w, k_b, k_h, k_s, qp_b, kp_b, kv_b,
    factor, cap,
    CAUSAL: tl.constexpr, SKIP: tl.constexpr, FLAT: tl.constexpr, STEPS: tl.constexpr, UPCAST: tl.constexpr,
    DIM: tl.constexpr, ALIGN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    plane, tile = (tl.program_id(0) // row_tiles).to(tl.int64), tl.program_id(0) % row_tiles
    batch, kv_head = plane // kv_heads, plane % kv_heads
    if FLAT:
        row = tile * BM + tl.arange(0, BM)
        head, i = row // width, row % width
    else:
        per_head = tl.cdiv(width, BM)
        head = tile // per_head + tl.zeros([BM], tl.int32)
        i = tile % per_head * BM + tl.arange(0, BM)
    inside = (head < group) & (i < width)
    heads = kv_head * group + head
    q_rows = batch * q_b + heads * q_h + i.to(tl.int64) * q_w
    q0 = rows_of(q, q_rows, inside, 0, D0, DIM, ALIGN, UPCAST)
    q1 = rows_of(q, q_rows, inside, D0, D1, DIM, ALIGN, UPCAST) if D1 > 0 else q0

    start = tl.program_id(1) * part
    end = tl.minimum(start + part, keys)
    if bounds is not None:
        first, last = segment_of(bounds, i, segments, keys, STEPS)
        start = tl.maximum(start, tl.min(tl.where(inside, first, keys), axis=0))
        end = tl.minimum(end, tl.max(tl.where(inside, last, 0), axis=0))
    if CAUSAL:
        q_at = i + (keys - width)
        if SKIP:
            end = tl.minimum(end, tl.max(tl.where(inside, q_at, -1), axis=0) + 1)
        if q_pos is not None:
            q_at = tl.load(q_pos + batch * qp_b + i, mask=inside, other=0)

    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for j0 in range(start, end, BN):
        j = j0 + tl.arange(0, BN)
        here = j < end
        k_rows = batch * k_b + kv_head * k_h + j.to(tl.int64) * k_s
        k0 = rows_of(k, k_rows, here, 0, D0, DIM, ALIGN, UPCAST)
        k1 = rows_of(k, k_rows, here, D0, D1, DIM, ALIGN, UPCAST) if D1 > 0 else k0
        z = base_2(products(q0, q1, k0, k1, D1), factor, cap)
        if key_valid is not None:
            here = here & (tl.load(key_valid + batch * kv_b + j, mask=here, other=0) != 0)
        allowed = here[None, :]
        if CAUSAL:
            k_at = j
            if k_pos is not None:
                k_at = tl.load(k_pos + batch * kp_b + j, mask=j < end, other=0)
            allowed = allowed & (k_at[None, :] <= q_at[:, None])
        if bounds is not None:
            allowed = allowed & (first[:, None] <= j[None, :]) & (j[None, :] < last[:, None])
        z = tl.where(allowed, z, float("-inf"))
        # A NaN may get lost in the maximum, never in the sum.
        m_new = tl.maximum(m, tl.max(z, axis=1))
        less = subtrahend(m_new)
        total = total * tl.exp2(m - less) + tl.sum(tl.exp2(z - less[:, None]), axis=1)
        m = m_new
    lse = log_sum(subtrahend(m), total)
    tl.store(out + tl.program_id(1).to(tl.int64) * all_rows + (batch * kv_heads * group + heads) * width + i,
             lse, mask=inside)  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def lse_of_few_rows(
    q, k, q_pos, k_pos, key_valid, out,
    kv_heads, group, width, keys, parts, all_rows,
    q_b, q_h, q_w, k_b, k_h, k_s, qp_b, kp_b, kv_b,
    factor, cap,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    plane, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    batch, kv_head = plane // kv_heads, plane % kv_heads
    j = part * BN + tl.arange(0, BN)
    d = tl.arange(0, WIDE)
    here = j < keys
    k_rows = batch * k_b + kv_head * k_h + j.to(tl.int64) * k_s
    k_tile = rows_of(k, k_rows, here, 0, WIDE, DIM, ALIGN, True)
    k_at = j
    if k_pos is not None:
        k_at = tl.load(k_pos + batch * kp_b + j, mask=here, other=0)
    if key_valid is not None:
        here = here & (tl.load(key_valid + batch * kv_b + j, mask=here, other=0) != 0)
    for row in range(0, group * width):
        head, i = kv_head * group + row // width, row % width
        q_row = tl.load(q + batch * q_b + head * q_h + i.to(tl.int64) * q_w + d, mask=d < DIM, other=0.0)
        z = base_2(tl.sum(k_tile * q_row.to(tl.float32)[None, :], axis=1), factor, cap)
        allowed = here
        if CAUSAL:
            q_at = i + (keys - width)
            if q_pos is not None:
                q_at = tl.load(q_pos + batch * qp_b + i)
            allowed = allowed & (k_at <= q_at)
        z = tl.where(allowed, z, float("-inf"))
        less = subtrahend(tl.max(z, axis=0))
        lse = log_sum(less, tl.sum(tl.exp2(z - less), axis=0))
        tl.store(out + part.to(tl.int64) * all_rows + (batch * kv_heads * group + head) * width + i, lse)


@triton.jit(do_not_specialize=VARYING)
def lse_of_parts(partial, out, parts, all_rows, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """[parts, all_rows] to [all_rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < all_rows
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for part in range(0, parts, PARTS):
        n = part + tl.arange(0, PARTS)
        places = partial + n[:, None].to(tl.int64) * all_rows + row[None, :]
        z = tl.load(places, mask=(n < parts)[:, None] & inside[None, :], other=float("-inf")) * logits.LOG2_E
        m_new = tl.maximum(m, tl.max(z, axis=0))
        less = subtrahend(m_new)
        total = total * tl.exp2(m - less) + tl.sum(tl.exp2(z - less[None, :]), axis=0)
        m = m_new
    tl.store(out + row, log_sum(subtrahend(m), total), mask=inside)


def lse_launcher(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_valid: Tensor | None,
    softcap: float | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """As the public op; packed tokens are [1, H, T, D] views of [T, H, D], with cu_seqlens."""
    out = _fake(q, k, scale, causal, q_pos, k_pos, key_valid, softcap)
    (batch, _, width, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    if not out.numel() or not keys:
        return out.fill_(-torch.inf)
    group, planes, few = q.shape[1] // kv_heads, batch * kv_heads, few_rows(q, k, cu_seqlens)
    flat = cu_seqlens is None and width <= FLAT_ROWS
    bm, bn, warps, stages = logits.tile_of(TILES, q, group * width if flat else width)
    if few:
        part = logits.keys_in_registers(dim)
    else:
        row_tiles = _launch.cdiv(group * width, bm) if flat else group * _launch.cdiv(width, bm)
        part = _part(keys, bn, planes * row_tiles, _launch.processors(q.device))
    parts = _launch.cdiv(keys, part)
    target = out if parts == 1 else out.new_empty((parts, *out.shape))
    factor, cap = logits.scales(scale, softcap)
    strides = (*logits.strides_of(q), *logits.strides_of(k), *map(logits.batch_stride, (q_pos, k_pos, key_valid)))
    masks = (q_pos, k_pos, logits.as_bytes(key_valid))
    if few:
        _launch.launch(
            lse_of_few_rows, (planes * parts,), q, k, *masks, target,
            kv_heads, group, width, keys, parts, out.numel(), *strides, factor, cap,
            warps=4, CAUSAL=causal, DIM=dim, ALIGN=logits.alignment(k),
            WIDE=_launch.next_power_of_2(dim), BN=part,
        )  # fmt: skip
    else:
        segments = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _launch.launch(
            lse_of_rows, (planes * row_tiles, parts), q, k, *masks, cu_seqlens, target,
            kv_heads, group, width, keys, row_tiles, part, out.numel(), segments, *strides, factor, cap,
            warps=warps, stages=stages, CAUSAL=causal, SKIP=causal and q_pos is None and k_pos is None, FLAT=flat,
            STEPS=logits.steps_of(cu_seqlens), BM=bm, BN=bn, **common(q, k),
        )  # fmt: skip
    if parts > 1:
        at_once = min(JOINED_AT_ONCE, _launch.next_power_of_2(parts))
        rows = min(PARTIALS // at_once, 64)
        _launch.launch(
            lse_of_parts, (_launch.cdiv(out.numel(), rows),), target, out, parts, out.numel(),
            warps=4, PARTS=at_once, ROWS=rows,
        )  # fmt: skip
    return out


def _part(keys: int, tile: int, programs: int, processors: int) -> int:
    """Keys of a part: all of them where the programs fill the GPU, else such that there are twice as many programs as
    processors, but two tiles at least."""
    if programs >= processors:
        return max(tile, _launch.cdiv(keys, tile) * tile)
    parts = min(_launch.cdiv(2 * processors, programs), _launch.cdiv(keys, 2 * tile))
    return _launch.cdiv(_launch.cdiv(keys, tile), parts) * tile


def _fake(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_valid: Tensor | None,
    softcap: float | None,
) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


define(
    "row_logsumexp",
    "(Tensor q, Tensor k, float scale, bool causal, Tensor? q_pos, Tensor? k_pos, Tensor? key_valid, float? softcap)"
    " -> Tensor",
    lse_launcher,
    _fake,
)


class RowLogSumExp(Kernel):
    op = "row_logsumexp"

    def refuses(self, *, q: Tensor, k: Tensor, **arguments: object) -> str | None:
        return logits.refusal_of(q)

    def bucket(self, *, q: Tensor, k: Tensor, **arguments: object) -> str:
        return logits.bucket_of(q, k)

    def run(
        self,
        *,
        q: Tensor,
        k: Tensor,
        scale: float,
        causal: bool,
        q_pos: Tensor | None,
        k_pos: Tensor | None,
        key_valid: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        return call("row_logsumexp", q, k, float(scale), causal, q_pos, k_pos, key_valid, softcap)


ROW_LOGSUMEXP = RowLogSumExp()
