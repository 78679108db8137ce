"""Low-pass resampling of a token grid with the discrete cosine transform.

Shape letters: B batch, H W rows and columns, h w the new ones, C channels.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from vlmeff.ops._dispatch import dispatch, operator

Gain = Literal["ortho", "preserve"]
GAINS = ("ortho", "preserve")


@operator
def dct_resample(x: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], *, gain: Gain = "ortho") -> Tensor:
    """Low-pass a grid of tokens to a smaller grid with the 2-D DCT.

    Y = A_h X A_w^T per channel, A_n = D_{n'}^T D_n[:n'] (two small matrix products, no FFT), D_n the orthonormal
    DCT-II: D_n[u, i] = c_u cos(pi (2i + 1) u / 2n), c_0 = sqrt(1/n), c_u = sqrt(2/n).

    Args:
        x: [B, H*W, C] tokens in raster order, or [H*W, C] without a batch. Any float dtype; computed in float32, or in
            float64 if x is.
        grid: (H, W) of x.  new_grid: (H', W'), 1 <= H' <= H and 1 <= W' <= W. When it is ``grid``, the answer is x.
        gain: "ortho" keeps the amplitude factor sqrt(HW / H'W') that Fourier-VLM checkpoints were trained with;
            "preserve" removes it (use on checkpoints trained without the module).
    Returns:
        [B, H'*W', C], or [H'*W', C], in x.dtype.
    Raises:
        ValueError: grid does not match x, new_grid exceeds grid, or gain is unknown.
        TypeError: x is not a tensor of floats, or a grid is not a pair of ints.

    Source: "Fourier-VLM", arXiv 2508.06038; differs from the official code in accepting float32 and any grid.
    Differentiable in x.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"dct_resample: x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"dct_resample: x must have a float dtype, got {str(x.dtype).removeprefix('torch.')}")
    if x.ndim not in (2, 3):
        raise ValueError(f"dct_resample: x must be [B, H*W, C] or [H*W, C], got {tuple(x.shape)}")
    grid, new_grid = _pair("grid", grid), _pair("new_grid", new_grid)
    if x.shape[-2] != grid[0] * grid[1]:
        raise ValueError(
            f"dct_resample: grid {grid} has {grid[0] * grid[1]} tokens and x has {x.shape[-2]}; give the (H, W) of x"
        )
    if new_grid[0] > grid[0] or new_grid[1] > grid[1]:
        raise ValueError(f"dct_resample: new_grid {new_grid} exceeds grid {grid}; it can only make a grid smaller")
    if gain not in GAINS:
        raise ValueError(f"dct_resample: gain={gain!r} must be 'ortho' or 'preserve'")
    return dispatch("dct_resample", _dct_resample_reference, x=x, grid=grid, new_grid=new_grid, gain=gain)


def _dct_resample_reference(*, x: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], gain: Gain) -> Tensor:
    if new_grid == grid:
        return x
    (height, width), (new_height, new_width) = grid, new_grid
    channels = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    # A cached matrix must be a plain tensor: one made while a graph is traced or faked belongs to that graph.
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    matrix = _cached_matrix if plain else _matrix
    a_hH = matrix(height, new_height, gain, x.device, wide)
    a_wW = matrix(width, new_width, gain, x.device, wide)
    with _autocast_off(x):
        rows = torch.matmul(a_hH, x.to(wide).reshape(-1, height, width * channels))
        cells = torch.matmul(a_wW, rows.reshape(-1, width, channels))
    return cells.reshape(*x.shape[:-2], new_height * new_width, channels).to(x.dtype)


@functools.lru_cache(maxsize=256)
def _cached_matrix(n: int, new_n: int, gain: Gain, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # a cached inference tensor could not be used in training later
        return _matrix(n, new_n, gain, device, dtype)


def _matrix(n: int, new_n: int, gain: Gain, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A [n', n] on ``device``."""
    return _matrix64(n, new_n, gain).to(dtype).to(device)  # cast first: not every device has float64


def _matrix64(n: int, new_n: int, gain: Gain) -> Tensor:
    """A = D_{n'}^T D_n[:n'], [n', n] float64 on the CPU; its rows sum to sqrt(n / n'), or to one for "preserve"."""
    low_pass = _cosines(new_n, new_n).T @ _cosines(n, new_n)
    return low_pass * math.sqrt(new_n / n) if gain == "preserve" else low_pass


def _cosines(n: int, count: int) -> Tensor:
    """The first ``count`` rows of D_n, float64 on the CPU."""
    u = torch.arange(count, dtype=torch.float64, device="cpu")[:, None]
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    rows = math.sqrt(2 / n) * torch.cos(math.pi * (2 * i + 1) * u / (2 * n))
    rows[0] = math.sqrt(1 / n)
    return rows


def _pair(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2 or any(type(side) is not int for side in value):
        raise TypeError(f"dct_resample: {name} must be a pair of ints (rows, columns), got {value!r}")
    if min(value) < 1:
        raise ValueError(f"dct_resample: {name} must have at least one row and one column, got {tuple(value)}")
    return value[0], value[1]


def _autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """Keep an ambient autocast from turning the float32 products back into half precision."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
