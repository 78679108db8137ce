"""dct_resample: against SciPy's transform and the identities of an orthonormal basis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn, idctn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmeff import ops
from vlmeff.ops import dct_resample
from vlmeff.ops.dct import _cosines

SINGLE = {"rtol": 1e-5, "atol": 2e-6}  # float32 sums of up to 24 * 24 terms of size one
DOUBLE = {"rtol": 1e-12, "atol": 1e-13}
side = st.integers(1, 13)
grids = st.tuples(side, side)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def tokens(grid: tuple[int, int], *, batch: int | None = None, channels: int = 3, seed: int = 0, dtype=torch.float64):
    shape = (grid[0] * grid[1], channels) if batch is None else (batch, grid[0] * grid[1], channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scipy_resample(x: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Channel by channel: transform, crop, transform back."""
    maps = x.double().numpy().reshape(*grid, -1)
    out = [
        idctn(dctn(maps[..., c], norm="ortho")[: new_grid[0], : new_grid[1]], norm="ortho") for c in range(x.shape[-1])
    ]
    return torch.from_numpy(np.stack(out, -1)).flatten(0, 1)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(shapes=st.lists(st.tuples(side, side), max_size=5), data=st.data(), seed=seeds)
def test_several_grids_in_a_row_are_resampled_each_for_itself(
    shapes: list[tuple[int, int]], data: st.DataObject, seed: int
) -> None:
    shapes += shapes[:1]  # two alike go through the products together
    new = [smaller(data, shape) for shape in shapes[:-1]]
    new += new[:1]
    parts = [tokens(shape, seed=seed + n) for n, shape in enumerate(shapes)]
    got = dct_resample(torch.cat([*parts, torch.zeros(0, 3, dtype=torch.float64)]), shapes, new)
    expected = [scipy_resample(*one) for one in zip(parts, shapes, new, strict=True)]
    torch.testing.assert_close(got, torch.cat([*expected, got[:0]]), **DOUBLE)


def smaller(data: st.DataObject, grid: tuple[int, int]) -> tuple[int, int]:
    return data.draw(st.integers(1, grid[0])), data.draw(st.integers(1, grid[1]))


@quick
@given(grid=grids, data=st.data(), batch=st.integers(0, 3), seed=seeds)
def test_equals_scipy_on_any_grid(grid: tuple[int, int], data: st.DataObject, batch: int, seed: int) -> None:
    new_grid = smaller(data, grid)
    x = tokens(grid, batch=batch, seed=seed)
    got = dct_resample(x, grid, new_grid)
    assert got.shape == (batch, new_grid[0] * new_grid[1], 3)
    for b in range(batch):
        expected = scipy_resample(x[b], grid, new_grid)
        torch.testing.assert_close(got[b], expected, **DOUBLE)
        torch.testing.assert_close(dct_resample(x[b], grid, new_grid), expected, **DOUBLE)
        torch.testing.assert_close(dct_resample(x[b].float(), grid, new_grid), expected.float(), **SINGLE)


@pytest.mark.parametrize("target", [24, 16, 12, 8, 6, 1])
def test_equals_scipy_at_the_sizes_of_the_published_checkpoints(target: int) -> None:
    x = tokens((24, 24), channels=8, dtype=torch.float32)
    expected = scipy_resample(x, (24, 24), (target, target)).float()
    torch.testing.assert_close(dct_resample(x, (24, 24), (target, target)), expected, **SINGLE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gain", ["ortho", "preserve"])
def test_the_full_grid_comes_back_bit_for_bit(dtype: torch.dtype, gain: Any) -> None:
    x = tokens((3, 5), batch=2, dtype=dtype)
    got = dct_resample(x, (3, 5), (3, 5), gain=gain)
    assert got.dtype == dtype
    assert torch.equal(got, x)


@pytest.mark.parametrize("n", [1, 2, 7, 24, 64])
def test_the_basis_is_orthonormal(n: int) -> None:
    basis = _cosines(n, n)
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(_cosines(n, (n + 1) // 2), basis[: (n + 1) // 2])


@quick
@given(grid=grids, data=st.data(), seed=seeds)
def test_the_energy_is_that_of_the_kept_frequencies(grid: tuple[int, int], data: st.DataObject, seed: int) -> None:
    new_grid = smaller(data, grid)
    x = tokens(grid, channels=1, seed=seed)
    spectrum = dctn(x.numpy().reshape(grid), norm="ortho")
    kept = float((spectrum[: new_grid[0], : new_grid[1]] ** 2).sum())
    assert float(dct_resample(x, grid, new_grid).square().sum()) == pytest.approx(kept, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(("target", "factor"), [(16, 1.5), (12, 2.0), (8, 3.0), (6, 4.0)])
def test_a_constant_map_comes_back_times_the_published_gain(target: int, factor: float) -> None:
    x = torch.full((576, 4), 0.75)
    got = dct_resample(x, (24, 24), (target, target), gain="ortho")
    torch.testing.assert_close(got, torch.full_like(got, 0.75 * factor), rtol=1e-6, atol=0)


@quick
@given(grid=grids, data=st.data(), value=st.floats(-8, 8))
def test_ortho_scales_constants_by_the_root_of_the_ratio_and_preserve_keeps_them(
    grid: tuple[int, int], data: st.DataObject, value: float
) -> None:
    new_grid = smaller(data, grid)
    x = torch.full((grid[0] * grid[1], 2), value, dtype=torch.float64)
    factor = math.sqrt(grid[0] * grid[1] / (new_grid[0] * new_grid[1]))
    ortho, preserve = (dct_resample(x, grid, new_grid, gain=gain) for gain in ("ortho", "preserve"))
    torch.testing.assert_close(ortho, torch.full_like(ortho, factor * value), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(preserve, torch.full_like(preserve, value), rtol=1e-12, atol=1e-12)


@quick
@given(grid=grids, data=st.data(), seed=seeds)
def test_preserve_is_ortho_over_the_gain(grid: tuple[int, int], data: st.DataObject, seed: int) -> None:
    new_grid = smaller(data, grid)
    x = tokens(grid, seed=seed)
    factor = math.sqrt(grid[0] * grid[1] / (new_grid[0] * new_grid[1]))
    expected = x if new_grid == grid else scipy_resample(x, grid, new_grid) / factor
    torch.testing.assert_close(dct_resample(x, grid, new_grid, gain="preserve"), expected, **DOUBLE)


@quick
@given(grid=grids, data=st.data(), a=st.floats(-4, 4), b=st.floats(-4, 4))
def test_is_linear(grid: tuple[int, int], data: st.DataObject, a: float, b: float) -> None:
    new_grid = smaller(data, grid)
    x, y = tokens(grid, seed=1), tokens(grid, seed=2)
    both = dct_resample(a * x + b * y, grid, new_grid)
    apart = a * dct_resample(x, grid, new_grid) + b * dct_resample(y, grid, new_grid)
    torch.testing.assert_close(both, apart, rtol=1e-11, atol=1e-11)


@quick
@given(grid=grids, data=st.data(), seed=seeds)
def test_commutes_with_transposition(grid: tuple[int, int], data: st.DataObject, seed: int) -> None:
    new_grid = smaller(data, grid)
    x = tokens(grid, seed=seed)
    turned = x.view(*grid, 3).transpose(0, 1).reshape(-1, 3)
    back = dct_resample(turned, grid[::-1], new_grid[::-1]).view(new_grid[1], new_grid[0], 3).transpose(0, 1)
    torch.testing.assert_close(dct_resample(x, grid, new_grid), back.reshape(-1, 3), **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    x = tokens((9, 8), batch=2, dtype=dtype)
    got = dct_resample(x, (9, 8), (4, 5))
    assert got.dtype == dtype
    exact = dct_resample(x.double(), (9, 8), (4, 5))
    # Half a unit in the last place, and a little for the float32 sum.
    torch.testing.assert_close(got.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_does_not_lower_the_precision() -> None:
    x = tokens((6, 6), dtype=torch.float32)
    plain = dct_resample(x, (6, 6), (3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dct_resample(x, (6, 6), (3, 3)), plain)


def test_a_picture_does_not_see_its_batch_mates() -> None:
    x = tokens((6, 7), batch=3, dtype=torch.float32)
    alone = dct_resample(x[1:2], (6, 7), (4, 3))[0]
    x[0], x[2] = math.nan, math.inf
    torch.testing.assert_close(dct_resample(x, (6, 7), (4, 3))[1], alone, **SINGLE)


def test_any_strides_and_the_input_is_left_alone() -> None:
    x = tokens((4, 6), batch=2)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(dct_resample(strided, (4, 6), (2, 3)), dct_resample(x, (4, 6), (2, 3)), **DOUBLE)
    assert torch.equal(strided, tokens((4, 6), batch=2))


def test_gradients_flow_also_after_a_first_call_in_inference_mode() -> None:
    grid, new_grid = (11, 5), (3, 2)  # a size that no other test uses: its matrices are made here
    with torch.inference_mode():
        dct_resample(tokens(grid), grid, new_grid)
    x = tokens(grid).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dct_resample(t, grid, new_grid), (x,))


def test_a_fake_or_compiled_call_leaves_no_trace_in_a_real_one() -> None:
    grid, new_grid = (5, 11), (2, 3)  # likewise
    with FakeTensorMode():
        assert dct_resample(torch.zeros(1, 55, 2, device="cuda"), grid, new_grid).shape == (1, 6, 2)
        assert dct_resample(torch.zeros(1, 55, 2), grid, new_grid).shape == (1, 6, 2)
    x = tokens(grid)
    compiled = torch.compile(lambda t: dct_resample(t, grid, new_grid), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), scipy_resample(x, grid, new_grid), **DOUBLE)
    torch.testing.assert_close(dct_resample(x, grid, new_grid), scipy_resample(x, grid, new_grid), **DOUBLE)


@pytest.mark.parametrize("shape", [(2, 9, 0), (0, 9, 3)])
def test_no_channels_and_no_pictures_are_legal(shape: tuple[int, int, int]) -> None:
    assert dct_resample(torch.zeros(shape), (3, 3), (2, 2)).shape == (shape[0], 4, shape[2])


def test_is_known_to_the_dispatcher() -> None:
    x = torch.zeros(12, 2)
    assert ops.explain("dct_resample", x, (3, 4), (3, 4)).backend == "reference"
    with ops.counters() as ran:
        dct_resample(x, (3, 4), (2, 2))
    assert ran["dct_resample", "reference"] == 1


x_ = torch.zeros(2, 12, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], (1, 1), (1, 1)), TypeError, "x must be a tensor, got list"),
        ((x_.long(), (3, 4), (2, 2)), TypeError, "x must have a float dtype, got int64"),
        ((x_[0, 0], (1, 3), (1, 1)), ValueError, r"x must be \[B, H\*W, C\] or \[H\*W, C\], got \(3,\)"),
        ((x_, (3, 5), (2, 2)), ValueError, r"grid \(3, 5\) has 15 tokens and x has 12"),
        ((x_, (3, 4), (2, 5)), ValueError, r"new_grid \(2, 5\) exceeds grid \(3, 4\)"),
        ((x_, (3, 4), (4, 3)), ValueError, r"new_grid \(4, 3\) exceeds grid \(3, 4\)"),
        ((x_, (3, 4), (0, 4)), ValueError, r"new_grid must have at least one row and one column, got \(0, 4\)"),
        ((x_, (3.0, 4), (2, 2)), TypeError, r"grid must be a pair of ints \(rows, columns\), got \(3.0, 4\)"),
        ((x_, (3, 4), 2), TypeError, "new_grid must be a pair of ints"),
    ],
)
def test_errors_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^dct_resample: {message}"):
        dct_resample(*arguments)


def test_an_unknown_gain_is_refused() -> None:
    with pytest.raises(ValueError, match="gain='unit' must be 'ortho' or 'preserve'"):
        dct_resample(x_, (3, 4), (3, 4), gain="unit")  # type: ignore[arg-type]
