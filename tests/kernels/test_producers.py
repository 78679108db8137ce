"""The Triton producers against the reference.

They compute the same numbers in another order, so a float32 may differ in its last bits; what is rounded to 16 bits
after that may then differ by a unit in the last place, a code by one step, and a scale by that unit.
"""

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
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # infinities, in the interpreter
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHARE = 0.02  # of the codes, that may be off by one: chance of a float to lie at the limit of two
ULPS = {torch.float32: 32.0, torch.float16: 1.0, torch.bfloat16: 1.0}  # of the largest number of a row
drawn = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def compare(call: Callable[[], tuple[Tensor, Tensor]], op: str, dtype: torch.dtype) -> bool:
    expected = call()
    with ops.backend("triton"), ops.counters() as ran:
        got = call()
    assert ran == {(op, "triton"): 1}
    q, s = got
    assert (q.shape, s.shape, q.dtype, s.dtype) == (expected[0].shape, expected[1].shape, torch.int8, torch.float32)
    off = (q.int() - expected[0].int()).abs()
    close = torch.isclose(s, expected[1], rtol=ULPS[dtype] * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    same_scale = (s == expected[1]) | s.isnan()
    few = int((off * same_scale).sum()) <= max(2, SHARE * off.numel())
    return bool(close.all()) and int(off.amax() if off.numel() else 0) <= 1 and few


def sized(x: Tensor) -> Tensor:
    """Rows whose largest GELU is well above zero: far below it, all that is left of 1 + erf is rounding."""
    x[..., 0] = x[..., 0].abs() + 1
    return x


@pytest.mark.usefixtures("poison")
@drawn
@given(data=st.data())
def test_gelu_equals_the_reference(data: Any, device: torch.device) -> None:
    m, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 300))
    dtype = data.draw(st.sampled_from(FLOATS))
    x = sized((torch.randn(m, k, device=device) * 3).to(dtype))
    smooth = torch.rand(k, device=device) + 0.1 if data.draw(st.booleans()) else None
    approximate = data.draw(st.sampled_from(["none", "tanh"]))
    assert compare(lambda: ops.gelu_quant_int8(x, smooth, approximate=approximate), "gelu_quant_int8", dtype)


@pytest.mark.usefixtures("poison")
@drawn
@given(data=st.data())
def test_norms_equal_the_reference(data: Any, device: torch.device) -> None:
    draw = data.draw
    batch, tokens, k = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 300))
    dtype, kind = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(["layer", "rms"]))
    per = draw(st.sampled_from([torch.float32, dtype]))

    def maybe(*shapes: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return torch.randn(draw(st.sampled_from(shapes)), device=device).to(dtype) if draw(st.booleans()) else None

    x = (torch.randn(batch, tokens, k, device=device) * 5 + 1).to(dtype)
    shapes = (k,), (batch, k), (batch, 1, k), (batch, tokens, k)
    arguments = {
        "weight": maybe((k,), dtype=dtype),
        "bias": maybe((k,), dtype=dtype) if kind == "layer" else None,
        "scale": maybe(*shapes, dtype=per),
        "shift": maybe(*shapes, dtype=per),
        "smooth": torch.rand(k, device=device) + 0.1 if draw(st.booleans()) else None,
    }
    assert compare(lambda: ops.norm_quant_int8(x, **arguments, eps=1e-5, kind=kind), "norm_quant_int8", dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_that_are_not_numbers(dtype: torch.dtype, device: torch.device) -> None:
    x = sized(torch.randn(5, 40, device=device)).to(dtype)
    x[0, 3], x[1, 39], x[2, 0] = torch.nan, torch.inf, -torch.inf
    assert compare(lambda: ops.gelu_quant_int8(x), "gelu_quant_int8", dtype)
    assert compare(lambda: ops.gelu_quant_int8(x, approximate="tanh"), "gelu_quant_int8", dtype)
    assert compare(lambda: ops.norm_quant_int8(x, eps=1e-6), "norm_quant_int8", dtype)
    assert compare(lambda: ops.norm_quant_int8(x, eps=1e-6, kind="rms"), "norm_quant_int8", dtype)


@pytest.mark.parametrize("value", [-20.0, -6.0, -1e-20, 0.0, 6.0, 20.0, 1e20])
def test_gelu_far_from_zero(value: float, device: torch.device) -> None:
    x = torch.full((1, 8), value, device=device)
    for approximate in ("none", "tanh"):
        q, s = ops.gelu_quant_int8(x, approximate=approximate)
        with ops.backend("triton"):
            codes, scale = ops.gelu_quant_int8(x, approximate=approximate)
        # Beside what rounding leaves of 1 + erf, some units of 2^-24 of x.
        torch.testing.assert_close(codes * scale, q * s, rtol=1e-6, atol=abs(value) * 2.0**-22)


@pytest.mark.parametrize(("tokens", "k"), [(0, 40), (1, 1), (1, 129)])
def test_every_size(tokens: int, k: int, device: torch.device) -> None:
    x = sized(torch.randn(tokens, k, device=device))
    assert compare(lambda: ops.gelu_quant_int8(x), "gelu_quant_int8", x.dtype)
    assert compare(lambda: ops.norm_quant_int8(x, eps=1e-5, kind="rms"), "norm_quant_int8", x.dtype)


def test_strides_and_neighbours(device: torch.device) -> None:
    """Interpreted kernels read raw memory: what lies around the rows must not matter."""
    room = torch.full((4, 9, 90), torch.nan, device=device)
    x = room[1:3, 2:8:2, 11:76]
    x.copy_(sized(torch.randn_like(x)))
    factors = torch.full((4, 90), torch.nan, device=device)
    scale = factors[1:3, 7:72]
    scale.copy_(torch.randn_like(scale))
    assert compare(lambda: ops.norm_quant_int8(x, scale=scale, shift=scale, eps=1e-5), "norm_quant_int8", x.dtype)
    assert compare(lambda: ops.gelu_quant_int8(x[1]), "gelu_quant_int8", x.dtype)
    assert compare(lambda: ops.gelu_quant_int8(x[0].clone()[:, :9].T), "gelu_quant_int8", x.dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("gelu_quant_int8", {"TAIL": 32}),  # the last four channels left out
        ("gelu_quant_int8", {"TANH": True}),
        ("gelu_quant_int8", {"SMOOTH": False}),
        ("norm_quant_int8", {"TAIL": 32}),
        ("norm_quant_int8", {"LAYER": False}),
        ("norm_quant_int8", {"WEIGHT": False}),
        ("norm_quant_int8", {"BIAS": False}),
        ("norm_quant_int8", {"SCALE": False}),
        ("norm_quant_int8", {"SHIFT": False}),
        ("norm_quant_int8", {"SMOOTH": False}),
    ],
)
def test_a_kernel_that_leaves_a_step_out_is_noticed(
    op: str, change: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmeff_kernels import _launch

    launch = _launch.launch

    def changed(kernel: Any, grid: Any, *arguments: Any, warps: int, **constexprs: Any) -> None:
        launch(kernel, grid, *arguments, warps=warps, **{**constexprs, **change})

    x = sized(torch.randn(3, 100, device=device) + 1)
    factors = {name: torch.rand(100, device=device) + 0.5 for name in ("weight", "bias", "scale", "shift", "smooth")}
    # An outlier's own error is coarse: the difference of the two GELUs needs a fine scale.
    if "TANH" in change:
        x, factors["smooth"] = -x.abs().clamp(1.5, 3), factors["smooth"]
    monkeypatch.setattr(_launch, "launch", changed)
    if op == "gelu_quant_int8":
        assert not compare(lambda: ops.gelu_quant_int8(x, factors["smooth"]), op, x.dtype)
    else:
        assert not compare(lambda: ops.norm_quant_int8(x, **factors, eps=1e-5), op, x.dtype)


def test_what_the_kernels_do_not_take_is_refused(device: torch.device) -> None:
    with ops.backend("triton"):
        with pytest.raises(BackendUnavailableError, match=r"float32, float16 and bfloat16, not .*float64"):
            ops.gelu_quant_int8(torch.ones(2, 8, device=device, dtype=torch.float64))
        with pytest.raises(BackendUnavailableError, match="rows of 1 to 16384 channels, not 20000"):
            ops.norm_quant_int8(torch.ones(1, 20000, device=device), eps=1e-5)
