"""Statistics of attention that never hold the attention matrix: row log-sum-exp and column mass.

Shape letters: B batch, H query heads, K key/value heads, G = H // K, W query rows, S keys, D head dim, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vlmeff.ops._arguments import autocast_off, check_tensors
from vlmeff.ops._dispatch import dispatch, operator

Reduce: TypeAlias = Literal["none", "group", "mean"]

# The references work on as many query rows at a time as fit their logits into this, and on one row at least.
_LOGITS_BLOCK_BYTES = 32 * 2**20
_CPU_LOGITS_BLOCK_BYTES = 4 * 2**20  # what several passes over it find in the cache, and no page of it is mapped anew


@operator
def row_logsumexp(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    key_valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute the natural-log normaliser of every attention row.

    lse_i = log sum_{j allowed} exp(z_ij), z_ij = scale * <q_i, k_j>, and z <- softcap * tanh(z / softcap) if given.
    Key j is allowed to row i if key_valid[b, j] and, when causal, k_pos[b, j] <= q_pos[b, i].

    Args:
        q: [B, Hq, W, D] queries, rotary embedding applied; float32, float16, bfloat16 or float64. Any strides.
        k: [B, Hk, S, D] keys, dtype and device of q. Hk divides Hq; query head h reads key head h // (Hq // Hk).
        scale: factor of the inner products, usually D ** -0.5.
        causal: mask by position. The two position arguments are read only then.
        q_pos: [B, W] int32 or int64; default S-W .. S-1, that is right-aligned with the keys. Values must fit int32.
        k_pos: [B, S] int32 or int64; default 0 .. S-1. Needed once an eviction has made the slots non-contiguous.
        key_valid: [B, S] bool, False for padding; default all True.
        softcap: positive, or None.
    Returns:
        [B, Hq, W] float32 (float64 for float64 inputs). A row with no allowed key is -inf; a NaN in a query row or in a
        key that it may attend to makes the row NaN.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.

    If the attention kernel returns its own log-sum-exp, use that (and mind its base). Memory: one block of logits of
    about 32 MB (4 on a CPU) and a float32 copy of k; under autograd the blocks are kept for the backward.

    Tolerance of the back ends: relative Frobenius error 1e-5 for float32, 1e-4 for half inputs. Source: the online
    normaliser of softmax, arXiv 1805.02867.
    """
    op = "row_logsumexp"
    _check_queries_and_keys(op, q, k, packed=False)
    masks = _checked_masks(op, q, k, causal=causal, q_pos=q_pos, k_pos=k_pos, key_valid=key_valid)
    _check_scalars(op, scale, softcap)
    return dispatch(op, _row_logsumexp_reference, q=q, k=k, scale=scale, softcap=softcap, **masks)


@operator
def attention_column_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    lse: Tensor | None = None,
    query_weight: Tensor | None = None,
    reduce: Reduce = "none",
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    key_valid: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Sum the attention that every key receives over the query rows, each row with its weight.

    p_ij = exp(z_ij - lse_i) for allowed (i, j), else 0; out[b, h, j] = sum_i weight[b, h, i] * p_ij. Logits z, masks
    and lse are those of `row_logsumexp`. So without lse, the masses of a head sum to the weights of its rows that have
    an allowed key. Divisions (by the window, by the number of queries) are left to the caller.

    Args:
        q, k, scale, causal, q_pos, k_pos, key_valid, softcap: as in `row_logsumexp`.
        lse: [B, Hq, W] normalisers, natural log, floating point; default `row_logsumexp` of the same arguments. Give
            one to normalise over more keys than k holds. A row whose lse is -inf contributes 0.
        query_weight: [B, W] or [B, Hq, W], bool or floating point; default 1. Zero does not hide a NaN row (0 * NaN).
        reduce: "none" keeps the query heads, "group" averages the heads that share a key head, "mean" all heads.
        cu_seqlens: [n + 1] int32 or int64, from 0 to T, not decreasing: q is [T, Hq, D], k is [T, Hk, D], and each of
            the n segments attends to itself. lse is then [Hq, T] and query_weight [T] or [Hq, T]; the other masks are
            not available.
    Returns:
        float32 (float64 for float64 inputs). [B, Hq, S], [B, Hk, S] or [B, S] by reduce; packed [Hq, T], [Hk, T] or
            [T].
        A NaN in a query row, or in a key that some row may attend to, makes NaN every mass it enters.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.

    Uses: last-window scores (SnapKV; PrefixKV with the window metric): q of the last w rows, causal. Full scores
    (PrefixKV): all rows, causal, query_weight = valid queries, "mean". Column mean of a vision layer (HiPrune): not
    causal, cu_seqlens for Qwen, "mean". AdaptInfer: lse over all keys, k of the visual ones, weights from the text.

    Memory as in `row_logsumexp`; k is never repeated for the heads of a group. The reference reads the segment bounds
    to the host: with cu_seqlens on CUDA that is its one synchronisation.

    Tolerance of the back ends: relative Frobenius error 1e-5 for float32, 1e-4 for half inputs. Sources: HiPrune
    (arXiv 2508.00553), PrefixKV (arXiv 2412.03409) and SnapKV (arXiv 2404.14469), which sum these columns.
    """
    op = "attention_column_mass"
    packed = cu_seqlens is not None
    _check_queries_and_keys(op, q, k, packed=packed)
    if cu_seqlens is not None:
        if causal or q_pos is not None or k_pos is not None or key_valid is not None:
            raise ValueError(f"{op}: cu_seqlens cannot be combined with causal, q_pos, k_pos or key_valid")
        _check_tensor(op, "cu_seqlens", cu_seqlens, q, {"n + 1": None}, _INTEGERS)
        cu_seqlens = cu_seqlens.int()
    masks = _checked_masks(op, q, k, causal=causal, q_pos=q_pos, k_pos=k_pos, key_valid=key_valid)
    _check_scalars(op, scale, softcap)
    if reduce not in get_args(Reduce):
        raise ValueError(f"{op}: reduce must be one of {', '.join(get_args(Reduce))}, got {reduce!r}")
    per_head = {"Hq": q.shape[1], "T": q.shape[0]} if packed else {"B": q.shape[0], "Hq": q.shape[1], "W": q.shape[2]}
    if lse is not None:
        _check_tensor(op, "lse", lse, q, per_head, _FLOATS)
        lse = lse.to(_score_dtype(q))
    check_tensors(op, optional={"query_weight": query_weight})
    if query_weight is not None:
        shared = {letter: size for letter, size in per_head.items() if letter != "Hq"}
        dims = per_head if query_weight.ndim == len(per_head) else shared
        _check_tensor(op, "query_weight", query_weight, q, dims, (torch.bool, *_FLOATS))
        query_weight = query_weight.to(_score_dtype(q))
    return dispatch(
        op,
        _column_mass_reference,
        q=q,
        k=k,
        scale=scale,
        lse=lse,
        query_weight=query_weight,
        reduce=reduce,
        softcap=softcap,
        cu_seqlens=cu_seqlens,
        **masks,
    )


# The references. They define the numbers.


def _row_logsumexp_reference(*, q: Tensor, k: Tensor, **logit_arguments: Any) -> Tensor:
    with autocast_off(q):
        return torch.cat([_logsumexp(**arguments) for arguments in _by_samples(q=q, k=k, **logit_arguments)])


def _logsumexp(q: Tensor, k: Tensor, **logit_arguments: Any) -> Tensor:
    blocks = [logits.logsumexp(-1).flatten(1, 2) for _, logits, *_ in _logit_blocks(q, k, **logit_arguments)]
    return torch.cat([q.new_empty((*q.shape[:2], 0), dtype=_score_dtype(q)), *blocks], dim=2)


def _column_mass_reference(
    *,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    query_weight: Tensor | None,
    reduce: Reduce,
    cu_seqlens: Tensor | None,
    **logit_arguments: Any,
) -> Tensor:
    with autocast_off(q):
        if cu_seqlens is None:
            samples = _by_samples(q=q, k=k, lse=lse, weight=query_weight, **logit_arguments)
            mass_BKGS = torch.cat([_column_mass(**arguments) for arguments in samples])
        else:
            mass_BKGS = _packed_column_mass(q, k, lse, query_weight, cu_seqlens, **logit_arguments)
    mass = mass_BKGS.flatten(1, 2) if reduce == "none" else mass_BKGS.mean(2 if reduce == "group" else (1, 2))
    return mass if cu_seqlens is None else mass.squeeze(0)


def _packed_column_mass(
    q_THD: Tensor,
    k_TKD: Tensor,
    lse_HT: Tensor | None,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    **logit_arguments: Any,
) -> Tensor:
    """Treat every segment as a batch of one: [1, K, G, T]."""
    (total, heads, _), kv_heads = q_THD.shape, k_TKD.shape[1]
    bounds = cu_seqlens.tolist()
    # Checked here and not with the arguments: an accelerated back end never brings the bounds to the host.
    if bounds[:1] != [0] or bounds[-1] != total or any(end < start for start, end in pairwise(bounds)):
        raise ValueError(f"attention_column_mass: cu_seqlens must go from 0 up to T = {total}, got {bounds}")
    q_BHTD, k_BKTD = q_THD.transpose(0, 1)[None], k_TKD.transpose(0, 1)[None]
    masses = [q_THD.new_zeros((1, kv_heads, heads // kv_heads, 0), dtype=_score_dtype(q_THD))]
    for start, end in pairwise(bounds):
        lse = None if lse_HT is None else lse_HT[None, :, start:end]
        segment_weight = None if weight is None else weight[None, ..., start:end]
        masses.append(
            _column_mass(q_BHTD[:, :, start:end], k_BKTD[:, :, start:end], lse, segment_weight, **logit_arguments)
        )
    return torch.cat(masses, dim=-1)


def _column_mass(q: Tensor, k: Tensor, lse: Tensor | None, weight: Tensor | None, **logit_arguments: Any) -> Tensor:
    """Return [B, K, G, S]; weight is [B, W] or [B, H, W]."""
    q_BHWD, k_BKSD, lse_BHW = q, k, lse
    batch, heads, width, _ = q_BHWD.shape
    kv_heads, keys = k_BKSD.shape[1:3]
    grouped = (batch, kv_heads, heads // kv_heads)
    lse_BKGW = None if lse_BHW is None else lse_BHW.reshape(*grouped, width)
    if weight is not None and weight.ndim == 2:
        weight = weight[:, None].expand(batch, heads, width)
    weight_BKGW = None if weight is None else weight.reshape(*grouped, width)

    mass_BKGS = q_BHWD.new_zeros((*grouped, keys), dtype=_score_dtype(q_BHWD))
    for rows, logits, first, hidden in _logit_blocks(q_BHWD, k_BKSD, **logit_arguments):
        p = _probabilities(logits, None if lse_BKGW is None else lse_BKGW[..., rows, None], first, hidden)
        # The weighted sum as a product: no second block of weight * p.
        mass = p.sum(-2) if weight_BKGW is None else (weight_BKGW[..., None, rows] @ p).squeeze(-2)
        mass_BKGS = mass_BKGS + torch.nn.functional.pad(mass, (0, keys - mass.shape[-1]))
    return mass_BKGS


def _probabilities(logits: Tensor, lse: Tensor | None, first: int, hidden: Tensor | None) -> Tensor:
    """exp(z - lse), 0 where hidden and in rows with lse = -inf; without an lse, the softmax.

    ``hidden`` is about the keys from ``first`` on. The logits may be overwritten.
    """
    # lse = -inf becomes +inf: exp(z - inf) is 0, and so is its gradient.
    p = logits.softmax(-1) if lse is None else logits.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()
    if hidden is None:
        return p
    # What is hidden is 0 by now, except in a fully masked row (softmax: NaN) and in one whose lse is NaN.
    if p.requires_grad:  # the backward reads p
        return torch.cat([p[..., :first], p[..., first:].masked_fill(hidden, 0)], -1)
    p[..., first:].masked_fill_(hidden, 0)
    return p


def _by_samples(q: Tensor, k: Tensor, **arguments: Any) -> Iterator[dict[str, Any]]:
    """The arguments of as many samples at a time as one block of logits may hold, at least one.

    The blocks of query rows are then the same whatever the batch: a sample's sums never depend on its batch mates.
    """
    sample_bytes = q.shape[1] * q.shape[2] * k.shape[2] * _score_dtype(q).itemsize
    step = max(1, _block_bytes(q) // max(1, sample_bytes))
    if len(q) <= step:
        yield {"q": q, "k": k, **arguments}
        return
    for start in range(0, len(q), step):
        rows = slice(start, start + step)
        yield {n: v[rows] if isinstance(v, Tensor) else v for n, v in {"q": q, "k": k, **arguments}.items()}


def _logit_blocks(
    q_BHWD: Tensor,
    k_BKSD: Tensor,
    *,
    scale: float,
    softcap: float | None,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_valid: Tensor | None,
) -> Iterator[tuple[slice, Tensor, int, Tensor | None]]:
    """Yield blocks of query rows: (rows, logits [B, K, G, w, s] of the first s keys, -inf where hidden, the first key
    that may be hidden, and whether those from it on are: it broadcasts to their logits, or None for none).

    Without explicit positions a causal block needs no key behind its last row, and no mask before its first.
    """
    (batch, heads, width, dim), (_, kv_heads, keys, _) = q_BHWD.shape, k_BKSD.shape
    dtype = _score_dtype(q_BHWD)
    k_BKDS = k_BKSD.to(dtype).contiguous().transpose(-1, -2)  # contiguous: no bit may depend on the strides
    aligned = causal and q_pos is None and k_pos is None
    if causal:
        q_pos = torch.arange(keys - width, keys, device=q_BHWD.device)[None] if q_pos is None else q_pos
        k_pos = torch.arange(keys, device=q_BHWD.device)[None] if k_pos is None else k_pos

    step = max(1, _block_bytes(q_BHWD) // max(1, heads * keys * dtype.itemsize))
    for start in range(0, width, step):
        rows = slice(start, min(start + step, width))
        count = rows.stop - rows.start
        # The rows of the G heads of a group lie side by side, so that their one K needs no repeating.
        q_block = (q_BHWD[:, :, rows].to(dtype) * scale).contiguous()
        q_block = q_block.view(batch, kv_heads, heads // kv_heads * count, dim)
        seen = min(keys, max(1, keys - width + rows.stop)) if aligned else keys
        first = min(seen, max(0, keys - width + start + 1)) if aligned and key_valid is None else 0
        logits = (q_block @ k_BKDS[..., :seen]).view(batch, kv_heads, heads // kv_heads, count, seen)
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        hidden = None if key_valid is None else ~key_valid[:, None, :seen]
        if q_pos is not None and k_pos is not None:
            later = k_pos[:, None, first:seen] > q_pos[:, rows, None]
            hidden = later if hidden is None else later | hidden
        if hidden is not None:
            hidden = hidden[:, None, None]
            logits[..., first:].masked_fill_(hidden, -torch.inf)
        yield rows, logits, first, hidden


def _block_bytes(q: Tensor) -> int:
    return min(_LOGITS_BLOCK_BYTES, _CPU_LOGITS_BLOCK_BYTES) if q.device.type == "cpu" else _LOGITS_BLOCK_BYTES


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# Checks of the arguments. None of them reads a value of a tensor, so none waits for the device.

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def _check_queries_and_keys(op: str, q: Tensor, k: Tensor, *, packed: bool) -> None:
    letters = ("T", "Hq", "D") if packed else ("B", "Hq", "W", "D")
    _check_tensor(op, "q", q, q, dict.fromkeys(letters), _FLOATS)
    dim = q.shape[-1]
    expected = {"T": q.shape[0], "Hk": None, "D": dim} if packed else {"B": q.shape[0], "Hk": None, "S": None, "D": dim}
    _check_tensor(op, "k", k, q, expected, (q.dtype,))
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: the heads of k must divide those of q, got {kv_heads} for {heads}")


def _checked_masks(
    op: str,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_valid: Tensor | None,
) -> dict[str, Any]:
    """Check the mask arguments and return them as the back ends take them: positions int32, and only if causal."""
    queries, keys = {"B": q.shape[0], "W": q.shape[-2]}, {"B": q.shape[0], "S": k.shape[-2]}
    if q_pos is not None:
        _check_tensor(op, "q_pos", q_pos, q, queries, _INTEGERS)
    if k_pos is not None:
        _check_tensor(op, "k_pos", k_pos, q, keys, _INTEGERS)
    if key_valid is not None:
        _check_tensor(op, "key_valid", key_valid, q, keys, (torch.bool,))
    return {
        "causal": causal,
        "q_pos": q_pos.int() if causal and q_pos is not None else None,
        "k_pos": k_pos.int() if causal and k_pos is not None else None,
        "key_valid": key_valid,
    }


def _check_scalars(op: str, scale: float, softcap: float | None) -> None:
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not isinstance(value, int | float):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")


def _check_tensor(
    op: str, name: str, value: Tensor, like: Tensor, shape: Mapping[str, int | None], dtypes: Sequence[torch.dtype]
) -> None:
    """Check the shape (None leaves a size open), the dtype and, against the tensor like, the device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    sizes = tuple(shape.values())
    if value.ndim != len(sizes) or any(n is not None and n != got for n, got in zip(sizes, value.shape, strict=True)):
        known = ", ".join(f"{letter} = {size}" for letter, size in shape.items() if size is not None)
        source = f" with {known} (from q)" if known and name != "q" else ""
        raise ValueError(f"{op}: {name} must be [{', '.join(shape)}]{source}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} (as q), got {value.device}")
