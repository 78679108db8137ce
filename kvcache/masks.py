"""Attention masks for a layer that no longer holds every column.

The library builds one mask for the full cache: M over K = seen + q keys. A layer that holds C old columns needs one
over C + q. Every old column lies before every new query, so of the old part only ``valid`` [B, C] matters (padding and
fillers are False); the new part is the last q columns of M. Pure functions; none of them waits for the device.

Forms of M, by back end: bool [B, 1, q, K] or None (sdpa), float [B, 1, q, K] (eager), bool [B, K] or None (flash),
``BlockMask`` (flex). None means causal, nothing padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from vlmeff.errors import UnsupportedMaskError

Mask = Tensor | BlockMask | None

_ROWS_AT_A_TIME = 256  # query rows of a BlockMask that are written out at a time


def compact_mask(
    mask: Mask,
    valid: Tensor | None,
    *,
    columns: int,
    new: int,
    seen: int,
    rows: int,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    new_valid: bool = False,
) -> Mask:
    """The mask of a layer with ``columns`` old columns for ``new`` queries.

    Args:
        mask: M, as the library built it for ``seen`` old tokens.
        valid: [B, columns] bool; None: every old column is real.
        rows, device, dtype: B, and where and in which type a mask is made when there is none to cut.
        backend: ``config._attn_implementation``.
        new_valid: known without looking: none of the new tokens is padding.
    Raises:
        UnsupportedMaskError: M has none of the forms above.
    """
    if isinstance(mask, BlockMask):
        return _block_mask(mask, valid, columns=columns, new=new, seen=seen, rows=rows, device=device)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim not in (2, 4)):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedMaskError(
            f"KV retention cannot cut the attention mask of the attention back end {backend!r} ({got}): use "
            "model.set_attn_implementation('sdpa')."
        )
    if valid is not None:
        valid = valid.to(device)
    if "flash" in backend:
        return _flat_mask(mask, valid, columns=columns, new=new, rows=rows, new_valid=new_valid, device=device)
    if backend == "flex_attention" and mask is None:
        raise UnsupportedMaskError(
            "KV retention with flex attention needs the mask that the model builds: pass attention_mask=None or 2-D."
        )
    # Without a mask sdpa picks its fastest kernel; alone, one new token sees every old column.
    if valid is None and new == 1 and (mask is None or (new_valid and mask.ndim == 4 and mask.dtype == torch.bool)):
        return None
    return _square_mask(mask, valid, columns=columns, new=new, rows=rows, backend=backend, device=device, dtype=dtype)


def _square_mask(
    mask: Tensor | None,
    valid: Tensor | None,
    *,
    columns: int,
    new: int,
    rows: int,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """bool or float [B, 1, q, C + q]."""
    if mask is None:
        recent = torch.ones(new, new, dtype=torch.bool, device=device).tril().expand(rows, 1, new, new)
        if backend == "eager":
            recent = _as_float(recent, dtype)
    elif mask.ndim == 2:  # a kernel of one's own that takes the padding alone
        recent = mask[:, None, None, -new:].bool() & torch.ones(new, new, dtype=torch.bool, device=device).tril()
    else:
        recent = mask[..., -new:]
    heads = recent.shape[1]
    if valid is None:
        old = torch.ones(1, dtype=torch.bool, device=device).expand(rows, heads, new, columns)
    else:
        old = valid[:, None, None].expand(rows, heads, new, columns)
    if recent.dtype != torch.bool:
        old = _as_float(old, recent.dtype)
    return torch.cat([old, recent.expand(rows, -1, -1, -1)], -1)


def _as_float(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _flat_mask(
    mask: Tensor | None,
    valid: Tensor | None,
    *,
    columns: int,
    new: int,
    rows: int,
    new_valid: bool,
    device: torch.device,
) -> Tensor | None:
    """bool [B, C + q], None when nothing is masked: the kernel is causal by itself, aligned to the last key."""
    if valid is None and (mask is None or new_valid):
        return None
    old = torch.ones(rows, columns, dtype=torch.bool, device=device) if valid is None else valid
    if mask is None:
        recent = torch.ones(rows, new, dtype=torch.bool, device=device)
    else:
        recent = (mask if mask.ndim == 2 else mask[:, 0, -1])[:, -new:].bool()
    return torch.cat([old, recent], 1)


def _block_mask(
    mask: BlockMask, valid: Tensor | None, *, columns: int, new: int, seen: int, rows: int, device: torch.device
) -> BlockMask:
    original, last = mask.mask_mod, max(columns - 1, 0)
    known = torch.ones(rows, max(columns, 1), dtype=torch.bool, device=device) if valid is None else valid.to(device)

    def compacted(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # Both sides are computed for every j: the indices of the one that is not taken must be legal too.
        return torch.where(j < columns, known[b, j.clamp(max=last)], original(b, h, i, j - columns + seen))

    return create_block_mask(compacted, rows, None, new, columns + new, device=device)


def new_validity(mask: Mask, new: int) -> Tensor | None:
    """[B, new] bool: which of the new tokens are real, read off the mask's last query row; None: all of them."""
    if mask is None:
        return None
    if isinstance(mask, BlockMask):
        return _written_out(mask, [mask.seq_lengths[0] - 1])[:, 0, -new:]
    last = mask if mask.ndim == 2 else mask[:, 0, -1]
    last = last[:, -new:]
    return last.bool() if mask.ndim == 2 else _allowed(last)


def last_visible(mask: Mask) -> Tensor | None:
    """[B, q] int64: the last key that each query sees; None: its own, the mask is plainly causal.

    Models that let the tokens of a picture see each other in both directions (Gemma 3, PaliGemma) differ from causal in
    that alone: a query sees every real key up to the end of its picture. Rows that see nothing get the last key.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return None
    if isinstance(mask, BlockMask):
        queries, rows = mask.seq_lengths[0], range(0, mask.seq_lengths[0], _ROWS_AT_A_TIME)
        parts = [_written_out(mask, range(r, min(r + _ROWS_AT_A_TIME, queries))) for r in rows]
        return torch.cat([_last_true(part) for part in parts], 1)
    return _last_true(_allowed(mask[:, 0]))


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _last_true(allowed: Tensor) -> Tensor:
    return allowed.shape[-1] - 1 - allowed.flip(-1).to(torch.uint8).argmax(-1)


def _written_out(mask: BlockMask, queries: Any) -> Tensor:
    """bool [B, len(queries), K] of some query rows."""
    device = mask.kv_num_blocks.device
    b = torch.arange(mask.shape[0], device=device)
    i = torch.tensor(list(queries), device=device)
    j = torch.arange(mask.seq_lengths[1], device=device)
    head = torch.zeros((), dtype=torch.int64, device=device)
    function: Any = lambda row, query, key: mask.mask_mod(row, head, query, key)  # noqa: E731
    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        function = torch.vmap(function, in_dims=dims)
    return function(b, i, j).expand(len(b), len(i), len(j))
