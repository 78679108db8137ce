"""What is measured while a prompt goes through: attention received, attention rows, norms of keys. float32 throughout.

Pure functions of the very q and k that the attention kernel used; no heads x S x S tensor is ever made. Letters: B
rows, H query heads, K key/value heads, W queries of this pass, S keys so far, D head dim. Queries are the last W keys'.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlmeff import ops

Reduce = Literal["none", "group", "mean"]


def full_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    reduce: Reduce,
    valid: Tensor | None = None,
    last_key: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention that every key receives from all W queries, which may be the last of the prompt only.

    score[b, j] = sum over real queries i of mean over h of A[b, h, i, j], A = softmax rows, causal. So the scores of a
    prompt of n tokens sum to n. Chunks of a prompt add up.

    Args:
        q: [B, H, W, D].  k: [B, K, S, D].
        reduce: "mean" over all heads; "group", over each key head's query heads only; "none": each query head's own.
        valid: [B, S] bool, False for padding: such keys score 0 and such queries give nothing. None: all real.
        last_key: [B, W] the last key that each query sees; default its own.
    Returns:
        float32 [B, S], [B, K, S] or [B, H, S] by ``reduce``.

    Source: PrefixKV, arXiv 2412.03409, whose code averages the heads in the model's dtype.
    """
    weight, positions = _queries(q, k, valid, last_key)
    mass = ops.attention_column_mass(
        _without_padding(q, weight),
        k,
        scale=scale,
        query_weight=weight,
        reduce=reduce,
        causal=True,
        q_pos=positions,
        key_valid=valid,
        softcap=softcap,
    )
    return mass.float()


def window_rows(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    valid: Tensor | None = None,
    last_key: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The attention rows of W queries, float32 [B, H, W, S]; rows of padding and masked keys are 0. Keep W small.

    Arguments as in ``full_scores``.
    """
    weight, positions = _queries(q, k, valid, last_key)
    q = _without_padding(q, weight)
    groups = q.shape[1] // k.shape[1]
    z = torch.einsum(
        "bkgwd,bksd->bkgws", (_at_least_float(q) * scale).unflatten(1, (k.shape[1], groups)), _at_least_float(k)
    )
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    keys = torch.arange(k.shape[2], device=q.device)
    allowed = keys <= positions[:, :, None]
    if valid is not None:
        allowed = allowed & valid[:, None]
    allowed = allowed[:, None, None]
    p = z.masked_fill(~allowed, -torch.inf).softmax(-1).masked_fill(~allowed, 0).flatten(1, 2)
    return (p if weight is None else p * weight[:, None, :, None]).float()


def full_scores_of_weights(weights: Tensor, *, kv_heads: int, reduce: Reduce, valid: Tensor | None = None) -> Tensor:
    """``full_scores`` from attention weights [B, H, W, S] that were made anyway (eager attention)."""
    batch, heads, width, keys = weights.shape
    real = torch.ones(batch, width, device=weights.device) if valid is None else valid[:, keys - width :].float()
    seen = [_row_sum(weights[:, head], real, valid) for head in range(heads)]  # a float32 copy of one head at a time
    mass = torch.stack(seen, 1)
    if reduce == "none":
        return mass
    return mass.unflatten(1, (kv_heads, heads // kv_heads)).mean(2) if reduce == "group" else mass.mean(1)


def _row_sum(weights: Tensor, real: Tensor, valid: Tensor | None) -> Tensor:
    p = weights.float()
    if valid is not None:
        # A padding query sees nothing, which softmax makes uniform or NaN.
        p = p.masked_fill(~real.bool()[:, :, None], 0).masked_fill(~valid[:, None], 0)
    return (real[:, None] @ p).squeeze(1)


def window_rows_of_weights(weights: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """``window_rows`` from attention weights [B, H, W, S]."""
    p = weights.float()
    if valid is None:
        return p
    real = valid[:, weights.shape[3] - weights.shape[2] :]
    return p.masked_fill(~(real[:, None, :, None] & valid[:, None, None]), 0)


def key_norms(keys: Tensor) -> Tensor:
    """[B, K, S, D] -> float32 [B, K, S]."""
    return torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)


def accumulate(total: Tensor | None, scores: Tensor) -> Tensor:
    """Add a pass's scores [..., S] to those of the passes before it, over fewer keys."""
    if total is None:
        return scores
    return torch.cat([total + scores[..., : total.shape[-1]], scores[..., total.shape[-1] :]], -1)


def stack_rows(total: Tensor | None, rows: Tensor) -> Tensor:
    """Put a pass's rows [B, H, W, S] under those of the passes before it, whose queries saw fewer keys."""
    if total is None:
        return rows
    missing = rows.shape[-1] - total.shape[-1]
    return torch.cat([torch.nn.functional.pad(total, (0, missing)), rows], 2)


def _queries(q: Tensor, k: Tensor, valid: Tensor | None, last_key: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Which queries are real [B, W], None: all, and the last key each sees [B, W]."""
    width, keys = q.shape[2], k.shape[2]
    weight = None if valid is None else valid[:, keys - width :]
    if last_key is None:
        last_key = torch.arange(keys - width, keys, device=q.device).expand(len(q), -1)
    return weight, last_key


def _without_padding(q: Tensor, weight: Tensor | None) -> Tensor:
    """0 weight does not hide NaN, which a padding query may well be: it attended to nothing."""
    return q if weight is None else q.masked_fill(~weight[:, None, :, None], 0)


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
