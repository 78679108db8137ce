"""Launches of the decode attention over packed keys and values that must compile well."""

from __future__ import annotations

import torch
from compile_gate import Case

from vlmeff import ops

TENSOR = {"decode_split": {80: "HMMA", 90: "HG?MMA"}}  # 16 rows of queries are fewer than a warp group's 64


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(
    heads: int, kv_heads: int, columns: int, dim: int, bits: int, *, group: int = 32, rows: int = 1,
    dtype: torch.dtype = torch.bfloat16, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """A cache of ``columns`` columns as it is stored: all but the last 128 packed."""
    packed = columns // 128 * 128, columns - 128
    shape, width = (rows, kv_heads), dim * bits // 8
    small = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    about = zip(packed, ((packed[0] // group, dim), (packed[1], dim // 32)), (group, 32), strict=True)
    keys, values = (
        ops.StoredStates(
            meta(*shape, tokens, width, dtype=torch.uint8),
            meta(*shape, *scales, dtype=small),
            meta(*shape, *scales, dtype=small),
            meta(*shape, columns - tokens, dim, dtype=dtype),
            bits,
            g,
        )
        for tokens, scales, g in about
    )
    q, valid = meta(rows, heads, 1, dim, dtype=dtype), None if rows == 1 else meta(rows, columns, dtype=torch.bool)
    return ops.quantized_decode_attention(q, keys, values, scale=dim**-0.5, valid=valid, softcap=softcap)


CASES = [
    Case(f"int{bits} {heads}/{kv_heads} heads D={dim} rows={rows}",
         lambda a=(heads, kv_heads, 4177, dim, bits), rows=rows: attention(*a, rows=rows),  # type: ignore[misc]
         instructions=TENSOR, wide_loads=("decode_split",))
    for heads, kv_heads, dim, bits, rows in (
        (28, 4, 128, 8, 1), (28, 4, 128, 4, 1), (28, 4, 128, 2, 1), (32, 32, 128, 4, 1), (28, 4, 128, 4, 4),
        (8, 4, 256, 8, 1),
    )
] + [  # The largest that are not refused, with all there is: one head more, or groups of twice the size, would spill.
    Case(f"largest: int{bits} {heads}/1 heads D={dim} groups of {group}{' float32' * (dtype == torch.float32)}",
         lambda a=(heads, 1, 4177, dim, bits), options=options:  # type: ignore[misc]
             attention(*a, rows=2, softcap=30.0, **options),
         instructions={} if dtype == torch.float32 else TENSOR, wide_loads=("decode_split",))
    for heads, dim, bits, group, dtype in (
        (64, 128, 8, 32, torch.bfloat16), (32, 128, 8, 64, torch.bfloat16), (16, 256, 8, 32, torch.bfloat16),
        (16, 64, 8, 32, torch.float32),
    )
    for options in ({"group": group, "dtype": dtype},)
]  # fmt: skip
