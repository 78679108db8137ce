"""Exact copies of chosen tokens.

Shape letters: B batch, S tokens, C channels, K kept tokens.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vlmeff.ops._dispatch import dispatch, operator


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
    if _may_read(index):
        _check_range(index, x.shape[-2])
    return dispatch("gather_tokens", _gather_tokens_reference, x=x, index=index)


def _gather_tokens_reference(*, x: Tensor, index: Tensor) -> Tensor:
    # Not torch.gather: on CPU that quietens signalling NaNs of 16-bit floats, knows no float8 and is ten times slower.
    if x.ndim == 2:
        return x[index]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def _may_read(index: Tensor) -> bool:
    """Whether the values may be looked at: at no cost on CPU, on request elsewhere, never while a graph is traced."""
    if torch.compiler.is_compiling():
        return False
    return index.device.type == "cpu" or os.environ.get("VLMEFF_DEBUG") == "1"


def _check_range(index: Tensor, tokens: int) -> None:
    if index.numel() == 0:
        return
    low, high = int(index.amin()), int(index.amax())
    if low < 0 or high >= tokens:
        raise ValueError(f"gather_tokens: index must lie in [0, {tokens}), got values from {low} to {high}")
