"""What quantized entries are, group by group in float64, from a table of all 16-bit numbers."""

from __future__ import annotations

import numpy as np
import torch


def numbers(dtype: torch.dtype) -> np.ndarray:
    """Every finite number of a 16-bit float type, ascending."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double().numpy()
    return np.unique(every[np.isfinite(every)])


TABLES = {torch.bfloat16: numbers(torch.bfloat16), torch.float16: numbers(torch.float16)}


def small_type(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def reference_group(x: np.ndarray, bits: int, dtype: torch.dtype):
    """(levels before rounding, scale, zero) of one group [n] float64; scale and zero are 16-bit numbers."""
    table = TABLES[small_type(dtype)]
    zero = table[np.searchsorted(table, x.min(), side="right") - 1]
    scale = table[np.searchsorted(table, (x.max() - zero) / (2**bits - 1), side="left")]
    level = (x - zero) / (scale if scale else 1.0)
    return np.clip(level, 0, 2**bits - 1), scale, zero


def stored(x: torch.Tensor, bits: int, group: int, dim: int) -> torch.Tensor:
    """What comes back of [B, H, T, D] quantized in groups of ``group`` along ``dim`` (2: keys, 3: values)."""
    out = x.double().numpy().copy()
    lines = np.moveaxis(out, dim, -1)  # a view
    for place in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], group):
            members = lines[place][start : start + group]
            level, scale, zero = reference_group(members.copy(), bits, x.dtype)
            members[:] = np.round(level) * scale + zero
    return torch.from_numpy(out).to(x.dtype)
