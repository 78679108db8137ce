"""The back end "torch" of the 8-bit linear layers, on the CPU; on a GPU the same tests run there too."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vlmeff_kernels import torch_linear

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

ROOT = Path(__file__).parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(1, 1, 1), (17, 16, 32), (16, 8, 8), (3, 5, 7), (300, 48, 80), (32, 33, 15)]
BF16_ROUNDING = 2.0**-8  # of one element: the product is rounded to bfloat16, and once more with a bias


@pytest.fixture(autouse=True)
def _cleared(request: pytest.FixtureRequest):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch_linear._tested.clear()
    yield
    torch_linear._tested.clear()


def arguments(kind: str, m: int, n: int, k: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    if kind == "fp8":
        q, wq = (torch.randn(rows, k, generator=g).to(torch.float8_e4m3fn) for rows in (m, n))
    else:
        q, wq = (torch.randint(-127, 128, (rows, k), generator=g).to(torch.int8) for rows in (m, n))
    s, ws = (torch.rand(rows, 1, generator=g) + 0.1 for rows in (m, n))
    return tuple(t.to(device) for t in (q, s, wq, ws))


def run(kind: str, *args: Any, **backends: str) -> Tensor:
    name = f"linear_w8a8_{kind}"
    with ops.backend(**{name: "torch"}, **backends), ops.counters() as ran:
        out = getattr(ops, name)(*args)
    assert ran == {(name, "torch"): 1}
    return out


def exact(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None = None) -> Tensor:
    y = (q.double() @ wq.double().T) * s.double() * ws.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_reference_bit_for_bit(device: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    args = arguments("int8", m, n, k, device)
    for bias in (None, torch.randn(n, generator=torch.Generator().manual_seed(1)).to(device, dtype)):
        got = run("int8", *args, bias, dtype)
        with ops.backend("reference"):
            assert torch.equal(got, ops.linear_w8a8_int8(*args, bias, dtype))
        assert got.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_is_a_bfloat16_rounding_of_the_product(
    device: str, m: int, n: int, k: int, dtype: torch.dtype, with_bias: bool
) -> None:
    args = arguments("fp8", m, n, k, device)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(device, dtype) if with_bias else None
    got = run("fp8", *args, bias, dtype)
    product, expected = exact(*args), exact(*args, bias)
    assert got.dtype == dtype
    assert got.shape == (m, n)
    assert got.is_contiguous()
    size = product.abs() + (0 if bias is None else bias.double().abs())
    # Sums of k float32 products, then at most three roundings (product, bias, output).
    allowed = 3 * BF16_ROUNDING * size + 1e-5 * product.abs().max()
    assert bool(((got.double() - expected).abs() <= allowed).all())


def test_a_float32_bias_is_not_rounded_to_bfloat16() -> None:
    q, s, wq, ws = arguments("fp8", 4, 16, 16)
    bias = torch.full((16,), 1 + 2.0**-12)
    assert torch.equal(run("fp8", torch.zeros_like(q), s, wq, ws, bias, torch.float32), bias.expand(4, -1))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_no_channels_zeros_and_nan(kind: str, device: str) -> None:
    bias = torch.randn(8, generator=torch.Generator().manual_seed(2)).to(device)
    assert run(kind, *arguments(kind, 0, 8, 16, device), bias, torch.float32).shape == (0, 8)
    assert torch.equal(run(kind, *arguments(kind, 2, 8, 0, device), bias, torch.float32), bias.expand(2, -1))
    q, s, wq, ws = arguments(kind, 3, 8, 24, device)
    q[1] = torch.zeros_like(q[1])
    s[2] = math.nan
    got = run(kind, q, s, wq, ws, bias, torch.float32)
    assert torch.equal(got[1], bias)
    assert bool(got[2].isnan().all())
    assert bool(got[0].isfinite().all())


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_strided_operands_are_read_right(kind: str) -> None:
    q, s, wq, ws = arguments(kind, 6, 32, 32)
    args = (q[::2, :16], s[::2], wq[:, 16:], ws)
    assert torch.equal(
        run(kind, *args, None, torch.float32), run(kind, *(a.contiguous() for a in args), None, torch.float32)
    )


def test_cpu_tensors_stay_on_the_reference_unless_asked() -> None:
    args = (*arguments("int8", 2, 3, 4), None, torch.float32)
    assert ops.explain("linear_w8a8_int8", *args).backend == "reference"
    with ops.backend(linear_w8a8_int8="torch"):
        assert ops.explain("linear_w8a8_int8", *args).backend == "torch"
    with ops.backend("torch"):  # for all ops: those that have none refuse
        assert ops.linear_w8a8_int8(*args).shape == (2, 3)
        with pytest.raises(BackendUnavailableError, match=r"act_quant_int8.*no such implementation"):
            ops.act_quant_int8(torch.ones(2, 4))


def test_wrong_types_and_devices_are_refused_with_a_reason() -> None:
    q, s, wq, ws = arguments("int8", 2, 3, 4)
    rest = {"s": s, "ws": ws, "bias": None, "out_dtype": torch.float32}
    assert "float8_e4m3fn only" in (torch_linear.FP8_LINEAR.supports(q=q, wq=wq, **rest) or "")
    assert "int8 only" in (torch_linear.INT8_LINEAR.supports(q=q.float(), wq=wq, **rest) or "")
    assert "not on meta" in (torch_linear.INT8_LINEAR.supports(q=q.to("meta"), wq=wq, **rest) or "")


@pytest.mark.parametrize(
    ("kind", "capability", "reason"),
    [("fp8", (8, 6), "8.9, the GPU has 8.6"), ("fp8", (8, 9), None), ("int8", (7, 0), "7.5"), ("int8", (8, 0), None)],
)
def test_old_gpus_are_refused(
    kind: str, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch_linear, "self_test", lambda *_: None)
    got = torch_linear.refusal(kind, "cuda", 0)
    assert (got is None) == (reason is None)
    assert reason is None or reason in (got or "")


def test_neither_a_graph_capture_nor_a_full_memory_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "graph capture" in (torch_linear.refusal("int8", "cuda", 0) or "")

    def full(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as now:
        now.setattr(torch, "_int_mm", full)
        with pytest.raises(torch.OutOfMemoryError):
            torch_linear.refusal("int8", "cpu", None)
    assert torch_linear.refusal("int8", "cpu", None) is None


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_library_that_computes_wrongly_or_fails_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_linear.self_test(kind, "cpu", None) is None
    name = {"fp8": "_scaled_mm", "int8": "_int_mm"}[kind]
    real = getattr(torch, name)
    args = (*arguments(kind, 2, 8, 16), None, torch.float32)

    def last_rows_wrong(*a: Any, **options: Any) -> Tensor:
        out = real(*a, **options)
        out[256:] = 0  # as when M is not a multiple of 256
        return out

    def failing(*a: Any, **options: Any) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    for broken, reason in ((last_rows_wrong, "self-test is off by"), (failing, "CUBLAS_STATUS_NOT_SUPPORTED")):
        torch_linear._tested.clear()
        monkeypatch.setattr(torch, name, broken)
        with (
            ops.backend(**{f"linear_w8a8_{kind}": "torch"}),
            pytest.raises(BackendUnavailableError, match=reason),
        ):
            getattr(ops, f"linear_w8a8_{kind}")(*args)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_compiled_call_runs_on_it(kind: str) -> None:
    name = f"linear_w8a8_{kind}"
    op = getattr(ops, name)
    args = (*arguments(kind, 20, 9, 21), torch.ones(9), torch.float32)
    with ops.backend(**{name: "torch"}):
        compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), op(*args), rtol=1e-6, atol=1e-6)


def test_importing_the_package_does_not_import_the_back_ends() -> None:
    code = "import sys, vlmeff_kernels; print('torch' in sys.modules, 'vlmeff_kernels.torch_linear' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "kernels", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
