"""Launches of the attention statistics that must compile well: the window and the whole prompt of LLaVA-1.5-7B, layers
of CLIP-L and SigLIP, Qwen2.5-VL-7B's window and its packed vision tower, one row, and float32."""

from __future__ import annotations

from typing import Any

import torch
from compile_gate import Case

from vlmeff import ops

TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}
BOTH_PASSES = {"lse_of_rows": TENSOR_CORES, "mass_of_columns": TENSOR_CORES}
FLOAT32 = {"lse_of_rows": {80: "FFMA", 90: "FFMA"}, "mass_of_columns": {80: "FFMA", 90: "FFMA"}}
WIDE = ("lse_of_rows", "mass_of_columns")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def mass(queries: tuple[int, ...], keys: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> Any:
    q, k = meta(*queries, dtype=dtype), meta(*keys, dtype=dtype)
    return ops.attention_column_mass(q, k, scale=queries[-1] ** -0.5, **arguments)


CASES = [
    Case(
        "LLaVA, last 64 rows",
        lambda: mass((1, 32, 64, 128), (1, 32, 640, 128), torch.float16, causal=True),
        BOTH_PASSES,
        WIDE,
    ),
    Case(
        "LLaVA, all 640 rows",
        lambda: mass(
            (1, 32, 640, 128), (1, 32, 640, 128), torch.float16, causal=True, reduce="mean",
            query_weight=meta(1, 640, dtype=torch.float32), key_valid=meta(1, 640, dtype=torch.bool),
        ),
        BOTH_PASSES,
        WIDE,
    ),
    Case("SigLIP layer", lambda: mass((1, 16, 729, 72), (1, 16, 729, 72), reduce="mean"), BOTH_PASSES, WIDE),
    Case("CLIP-L layer", lambda: mass((1, 16, 577, 64), (1, 16, 577, 64), reduce="mean"), BOTH_PASSES, WIDE),
    Case(
        "Qwen2.5-VL, last 64 rows",
        lambda: mass((1, 28, 64, 128), (1, 4, 16384, 128), causal=True, reduce="group"),
        BOTH_PASSES,
        WIDE,
    ),
    Case(
        "Qwen2.5-VL vision layer, packed",
        lambda: mass(
            (4096, 16, 80), (4096, 16, 80), reduce="mean", cu_seqlens=meta(65, dtype=torch.int32)
        ),
        BOTH_PASSES,
        WIDE,
    ),
    Case(
        "one row",
        lambda: mass((1, 28, 1, 128), (1, 4, 16384, 128), causal=True),
        wide_loads=("lse_of_few_rows", "mass_of_few_rows"),
    ),
    Case(
        "float32",
        lambda: mass((1, 32, 64, 128), (1, 32, 640, 128), torch.float32, causal=True),
        FLOAT32,
    ),
    Case(
        "float32 D=256, packed",
        lambda: mass((640, 8, 256), (640, 8, 256), torch.float32, reduce="mean", cu_seqlens=meta(5, dtype=torch.int32)),
        FLOAT32,
    ),
]  # fmt: skip
