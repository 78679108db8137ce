"""Cosine similarities of tokens, in blocks of bounded size.

Shape letters: N tokens, R rows of one block, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 64 * 2**20
"""The largest similarity matrix that is held at once: all pairs of 4096 tokens in float32."""


def unit_rows(features: Tensor) -> Tensor:
    """[N, D] floats -> [N, D] rows of length one, float32 (float64 for float64); a row of zeros stays zero.

    Always new, contiguous memory: the products then round alike whatever tensor the tokens were a slice of.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    rows = features.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
    return torch.nn.functional.normalize(rows, dim=-1)


def all_similarities(unit: Tensor) -> Tensor:
    """[N, D] -> [N, N]; a token's similarity to itself is exactly 1 (0 for a row of zeros)."""
    with _autocast_off(unit):
        pairs = unit @ unit.T
    pairs.diagonal().round_()  # else a tie between tokens that are like no other is decided by the last bit
    return pairs


def similarities_of(unit: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` [R] of ``all_similarities``: [R, N]."""
    with _autocast_off(unit):
        rows = unit[index] @ unit.T
    own = rows.gather(1, index[:, None]).round()
    return rows.scatter_(1, index[:, None], own)


def fits(n: int, dtype: torch.dtype) -> bool:
    """Whether all pairs of n tokens stay within ``BLOCK_BYTES``."""
    return n * n * dtype.itemsize <= BLOCK_BYTES


def rows_per_block(n: int, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (n * dtype.itemsize))


def row_blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, similarities [R, len(columns)]) of all rows to all columns, each within ``BLOCK_BYTES``."""
    step = rows_per_block(len(columns), rows.dtype)
    for start in range(0, len(rows), step):
        with _autocast_off(rows):
            block = rows[start : start + step] @ columns.T
        yield start, block


def check_tokens(function: str, features: Tensor, k: int) -> None:
    """Raise ``ValueError`` unless ``features`` is [N, D] or [B, N, D] and 1 <= k <= N."""
    if features.ndim not in (2, 3) or not features.is_floating_point():
        shape = tuple(features.shape)
        raise ValueError(f"{function}: features must be floats [N, D] or [B, N, D], got {features.dtype} {shape}")
    if not 1 <= k <= features.shape[-2]:
        raise ValueError(f"{function}: k={k} must lie in [1, {features.shape[-2]}], the number of tokens")


def _autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """Keep an ambient autocast from turning the float32 products into half precision, which ties most of them."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
