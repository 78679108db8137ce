"""Peak memory of scoring a picture of 16384 patches in the geometry of Qwen2.5-VL's tower: 16 heads of 80.

    python benchmarks/patches.py

Three calls, on random numbers: the op ``attention_column_mass`` on q and k; the probe's whole hook, which makes q and k
from the layer's input first; and, to compare the hook with, the attention module that it stands before. What eager
attention would hold is computed, not run. On the CPU this is to run in a process of its own (``tokens.py`` sees to it),
so that the peak of the process can be measured besides torch's ledger.

``--heads`` and ``--rows`` make it quicker: the op works on blocks of query rows, so fewer rows are fewer blocks of the
same size.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from measuring import ProcessPeak, environment, extra_peak_bytes, timed
from torch import Tensor

from vlmeff import ops

HEAD_DIM = 80
LIMIT_BYTES = 300_000_000


def measure_op(patches: int, heads: int, rows: int | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """``attention_column_mass``, packed as Qwen's towers are; with ``rows``, of that many query rows, batched."""
    q, k = (torch.randn(patches, heads, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    arguments: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "reduce": "mean"}
    if rows is None:
        borders = torch.tensor([0, patches], dtype=torch.int32, device=device)
        run, shape = (lambda: ops.attention_column_mass(q, k, cu_seqlens=borders, **arguments)), "packed"
    else:
        q_rows, keys = q[:rows].transpose(0, 1)[None], k.transpose(0, 1)[None]
        run, shape = (lambda: ops.attention_column_mass(q_rows, keys, **arguments)), "batched"
    small = torch.tensor([0, 64], dtype=torch.int32, device=device)
    # The start-up of the libraries and of the profiler is not the op's.
    extra_peak_bytes(lambda: ops.attention_column_mass(q[:64], k[:64], cu_seqlens=small, **arguments), device)
    return {"layout": shape, "query_rows": rows or patches, **_peaks(run, device)}


def measure_layer(
    patches: int, heads: int, frames: int, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """The hook on an attention module of Qwen2.5-VL's tower, and that module itself."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

    from vlmeff.vlm.families.qwen import Qwen2_5VL
    from vlmeff.vlm.probe import column_mean

    config = Qwen2_5_VLVisionConfig(hidden_size=heads * HEAD_DIM, num_heads=heads)
    config._attn_implementation = "sdpa"
    module = Qwen2_5_VLVisionAttention(config).to(device, dtype).eval()
    angles = torch.rand(patches, HEAD_DIM, device=device)
    arguments = {
        "cu_seqlens": torch.linspace(0, patches, frames + 1, dtype=torch.float64, device=device).int(),
        "position_embeddings": (angles.cos(), angles.sin()),
    }
    hidden = torch.randn(patches, heads * HEAD_DIM, device=device, dtype=dtype)
    family = Qwen2_5VL()

    def scores() -> Tensor:
        return column_mean(family.query_key(module, hidden, arguments))

    return {
        "hook": _peaks(scores, device),
        "attention_module_sdpa": _peaks(lambda: module(hidden, **arguments), device),
    }


def _peaks(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Milliseconds and both peaks of one call; on the CPU the time includes the profiler's work."""
    elapsed, process = 0.0, ProcessPeak()

    def once() -> None:
        nonlocal elapsed
        with process:
            elapsed = timed(run, device)

    extra = extra_peak_bytes(once, device)
    of_process = process.extra_bytes if device.type == "cpu" else None
    return {"extra_peak_bytes": extra, "process_extra_peak_bytes": of_process, "ms": round(elapsed, 1)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--patches", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rows", type=int, help="query rows of the op; default: all")
    parser.add_argument("--frames", type=int, default=1, help="of the hook: patches attend within their frame")
    parser.add_argument("--only", choices=["op", "hook"])
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    # The op first: a process's peak never sinks again.
    op = {} if args.only == "hook" else {"op": measure_op(args.patches, args.heads, args.rows, device, dtype)}
    hook = {} if args.only == "op" else measure_layer(args.patches, args.heads, args.frames, device, dtype)
    result = {
        "patches": args.patches,
        "heads": args.heads,
        "head_dim": HEAD_DIM,
        "dtype": args.dtype,
        "limit_bytes": LIMIT_BYTES,
        "frames": args.frames,
        **op,
        **hook,
        "eager_map_bytes_computed": math.prod((args.heads, args.patches, args.patches, dtype.itemsize)),
        "environment": environment(device),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
