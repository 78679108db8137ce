"""Dynamic quantization of activations: against formulas spelt out in numpy, one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
F32 = np.float32


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def groups_of(row: np.ndarray, group: int) -> list[np.ndarray]:
    size = group if 0 < group < len(row) else max(len(row), 1)
    return [row[i : i + size] for i in range(0, len(row), size)]


def int_token(row: np.ndarray, bits: int, group: int) -> tuple[list[int], list[float]]:
    """One token's codes and scales, each step rounded to float32; np.rint rounds half to even."""
    largest = 2 ** (bits - 1) - 1
    codes: list[int] = []
    scales = []
    for part in groups_of(row.astype(F32), group):
        s = F32(max(abs(v) for v in part)) / F32(largest)
        s = F32(1) if s == 0 else s
        scales.append(float(s))
        codes += [int(min(max(np.rint(F32(v) / s), -largest), largest)) for v in part]
    return codes, scales


def uint_token(row: np.ndarray, bits: int, clip: tuple[float, float], contain: bool) -> tuple[list[int], float, int]:
    largest = 2**bits - 1
    lo, hi = row.astype(F32).min(), row.astype(F32).max()
    if contain:
        lo, hi = min(lo, F32(0)), max(hi, F32(0))
    lo, hi = F32(lo) * F32(clip[0]), F32(hi) * F32(clip[1])
    s = max((hi - lo) / F32(largest), F32(1e-6))
    z = min(max(np.rint(-lo / s), 0), largest)
    return [int(min(max(np.rint(F32(v) / s) + z, 0), largest)) for v in row], float(s), int(z)


E4M3 = sorted(
    {sign * m * 2.0**-9 for m in range(8) for sign in (1, -1)}
    | {sign * (1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) for sign in (1, -1) if (e, m) != (8, 7)}
)  # every finite value of the format, from its definition: 4 exponent bits with bias 7, 3 of mantissa, 448 the largest


def nearest_e4m3(v: float) -> set[float]:
    best = min(abs(v - e) for e in E4M3)
    return {e for e in E4M3 if abs(v - e) == best}


# int8 and narrower symmetric codes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 64), (4, 64), (4, 5), (3, 1), (2, 0)])
def test_symmetric_codes_are_those_of_the_formula(dtype: torch.dtype, bits: int, group: int) -> None:
    x = randn(5, 67, scale=3).to(dtype)
    q, s = ops.act_quant_int8(x, bits=bits, group=group)
    expected = [int_token(row, bits, group) for row in x.float().numpy()]
    assert (q.dtype, s.dtype) == (torch.int8, torch.float32)
    assert q.tolist() == [codes for codes, _ in expected]
    assert s.tolist() == [scales for _, scales in expected]


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert ops.act_quant_int8(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@PROPERTY
@given(st.integers(1, 6), st.integers(1, 40), st.integers(2, 8), st.integers(0, 12), st.integers(0, 2**31))
def test_symmetric_error_scaling_and_permutation(m: int, k: int, bits: int, group: int, seed: int) -> None:
    x = randn(m, k, seed=seed)
    q, s = ops.act_quant_int8(x, bits=bits, group=group)
    wide = s if s.shape[1] == 1 else s.repeat_interleave(group, 1)[:, :k]
    assert bool(((q * wide - x).abs() <= wide / 2 * (1 + 1e-5)).all())
    for power in (2.0**-7, 2.0**9):
        again, scaled = ops.act_quant_int8(x * power, bits=bits, group=group)
        assert torch.equal(again, q)
        assert torch.equal(scaled, s * power)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    moved, scales = ops.act_quant_int8(x[order], bits=bits, group=group)
    assert torch.equal(moved, q[order])
    assert torch.equal(scales, s[order])


def test_smoothing_divides_first() -> None:
    x, smooth = randn(4, 9).bfloat16(), randn(9, seed=1).abs() + 0.1
    divided = x.float() / smooth
    for op in (ops.act_quant_int8, ops.act_quant_fp8):
        q, s = op(x, smooth)
        expected, scales = op(divided)
        assert torch.equal(q.float(), expected.float())
        assert torch.equal(s, scales)


# float8


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8_codes_are_the_nearest_values_of_the_format(dtype: torch.dtype) -> None:
    x = randn(4, 50, scale=20).to(dtype)
    q, s = ops.act_quant_fp8(x)
    assert (q.dtype, s.dtype) == (torch.float8_e4m3fn, torch.float32)
    for row, codes, scale in zip(x.float().numpy(), q.float().tolist(), s[:, 0].tolist(), strict=True):
        assert scale == float(F32(np.abs(row).max()) / F32(448))
        for value, code in zip(row, codes, strict=True):
            assert code in nearest_e4m3(float(F32(value) / F32(scale)))


def test_fp8_of_large_half_precision_numbers_does_not_overflow() -> None:
    x = torch.full((2, 8), 60000.0, dtype=torch.float16)
    x[0, 1] = -65504
    q, s = ops.act_quant_fp8(x)
    assert q.float().abs().amax(1).tolist() == [448, 448]
    torch.testing.assert_close(q.float() * s, x.float(), rtol=0.07, atol=0)


# unsigned codes with a zero-point


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("clip", [None, (0.95, 0.9), (0.5, 1.0)])
@pytest.mark.parametrize("contain", [True, False])
def test_unsigned_codes_are_those_of_the_formula(
    dtype: torch.dtype, bits: int, clip: tuple[float, float] | None, contain: bool
) -> None:
    x = randn(6, 33).to(dtype)
    x[1], x[2] = x[1].abs() + 1, -x[2].abs() - 1  # of one sign
    x[3] = 2.5  # constant
    x[4] = 0
    q, s, z, rowsum = ops.act_quant_uint(
        x, bits=bits, clip=None if clip is None else torch.tensor(clip), contain_zero=contain
    )
    expected = [uint_token(row, bits, clip or (1, 1), contain) for row in x.float().numpy()]
    assert (q.dtype, s.dtype, z.dtype, rowsum.dtype) == (torch.uint8, torch.float32, torch.int32, torch.int32)
    assert q.tolist() == [codes for codes, _, _ in expected]
    assert s[:, 0].tolist() == [scale for _, scale, _ in expected]
    assert z[:, 0].tolist() == [zero for _, _, zero in expected]
    assert rowsum[:, 0].tolist() == [sum(codes) for codes, _, _ in expected]


@PROPERTY
@given(st.floats(-100, 100, allow_nan=False, width=32), st.integers(2, 7), st.integers(1, 9))
def test_a_constant_token_comes_back_within_half_a_step(value: float, bits: int, k: int) -> None:
    x = torch.full((1, k), value)
    q, s, z, _ = ops.act_quant_uint(x, bits=bits)
    assert float(((q.int() - z) * s - x).abs().max()) <= float(s) / 2 * (1 + 1e-5)
    codes, scale = ops.act_quant_int8(x, bits=bits)
    assert float((codes * scale - x).abs().max()) <= float(scale) / 2 * (1 + 1e-5)


@PROPERTY
@given(st.integers(2, 7), st.integers(1, 30), st.integers(0, 2**31))
def test_unsigned_scaling_and_permutation(bits: int, k: int, seed: int) -> None:
    x = randn(4, k, seed=seed, scale=5)
    q, s, z, rowsum = ops.act_quant_uint(x, bits=bits)
    if bool((s > 1e-3).all()):  # far from the smallest scale
        again, scaled, zeros, _ = ops.act_quant_uint(x * 0.25, bits=bits)
        assert torch.equal(again, q)
        assert torch.equal(scaled, s / 4)
        assert torch.equal(zeros, z)
    flipped = ops.act_quant_uint(x.flip(0), bits=bits)
    for one, other in zip((q, s, z, rowsum), flipped, strict=True):
        assert torch.equal(one, other.flip(0))


# Odd inputs


def quantizers(k: int) -> dict[str, object]:
    return {
        "int8": lambda x: ops.act_quant_int8(x),
        "int4 groups": lambda x: ops.act_quant_int8(x, bits=4, group=4),
        "fp8": lambda x: ops.act_quant_fp8(x),
        "uint4": lambda x: ops.act_quant_uint(x, bits=4),
    }


@pytest.mark.parametrize("kind", quantizers(1))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_spoil_exactly_their_row(kind: str, bad: float, dtype: torch.dtype) -> None:
    x = randn(3, 10).to(dtype)
    clean = quantizers(10)[kind](x)  # type: ignore[operator]
    x[1, 6] = bad
    got = quantizers(10)[kind](x)  # type: ignore[operator]
    assert bool(got[1][1].isnan().any())
    assert not bool(got[1][[0, 2]].isnan().any())
    for mine, theirs in zip(got, clean, strict=True):
        assert torch.equal(mine[[0, 2]].float(), theirs[[0, 2]].float())
    if kind == "int4 groups":  # the other groups of the row are sound
        assert got[1][1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", quantizers(1))
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (17, 8), (3, 1), (2, 0)])
def test_every_size_has_the_right_shapes(kind: str, shape: tuple[int, int]) -> None:
    q, s, *rest = quantizers(shape[1])[kind](torch.ones(shape))  # type: ignore[operator]
    assert q.shape == shape
    assert s.shape == (shape[0], 2 if kind == "int4 groups" and shape[1] == 8 else 1)
    assert all(r.shape == (shape[0], 1) for r in rest)


@pytest.mark.parametrize("kind", quantizers(1))
def test_rows_of_zeros_and_strided_inputs(kind: str) -> None:
    x = randn(8, 12)
    x[2] = 0
    q, s, *rest = quantizers(12)[kind](x)  # type: ignore[operator]
    zero = rest[0][2] if rest else 0
    assert bool((q[2].float() - zero == 0).all())
    assert bool(s.isfinite().all())
    strided = quantizers(6)[kind](x[::2, 1::2])  # type: ignore[operator]
    contiguous = quantizers(6)[kind](x[::2, 1::2].contiguous())  # type: ignore[operator]
    transposed = quantizers(8)[kind](x.T)  # type: ignore[operator]
    for one, other in zip(strided, contiguous, strict=True):
        assert torch.equal(one.float(), other.float())
    for one, other in zip(transposed, quantizers(8)[kind](x.T.contiguous()), strict=True):  # type: ignore[operator]
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.act_quant_int8(torch.ones(2, 3, dtype=torch.int32)), TypeError, "float tensor, got torch.int32"),
        (lambda: ops.act_quant_fp8(torch.ones(2, 3, 4)), ValueError, r"\[M, K\], got \(2, 3, 4\); flatten"),
        (lambda: ops.act_quant_int8(torch.ones(2, 3), bits=9), ValueError, "bits must be 2 to 8, got 9"),
        (lambda: ops.act_quant_int8(torch.ones(2, 3), group=-1), ValueError, "group must be 0 .*got -1"),
        (lambda: ops.act_quant_uint(torch.ones(2, 3), bits=8), ValueError, "bits must be 2 to 7, got 8"),
        (lambda: ops.act_quant_int8(torch.ones(2, 3), torch.ones(2)), ValueError, r"smooth .* K = 3 .*got \(2,\)"),
        (lambda: ops.act_quant_uint(torch.ones(2, 3), bits=4, clip=torch.ones(1)), ValueError, r"clip must be \[2\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["act_quant_int8", "act_quant_fp8", "act_quant_uint"])
def test_they_are_counted_and_explained(name: str) -> None:
    options = {"bits": 4} if name == "act_quant_uint" else {}
    with ops.counters() as ran:
        getattr(ops, name)(torch.ones(2, 4), **options)
    assert ran == {(name, "reference"): 1}
    assert ops.explain(name, torch.ones(2, 4), **options).backend == "reference"


def test_a_compiled_function_gives_the_same_codes() -> None:
    def all_three(x: Tensor, smooth: Tensor, clip: Tensor) -> list[Tensor]:
        return [
            *ops.act_quant_int8(x, smooth),
            *ops.act_quant_int8(x, bits=4, group=5),
            *ops.act_quant_fp8(x, smooth),
            *ops.act_quant_uint(x, bits=4, clip=clip),
        ]

    arguments = randn(5, 12), randn(12, seed=1).abs() + 0.5, torch.tensor([0.9, 0.8])
    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*arguments), all_three(*arguments), strict=True):
        assert torch.equal(got.float(), expected.float())
