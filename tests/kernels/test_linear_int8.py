"""The Triton int8 linear layer against exact integer products and float64 scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vlmeff_kernels import _launch

from vlmeff import ops

pytest.importorskip("triton")
sizes = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FLOAT32 = 1e-6  # relative Frobenius error: three roundings of the product
# Of one element: half a unit in the last place. The interpreter cuts bfloat16 off instead of rounding: a whole one.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7}
# Tiles of the interpreter are 16 x 32 x 32: smaller, equal, two in every dimension, not divisible.
SIZES = [(1, 9, 1), (16, 32, 32), (32, 64, 64), (33, 70, 100), (3, 65, 31)]


def codes(rows: int, k: int, device: torch.device) -> Tensor:
    return torch.randint(-128, 128, (rows, k), device=device).to(torch.int8)


def scales(rows: int, device: torch.device) -> Tensor:
    return 0.01 + torch.rand(rows, 1, device=device)


def run(*arguments: Any) -> Tensor:
    with ops.backend("triton"), ops.counters() as ran:
        out = ops.linear_w8a8_int8(*arguments)
    assert ran["linear_w8a8_int8", "triton"] == 1
    return out


def exact(q: Tensor, wq: Tensor) -> Tensor:
    return (q.cpu().long() @ wq.cpu().long().T).to(q.device)


def expected(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None) -> Tensor:
    y = exact(q, wq).double() * s.double() * ws.double().T
    return y if bias is None else y + bias.double()


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9))  # all may be zeros


@pytest.mark.usefixtures("poison")
@sizes
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(0, 130))
def test_the_accumulators_are_exact(m: int, n: int, k: int, device: torch.device) -> None:
    q, wq = codes(m, k, device), codes(n, k, device)
    one = torch.ones(m, 1, device=device), torch.ones(n, 1, device=device)
    got = run(q, one[0], wq, one[1], None, torch.float32)  # 130 * 2^14 < 2^24: float32 holds every sum
    assert torch.equal(got.long(), exact(q, wq))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_output_is_rounded_once(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    q, wq, s, ws = codes(m, k, device), codes(n, k, device), scales(m, device) * 0.01, scales(n, device)
    for bias in (None, torch.randn(n, device=device, dtype=dtype)):
        got, wanted = run(q, s, wq, ws, bias, dtype), expected(q, s, wq, ws, bias)
        assert got.dtype == dtype
        assert got.shape == (m, n)
        assert got.is_contiguous()
        if dtype == torch.float32:
            assert error(got, wanted) <= FLOAT32
        else:
            size = wanted.abs() if bias is None else wanted.abs() + bias.double().abs()
            allowed = ROUNDING[dtype] * wanted.abs() + FLOAT32 * size + 2.0**-25  # the last: of subnormal float16
            assert bool(((got.double() - wanted).abs() <= allowed).all())


def test_neighbours_of_the_operands_are_left_alone(device: torch.device) -> None:
    """Rows in the middle of larger buffers: scales stand among NaN, codes among codes that would change every sum."""
    room = [torch.full((60, 80), 99, dtype=torch.int8, device=device) for _ in range(2)]
    q, wq = room[0][7:26, 11:64], room[1][2:41, 5:58]
    q.copy_(codes(*q.shape, device)), wq.copy_(codes(*wq.shape, device))
    around = [torch.full((60, 3), torch.nan, device=device) for _ in range(3)]
    s, ws, bias = around[0][9:28, 1:2], around[1][4:43, 2:], around[2].flatten()[6:45]
    s.copy_(scales(len(s), device)), ws.copy_(scales(len(ws), device)), bias.copy_(torch.randn_like(bias))
    before = [t.clone() for t in room]
    assert error(run(q, s, wq, ws, bias, torch.float32), expected(q, s, wq, ws, bias)) <= FLOAT32
    assert all(torch.equal(a, b) for a, b in zip(room, before, strict=True))


def test_operands_of_any_stride_are_read_right(device: torch.device) -> None:
    q, wq, s, ws = codes(20, 80, device), codes(34, 80, device), scales(20, device), scales(34, device)
    got = run(q[::2, ::2], s[::2], wq[:, ::2], ws, None, torch.float32)
    assert error(got, expected(q[::2, ::2], s[::2], wq[:, ::2], ws, None)) <= FLOAT32


@pytest.mark.usefixtures("poison")
def test_no_rows_no_channels_and_nan(device: torch.device) -> None:
    bias = torch.randn(8, device=device)
    ws = scales(8, device)
    assert run(codes(0, 9, device), scales(0, device), codes(8, 9, device), ws, bias, torch.float32).shape == (0, 8)
    got = run(codes(2, 0, device), scales(2, device), codes(8, 0, device), ws, bias, torch.float32)
    assert torch.equal(got, bias.expand(2, -1))
    s = scales(3, device)
    s[1] = torch.nan
    got = run(codes(3, 9, device), s, codes(8, 9, device), ws, bias, torch.float32)
    assert got.isnan().any(1).tolist() == [False, True, False]
    assert bool(got[1].isnan().all())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("channels", lambda channels: channels - 1),
        ("channels", lambda channels: channels + 1),
        ("rows", lambda rows: rows - 1),
        ("outputs", lambda outputs: outputs - 1),
        ("s", lambda s: s * (1 + 1e-5)),
        ("ws_n", lambda stride: 0),
        ("bias", lambda bias: None),
    ],
)
def test_a_kernel_that_is_off_by_one_is_noticed(
    name: str, change: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = _launch.launch

    def broken(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        at = list(kernel.arg_names).index(name)
        launch(kernel, grid, *arguments[:at], change(arguments[at]), *arguments[at + 1 :], **options)

    room = codes(21, 60, device).fill_(99)  # so that one channel too many is memory of ours
    q, wq = room[:18, :50], codes(40, 60, device).fill_(99)[:35, :50]
    q.copy_(codes(18, 50, device)), wq.copy_(codes(35, 50, device))
    arguments = (q, scales(18, device), wq, scales(35, device), torch.randn(35, device=device))
    wanted = expected(*arguments)
    assert error(run(*arguments, torch.float32), wanted) <= FLOAT32
    monkeypatch.setattr(_launch, "launch", broken)
    assert not error(run(*arguments, torch.float32), wanted) <= FLOAT32


def test_a_traced_call_is_one_op_with_a_fitting_fake(device: torch.device) -> None:
    q, wq, s, ws = codes(5, 33, device), codes(7, 33, device), scales(5, device), scales(7, device)
    torch.library.opcheck(
        torch.ops.vlmeff_kernels.linear_w8a8_int8.default, (q, s, wq, ws, None, torch.bfloat16),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )  # fmt: skip
    compiled = torch.compile(lambda *a: ops.linear_w8a8_int8(*a) + 1, fullgraph=True, backend="aot_eager")
    with ops.backend("triton"):
        assert torch.equal(compiled(q, s, wq, ws, None, torch.float32), run(q, s, wq, ws, None, torch.float32) + 1)


def test_few_tokens_get_a_narrow_tile_and_a_bucket_of_their_own() -> None:
    from vlmeff_kernels.linear_int8 import W8A8_INT8

    def tile(m: int, k: int, capability: tuple[int, int]) -> tuple[int, int]:
        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, wq = meta(m, k, dtype=torch.int8), meta(512, k, dtype=torch.int8)
        with _launch.recording(capability) as record:
            run(q, meta(m, 1), wq, meta(512, 1), None, torch.float32)
        return record.launches[0].constexprs["BM"], record.launches[0].constexprs["BN"]

    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        assert [tile(m, 512, capability)[0] for m in (1, 16, 64)] == [16, 16, 64]
    assert tile(4096, 512, (9, 0)) == (128, 256)
    assert tile(4096, 512, (8, 0)) == (128, 128)
    assert tile(4096, 511, (9, 0)) == (64, 64)
    assert tile(4096, 512, (12, 0)) == (128, 128)  # newer, and with less shared memory
    wq = torch.empty(3, 32)
    buckets = [W8A8_INT8.bucket(q=torch.empty(m, 32), wq=wq) for m in (0, 16, 17, 64, 65, 512, 513)]
    assert buckets == ["M <= 16"] * 2 + ["M <= 64"] * 2 + ["M <= 512"] * 2 + ["M > 512"]
    assert W8A8_INT8.bucket(q=torch.empty(3, 31), wq=wq[:, :31]) == "M <= 16, unaligned"
    assert W8A8_INT8.bucket(q=torch.empty(3, 16), wq=torch.empty(3, 24)[:, :16]) == "M <= 16, unaligned"


def test_other_output_dtypes_are_refused(device: torch.device) -> None:
    from vlmeff_kernels.linear_int8 import W8A8_INT8

    q, s = codes(2, 4, device), scales(2, device)
    reason = W8A8_INT8.supports(q=q, s=s, wq=q, ws=s, bias=None, out_dtype=torch.float64)
    assert reason is not None
    assert "not torch.float64" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes small tiles")
@pytest.mark.parametrize("m", [5, 40, 300, 1100])
@pytest.mark.parametrize("k", [1024, 1040, 1021])
def test_tiles_of_a_gpu_are_exact_and_repeat(m: int, k: int, device: torch.device) -> None:
    q, wq, s, ws = codes(m, k, device), codes(520, k, device), scales(m, device), scales(520, device)
    bias = torch.randn(520, device=device)
    first = run(q, s, wq, ws, bias, torch.float32)
    wanted = (q.double() @ wq.double().T) * s.double() * ws.double().T + bias.double()  # float64 holds the sums
    assert error(first, wanted) <= FLOAT32
    assert all(torch.equal(run(q, s, wq, ws, bias, torch.float32), first) for _ in range(20))
