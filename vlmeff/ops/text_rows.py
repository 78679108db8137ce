"""How much the text of a prompt looks at each visual token, without an attention map (AdaptInfer, arXiv 2508.06084).

Shape letters: B batch, Hq query heads, Hkv key heads, T text rows, nv visual tokens, L keys, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmeff.ops._arguments import autocast_off
from vlmeff.ops._dispatch import dispatch, is_chosen, may_read, operator
from vlmeff.ops.attention import (
    _INTEGERS,
    _check_queries_and_keys,
    _check_scalars,
    _check_tensor,
    attention_column_mass,
    row_logsumexp,
)
from vlmeff.ops.gather import check_range

_AT_ONCE_BYTES = 32 * 2**20  # of the attention rows of a text that is done in one pass


@operator
def text_to_vision_scores(
    q: Tensor,
    k: Tensor,
    *,
    text: Tensor,
    vision: Tensor,
    scale: float,
    key_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Score visual tokens by the attention of the text, each text row weighted by its standing among the text.

    A is the causal softmax of a text row over all its valid keys, heads h apart:

        T2T  = A[h, text, text]
        w_j  = rowsum_j(T2T) + colsum_j(T2T) - diag_j(T2T)        the column sum of T2T + T2T^T - diag
        s[v] = sum_h sum_t w[h, t] * A[h, t, v]

    Args:
        q: [B, Hq, T, D] queries of the text rows, rotary embedding applied; float32, float16, bfloat16 or float64.
        k: [B, Hkv, L, D] keys of the whole sequence, dtype and device of q; Hkv divides Hq.
        text: [B, T] int32 or int64, the column of k at which each text row stands, distinct within a sample. A row
            sees the columns up to and with its own.
        vision: [B, nv] int32 or int64, the columns to score, distinct within a sample.
        scale: factor of the inner products.
        key_valid: [B, L] bool, False for padding; default all True.
        text_valid: [B, T] bool, False for rows that only fill up a ragged batch (their ``text`` is any column); such a
            row, and one that stands in the padding, neither votes nor counts in the weights. Default all True.
        softcap: positive, or None.
    Returns:
        [B, nv] float32 (float64 for float64 inputs), heads summed last. Up to rounding, a sample does not depend on its
        batch mates nor on what fills it up; it is 0 where the sample has no text.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.

    Four passes over blocks of text rows, so nothing of size Hq x L x L or Hq x T x L is held: the normalisers over all
    keys, row and column sums over the text's keys, and the weighted column mass of the visual keys. Each is an op of
    its own with its own kernels; this one only combines them, so its choice of back end is theirs. On a CPU, where all
    four would run on their references, a short text is done in one pass that holds its rows [B, Hq, T, L].

    Source: arXiv 2508.06084, official code; differs in working from q and k instead of an attention map, and in
    float32.
    """
    op = "text_to_vision_scores"
    _check_queries_and_keys(op, q, k, packed=False)
    rows, keys = {"B": q.shape[0], "T": q.shape[2]}, {"B": q.shape[0], "L": k.shape[2]}
    _check_tensor(op, "text", text, q, rows, _INTEGERS)
    _check_tensor(op, "vision", vision, q, {"B": q.shape[0], "nv": None}, _INTEGERS)
    if key_valid is not None:
        _check_tensor(op, "key_valid", key_valid, q, keys, (torch.bool,))
    if text_valid is not None:
        _check_tensor(op, "text_valid", text_valid, q, rows, (torch.bool,))
    _check_scalars(op, scale, softcap)
    for name, columns in (("text", text), ("vision", vision)):
        if may_read(columns, debug=True):
            check_range(columns, k.shape[2], op=op, name=name)
    return dispatch(
        op,
        _reference,
        q=q,
        k=k,
        text=text.long(),
        vision=vision.long(),
        scale=scale,
        key_valid=key_valid,
        text_valid=text_valid,
        softcap=softcap,
    )


def _reference(
    *,
    q: Tensor,
    k: Tensor,
    text: Tensor,
    vision: Tensor,
    scale: float,
    key_valid: Tensor | None,
    text_valid: Tensor | None,
    softcap: float | None,
) -> Tensor:
    votes = torch.ones_like(text, dtype=torch.bool) if text_valid is None else text_valid
    if key_valid is not None:
        votes = votes & key_valid.gather(1, text)
    held = len(q) * q.shape[1] * q.shape[2] * k.shape[2] * 4
    if held <= _AT_ONCE_BYTES and q.device.type == "cpu" and not is_chosen("row_logsumexp", "attention_column_mass"):
        with autocast_off(q):
            return _at_once(q, k, text, vision, votes, scale=scale, key_valid=key_valid, softcap=softcap)
    if text_valid is not None or key_valid is not None:
        q = q.masked_fill(~votes[:, None, :, None], 0)  # a weight of 0 would not hide a NaN
    among_text: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "causal": True, "q_pos": text, "k_pos": text, "key_valid": votes,
    }  # fmt: skip
    seen = None if key_valid is None else key_valid.gather(1, vision)
    k_text, k_vision = _columns(k, text), _columns(k, vision)

    every_column = torch.arange(k.shape[2], device=k.device).expand(len(k), -1)
    lse = row_logsumexp(
        q, k, scale=scale, softcap=softcap, causal=True, q_pos=text, k_pos=every_column, key_valid=key_valid
    )
    # A row that does not vote may see no key at all; its normaliser must not make a NaN of the diagonal.
    lse = lse.masked_fill(~votes[:, None], torch.inf)
    row_sum = (row_logsumexp(q, k_text, **among_text) - lse).exp()
    column_sum = attention_column_mass(q, k_text, lse=lse, **among_text)
    weight = row_sum + column_sum - (_diagonal(q, k_text, scale, softcap) - lse).exp()
    weight = weight.masked_fill(~votes[:, None], 0)
    per_head = attention_column_mass(
        q, k_vision, lse=lse, query_weight=weight, scale=scale, softcap=softcap, causal=True, q_pos=text, k_pos=vision,
        key_valid=seen,
    )  # fmt: skip
    return per_head.sum(1)


def _at_once(
    q: Tensor,
    k: Tensor,
    text: Tensor,
    vision: Tensor,
    votes: Tensor,
    *,
    scale: float,
    key_valid: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """The formula as it stands in the docstring, with the rows A [B, Hk, G, T, L] written out."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    grouped = (q.to(dtype) * scale).reshape(len(q), k.shape[1], groups * q.shape[2], q.shape[3])
    logits = (grouped @ k.to(dtype).transpose(2, 3)).view(len(q), k.shape[1], groups, q.shape[2], k.shape[2])
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    # All rows see what stands before the text, so only the rest needs a mask.
    before = int(text.min()) if key_valid is None and text.numel() and may_read(text) else 0
    hidden = torch.arange(before, k.shape[2], device=k.device) > text[:, :, None]
    if key_valid is not None:
        hidden = hidden | ~key_valid[:, None]
    logits[..., before:].masked_fill_(hidden[:, None, None], -torch.inf)
    attention = logits.softmax(-1)
    if not (may_read(votes) and bool(votes.all())):  # of the rows that do not vote some may see no key, and be NaN
        attention = attention.masked_fill(~votes[:, None, None, :, None], 0)
    among_text = attention.gather(4, text[:, None, None, None].expand(*attention.shape[:4], -1))
    among_text = among_text.masked_fill(~votes[:, None, None, None], 0)
    weight = among_text.sum(4) + among_text.sum(3) - among_text.diagonal(dim1=3, dim2=4)
    return (weight.flatten(1)[:, None] @ attention.flatten(1, 3)).squeeze(1).gather(1, vision)


def _columns(k: Tensor, index: Tensor) -> Tensor:
    """[B, Hkv, L, D], [B, n] -> [B, Hkv, n, D]."""
    return k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))


def _diagonal(q: Tensor, k_text: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logit of each text row with its own key: [B, Hq, T]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, _, rows, dim = q.shape
    grouped = q.reshape(batch, k_text.shape[1], q.shape[1] // k_text.shape[1], rows, dim)
    logits = (grouped.to(dtype) * scale * k_text[:, :, None].to(dtype)).sum(-1).flatten(1, 2)
    return logits if softcap is None else softcap * (logits / softcap).tanh()
