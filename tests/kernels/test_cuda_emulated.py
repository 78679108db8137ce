"""The CUDA kernels and their binding, run on the CPU through the public ops: bit for bit what the reference gives.

Threads of the quantizer run in parallel here too, with true barriers and shuffles, as host_emulation.h says. Not
covered: the machine code, the device guard and the stream, which need a GPU.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vlmeff_kernels import cuda_ops

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

sys.path.append(str(Path(__file__).parent))
emulation = importlib.import_module("emulation")
pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
sizes = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_ops.build, "built", emulation.library)
    assert cuda_ops.load() is None


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)


def loop(states: Tensor, index: Tensor) -> Tensor:
    batch, heads, _, width = states.shape
    out = torch.zeros(batch, heads, index.shape[-1], width, dtype=states.dtype)
    for b in range(batch):
        for h in range(heads):
            chosen = index[b] if index.ndim == 2 else index[b, h % index.shape[1]]
            for i, at in enumerate(chosen.tolist()):
                out.view(torch.uint8)[b, h, i] = states.view(torch.uint8)[b, h, at]
    return out


def gather(keys: list[Tensor], values: list[Tensor], index: list[Tensor]) -> None:
    """Gather, and compare with the loop."""
    with ops.backend("cuda"), ops.counters() as ran:
        got = ops.gather_kv(keys, values, index)
    assert ran["gather_kv", "cuda"] == 1
    for states, taken in zip((keys, values), got, strict=True):
        for x, t, i in zip(states, taken, index, strict=True):
            expected = loop(x.contiguous(), i)
            assert t.shape == expected.shape
            assert t.dtype == x.dtype
            assert t.is_contiguous()
            assert torch.equal(bits(t), bits(expected))


@sizes
@given(data=st.data())
def test_gathered_layers_equal_a_loop(data: Any) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64]))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    piece = 16 // dtype.itemsize
    width, other = (piece * draw(st.integers(1, 5)) for _ in range(2))
    keys, values, index = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        tokens, kept = draw(st.integers(1, 40)), draw(st.integers(0, 40))
        room = random_bits((batch, heads, tokens + 3, width + piece), dtype)  # a preallocated cache
        keys.append(room[:, :, 2 : 2 + tokens, piece:])
        values.append(random_bits((batch, tokens, heads, other), dtype).transpose(1, 2))
        shape = draw(st.sampled_from([(batch, kept), (batch, 1, kept), (batch, heads, kept)]))
        index.append(torch.randint(0, tokens, shape))
    gather(keys, values, index)


def test_layers_of_10_0_and_33_rows_with_fillers() -> None:
    keys = [random_bits((2, 3, n, 64), torch.float16) for n in (10, 7, 90)]
    values = [random_bits((2, 3, n, 128), torch.float16) for n in (10, 7, 90)]
    index = [torch.arange(10).expand(2, 10), torch.empty(2, 0, dtype=torch.int64), torch.arange(0, 66, 2).repeat(2, 1)]
    index[2][1, :20] = 0  # fillers of the shorter row
    gather(keys, values, index)


@pytest.mark.parametrize("layers", [50, 51, 103])
def test_more_layers_than_a_launch_holds(layers: int) -> None:
    keys = [random_bits((1, 2, 4 + n % 3, 16), torch.int8) for n in range(layers)]
    index = [torch.randint(0, 4, (1, n % 4)) for n in range(layers)]
    gather(keys, keys, index)


def test_layers_of_different_heads_and_widths() -> None:
    shapes = [(1, 2, 5, 16), (1, 4, 6, 16), (2, 4, 6, 16), (2, 4, 6, 4112)]
    keys = [random_bits(shape, torch.int8) for shape in shapes]
    gather(keys, keys, [torch.randint(0, 5, (shape[0], shape[1], 3)) for shape in shapes])


def test_more_rows_than_a_tile_and_no_rows_at_all() -> None:
    keys = random_bits((1, 1, 700, 8), torch.float32)
    gather([keys], [keys], [torch.randperm(700)[None]])
    gather([keys[:, :0]], [keys[:, :0]], [torch.zeros(1, 5, dtype=torch.int64)])
    gather([keys[..., :0]], [keys[..., :0]], [torch.zeros(1, 5, dtype=torch.int64)])


def test_what_cannot_move_in_16_bytes_is_refused() -> None:
    index = torch.zeros(1, 1, dtype=torch.int64)
    room = torch.zeros(1, 2, 4, 16)
    cases = {
        "multiple of 16 bytes, got 3": torch.zeros(1, 2, 4, 3),
        "start at multiples of 16": room[..., :4].as_strided((1, 2, 4, 4), (64, 5, 16, 1)),
        "a tensor must start": room[..., 1:5],
    }
    with ops.backend("cuda"):
        for reason, keys in cases.items():
            with pytest.raises(BackendUnavailableError, match=reason):
                ops.gather_kv(keys, keys, index)


def test_the_binding_checks_what_it_is_given() -> None:
    gather_op = torch.ops.vlmeff_kernels.gather_kv_cuda.default
    keys, index = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 2, dtype=torch.int64)
    for wrong in (
        ([keys], [keys], []),
        ([keys], [keys[0]], [index]),
        ([keys], [keys], [index.int()]),
        ([keys[..., 1:5]], [keys], [index]),
        ([keys[..., :3]], [keys], [index]),
    ):
        with pytest.raises(RuntimeError, match="gather_kv_cuda"):
            gather_op(*wrong)
    for x, smooth, n in ((keys[0, 0], torch.ones(3), 8), (keys, None, 8), (keys[0, 0].double(), None, 8)):
        with pytest.raises(RuntimeError, match="act_quant_int8_cuda"):
            torch.ops.vlmeff_kernels.act_quant_int8_cuda.default(x, smooth, n)


def quantize(x: Tensor, smooth: Tensor | None = None, bits: int = 8) -> None:
    """Quantize, and compare with the reference."""
    with ops.backend("cuda"), ops.counters() as ran:
        codes, scale = ops.act_quant_int8(x, smooth, bits=bits)
    assert ran["act_quant_int8", "cuda"] == 1
    with ops.backend("reference"):
        expected, expected_scale = ops.act_quant_int8(x, smooth, bits=bits)
    assert codes.dtype == torch.int8
    assert torch.equal(codes, expected)
    assert scale.shape == expected_scale.shape
    assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))


@sizes
@given(data=st.data())
def test_codes_and_scales_equal_the_reference(data: Any) -> None:
    draw = data.draw
    dtype, width = draw(st.sampled_from(FLOATS)), draw(st.integers(0, 700))
    x = torch.randn(draw(st.integers(0, 4)), width) * 10.0 ** draw(st.integers(-6, 3))
    smooth = torch.rand(width) + 0.1 if draw(st.booleans()) else None
    if draw(st.booleans()):  # rows in a larger tensor, often not at multiples of 16 bytes
        x = torch.nn.functional.pad(x, (draw(st.integers(0, 9)), draw(st.integers(0, 9))), value=torch.nan)
        start = draw(st.integers(0, x.shape[1] - width))
        x = x[:, start : start + width].nan_to_num(0.5)
    quantize(x.to(dtype), smooth, draw(st.integers(2, 8)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [2048, 2049, 8192, 16384, 16392, 16387])
def test_every_length_of_row_has_its_kernel(dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(2, width) * torch.tensor([[1.0], [1e-3]])).to(dtype)
    quantize(x, torch.rand(width) + 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_with_nan_and_infinity_and_rows_of_zeros(dtype: torch.dtype) -> None:
    x = torch.randn(6, 300).to(dtype)
    x[0] = 0
    x[1, 299], x[2, 3], x[3, 150], x[4, 7] = torch.nan, torch.inf, -torch.inf, -0.0
    x[5] = torch.finfo(dtype).max
    quantize(x)
    x[4] = torch.finfo(dtype).tiny
    smooth = torch.ones(300)
    smooth[8], smooth[9] = 0.0, torch.inf
    quantize(x, smooth)


def test_halves_are_widened() -> None:
    patterns = torch.cat(
        [torch.randint(0, 65536, (150,)), torch.tensor([0, 1, 1023, 1024, 31743, 31744, 31745, 32768])]
    )
    x = patterns.to(torch.int32).to(torch.uint16).view(torch.float16)[:, None]
    with ops.backend("cuda"):
        _, scale = ops.act_quant_int8(x, bits=2)  # P = 1, so that the scale is |x|
    expected = x.float().abs().where(x != 0, 1.0)
    assert torch.equal(scale.nan_to_num(-1.0, posinf=-1.0), expected.where(expected.isfinite(), -1.0))


def test_ties_and_subnormals_and_the_largest_numbers_round_as_a_division() -> None:
    """Rows whose scale is 2^n, 3 x 2^n and random, with values at, just below and just above half a step."""
    scales = torch.cat([2.0 ** torch.arange(-149.0, 121.0, 9), 3 * 2.0 ** torch.arange(-140.0, 118.0, 9)])
    steps = torch.cat([torch.arange(-127.0, 128.0), torch.arange(-126.5, 127.0)])
    ties = scales[:, None] * steps
    x = torch.cat([ties, ties.nextafter(torch.zeros(())), ties.nextafter(ties * 2)], 1).clamp(-3e38, 3e38)
    assert x.isfinite().all()
    quantize(x)
    quantize(torch.randint(-200, 200, (40, 64)) * 2.0**-149)


def test_schemas_and_fakes_fit_the_kernels() -> None:
    keys = torch.randn(2, 3, 6, 8)
    index = torch.randint(0, 6, (2, 1, 4))
    torch.library.opcheck(torch.ops.vlmeff_kernels.gather_kv_cuda.default, ([keys, keys], [keys, keys], [index, index]))
    for smooth in (None, torch.rand(8) + 0.5):
        torch.library.opcheck(torch.ops.vlmeff_kernels.act_quant_int8_cuda.default, (keys[0, 0], smooth, 6))


def test_a_compiled_caller_has_no_graph_break() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def caller(keys: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        taken, _ = ops.gather_kv(keys, keys, index)
        return ops.act_quant_int8(taken[0, 0])

    keys, index = torch.randn(1, 2, 6, 8), torch.tensor([[0, 5, 5]])
    with ops.backend("cuda"):
        codes, scale = caller(keys, index)
    expected = ops.act_quant_int8(keys[0, 0, [0, 5, 5]])
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
