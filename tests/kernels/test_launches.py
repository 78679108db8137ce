"""What is launched for sizes that no test computes with: grids within CUDA's limits, tiles within the shared memory of
each GPU, and the same compiled kernel for prompts and caches of any length."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlmeff import ops

pytest.importorskip("triton")
from vlmeff_kernels import _launch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stored(rows: int, heads: int, packed: int, newer: int) -> ops.StoredStates:
    about = meta(rows, heads, packed // 32, 64), meta(rows, heads, packed // 32, 64)
    return ops.StoredStates(
        meta(rows, heads, packed, 64, dtype=torch.uint8), *about, meta(rows, heads, newer, 64), 8, 32
    )


def stored_values(rows: int, heads: int, packed: int, newer: int) -> ops.StoredStates:
    about = meta(rows, heads, packed, 2), meta(rows, heads, packed, 2)
    return ops.StoredStates(
        meta(rows, heads, packed, 64, dtype=torch.uint8), *about, meta(rows, heads, newer, 64), 8, 32
    )


def decode(rows: int, heads: int, packed: int, newer: int) -> Tensor:
    states = stored(rows, heads, packed, newer), stored_values(rows, heads, packed, newer)
    return ops.quantized_decode_attention(meta(rows, heads, 1, 64), *states, scale=0.1)


def linear(m: int) -> Tensor:
    q, wq = meta(m, 512, dtype=torch.int8), meta(512, 512, dtype=torch.int8)
    s, ws = (meta(n, 1, dtype=torch.float32) for n in (m, 512))
    return ops.linear_w8a8_int8(q, s, wq, ws, None, torch.bfloat16)


def statistics(heads: int, width: int, keys: int) -> Tensor:
    return ops.attention_column_mass(meta(1, heads, width, 128), meta(1, heads, keys, 128), scale=0.1, causal=True)


MILLION = 2**20
LARGE: dict[str, Callable[[], object]] = {
    "gather_kv": lambda: ops.gather_kv(
        meta(1, 8, 4 * MILLION, 1024), meta(1, 8, 4 * MILLION, 1024), meta(1, 3 * MILLION, dtype=torch.int64)
    ),
    "gather_tokens": lambda: ops.gather_tokens(meta(2, MILLION, 4096), meta(2, MILLION, dtype=torch.int64)),
    "act_quant_int8": lambda: ops.act_quant_int8(meta(MILLION, 8192), group=32),
    "act_quant_fp8": lambda: ops.act_quant_fp8(meta(MILLION, 20000)),
    "act_quant_uint": lambda: ops.act_quant_uint(meta(MILLION, 20000), bits=4),
    "gelu_quant_int8": lambda: ops.gelu_quant_int8(meta(MILLION, 8192)),
    "norm_quant_int8": lambda: ops.norm_quant_int8(meta(2, MILLION, 5120), eps=1e-6),
    "linear_w8a8_int8": lambda: linear(16 * MILLION),
    "linear_wna16, many rows": lambda: ops.linear_wna16(
        meta(MILLION, 512), meta(512, 256, dtype=torch.uint8), meta(512, 1), None, None, bits=4
    ),
    "linear_wna16, long rows": lambda: ops.linear_wna16(
        meta(1, 64 * MILLION), meta(16, 64 * MILLION, dtype=torch.int8), meta(16, 1), None, None, bits=8
    ),
    "quantized_decode_attention, many rows": lambda: decode(16384, 8, 128, 1),
    "quantized_decode_attention, long": lambda: decode(1, 2, 32 * MILLION, 8 * MILLION),
    "attention_column_mass": lambda: statistics(8, MILLION, MILLION),
    "attention_column_mass of one row": lambda: statistics(8, 1, 16 * MILLION),
    "row_logsumexp of one row": lambda: ops.row_logsumexp(meta(1, 8, 1, 256), meta(1, 8, 16 * MILLION, 256), scale=0.1),
}


@pytest.mark.parametrize("what", LARGE)
def test_large_sizes_stay_within_the_limits_of_a_grid(what: str) -> None:
    with _launch.recording((9, 0)) as record, ops.backend("triton"):
        LARGE[what]()
    assert record.launches
    for launch in record.launches:
        assert launch.grid[0] < 2**31, launch.name
        assert all(blocks <= _launch.MOST_BLOCKS for blocks in launch.grid[1:]), (launch.name, launch.grid)


def test_tiles_go_by_shared_memory_and_not_by_age() -> None:
    tiles = {}
    for capability in CAPABILITIES:
        with _launch.recording(capability) as record, ops.backend("triton"):
            linear(4096)
        constants = record.launches[0].constexprs
        tiles[capability] = constants["BM"], constants["BN"], constants["BK"]
        held = record.launches[0].stages * (constants["BM"] + constants["BN"]) * constants["BK"]
        assert held <= 1024 * _launch.SHARED_MEMORY[capability]
    assert tiles[9, 0] == tiles[10, 0] != tiles[8, 9] == tiles[12, 0]
    with _launch.recording((99, 0)):
        assert _launch.shared_memory(torch.device("meta")) == _launch.SMALL


SAME = """
import sys
sys.path[:0] = [{here!r}]
import compile_gate, test_launches as t
calls = dict(
    decode=[lambda n=n, r=r: t.decode(1, 4, n, r) for n, r in ((4096, 81), (4128, 112), (4160, 1), (4096, 64))],
    mass=[lambda w=w, s=s: t.statistics(8, w, s) for w, s in ((512, 512), (513, 513), (600, 1600), (1000, 1001))],
    linear=[lambda m=m: t.linear(m) for m in (513, 528, 999)],
)
for name, same in calls.items():
    found = [compile_gate.launches_of(compile_gate.Case(name, call), 90) for call in same]
    for other in found[1:]:
        for one, two in zip(found[0], other):
            (types, _, aligned), (types_2, _, aligned_2) = map(compile_gate.specialisation, (one, two))
            changed = [n for n in types if types[n] != types_2[n]]
            tiles = "PARTS" not in one.constexprs and one.constexprs != two.constexprs  # parts: a few powers of two
            if changed or aligned != aligned_2 or tiles:
                print(name, one.name, changed, aligned, aligned_2, one.constexprs, two.constexprs)
"""


def test_no_length_compiles_a_kernel_anew() -> None:
    """In a process of its own: what the interpreter runs has no specialisation."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SAME.format(here=str(HERE))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout
