"""The Triton float8 linear layer against float64 products of the same codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vlmeff_kernels import _launch

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

pytest.importorskip("triton")
FP8 = torch.float8_e4m3fn
sizes = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Tensor cores keep fewer bits of a float8 sum than float32 has; the interpreter adds in float32.
TOLERANCE = 1e-2 if torch.cuda.is_available() else 1e-6
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}  # bfloat16 is cut off there


@pytest.fixture(autouse=True)
def _float8_needs_a_gpu_that_has_it() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")


def codes(rows: int, k: int, device: torch.device) -> Tensor:
    return (torch.randn(rows, k, device=device) * 100).clamp(-448, 448).to(FP8)


def scales(rows: int, device: torch.device) -> Tensor:
    return 0.01 + torch.rand(rows, 1, device=device)


def run(*arguments: Any) -> Tensor:
    with ops.backend("triton"), ops.counters() as ran:
        out = ops.linear_w8a8_fp8(*arguments)
    assert ran["linear_w8a8_fp8", "triton"] == 1
    return out


def expected(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None) -> Tensor:
    y = (q.double() @ wq.double().T) * s.double() * ws.double().T
    return y if bias is None else y + bias.double()


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9))  # all may be zeros


@pytest.mark.usefixtures("poison")
@sizes
@given(m=st.integers(1, 40), n=st.integers(5, 70), k=st.integers(1, 130))  # a lone sum may cancel to nothing
def test_products_are_those_of_the_codes(m: int, n: int, k: int, device: torch.device) -> None:
    q, wq, s, ws = codes(m, k, device), codes(n, k, device), scales(m, device), scales(n, device)
    for bias in (None, torch.randn(n, device=device)):
        assert error(run(q, s, wq, ws, bias, torch.float32), expected(q, s, wq, ws, bias)) <= TOLERANCE


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 9, 1), (32, 64, 64), (33, 70, 100)])
def test_the_output_has_the_dtype_asked_for(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    q, wq, s, ws = codes(m, k, device), codes(n, k, device), scales(m, device) * 0.01, scales(n, device)
    bias = torch.randn(n, device=device, dtype=dtype)
    got = run(q, s, wq, ws, bias, dtype)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert error(got, expected(q, s, wq, ws, bias)) <= TOLERANCE + ROUNDING[dtype]


def test_nan_around_the_operands_is_not_read(device: torch.device) -> None:
    """Rows in the middle of buffers of NaN, with a K that ends inside a tile."""
    room = [torch.full((60, 80), torch.nan, device=device).to(FP8) for _ in range(2)]
    q, wq = room[0][7:26, 11:64], room[1][2:41, 5:58]
    q.copy_(codes(*q.shape, device)), wq.copy_(codes(*wq.shape, device))
    s, ws = scales(len(q), device), scales(len(wq), device)
    assert error(run(q, s, wq, ws, None, torch.float32), expected(q, s, wq, ws, None)) <= TOLERANCE
    assert sum(int(t.float().isnan().sum()) for t in room) == 2 * 60 * 80 - q.numel() - wq.numel()


def test_operands_of_any_stride_are_read_right(device: torch.device) -> None:
    q, wq, s, ws = codes(20, 80, device), codes(34, 80, device), scales(20, device), scales(34, device)
    got = run(q[::2, ::2], s[::2], wq[:, ::2], ws, None, torch.float32)
    assert error(got, expected(q[::2, ::2], s[::2], wq[:, ::2], ws, None)) <= TOLERANCE


@pytest.mark.usefixtures("poison")
def test_no_rows_no_channels_and_nan(device: torch.device) -> None:
    bias, ws = torch.randn(8, device=device), scales(8, device)
    assert run(codes(0, 9, device), scales(0, device), codes(8, 9, device), ws, bias, torch.float32).shape == (0, 8)
    got = run(codes(2, 0, device), scales(2, device), codes(8, 0, device), ws, bias, torch.float32)
    assert torch.equal(got, bias.expand(2, -1))
    q, wq, s = codes(4, 37, device), codes(8, 37, device), scales(4, device)
    s[2] = torch.nan
    assert run(q, s, wq, ws, None, torch.float32).isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter reads the codes of NaN as 480")
def test_codes_of_nan_give_nan(device: torch.device) -> None:
    q, wq, s, ws = codes(4, 37, device), codes(8, 37, device), scales(4, device), scales(8, device)
    q.view(torch.uint8)[1, 36] = 0x7F
    assert run(q, s, wq, ws, None, torch.float32).isnan().all(1).tolist() == [False, True, False, False]
    wq.view(torch.uint8)[5, 0] = 0xFF
    assert run(q, s, wq, ws, None, torch.float32)[0].isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("channels", lambda channels: channels - 1),
        ("rows", lambda rows: rows - 1),
        ("s", lambda s: s * 1.1),
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

    arguments = (codes(18, 50, device), scales(18, device), codes(35, 50, device), scales(35, device))
    bias = 300 * torch.randn(35, device=device)
    wanted = expected(*arguments, bias)
    monkeypatch.setattr(_launch, "launch", broken)
    assert not error(run(*arguments, bias, torch.float32), wanted) <= TOLERANCE


def test_a_traced_call_is_one_op_with_a_fitting_fake(device: torch.device) -> None:
    q, wq, s, ws = codes(5, 33, device), codes(7, 33, device), scales(5, device), scales(7, device)
    torch.library.opcheck(
        torch.ops.vlmeff_kernels.linear_w8a8_fp8.default, (q, s, wq, ws, None, torch.float32),
        test_utils="test_faketensor",  # checking the schema needs arithmetic that float8 lacks on the CPU
    )  # fmt: skip


def test_gpus_without_float8_are_refused() -> None:
    q = torch.empty(2, 4, dtype=FP8, device="meta")
    s = torch.empty(2, 1, device="meta")
    with _launch.recording((8, 6)), pytest.raises(BackendUnavailableError, match=r"8\.9, the GPU has 8\.6"):
        run(q, s, q, s, None, torch.float32)
    with _launch.recording((8, 9)) as record:
        run(q, s, q, s, None, torch.float32)
    assert len(record.launches) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes small tiles")
@pytest.mark.parametrize("m", [5, 40, 300, 1100])
@pytest.mark.parametrize("k", [1024, 1040, 1021])
def test_tiles_of_a_gpu_are_right_and_repeat(m: int, k: int, device: torch.device) -> None:
    q, wq, s, ws = codes(m, k, device), codes(520, k, device), scales(m, device), scales(520, device)
    first = run(q, s, wq, ws, None, torch.float32)
    assert error(first, expected(q, s, wq, ws, None)) <= TOLERANCE
    assert all(torch.equal(run(q, s, wq, ws, None, torch.float32), first) for _ in range(20))
