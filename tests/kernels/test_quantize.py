"""The Triton quantizers against the reference: codes, scales, zero-points and sums, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

pytest.importorskip("triton")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ONE_PASS = 128  # channels, in the interpreter: below and above it are two kernels
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # infinities, in the interpreter
drawn = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def act_quantizers(k: int, device: torch.device) -> dict[str, tuple[str, Callable[[Tensor], tuple[Tensor, ...]]]]:
    """name -> (op, call)."""
    smooth = torch.rand(k, device=device) + 0.1
    clip = torch.tensor([0.9, 0.7], device=device)
    return {
        "int8": ("act_quant_int8", lambda x: ops.act_quant_int8(x)),
        "int8 smoothed": ("act_quant_int8", lambda x: ops.act_quant_int8(x, smooth)),
        "int4": ("act_quant_int8", lambda x: ops.act_quant_int8(x, bits=4)),
        "int4 groups of 16": ("act_quant_int8", lambda x: ops.act_quant_int8(x, smooth, bits=4, group=16)),
        "int3 groups of 7": ("act_quant_int8", lambda x: ops.act_quant_int8(x, bits=3, group=7)),
        "fp8": ("act_quant_fp8", lambda x: ops.act_quant_fp8(x)),
        "fp8 smoothed": ("act_quant_fp8", lambda x: ops.act_quant_fp8(x, smooth)),
        "uint4": ("act_quant_uint", lambda x: ops.act_quant_uint(x, bits=4)),
        "uint7 clipped": ("act_quant_uint", lambda x: ops.act_quant_uint(x, bits=7, clip=clip)),
        "uint3 as in QVGen": (
            "act_quant_uint",
            lambda x: ops.act_quant_uint(x, bits=3, clip=clip, contain_zero=False),
        ),
    }


KINDS = list(act_quantizers(1, torch.device("cpu")))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit; one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_contiguous():
        return False
    if a.is_floating_point():
        missing = a.float().isnan()
        raw = torch.uint8 if a.dtype.itemsize == 1 else torch.int32
        return torch.equal(missing, b.float().isnan()) and torch.equal(a.view(raw)[~missing], b.view(raw)[~missing])
    return torch.equal(a, b)


def agree(kind: str, x: Tensor) -> bool:
    op, call = act_quantizers(x.shape[1], x.device)[kind]
    expected = call(x)
    with ops.backend("triton"), ops.counters() as ran:
        got = call(x)
    assert ran == {(op, "triton"): 1}
    return all(same(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.usefixtures("poison")
@drawn
@given(data=st.data())
def test_every_quantizer_equals_the_reference(data: Any, device: torch.device) -> None:
    m, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2 * ONE_PASS))
    x = (torch.randn(m, k, device=device) * 10 ** data.draw(st.integers(-3, 2))).to(data.draw(st.sampled_from(FLOATS)))
    assert agree(data.draw(st.sampled_from(KINDS)), x)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 90), (torch.float16, 140), (torch.bfloat16, 37)])
def test_rows_that_are_not_numbers_zero_or_of_one_sign(
    kind: str, dtype: torch.dtype, k: int, device: torch.device
) -> None:
    x = torch.randn(9, k, device=device).to(dtype)
    x[0] = 0
    x[1, k // 2] = torch.nan
    x[2, -1], x[2, 0] = torch.nan, torch.inf
    x[3, 0] = -torch.inf
    x[4, -1] = -torch.nan
    x[5], x[6] = x[5].abs() + 3, -x[6].abs() - 3
    x[7] = torch.finfo(dtype).max * (1 - 2 * torch.randint(0, 2, (k,), device=device))  # their difference overflows
    x[8, ::2] = -0.0
    assert agree(kind, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 40), (1, 1), (3, 0), (1, 128), (1, 129)])
def test_every_size(kind: str, shape: tuple[int, int], device: torch.device) -> None:
    assert agree(kind, torch.randn(shape, device=device))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_every_magnitude(kind: str, device: torch.device) -> None:
    powers = torch.tensor([-140, -120, -70, -58, 0, 58, 70, 117], device=device)
    assert agree(kind, (torch.randn(8, 40, device=device).clamp(-4, 4).double() * 2.0 ** powers[:, None]).float())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quotients_at_the_limit_of_two_codes(kind: str, device: torch.device) -> None:
    """Where a quotient that is off by its last bit is another code: half a step between codes, and beside it."""
    largest = 127.0 if kind == "int8" else 448.0
    steps = torch.cat([torch.rand(4, device=device) + 1, torch.tensor([2 - 2.0**-23, 1 + 2.0**-23], device=device)])
    if kind == "int8":
        codes = torch.arange(-127, 128, device=device)
    else:
        codes = (
            torch.arange(256, device=device).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0).unique()
        )
    limits = (codes[1:] + codes[:-1]) / 2
    x = steps[:, None].double() * torch.cat([limits, torch.tensor([largest], device=device)])
    below, above = (x.float().nextafter(torch.tensor(v, device=device)) for v in (-1e9, 1e9))
    values = torch.cat([below, x.float(), above])
    values[:, -1] = x[:, -1].float().repeat(3)
    assert agree(kind, values)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_neighbours(kind: str, device: torch.device) -> None:
    """Interpreted kernels read raw memory: what lies around the rows must not matter."""
    room = torch.full((12, 90), torch.nan, device=device)
    x = room[2:10:2, 11:76]
    x.copy_(torch.randn_like(x))
    assert agree(kind, x)
    assert agree(kind, x.clone()[:, :9].T)
    assert int(room.isnan().sum()) == room.numel() - x.numel()


def mutate(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    from vlmeff_kernels import _launch

    launch = _launch.launch

    def changed(kernel: Any, grid: Any, *arguments: Any, warps: int, **constexprs: Any) -> None:
        change(constexprs)
        launch(kernel, grid, *arguments, warps=warps, **constexprs)

    monkeypatch.setattr(_launch, "launch", changed)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("kind", "k", "change"),
    [
        ("int8", 100, {"LARGEST": 126.0}),
        ("int8", 100, {"TAIL": 32}),  # the last four channels left out
        ("int8 smoothed", 100, {"SMOOTH": False}),
        ("int8", 140, {"LARGEST": 128.0}),
        ("int4 groups of 16", 100, {"GROUP": 8}),
        ("int4 groups of 16", 100, {"SMOOTH": False}),
        ("fp8", 100, {"LARGEST": 447.0}),
        ("fp8 smoothed", 140, {"SMOOTH": False}),
        ("uint4", 100, {"LARGEST": 14.0}),
        ("uint4", 100, {"TAIL": 32}),
        ("uint4", 140, {"LARGEST": 16.0}),
        ("uint7 clipped", 100, {"CLIP": False}),
        ("uint3 as in QVGen", 140, {"CONTAIN": True}),
    ],
)
def test_a_kernel_that_is_off_by_one_is_noticed(
    kind: str, k: int, change: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, k, device=device).abs() + 1
    mutate(monkeypatch, lambda constexprs: constexprs.update(change))
    assert not agree(kind, x)


def test_what_the_kernels_do_not_take_is_refused(device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    with ops.backend("triton"):
        with pytest.raises(BackendUnavailableError, match=r"float32, float16 and bfloat16, not .*float64"):
            ops.act_quant_int8(x.double())
        with pytest.raises(BackendUnavailableError, match=r"smooth in float32, not .*float64"):
            ops.act_quant_fp8(x, torch.ones(8, device=device, dtype=torch.float64))
        with pytest.raises(BackendUnavailableError, match="groups of at most 16384 channels, not 16385"):
            ops.act_quant_int8(torch.zeros(1, 20000, device=device), group=16385)


def test_float8_needs_hardware_for_it() -> None:
    from vlmeff_kernels import _launch

    x = torch.empty(2, 8, device="meta")
    with _launch.recording((8, 0)), ops.backend("triton"), pytest.raises(BackendUnavailableError, match=r"8\.9"):
        ops.act_quant_fp8(x)
