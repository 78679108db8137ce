"""Launches of the low-bit linear layers that must compile well: sizes of Wan-14B, and short inputs."""

from __future__ import annotations

from typing import Any

import torch
from compile_gate import Case
from torch import Tensor

from vlmeff import ops

INTEGER, FLOAT8 = {80: "IMMA", 90: "IGMMA"}, {90: "QGMMA"}
ROWS, FEATURES, HIDDEN = 32760, 5120, 13824


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def eight_bit(op: Any, codes: torch.dtype, m: int, n: int, k: int) -> Tensor:
    bias = meta(n, dtype=torch.bfloat16)
    out: Tensor = op(meta(m, k, dtype=codes), meta(m, 1), meta(n, k, dtype=codes), meta(n, 1), bias, torch.bfloat16)
    return out


def w4a8(m: int, n: int, k: int, group: int = 0, s_groups: bool = False) -> Tensor:
    groups = k // group if group else 1
    q, wq = meta(m, k, dtype=torch.int8), meta(n, k // 2, dtype=torch.uint8)
    s = meta(m, groups if s_groups else 1)
    ws = meta(n, groups, dtype=torch.bfloat16 if group else torch.float32)
    return ops.linear_w4a8_int8(q, s, wq, ws, meta(n, dtype=torch.bfloat16), torch.bfloat16, group=group)


def wnan(m: int, n: int, k: int) -> Tensor:
    z, rowsum, colsum = (meta(*shape, dtype=torch.int32) for shape in ((m, 1), (m, 1), (n,)))
    q, wq = (meta(*shape, dtype=torch.uint8) for shape in ((m, k), (n, k // 2)))
    bias = meta(n, dtype=torch.bfloat16)
    return ops.linear_wnan_int(q, meta(m, 1), z, rowsum, wq, meta(n, 1), meta(n, 1), colsum, bias, torch.bfloat16)


CASES = [
    Case(
        f"w8a8_int8 M={m} N={n} K={k}",
        lambda m=m, n=n, k=k: eight_bit(ops.linear_w8a8_int8, torch.int8, m, n, k),  # type: ignore[misc]
        # Sixteen rows are fewer than a Hopper product of a warp group has.
        {"w8a8_int8": {**INTEGER, 90: "IGMMA" if m > 16 else "IMMA"}},
        wide_loads=("w8a8_int8",),
    )
    for m, n, k in ((ROWS, FEATURES, FEATURES), (64, HIDDEN, FEATURES), (16, FEATURES, FEATURES))
] + [
    Case(
        "w8a8_fp8 large",
        lambda: eight_bit(ops.linear_w8a8_fp8, torch.float8_e4m3fn, ROWS, FEATURES, HIDDEN),
        {"w8a8_fp8": FLOAT8},
        wide_loads=("w8a8_fp8",),
        architectures=(90,),
    ),
    Case(
        "w4a8 one scale",
        lambda: w4a8(ROWS, FEATURES, HIDDEN),
        {"w4a8": INTEGER},
        wide_loads=("w4a8",),
    ),
    Case(
        "w4a8 groups of 128",
        lambda: w4a8(ROWS, FEATURES, FEATURES, group=128),
        {"w4a8": INTEGER},
        wide_loads=("w4a8",),
    ),
    Case(
        "w4a8 groups of 64, of tokens too",
        lambda: w4a8(ROWS, FEATURES, FEATURES, group=64, s_groups=True),
        {"w4a8": INTEGER},
        wide_loads=("w4a8",),
    ),
    Case(
        "wnan",
        lambda: wnan(ROWS, FEATURES, FEATURES),
        {"wnan": INTEGER},
        wide_loads=("wnan",),
    ),
]
