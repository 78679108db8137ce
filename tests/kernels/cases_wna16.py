"""Launches of the weight-only linear layer that must compile well.

Wide loads are asked for where x is more than a few rows. The weights of a tile go to shared memory by 4 or 8 bytes a
thread, because that is how the operand of the product is read from there; the bytes of neighbouring threads adjoin.
"""

from __future__ import annotations

import torch
from compile_gate import Case

from vlmeff import ops

K, N, GROUP = 4096, 11008, 128
KERNEL = "expand_and_multiply"
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int4(rows: int, *, k: int = K, n: int = N, zeros: bool = False) -> torch.Tensor:
    scale = meta(n, k // GROUP, dtype=torch.float32)
    wq = meta(n, k // 2, dtype=torch.uint8)
    return ops.linear_wna16(meta(rows, k), wq, scale, scale if zeros else None, None, bits=4, group=GROUP)


def bytewise(rows: int, codes: torch.dtype, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    scale = meta(N, 1, dtype=torch.float32)
    return ops.linear_wna16(meta(rows, K, dtype=dtype), meta(N, K, dtype=codes), scale, None, None, bits=8)


CASES = [
    Case("int4 g128 M=1", lambda: int4(1), {KERNEL: TENSOR_CORES}),
    Case("int4 g128 zeros M=16 K=11008", lambda: int4(16, k=N, n=K, zeros=True), {KERNEL: TENSOR_CORES}),
    Case("int8 M=1", lambda: bytewise(1, torch.int8), {KERNEL: TENSOR_CORES}),
    Case("int4 g128 M=64", lambda: int4(64), {KERNEL: TENSOR_CORES}, wide_loads=(KERNEL,)),
    Case("int4 g128 M=2048", lambda: int4(2048), {KERNEL: TENSOR_CORES}, wide_loads=(KERNEL,)),
    Case("int8 M=2048", lambda: bytewise(2048, torch.int8), {KERNEL: TENSOR_CORES}, wide_loads=(KERNEL,)),
    Case("fp8 M=2048", lambda: bytewise(2048, torch.float8_e4m3fn), {KERNEL: TENSOR_CORES}, architectures=(90,)),
    Case("int8 float32 M=64", lambda: bytewise(64, torch.int8, torch.float32), {KERNEL: {80: "FFMA", 90: "FFMA"}}),
]
