"""The weight-only linear layer against weights expanded one by one and products in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError
from vlmeff.ops.packing import pack_nibbles

pytest.importorskip("triton")
FP8 = torch.float8_e4m3fn
# Relative Frobenius norm: float32 sums in another order; half a unit of the last place of each output.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(TOLERANCE)
drawn = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def layer(n: int, k: int, bits: int, group: int, *, zeros: bool, codes: torch.dtype, scales: torch.dtype) -> Any:
    """(wq as stored, ws, wz, codes as numbers [N, K] float32)."""
    groups = -(-k // group) if 0 < group < k else 1
    ws = (0.02 + 0.1 * torch.rand(n, groups)).to(scales)
    if bits == 8:
        numbers = torch.randn(n, k).to(FP8) if codes == FP8 else torch.randint(-128, 128, (n, k)).to(codes)
        wz = 8 * torch.randn(n, groups) if zeros else None
        return numbers, ws, wz, numbers.float()
    numbers = torch.randint(0, 2**bits, (n, k))
    wz = (2**bits * torch.rand(n, groups)) if zeros else None
    wq = pack_nibbles(numbers, pad=15)
    return wq, ws, wz, numbers.float() - (0 if zeros else 8)


def weights(numbers: Tensor, ws: Tensor, wz: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """[N, K] of dtype, one at a time in numpy's float32."""
    out = np.zeros(numbers.shape, np.float32)
    for n, k in np.ndindex(*numbers.shape):
        g = k // group if ws.shape[1] > 1 else 0
        zero = np.float32(0 if wz is None else wz[n, g].item())
        out[n, k] = np.float32(ws[n, g].item()) * (np.float32(numbers[n, k].item()) - zero)
    return torch.from_numpy(out).to(dtype)


def run(x: Tensor, wq: Tensor, ws: Tensor, wz: Tensor | None, bias: Tensor | None, **options: int) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = [t if t is None else t.to(device) for t in (x, wq, ws, wz, bias)]
    with ops.backend("triton"), ops.counters() as ran:
        out = ops.linear_wna16(*moved, **options)  # type: ignore[arg-type]
    assert ran == {("linear_wna16", "triton"): 1}
    return out.cpu()


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.usefixtures("poison")
@drawn
@given(data=st.data())
def test_products_equal_those_of_the_expanded_weight(data: Any) -> None:
    draw = data.draw
    bits, dtype = draw(st.sampled_from([8, 4, 3, 2])), draw(st.sampled_from(DTYPES))
    m, n = draw(st.sampled_from([1, 2, 16, 17, 40])), draw(st.sampled_from([1, 7, 16, 35]))
    k, group = draw(st.sampled_from([1, 2, 31, 64, 101, 160])), draw(st.sampled_from([0, 8, 24, 32, 64, 5]))
    zeros, codes = draw(st.booleans()), draw(st.sampled_from([torch.int8, FP8]))
    scales = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    wq, ws, wz, numbers = layer(n, k, bits, group, zeros=zeros, codes=codes, scales=scales)
    x = torch.randn(m, k).to(dtype)
    bias = torch.randn(n) if draw(st.booleans()) else None
    got = run(x, wq, ws, wz, bias, bits=bits, group=group)
    expected = x.double() @ weights(numbers, ws, wz, group, dtype).double().T
    if bias is not None:
        expected += bias.to(dtype).double()
    assert got.shape == (m, n)
    assert got.dtype == dtype
    assert error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "codes", "group", "zeros"),
    [(4, torch.uint8, 16, True), (4, torch.uint8, 0, False), (3, torch.uint8, 7, True), (8, torch.int8, 0, False),
     (8, torch.int8, 24, True), (8, FP8, 16, False)],
)  # fmt: skip
def test_rows_of_the_identity_read_the_rounded_weight_bit_for_bit(
    dtype: torch.dtype, bits: int, codes: torch.dtype, group: int, zeros: bool
) -> None:
    k = 41
    wq, ws, wz, numbers = layer(19, k, bits, group, zeros=zeros, codes=codes, scales=torch.float32)
    got = run(torch.eye(k, dtype=dtype), wq, ws, wz, None, bits=bits, group=group)
    assert torch.equal(got.T, weights(numbers, ws, wz, group, dtype))
    for first in (0, 23):  # few rows, and K cut in parts
        alone = run(torch.eye(k, dtype=dtype)[first : first + 8], wq, ws, wz, None, bits=bits, group=group)
        assert torch.equal(alone, got[first : first + 8])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 40), (3, 0, 40), (3, 5, 0), (0, 0, 0)])
@pytest.mark.usefixtures("poison")
def test_empty_sizes(m: int, n: int, k: int) -> None:
    wq, ws, _, _ = layer(n, k, 4, 0, zeros=False, codes=torch.uint8, scales=torch.float32)
    bias = torch.randn(n)
    got = run(torch.randn(m, k), wq, ws, None, bias, bits=4)
    assert got.shape == (m, n)
    assert torch.equal(got, bias.expand(m, n)) or k


@pytest.mark.parametrize("bits", [4, 8])
def test_strides_and_what_lies_around_the_tensors(bits: int, device: torch.device) -> None:
    """Interpreted kernels read raw memory: nothing outside the tensors may reach the result, nor change."""
    m, n, k, group = 6, 21, 75, 32
    wq, ws, wz, _ = layer(n, k, bits, group, zeros=True, codes=torch.int8, scales=torch.float32)
    assert wz is not None
    x, wq, ws, wz, bias = (t.to(device) for t in (torch.randn(m, k), wq, ws, wz, torch.randn(n)))

    def inside(t: Tensor) -> Tensor:
        """The same values in the middle of a larger tensor of NaN (or the largest integer)."""
        poison = torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max
        room = torch.full([2 * size + 9 for size in t.shape], poison, dtype=t.dtype, device=device)
        room[tuple(slice(5, 5 + size) for size in t.shape)] = t
        return room[tuple(slice(5, 5 + size) for size in t.shape)]

    expected = run(x, wq, ws, wz, bias, bits=bits, group=group)
    placed = [inside(t) for t in (x, wq, ws, wz, bias)]
    assert torch.equal(run(*placed, bits=bits, group=group), expected)
    columns = [t if t.ndim == 1 else t.T.contiguous().T for t in (x, wq, ws, wz, bias)]
    assert torch.equal(run(*columns, bits=bits, group=group), expected)
    twice = x.repeat_interleave(2, 0)[::2]
    assert torch.equal(run(twice, wq, ws, wz, bias, bits=bits, group=group), expected)


@pytest.mark.parametrize("m", [1, 20])
def test_nan_stays_in_its_row_and_its_output(m: int) -> None:
    wq, ws, _, _ = layer(9, 70, 4, 32, zeros=False, codes=torch.uint8, scales=torch.float32)
    x = torch.randn(m, 70)
    x[-1, 69] = torch.nan
    got = run(x, wq, ws, None, None, bits=4, group=32)
    assert got[-1].isnan().all()
    assert not got[:-1].isnan().any()
    ws[4, 2] = torch.nan  # the last group, which is short
    got = run(torch.randn(m, 70), wq, ws, None, None, bits=4, group=32)
    assert torch.equal(got.isnan().any(0), torch.arange(9) == 4)


def test_runs_repeat_and_do_not_depend_on_other_rows() -> None:
    wq, ws, wz, _ = layer(33, 300, 4, 100, zeros=True, codes=torch.uint8, scales=torch.float32)
    x = torch.randn(12, 300)
    first = run(x, wq, ws, wz, None, bits=4, group=100)
    assert torch.equal(run(x, wq, ws, wz, None, bits=4, group=100), first)
    changed = x.clone()
    changed[3:] = torch.randn(9, 300)
    assert torch.equal(run(changed, wq, ws, wz, None, bits=4, group=100)[:3], first[:3])


@pytest.mark.parametrize(("name", "change"), [("scale", 1.0001), ("zero", 1.001), ("group", 1), ("last", 1)])
def test_a_small_fault_is_noticed(name: str, change: float) -> None:
    """The comparison above must fail when what it compares with is slightly something else."""
    group, k = 32, 101
    wq, ws, wz, numbers = layer(16, k, 4, group, zeros=True, codes=torch.uint8, scales=torch.float32)
    assert wz is not None
    x = torch.randn(5, k)
    got = run(x, wq, ws, wz, None, bits=4, group=group)
    if name == "last":
        numbers[:, k - 1] += change
    scale, zero = ws * (change if name == "scale" else 1), wz * (change if name == "zero" else 1)
    if name == "group":
        scale = scale.roll(1, 1)
    expected = x.double() @ weights(numbers, scale, zero, group, torch.float32).double().T
    assert error(got, expected) > TOLERANCE[torch.float32]


def test_what_it_refuses() -> None:
    wq, ws, _, _ = layer(4, 8, 8, 0, zeros=False, codes=torch.int8, scales=torch.float32)
    with ops.backend("triton"), pytest.raises(BackendUnavailableError, match="x must be one of"):
        ops.linear_wna16(torch.randn(2, 8).double(), wq, ws, None, None, bits=8)


def test_registration_is_sound() -> None:
    """Schema, fake outputs and the launcher agree, also under a compiler."""
    from vlmeff_kernels import linear_wna16  # noqa: F401  # registers the op

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wq, ws, wz, _ = layer(5, 40, 4, 16, zeros=True, codes=torch.uint8, scales=torch.float32)
    x = torch.randn(3, 40)
    arguments = [t.to(device) for t in (x, wq, ws, wz)]
    op = torch.ops.vlmeff_kernels.linear_wna16.default
    torch.library.opcheck(op, (*arguments, None, 4, 16))

    compiled = torch.compile(
        lambda *a: ops.linear_wna16(*a, None, bits=4, group=16) + 1, backend="aot_eager", fullgraph=True
    )
    with ops.backend("triton"):
        assert torch.equal(compiled(*arguments), ops.linear_wna16(*arguments, None, bits=4, group=16) + 1)
