"""Weight quantizers: against the formulas as loops over groups, and the errors that Gaussian weights must have."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff.diffusion import quantizers
from vlmeff.errors import QuantConfigError

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
F32 = np.float32
ROOT = Path(__file__).parents[2]


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def of_groups(k: int, group: int) -> list[slice]:
    size = group if 0 < group < k else k
    return [slice(i, min(i + size, k)) for i in range(0, k, size)]


def stored(value: np.floating, dtype: torch.dtype) -> np.floating:
    return F32(torch.tensor(float(value)).to(dtype).float().item())


def loop(w: Tensor, bits: int, group: int, kind: str, dtype: torch.dtype = torch.float32):
    """codes, scales and zero-points, weight by weight, each step rounded to float32."""
    codes, scales, zeros = [], [], []
    for row in w.numpy().astype(F32):
        codes.append([])
        scales.append([])
        zeros.append([])
        for here in of_groups(len(row), group):
            part = row[here]
            if kind == "symmetric":
                largest = 2 ** (bits - 1) - 1
                s = F32(max(abs(v) for v in part)) / F32(largest)
                s, z, low = stored(s if s != 0 else F32(1), dtype), F32(0), -largest
            else:
                largest, low = 2**bits - 1, 0
                lo, hi = min(part.min(), F32(0)), max(part.max(), F32(0))
                s = max((hi - lo) / F32(largest), F32(1e-9))
                z = -lo / s
                if kind == "integer":
                    z = F32(min(max(np.rint(z), 0), largest))
                s, z = stored(s, dtype), stored(z, dtype)
            for v in part:
                q = np.rint(v / s + z) if kind == "float" else np.rint(v / s) + z
                codes[-1].append(int(min(max(q, low), largest)))
            scales[-1].append(float(s))
            zeros[-1].append(float(z))
    return codes, scales, zeros


CASES = [(8, 0), (4, 0), (4, 16), (4, 7), (3, 5), (2, 64), (8, 1)]


@pytest.mark.parametrize(("bits", "group"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_symmetric_is_the_formula(bits: int, group: int, dtype: torch.dtype) -> None:
    w = gaussian(5, 33)
    w[2] = 0
    codes, scale = quantizers.symmetric(w, bits, group, scale_dtype=dtype)
    expected, scales, _ = loop(w, bits, group, "symmetric", dtype)
    assert (codes.dtype, scale.dtype) == (torch.int8, dtype)
    assert codes.tolist() == expected
    assert scale.float().tolist() == scales
    assert bool((scale[2] == 1).all())
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize(("bits", "group"), CASES)
@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asymmetric_is_the_formula(bits: int, group: int, zero, dtype: torch.dtype) -> None:
    w = gaussian(6, 33)
    w[1], w[2] = w[1].abs() + 1, -w[2].abs() - 1  # of one sign
    w[3] = 0
    codes, scale, zeros = quantizers.asymmetric(w, bits, group, zero=zero, scale_dtype=dtype)
    expected, scales, zero_points = loop(w, bits, group, zero, dtype)
    assert (codes.dtype, scale.dtype, zeros.dtype) == (torch.uint8, dtype, dtype)
    assert codes.tolist() == expected
    assert scale.float().tolist() == scales
    assert zeros.float().tolist() == zero_points
    back = quantizers.dequantize(codes, scale, zeros, group)
    assert bool((back[3] == 0).all())


def test_a_short_last_group_has_a_scale_of_its_own_elements() -> None:
    w = torch.tensor([[1.0, -2.0, 3.0, 7.0, 0.06, -0.14]])
    codes, scale = quantizers.symmetric(w, 4, 4)
    assert scale[0].tolist() == pytest.approx([1.0, 0.02])
    assert codes.tolist() == [[1, -2, 3, 7, 3, -7]]
    positive = torch.tensor([[5.0, 6.0, 7.0, 8.0, 2.0, 3.0]])
    _, scale, zero = quantizers.asymmetric(positive, 4, 4, search=True)
    assert zero.tolist() == [[0, 0]]
    assert scale[0, 1] <= 0.2001


# Range search


def brute_force_range(part: np.ndarray, bits: int, zero: str, contain: bool) -> tuple[float, float, list[float]]:
    """Best (s, z) of a group, and the error of every candidate, in float64."""
    largest = 2**bits - 1
    lo, hi = float(part.min()), float(part.max())
    if contain:
        lo, hi = min(lo, 0.0), max(hi, 0.0)
    errors, candidates = [], []
    for i in range(80):
        p = 1 - i / 100
        s = max((hi - lo) * p / largest, 1e-9)
        z = -lo * p / s
        if zero == "integer":
            z = min(max(float(np.rint(z)), 0.0), float(largest))
        q = np.rint(part / s + z) if zero == "float" else np.rint(part / s) + z
        errors.append(float((np.abs(s * (np.clip(q, 0, largest) - z) - part) ** 2.4).sum()))
        candidates.append((s, z))
    best = int(np.argmin(errors))  # the first of equal ones: the larger range
    return *candidates[best], errors


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize(("bits", "group"), [(4, 0), (3, 0), (2, 8), (4, 11)])
@pytest.mark.parametrize("contain", [True, False])
def test_the_range_search_finds_the_best_of_eighty(zero, bits: int, group: int, contain: bool) -> None:
    k = 32 if not contain else 30
    group = group if contain or group != 11 else 8
    w = gaussian(4, k, seed=bits)
    w[1] = w[1].abs() + 0.5
    scale, zeros = quantizers.mse_range(w, bits, group, zero=zero, contain_zero=contain)
    for i, row in enumerate(w.double().numpy()):
        for g, here in enumerate(of_groups(k, group)):
            s, z, errors = brute_force_range(row[here], bits, zero, contain)
            got = (float(scale[i, g]), float(zeros[i, g]))
            if got != pytest.approx((s, z), rel=1e-5, abs=1e-5):
                # float32 may tip a half the other way; then the choice is as good, only not the same
                largest = 2**bits - 1
                q = np.rint(row[here] / got[0] + got[1])
                error = (np.abs(got[0] * (np.clip(q, 0, largest) - got[1]) - row[here]) ** 2.4).sum()
                assert error <= min(errors) * (1 + 1e-2)


@PROPERTY
@given(st.integers(2, 4), st.integers(1, 40), st.integers(0, 9), st.booleans(), st.integers(0, 2**31))
def test_the_search_is_never_worse_than_minimum_to_maximum(
    bits: int, k: int, group: int, integer: bool, seed: int
) -> None:
    w, zero = gaussian(3, k, seed=seed), "integer" if integer else "float"

    def errors(search: bool) -> Tensor:
        codes, scale, zeros = quantizers.asymmetric(w, bits, group, zero=zero, search=search)
        wrong = (quantizers.dequantize(codes, scale, zeros, group) - w).abs().double().pow(2.4)
        return torch.stack([wrong[:, here].sum(1) for here in of_groups(k, group)], 1)

    # Of each group, not only of the sum. Near zero both are the dust of float32.
    assert bool((errors(True) <= errors(False) * (1 + 1e-5) + 1e-12).all())


def test_of_equal_errors_the_larger_range_wins() -> None:
    zeros = torch.zeros(1, 4)
    scale, zero = quantizers.mse_range(zeros, 4)
    assert (float(scale), float(zero)) == (pytest.approx(1e-9), 0.0)
    grid = torch.arange(16.0)[None]  # codes of the whole range are exact: error 0 at once
    scale, zero = quantizers.mse_range(grid, 4)
    assert (float(scale), float(zero)) == (1.0, 0.0)
    # One weight is exact with every range, as long as p hi / P * P is p hi: all but the first clip it.
    scale, _ = quantizers.mse_range(torch.tensor([[15.0]]), 4)
    assert float(scale) == 1.0


# float8


def test_float8_codes_and_scales() -> None:
    w = gaussian(4, 19)
    w[1] = 0
    codes, scale = quantizers.fp8(w)
    assert codes.dtype == torch.float8_e4m3fn
    for row, q, s in zip(w.numpy(), codes.float().tolist(), scale[:, 0].tolist(), strict=True):
        largest = float(np.abs(row).max())
        assert s == (float(F32(largest) / F32(448)) if largest else 1.0)
        for value, code in zip(row, q, strict=True):
            scaled = float(F32(value) / F32(s))
            step = 2.0 ** (max(math.floor(math.log2(abs(scaled))), -6) - 3) if scaled else 0.0
            assert abs(code - scaled) <= step / 2
    assert float(codes.float().abs().max()) == 448


# What all have in common


def encoded(kind: str, w: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if kind == "fp8":
        return quantizers.fp8(w)
    if kind.startswith("sym"):
        return quantizers.symmetric(w, int(kind[3:]), group, scale_dtype=dtype)
    zero = "integer" if kind.startswith("int") else "float"
    return quantizers.asymmetric(w, int(kind[-1]), group, zero=zero, search=kind.startswith("mse"), scale_dtype=dtype)


KINDS = ["sym8", "sym4", "int4", "float4", "float3", "mse4", "mse3", "fp8"]


@PROPERTY
@given(st.sampled_from(KINDS), st.integers(1, 30), st.integers(0, 12), st.booleans(), st.integers(0, 2**31))
def test_quantizing_what_was_dequantized_gives_the_same_codes(
    kind: str, k: int, group: int, narrow: bool, seed: int
) -> None:
    group = 0 if kind == "fp8" else group
    w = gaussian(3, k, seed=seed)
    codes, scale, *zero = encoded(kind, w, group, torch.bfloat16 if narrow else torch.float32)
    back = quantizers.dequantize(codes, scale, *zero, group=group)
    wide = scale.float() if scale.shape[1] == 1 else scale.float().repeat_interleave(group, 1)[:, :k]
    if kind == "fp8":
        again = (back / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    elif zero:
        number = "integer" if kind.startswith("int") else "float"
        again = quantizers.zero_point_codes(back, scale, zero[0], int(kind[-1]), group, zero_kind=number)
    else:
        again = (back / wide).round().to(torch.int8)
    assert torch.equal(again.float(), codes.float())
    if kind in ("sym8", "sym4") and not narrow:  # and from nothing but the weights
        assert torch.equal(quantizers.symmetric(back, int(kind[3:]), group)[0], codes)


@PROPERTY
@given(
    st.sampled_from(["sym8", "sym4", "int4", "float4"]), st.integers(1, 30), st.integers(0, 12), st.integers(0, 2**31)
)
def test_the_error_is_at_most_half_a_step(kind: str, k: int, group: int, seed: int) -> None:
    w = gaussian(3, k, seed=seed)
    codes, scale, *zero = encoded(kind, w, group, torch.float32)
    back = quantizers.dequantize(codes, scale, *zero, group=group)
    wide = scale if scale.shape[1] == 1 else scale.repeat_interleave(group, 1)[:, :k]
    # An integer zero-point moves the range by up to half a step, so that its ends may clip by as much again.
    steps = 1.0 if kind == "int4" else 0.5
    assert bool(((back - w).abs() <= wide * steps * (1 + 1e-5) + 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_and_powers_of_two_change_only_the_scale(kind: str) -> None:
    w = gaussian(6, 40)
    codes, scale, *zero = encoded(kind, w, 0, torch.float32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for moved, still in zip(encoded(kind, w[order], 0, torch.float32), (codes, scale, *zero), strict=True):
        assert torch.equal(moved.float(), still[order].float())
    again, scaled, *same = encoded(kind, w * 8, 0, torch.float32)
    assert torch.equal(again.float(), codes.float())
    assert torch.equal(scaled, scale * 8)
    assert all(torch.equal(a, b) for a, b in zip(same, zero, strict=True))


@pytest.mark.parametrize(
    ("kind", "group", "least", "most"),
    [("sym8", 0, 0.7, 0.9), ("fp8", 0, 2.4, 2.8), ("sym4", 128, 11.0, 12.5), ("sym4", 0, 13.5, 15.5)],
)
def test_gaussian_weights_have_the_errors_of_the_literature(kind: str, group: int, least: float, most: float) -> None:
    w = gaussian(512, 1536)
    back = quantizers.dequantize(*encoded(kind, w, group, torch.float32), group=group)
    assert least <= 100 * float((back - w).norm() / w.norm()) <= most


def test_half_precision_weights_are_computed_in_float32() -> None:
    w = gaussian(4, 32).bfloat16()
    for kind in KINDS:
        for one, other in zip(
            encoded(kind, w, 0, torch.float32), encoded(kind, w.float(), 0, torch.float32), strict=True
        ):
            assert torch.equal(one.float(), other.float())


def test_float_zero_codes_are_those_of_lsq() -> None:
    w, scale, zero = gaussian(4, 20), torch.rand(4, 1) * 0.2 + 0.1, torch.rand(4, 1) * 20 - 2  # outside 0..15 too
    got = quantizers.float_zero_codes(w, scale, zero, 4)
    expected = [
        [int(min(max(np.rint(v / s + z), 0), 15)) for v in row]
        for row, s, z in zip(w.numpy(), scale[:, 0].numpy(), zero[:, 0].numpy(), strict=True)
    ]
    assert got.tolist() == expected


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: quantizers.symmetric(torch.ones(4), 8), r"must be \[N, K\], got \(4,\)"),
        (lambda: quantizers.symmetric(torch.ones(2, 4), 1), "bits=1 must be 2 to 8"),
        (lambda: quantizers.asymmetric(torch.ones(2, 4), 9), "bits=9 must be 2 to 8"),
        (lambda: quantizers.asymmetric(torch.ones(2, 4), 4, -1), "group=-1"),
        (lambda: quantizers.fp8(torch.tensor([[1.0, math.nan]])), "NaN or infinities"),
        (lambda: quantizers.mse_range(torch.tensor([[math.inf]]), 4), "NaN or infinities"),
        (lambda: quantizers.mse_range(torch.ones(1, 5), 4, 2, contain_zero=False), "must then contain zero"),
    ],
)
def test_what_cannot_work_is_refused(run, message: str) -> None:
    with pytest.raises(QuantConfigError, match=message):
        run()


def test_importing_quantizers_does_not_import_diffusers() -> None:
    code = "import sys, vlmeff.diffusion.quantizers; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
