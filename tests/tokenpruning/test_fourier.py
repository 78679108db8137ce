"""Fourier's grids and settings. The numbers are tested with vlmeff.ops.dct_resample."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn, idctn

from tokenpruning.fourier import Fourier
from tokenpruning.plan import Resampler, methods
from vlmeff.errors import ConfigError

sides = st.integers(1, 400)


def test_is_a_registered_resampler_with_the_published_ratio_and_the_gain_for_ordinary_checkpoints():
    assert methods.get("fourier") is Fourier
    assert isinstance(Fourier(), Resampler)
    assert Fourier().new_grid((24, 36)) == (16, 24)
    assert Fourier().gain == "preserve"


@given(height=sides, width=sides)
def test_the_default_ratio_is_two_thirds_of_each_axis_and_at_least_one(height, width):
    assert Fourier().new_grid((height, width)) == (max(2 * height // 3, 1), max(2 * width // 3, 1))


@given(n=sides, top=st.integers(1, 60), bottom=st.integers(1, 60))
def test_a_ratio_given_as_a_float_counts_as_the_fraction_it_stands_for(n, top, bottom):
    top, bottom = sorted((top, bottom))
    expected = max(n * top // bottom, 1)
    assert Fourier(ratio=Fraction(top, bottom)).new_grid((n, 1)) == (expected, 1)
    assert Fourier(ratio=top / bottom).new_grid((1, n)) == (1, expected)


def test_a_ratio_does_not_lose_a_row_to_float_truncation():
    assert int(0.7 * 90) == 62
    assert Fourier(ratio=0.7).new_grid((90, 90)) == (63, 63)


@pytest.mark.parametrize(
    ("side", "grid", "expected"),
    [(12, (24, 24), (12, 12)), (6, (4, 24), (4, 6)), (50, (3, 9), (3, 9)), (1, (9, 2), (1, 1))],
)
def test_a_side_is_a_square_within_the_grid(side, grid, expected):
    assert Fourier(side=side).new_grid(grid) == expected


@pytest.mark.parametrize("gain", ["ortho", "preserve"])
def test_resamples_every_leading_dimension_alike(gain):
    x = torch.randn(2, 3, 30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = Fourier(side=3, gain=gain)
    got = method.resample(x, (5, 6))
    assert got.shape == (2, 3, 9, 4)
    factor = 1.0 if gain == "ortho" else (9 / 30) ** 0.5
    for a, b in np.ndindex(2, 3):
        for c in range(4):
            spectrum = dctn(x[a, b, :, c].numpy().reshape(5, 6), norm="ortho")
            expected = idctn(spectrum[:3, :3], norm="ortho") * factor
            np.testing.assert_allclose(got[a, b, :, c].numpy().reshape(3, 3), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(method.resample(x[a], (5, 6))[b], got[a, b])
        torch.testing.assert_close(method.resample(x[a, b], (5, 6)), got[a, b])


def test_a_grid_that_stays_keeps_its_tokens_bit_for_bit():
    x = torch.randn(7, 12, 4).bfloat16()
    assert torch.equal(Fourier(side=12).resample(x, (4, 3)), x)
    assert torch.equal(Fourier(ratio=1).resample(x, (4, 3)), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": 12, "ratio": 0.5}, "side=12 and ratio=0.5 exclude each other"),
        ({"side": 0}, "side=0 must be an int >= 1"),
        ({"side": True}, "side=True must be an int >= 1"),
        ({"side": 12.0}, "side=12.0 must be an int >= 1"),
        ({"ratio": 0.0}, r"ratio=0.0 must be a share of each axis in \(0, 1\]"),
        ({"ratio": 1.5}, "ratio=1.5 must be a share"),
        ({"ratio": float("nan")}, "ratio=nan must be a share"),
        ({"ratio": True}, "ratio=True must be a share"),
        ({"ratio": "2/3"}, "ratio='2/3' must be a share"),
        ({"gain": "unit"}, "gain='unit' must be 'ortho' or 'preserve'"),
        ({"gain": ["ortho"]}, r"gain=\['ortho'\] must be 'ortho' or 'preserve'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=f"^Fourier: {message}"):
        Fourier(**arguments)
