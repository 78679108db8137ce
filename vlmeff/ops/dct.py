"""Low-pass resampling of a token grid with the discrete cosine transform.

Shape letters: B batch, H W rows and columns, h w the new ones, C channels; T tokens of several grids in a row.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from vlmeff.ops._arguments import autocast_off
from vlmeff.ops._dispatch import dispatch, operator

Gain = Literal["ortho", "preserve"]
Grid = tuple[int, int]
GAINS = ("ortho", "preserve")


@operator
def dct_resample(x: Tensor, grid: Grid | list[Grid], new_grid: Grid | list[Grid], *, gain: Gain = "ortho") -> Tensor:
    """Low-pass a grid of tokens, or several of different sizes, to smaller grids with the 2-D DCT.

    Y = A_h X A_w^T per channel, A_n = D_{n'}^T D_n[:n'] (two small matrix products, no FFT), D_n the orthonormal
    DCT-II: D_n[u, i] = c_u cos(pi (2i + 1) u / 2n), c_0 = sqrt(1/n), c_u = sqrt(2/n).

    Args:
        x: [B, H*W, C] tokens in raster order, or [H*W, C] without a batch. Any float dtype; computed in float32, or in
            float64 if x is.
        grid: (H, W) of x.  new_grid: (H', W'), 1 <= H' <= H and 1 <= W' <= W. When it is ``grid``, the answer is x.
            Lists of as many pairs: x is [T, C], the tokens of grids of different sizes one after the other, and so is
            the answer [T', C]; grids that are alike go through the products together.
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
    if gain not in GAINS:
        raise ValueError(f"dct_resample: gain={gain!r} must be 'ortho' or 'preserve'")
    several = _is_list_of_pairs(grid)
    if several != _is_list_of_pairs(new_grid) or (several and len(grid) != len(new_grid)):
        raise ValueError("dct_resample: grid and new_grid must be one pair each, or lists of as many pairs")
    if several and x.ndim != 2:
        raise ValueError(f"dct_resample: for a list of grids x must be [T, C], got {tuple(x.shape)}")
    grids = [_pair("grid", pair) for pair in (grid if several else [grid])]
    new_grids = [_pair("new_grid", pair) for pair in (new_grid if several else [new_grid])]
    tokens = sum(math.prod(pair) for pair in grids)
    if x.shape[-2] != tokens:
        said = f"grids {grids} have" if several else f"grid {grids[0]} has"
        raise ValueError(f"dct_resample: {said} {tokens} tokens and x has {x.shape[-2]}; give the (H, W) of x")
    for old, new in zip(grids, new_grids, strict=True):
        if new[0] > old[0] or new[1] > old[1]:
            raise ValueError(f"dct_resample: new_grid {new} exceeds grid {old}; it can only make a grid smaller")
    sizes = tuple(zip(grids, new_grids, strict=True))
    return dispatch("dct_resample", _dct_resample_reference, x=x, sizes=sizes, gain=gain)


def _dct_resample_reference(*, x: Tensor, sizes: tuple[tuple[Grid, Grid], ...], gain: Gain) -> Tensor:
    """``sizes``: (grid, new grid) of each grid in x."""
    if len(sizes) == 1:
        return _resampled(x, *sizes[0], gain)
    parts = x.split([math.prod(grid) for grid, _ in sizes])
    out = list(parts)
    for pair in dict.fromkeys(sizes):
        alike = [n for n, other in enumerate(sizes) if other == pair]
        together = _resampled(torch.stack([parts[n] for n in alike]), *pair, gain)
        for n, one in zip(alike, together, strict=True):
            out[n] = one
    return torch.cat(out) if out else x.clone()


def _resampled(x: Tensor, grid: Grid, new_grid: Grid, gain: Gain) -> Tensor:
    if new_grid == grid:
        return x
    (height, width), (new_height, new_width) = grid, new_grid
    batch, channels = math.prod(x.shape[:-2]), x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    # A cached matrix must be a plain tensor: one made while a graph is traced or faked belongs to that graph.
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    matrix = _cached_matrix if plain else _matrix
    a_hH = matrix(height, new_height, gain, x.device, wide)
    a_wW = matrix(width, new_width, gain, x.device, wide)
    with autocast_off(x):
        rows = torch.matmul(a_hH, x.to(wide).reshape(batch, height, width * channels))
        cells = torch.matmul(a_wW, rows.reshape(batch * new_height, width, channels))
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


def _is_list_of_pairs(grid: object) -> bool:
    """A single pair may come as a list too, as JSON brings it."""
    return isinstance(grid, list) and not (len(grid) == 2 and all(type(side) is int for side in grid))


def _pair(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2 or any(type(side) is not int for side in value):
        raise TypeError(f"dct_resample: {name} must be a pair of ints (rows, columns), got {value!r}")
    if min(value) < 1:
        raise ValueError(f"dct_resample: {name} must have at least one row and one column, got {tuple(value)}")
    return value[0], value[1]
