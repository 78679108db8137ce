"""Launches of the gathers that must compile well."""

from __future__ import annotations

import torch
from compile_gate import Case

from vlmeff import ops


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


CASES = [
    Case(
        f"gather_kv D={dim} itemsize={dtype.itemsize}",
        lambda dim=dim, dtype=dtype: ops.gather_kv(  # type: ignore[misc]
            meta(2, 8, 640, dim, dtype=dtype), meta(2, 8, 640, dim, dtype=dtype), index(2, 8, 320)
        ),
        wide_loads=("gather_rows",),
    )
    for dim, dtype in ((128, torch.bfloat16), (80, torch.bfloat16), (64, torch.float8_e4m3fn))
] + [
    Case(
        "gather_tokens C=4096",
        lambda: ops.gather_tokens(meta(4, 2880, 4096), index(4, 640)),
        wide_loads=("gather_one",),
    ),
]
