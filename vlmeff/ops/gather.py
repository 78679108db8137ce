"""Exact copies of chosen tokens: of hidden states, and of the keys and values of a cache.

Shape letters: B batch, S tokens, C channels, K kept tokens; Hk key/value heads, D head dim, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmeff.ops._dispatch import dispatch, may_read, operator


@operator
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Copy the tokens at index into a new tensor.

    out[b, i] = x[b, index[b, i]].

    Args:
        x: [B, S, C], or [S, C] without a batch. Any dtype (also float8 and integers), any strides.
        index: [B, K], or [K] for x without a batch; int64, values in [0, S), in any order, repeats allowed.
    Returns:
        [B, K, C], or [K, C]: contiguous, never a view of x, dtype of x, bit for bit the values of x. K = 0 is legal.
    Raises:
        ValueError: a shape or device does not fit, or an index is out of range. The range is checked on CPU always, on
            CUDA only under ``VLMEFF_DEBUG=1``, because looking at the values waits for the device.
        TypeError: index is not int64.

    Uses: keeping the chosen visual tokens and their positions. Differentiable in x.
    """
    for name, value in (("x", x), ("index", index)):
        if not isinstance(value, Tensor):
            raise TypeError(f"gather_tokens: {name} must be a tensor, got {type(value).__name__}")
    if x.ndim not in (2, 3):
        raise ValueError(f"gather_tokens: x must be [B, S, C] or [S, C], got {tuple(x.shape)}")
    if index.ndim != x.ndim - 1 or index.shape[:-1] != x.shape[:-2]:
        expected = "[K]" if x.ndim == 2 else f"[B, K] with B = {x.shape[0]} (from x)"
        raise ValueError(f"gather_tokens: index must be {expected}, got {tuple(index.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"gather_tokens: index must be int64, got {str(index.dtype).removeprefix('torch.')}")
    if index.device != x.device:
        raise ValueError(f"gather_tokens: index must be on {x.device} (as x), got {index.device}")
    if may_read(index, debug=True):
        check_range(index, x.shape[-2], op="gather_tokens")
    return dispatch("gather_tokens", _gather_tokens_reference, x=x, index=index)


def _gather_tokens_reference(*, x: Tensor, index: Tensor) -> Tensor:
    # Not torch.gather: on CPU that quietens signalling NaNs of 16-bit floats, knows no float8 and is ten times slower.
    if x.ndim == 2:
        return x.index_select(0, index) if x.device.type == "cpu" else x[index]
    if _as_rows(index, x):  # several times as fast as two indices
        starts = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        return x.flatten(0, 1).index_select(0, (index + starts).flatten()).unflatten(0, index.shape)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def _as_rows(index: Tensor, *tensors: Tensor) -> bool:
    """Whether tokens are looked up as rows of one list: where the range of the index was checked. An index that is out
    of it would take a row of a neighbour."""
    return may_read(index) and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


@operator
def gather_kv(
    keys: Tensor | Sequence[Tensor], values: Tensor | Sequence[Tensor], index: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Copy the cache entries at index, of one layer or of many at once.

    keys'[b, h, i] = keys[b, h, index[b, (h,) i]], and values likewise.

    Args:
        keys, values: [B, Hk, S, D] of one layer, or lists of L such tensors, each with its own S and K. The head dims
            of keys and values may differ. Any dtype (also float8 and integers), any strides.
        index: [B, K] (one choice for all heads) or [B, Hk, K], or a list of L such; int64, values in [0, S), ascending
            behind the fillers of a ragged batch, which repeat an entry.
    Returns:
        (keys', values'), [B, Hk, K, D], or two lists of them: contiguous, in storage of their own, bit for bit. K = 0
            is legal.
    Raises:
        ValueError: a shape or device does not fit, the lists differ in length, or an index is out of range (checked
            as in ``gather_tokens``).
        TypeError: index is not int64, or keys and values of a layer differ in dtype.

    Never in place: rows that are moved in parallel overlap. One launch for all layers where the back end can.
    """
    one = isinstance(keys, Tensor)
    layers = [list(given) if isinstance(given, list | tuple) else [given] for given in (keys, values, index)]
    if not layers[0]:
        raise ValueError("gather_kv: keys must have at least one layer, got an empty list")
    if len({len(part) for part in layers}) != 1:
        counts = ", ".join(str(len(part)) for part in layers)
        raise ValueError(f"gather_kv: keys, values and index must be as many, got {counts}")
    for k, v, chosen in zip(*layers, strict=True):
        _check_layer(k, v, chosen)
    found = dispatch("gather_kv", _gather_kv_reference, keys=layers[0], values=layers[1], index=layers[2])
    if one and isinstance(found, tuple):  # not what explain() asks for
        return found[0][0], found[1][0]
    return found


def _gather_kv_reference(
    *, keys: list[Tensor], values: list[Tensor], index: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    taken = [_entries([k, v], chosen) for k, v, chosen in zip(keys, values, index, strict=True)]
    return [k for k, _ in taken], [v for _, v in taken]


def _entries(both: list[Tensor], index: Tensor) -> list[Tensor]:
    """[B, Hk, S, D] each, at [B, K] or [B, Hk, K]."""
    batch, heads, tokens = both[0].shape[:3]
    if index.ndim == 2:
        index = index[:, None]
    if _as_rows(index, *both):  # twice as fast as a choice along the third dimension
        first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1) * tokens
        taken = [states.flatten(0, 2).index_select(0, (index + first).flatten()) for states in both]
        return [rows.view(batch, heads, index.shape[2], rows.shape[1]) for rows in taken]
    if batch == 1 and index.shape[1] == 1:
        return [states.index_select(2, index[0, 0]) for states in both]
    # Not torch.gather, as in _gather_tokens_reference.
    of_batch, of_heads = torch.arange(batch, device=index.device), torch.arange(heads, device=index.device)
    return [states[of_batch[:, None, None], of_heads[:, None], index].contiguous() for states in both]


def _check_layer(keys: Tensor, values: Tensor, index: Tensor) -> None:
    for name, value in (("keys", keys), ("values", values), ("index", index)):
        if not isinstance(value, Tensor):
            raise TypeError(f"gather_kv: {name} must be a tensor or a list of tensors, got {type(value).__name__}")
        if value.device != keys.device:
            raise ValueError(f"gather_kv: {name} must be on {keys.device} (as keys), got {value.device}")
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"gather_kv: keys and values must be [B, Hk, S, D], got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if keys.dtype != values.dtype:
        raise TypeError(f"gather_kv: keys and values must have one dtype, got {keys.dtype} and {values.dtype}")
    batch, heads, tokens = keys.shape[:3]
    if index.ndim not in (2, 3) or index.shape[:-1] not in ((batch,), (batch, heads), (batch, 1)):
        raise ValueError(
            f"gather_kv: index must be [B, K] or [B, Hk, K] with B = {batch}, Hk = {heads} (from keys), got "
            f"{tuple(index.shape)}"
        )
    if index.dtype != torch.int64:
        raise TypeError(f"gather_kv: index must be int64, got {str(index.dtype).removeprefix('torch.')}")
    if may_read(index, debug=True):
        check_range(index, tokens, op="gather_kv")


def check_range(index: Tensor, tokens: int, *, op: str, name: str = "index") -> None:
    if index.numel() == 0:
        return
    low, high = map(int, torch.aminmax(index))
    if low < 0 or high >= tokens:
        raise ValueError(f"{op}: {name} must lie in [0, {tokens}), got values from {low} to {high}")
