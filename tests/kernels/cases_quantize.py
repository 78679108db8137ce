"""Launches of the quantizers and of what is fused with them that must compile well, at the sizes of Wan 14B."""

from __future__ import annotations

import torch
from compile_gate import Case

from vlmeff import ops

TOKENS = 32760  # 81 frames of 480p


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def factors(n: int) -> torch.Tensor:
    return meta(n, dtype=torch.float32)


CASES = [
    *(
        Case(
            f"act_quant_int8 K={k}",
            lambda k=k: ops.act_quant_int8(meta(TOKENS, k)),  # type: ignore[misc]
            wide_loads=("symmetric_row",),
        )
        for k in (5120, 13824)
    ),
    Case(
        "act_quant_int8 K=5120 groups of 64, smoothed",
        lambda: ops.act_quant_int8(meta(TOKENS, 5120), factors(5120), bits=4, group=64),
        wide_loads=("symmetric_groups",),
    ),
    Case(
        "act_quant_fp8 K=13824",
        lambda: ops.act_quant_fp8(meta(TOKENS, 13824)),
        wide_loads=("symmetric_row",),
        architectures=(90,),
    ),
    Case(
        "act_quant_uint K=5120 clipped",
        lambda: ops.act_quant_uint(meta(TOKENS, 5120), bits=4, clip=factors(2)),
        wide_loads=("unsigned_row",),
    ),
    Case("act_quant_int8 K=20000", lambda: ops.act_quant_int8(meta(TOKENS, 20000)), wide_loads=("symmetric_long_row",)),
    Case(
        "act_quant_uint K=20000",
        lambda: ops.act_quant_uint(meta(TOKENS, 20000), bits=4),
        wide_loads=("unsigned_long_row",),
    ),
    *(
        Case(
            f"gelu_quant_int8 K=13824 {approximate}",
            lambda approximate=approximate: ops.gelu_quant_int8(meta(TOKENS, 13824), approximate=approximate),  # type: ignore[misc]
            wide_loads=("gelu_quant_row",),
        )
        for approximate in ("none", "tanh")
    ),
    Case(
        "norm_quant_int8 K=5120 of Wan",
        lambda: ops.norm_quant_int8(
            meta(1, TOKENS, 5120),
            scale=meta(1, 1, 5120, dtype=torch.float32),
            shift=meta(1, 1, 5120, dtype=torch.float32),
            eps=1e-6,
        ),
        wide_loads=("norm_quant_row",),
    ),
    Case(
        "norm_quant_int8 K=16383 float32, all factors",
        lambda: ops.norm_quant_int8(
            meta(1, TOKENS, 16383, dtype=torch.float32),
            weight=factors(16383),
            bias=factors(16383),
            scale=meta(1, 1, 16383, dtype=torch.float32),
            shift=meta(1, 1, 16383, dtype=torch.float32),
            smooth=factors(16383),
            eps=1e-6,
        ),
    ),
]
