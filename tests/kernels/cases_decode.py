"""Launches of the decode attention over packed keys and values that must compile well."""

from __future__ import annotations

import torch
from compile_gate import Case

from vlmeff import ops

TENSOR = {"decode_split": {80: "HMMA", 90: "HMMA"}}  # 16 rows of queries: fewer than a warp group's 64


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(heads: int, kv_heads: int, columns: int, dim: int, bits: int, *, rows: int = 1) -> torch.Tensor:
    """A cache of ``columns`` columns as it is stored: all but the last 128 packed."""
    packed = columns // 128 * 128, columns - 128
    shape, width = (rows, kv_heads), dim * bits // 8
    about = zip(packed, ((packed[0] // 32, dim), (packed[1], dim // 32)), strict=True)
    keys, values = (
        ops.StoredStates(
            meta(*shape, tokens, width, dtype=torch.uint8),
            meta(*shape, *scales),
            meta(*shape, *scales),
            meta(*shape, columns - tokens, dim),
            bits,
            32,
        )
        for tokens, scales in about
    )
    valid = None if rows == 1 else meta(rows, columns, dtype=torch.bool)
    return ops.quantized_decode_attention(meta(rows, heads, 1, dim), keys, values, scale=dim**-0.5, valid=valid)


CASES = [
    Case(f"int{bits} {heads}/{kv_heads} heads D={dim} rows={rows}",
         lambda a=(heads, kv_heads, 4177, dim, bits), rows=rows: attention(*a, rows=rows),  # type: ignore[misc]
         instructions=TENSOR, wide_loads=("decode_split",))
    for heads, kv_heads, dim, bits, rows in (
        (28, 4, 128, 8, 1), (28, 4, 128, 4, 1), (28, 4, 128, 2, 1), (32, 32, 128, 4, 1), (28, 4, 128, 4, 4),
        (8, 4, 256, 8, 1),
    )
]  # fmt: skip
