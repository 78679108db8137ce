"""Fourier-VLM: keep the low frequencies of the token grid ("Fourier-VLM", arXiv 2508.06038)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from tokenpruning.plan import Grid, methods
from vlmeff import ops
from vlmeff.errors import ConfigError
from vlmeff.ops.dct import GAINS, Gain

DEFAULT_RATIO = Fraction(2, 3)  # per axis: 44.4 % of the tokens, the published Qwen checkpoints
ROUNDING = 1e-6  # so that 0.7 * 90 = 62.99999999999999 counts as 63


@methods.register("fourier")
@dataclass(frozen=True, kw_only=True)
class Fourier:
    """Resample each grid of tokens to a smaller one by cutting off its high frequencies.

    The published accuracy is that of checkpoints trained with the module. On any other checkpoint this is an
    experiment: name the method in the call to ask for it, and keep ``gain="preserve"``.

    Args:
        side: rows and columns of the new grid (LLaVA: 16, 12, 8 or 6); a grid with fewer keeps what it has.
        ratio: share of rows and of columns kept, in (0, 1] (Qwen). At most one of side and ratio; without both 2/3.
        gain: "preserve" leaves the mean of the tokens as it is; "ortho" multiplies them by sqrt(HW / H'W') and is
            required by the published Fourier-* checkpoints, whose weights expect it.

    Source: arXiv 2508.06038. Differs from the official code in ``gain="preserve"``, in accepting float32, and in a
    ratio that does not suffer from float truncation.
    """

    side: int | None = None
    ratio: float | Fraction | None = None
    gain: Gain = "preserve"

    def __post_init__(self) -> None:
        if self.side is not None and self.ratio is not None:
            raise ConfigError(f"Fourier: side={self.side!r} and ratio={self.ratio!r} exclude each other; give one.")
        if self.side is not None and (type(self.side) is not int or self.side < 1):
            raise ConfigError(f"Fourier: side={self.side!r} must be an int >= 1 (rows and columns of the new grid).")
        if self.ratio is not None:
            number = isinstance(self.ratio, int | float | Fraction) and not isinstance(self.ratio, bool)
            if not number or not 0 < self.ratio <= 1:  # also false for NaN
                raise ConfigError(f"Fourier: ratio={self.ratio!r} must be a share of each axis in (0, 1].")
        if self.gain not in GAINS:
            raise ConfigError(f"Fourier: gain={self.gain!r} must be 'ortho' or 'preserve'.")

    def new_grid(self, grid: Grid) -> Grid:
        """The grid that one of (H, W) becomes."""
        height, width = grid
        if self.side is not None:
            return min(self.side, height), min(self.side, width)
        return self._shrunk(height), self._shrunk(width)

    def resample(self, features: Tensor, grid: Grid) -> Tensor:
        """[..., H * W, C] -> [..., H' * W', C] in the same dtype; the features themselves if the grid stays."""
        new_grid = self.new_grid(grid)
        if features.ndim <= 3:
            return ops.dct_resample(features, grid, new_grid, gain=self.gain)
        flat = ops.dct_resample(features.flatten(0, -3), grid, new_grid, gain=self.gain)
        return flat.unflatten(0, features.shape[:-2])

    def _shrunk(self, n: int) -> int:
        ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
        return max(math.floor(n * ratio + ROUNDING), 1)
