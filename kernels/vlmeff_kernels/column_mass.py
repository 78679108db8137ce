"""Triton back end of ``attention_column_mass``.

    out_j = share * sum_i w_i * exp(z_ij - lse_i)        over the rows i that may attend to key j

First the lse of every row, unless it is given (``row_logsumexp``). Then a program holds a tile of keys and goes over
the query rows of all G heads of their key head: K is loaded once and never repeated. Keys are the rows of the product,
so that the sum over queries stays within a few threads, and a window of 16 queries is still a full tensor-core tile.
Where the key tiles alone do not fill the GPU the heads, then the query rows, are cut into parts; a second kernel adds
parts, and heads if their mean is asked for, in a fixed order: no atomics, the same bits every time.

Few rows (W = 1 and the like): the same without tensor cores, the tile of keys in registers.

Packed segments: every token looks for its own segment among the bounds, on the device, and a tile goes over the tokens
from the start of its first segment to the end of its last. Nothing waits for the bounds, so malformed ones (not from 0
to T, or decreasing) are noticed by the reference only; here they give masses of no meaning.

Weights count for allowed pairs only: what a row must not see, not even a NaN weight of it reaches. Shape letters:
B batch, H query heads, K key heads, G = H // K, W query rows, S keys, D head dim, T packed tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch, logits
from vlmeff_kernels._backend import Kernel
from vlmeff_kernels._library import call, define
from vlmeff_kernels.logits import base_2, common, few_rows, products, rows_of, segment_of
from vlmeff_kernels.row_logsumexp import lse_launcher

# (BM, BN, warps, stages) by query rows a head; see row_logsumexp.
TILES = {
    "16": (16, 128, 4, 3),
    "32": (32, 128, 4, 3),
    "64": (64, 128, 8, 3),
    "default": (64, 128, 8, 3),
    "wide heads": (64, 64, 4, 2),
    "float32": (32, 64, 8, 2),
    "float32, wide heads": (32, 32, 8, 2),
}
PARTIALS = 2048  # elements of the tile in which parts are added


# These differ from prompt to prompt; see row_logsumexp.
VARYING = ("width", "keys", "key_tiles", "part_heads", "part_tiles", "part_size", "parts", "segments",
           "l_b", "l_h", "w_b", "w_h", "qp_b", "kp_b", "kv_b")  # fmt: skip


@triton.jit
def mass(z, lse, weight, allowed, OWN: tl.constexpr):
    """weight * exp(z - lse), 0 where not allowed and in rows whose lse is -inf; z is in base 2.

    OWN: lse is that of these z. An infinite one then comes of an infinite z, and the row's softmax is NaN.
    """
    less = tl.where(lse == float("-inf"), float("inf"), lse * logits.LOG2_E)
    if OWN:
        less = tl.where(lse == float("inf"), float("nan"), less)
    return tl.where(allowed, tl.exp2(z - less) * weight, 0.0)


@triton.jit(do_not_specialize=VARYING)
def mass_of_columns(
    q, k, lse, weight, q_pos, k_pos, key_valid, bounds, out,
    kv_heads, group, width, keys, key_tiles, part_heads, part_tiles, part_size, segments,
    q_b, q_h, q_w, k_b, k_h, k_s, l_b, l_h, w_b, w_h, qp_b, kp_b, kv_b,
    factor, cap, share,
    OWN: tl.constexpr, PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, STEPS: tl.constexpr,
    UPCAST: tl.constexpr,
    DIM: tl.constexpr, ALIGN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    plane, tile = (tl.program_id(0) // key_tiles).to(tl.int64), tl.program_id(0) % key_tiles
    batch, kv_head = plane // kv_heads, plane % kv_heads
    blocks = tl.cdiv(group, part_heads)
    block, part = tl.program_id(1) % blocks, tl.program_id(1) // blocks
    out += part.to(tl.int64) * part_size

    j = tile * BN + tl.arange(0, BN)
    inside = j < keys
    k_rows = batch * k_b + kv_head * k_h + j.to(tl.int64) * k_s
    k0 = rows_of(k, k_rows, inside, 0, D0, DIM, ALIGN, UPCAST)
    k1 = rows_of(k, k_rows, inside, D0, D1, DIM, ALIGN, UPCAST) if D1 > 0 else k0
    may_be_seen = inside
    if key_valid is not None:
        may_be_seen = inside & (tl.load(key_valid + batch * kv_b + j, mask=inside, other=0) != 0)
    if CAUSAL:
        k_at = j
        if k_pos is not None:
            k_at = tl.load(k_pos + batch * kp_b + j, mask=inside, other=0)

    # Row tiles of each head, of which there must be one: it stores.
    low = part * part_tiles
    high = tl.minimum(low + part_tiles, tl.cdiv(width, BM))
    first, last = low, high
    if SKIP:
        first = tl.maximum(low, (tile * BN - (keys - width)) // BM)
    if bounds is not None:
        start, end = segment_of(bounds, j, segments, keys, STEPS)
        first = tl.maximum(low, tl.min(tl.where(inside, start, keys), axis=0) // BM)
        last = tl.minimum(high, tl.cdiv(tl.max(tl.where(inside, end, 0), axis=0), BM))
    first = tl.minimum(first, high - 1)
    tiles = tl.maximum(last - first, 1)

    head_from = block * part_heads
    heads = tl.minimum(part_heads, group - head_from)
    total = tl.zeros([BN], tl.float32)
    for t in range(0, heads * tiles):
        head = kv_head * group + head_from + t // tiles
        i = (first + t % tiles) * BM + tl.arange(0, BM)
        here = i < width
        q_rows = batch * q_b + head * q_h + i.to(tl.int64) * q_w
        q0 = rows_of(q, q_rows, here, 0, D0, DIM, ALIGN, UPCAST)
        q1 = rows_of(q, q_rows, here, D0, D1, DIM, ALIGN, UPCAST) if D1 > 0 else q0
        row_lse = tl.load(lse + batch * l_b + head * l_h + i, mask=here, other=float("-inf"))
        row_weight = share
        if weight is not None:
            row_weight = tl.load(weight + batch * w_b + head * w_h + i, mask=here, other=0.0)[None, :] * share
        z = base_2(products(k0, k1, q0, q1, D1), factor, cap)  # [BN, BM]
        allowed = may_be_seen[:, None] & here[None, :]
        if CAUSAL:
            q_at = i + (keys - width)
            if q_pos is not None:
                q_at = tl.load(q_pos + batch * qp_b + i, mask=here, other=0)
            allowed = allowed & (k_at[:, None] <= q_at[None, :])
        if bounds is not None:
            allowed = allowed & (start[:, None] <= i[None, :]) & (i[None, :] < end[:, None])
        added = tl.sum(mass(z, row_lse[None, :], row_weight, allowed, OWN), axis=1)
        if PER_HEAD:  # start anew with each head, store at its end: without a branch, which would stop the prefetching
            total = tl.where(t % tiles == 0, 0.0, total) + added
            place = out + (batch * kv_heads * group + head) * keys + j
            tl.store(place, total, mask=j < tl.where(t % tiles == tiles - 1, keys, 0))
        else:
            total += added
    if not PER_HEAD:
        tl.store(out + (plane * blocks + block) * keys + j, total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def mass_of_few_rows(
    q, k, lse, weight, q_pos, k_pos, key_valid, out,
    kv_heads, group, width, keys, key_tiles,
    q_b, q_h, q_w, k_b, k_h, k_s, l_b, l_h, w_b, w_h, qp_b, kp_b, kv_b,
    factor, cap, share,
    OWN: tl.constexpr, PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    plane, tile = (tl.program_id(0) // key_tiles).to(tl.int64), tl.program_id(0) % key_tiles
    batch, kv_head = plane // kv_heads, plane % kv_heads
    j = tile * BN + tl.arange(0, BN)
    d = tl.arange(0, WIDE)
    inside = j < keys
    k_rows = batch * k_b + kv_head * k_h + j.to(tl.int64) * k_s
    k_tile = rows_of(k, k_rows, inside, 0, WIDE, DIM, ALIGN, True)
    may_be_seen = inside
    if key_valid is not None:
        may_be_seen = inside & (tl.load(key_valid + batch * kv_b + j, mask=inside, other=0) != 0)
    k_at = j
    if k_pos is not None:
        k_at = tl.load(k_pos + batch * kp_b + j, mask=inside, other=0)
    total = tl.zeros([BN], tl.float32)
    for row in range(0, group * width):
        head, i = kv_head * group + row // width, row % width
        q_row = tl.load(q + batch * q_b + head * q_h + i.to(tl.int64) * q_w + d, mask=d < DIM, other=0.0)
        row_weight = share
        if weight is not None:
            row_weight = tl.load(weight + batch * w_b + head * w_h + i) * share
        z = base_2(tl.sum(k_tile * q_row.to(tl.float32)[None, :], axis=1), factor, cap)
        allowed = may_be_seen
        if CAUSAL:
            q_at = i + (keys - width)
            if q_pos is not None:
                q_at = tl.load(q_pos + batch * qp_b + i)
            allowed = allowed & (k_at <= q_at)
        added = mass(z, tl.load(lse + batch * l_b + head * l_h + i), row_weight, allowed, OWN)
        if PER_HEAD:
            total = tl.where(i == 0, 0.0, total) + added
            place = out + (batch * kv_heads * group + head) * keys + j
            tl.store(place, total, mask=j < tl.where(i == width - 1, keys, 0))
        else:
            total += added
    if not PER_HEAD:
        tl.store(out + plane * keys + j, total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def mass_of_parts(partial, out, parts, heads, keys, key_tiles, part_size, PARTS: tl.constexpr, BN: tl.constexpr):
    """[parts, outputs * heads, keys] to [outputs, keys]: add parts and heads."""
    output, tile = (tl.program_id(0) // key_tiles).to(tl.int64), tl.program_id(0) % key_tiles
    j = tile * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for n0 in range(0, parts * heads, PARTS):
        n = n0 + tl.arange(0, PARTS)
        row = (n // heads).to(tl.int64) * part_size + (output * heads + n % heads) * keys
        inside = (n < parts * heads)[:, None] & (j < keys)[None, :]
        total += tl.sum(tl.load(partial + row[:, None] + j[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out + output * keys + j, total, mask=j < keys)


def _column_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    lse: Tensor | None,
    query_weight: Tensor | None,
    reduce: str,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_valid: Tensor | None,
    softcap: float | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """As the public op; packed tokens are [1, H, T, D] views of [T, H, D], with cu_seqlens."""
    out = _fake(q, k, scale, lse, query_weight, reduce, causal, q_pos, k_pos, key_valid, softcap, cu_seqlens)
    (batch, heads, width, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    if not out.numel() or not width:
        return out.zero_()
    own = lse is None
    if lse is None:
        lse = lse_launcher(q, k, scale, causal, q_pos, k_pos, key_valid, softcap, cu_seqlens)
    group, planes, per_head = heads // kv_heads, batch * kv_heads, reduce == "none"
    share = {"none": 1.0, "group": 1 / group, "mean": 1 / heads}[reduce]
    few = few_rows(q, k, cu_seqlens)
    bm, bn, warps, stages = logits.tile_of(TILES, q, width)
    bn = logits.keys_in_registers(dim) if few else bn
    key_tiles, row_tiles = _launch.cdiv(keys, bn), _launch.cdiv(width, bm)
    if few:
        part_heads, part_tiles = group, row_tiles
    else:
        part_heads, part_tiles = _parts(planes * key_tiles, group, row_tiles, _launch.processors(q.device))
    blocks, parts = _launch.cdiv(group, part_heads), _launch.cdiv(row_tiles, part_tiles)
    partial_heads = batch * heads if per_head else planes * blocks
    outputs = out.numel() // keys
    whole = parts == 1 and partial_heads == outputs
    target = out if whole else out.new_empty((parts, partial_heads, keys))

    factor, cap = logits.scales(scale, softcap)
    masks = (q_pos, k_pos, logits.as_bytes(key_valid))
    w_h = query_weight.stride(1) if query_weight is not None and query_weight.ndim == 3 else 0
    strides = (
        *logits.strides_of(q), *logits.strides_of(k), *lse.stride()[:2], logits.batch_stride(query_weight), w_h,
        *map(logits.batch_stride, (q_pos, k_pos, key_valid)),
    )  # fmt: skip
    if few:
        _launch.launch(
            mass_of_few_rows, (planes * key_tiles,), q, k, lse, query_weight, *masks, target,
            kv_heads, group, width, keys, key_tiles, *strides, factor, cap, share,
            warps=4, OWN=own, PER_HEAD=per_head, CAUSAL=causal, DIM=dim, ALIGN=logits.alignment(k),
            WIDE=_launch.next_power_of_2(dim), BN=bn,
        )  # fmt: skip
    else:
        segments = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _launch.launch(
            mass_of_columns, (planes * key_tiles, blocks * parts),
            q, k, lse, query_weight, *masks, cu_seqlens, target,
            kv_heads, group, width, keys, key_tiles, part_heads, part_tiles, partial_heads * keys, segments,
            *strides, factor, cap, share,
            warps=warps, stages=stages, OWN=own, PER_HEAD=per_head, CAUSAL=causal,
            SKIP=causal and q_pos is None and k_pos is None, STEPS=logits.steps_of(cu_seqlens), BM=bm, BN=bn,
            **common(q, k),
        )  # fmt: skip
    if not whole:
        added = partial_heads // outputs
        at_once = min(64, _launch.next_power_of_2(parts * added))
        columns = 16 if _launch.INTERPRET else max(32, min(256, PARTIALS // at_once))
        tiles = _launch.cdiv(keys, columns)
        _launch.launch(
            mass_of_parts, (outputs * tiles,), target, out, parts, added, keys, tiles, partial_heads * keys,
            warps=4, PARTS=at_once, BN=columns,
        )  # fmt: skip
    return out


def _parts(programs: int, group: int, row_tiles: int, processors: int) -> tuple[int, int]:
    """(heads, row tiles) of a part: all where the key tiles fill the GPU, else heads are cut first, then rows."""
    blocks = min(group, _launch.cdiv(processors, programs))
    heads = _launch.cdiv(group, blocks)
    parts = min(row_tiles, _launch.cdiv(processors, programs * _launch.cdiv(group, heads)))
    return heads, _launch.cdiv(row_tiles, parts)


def _fake(
    q: Tensor,
    k: Tensor,
    scale: float,
    lse: Tensor | None,
    query_weight: Tensor | None,
    reduce: str,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_valid: Tensor | None,
    softcap: float | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    (batch, heads), (_, kv_heads, keys, _) = q.shape[:2], k.shape
    kept = {"none": (heads,), "group": (kv_heads,), "mean": ()}[reduce]
    return q.new_empty((batch, *kept, keys), dtype=torch.float32)


define(
    "attention_column_mass",
    "(Tensor q, Tensor k, float scale, Tensor? lse, Tensor? query_weight, str reduce, bool causal, Tensor? q_pos,"
    " Tensor? k_pos, Tensor? key_valid, float? softcap, Tensor? cu_seqlens) -> Tensor",
    _column_mass,
    _fake,
)


class ColumnMass(Kernel):
    op = "attention_column_mass"

    def refuses(self, *, q: Tensor, k: Tensor, **arguments: object) -> str | None:
        return logits.refusal_of(q)

    def bucket(
        self, *, q: Tensor, k: Tensor, lse: Tensor | None, cu_seqlens: Tensor | None, **arguments: object
    ) -> str:
        return logits.bucket_of(q, k, cu_seqlens) + ("" if lse is None else ", lse given")

    def run(
        self,
        *,
        q: Tensor,
        k: Tensor,
        scale: float,
        lse: Tensor | None,
        query_weight: Tensor | None,
        reduce: str,
        causal: bool,
        q_pos: Tensor | None,
        k_pos: Tensor | None,
        key_valid: Tensor | None,
        softcap: float | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        packed = cu_seqlens is not None
        if packed:
            q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
            lse, query_weight = (None if x is None else x[None] for x in (lse, query_weight))
        mass = call(
            "attention_column_mass", q, k, float(scale), lse, query_weight, reduce, causal, q_pos, k_pos, key_valid,
            softcap, cu_seqlens,
        )  # fmt: skip
        return mass[0] if packed else mass


COLUMN_MASS = ColumnMass()
