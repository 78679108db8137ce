"""Two control methods. A method that cannot beat them at the same number of tokens is worth nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenpruning.budget import Budget, check_budget
from tokenpruning.plan import Segment, Selection, methods
from vlmeff.errors import ConfigError


@methods.register("random")
@dataclass(frozen=True, kw_only=True)
class Random:
    """Keep tokens at random places.

    The places depend on ``seed`` and the number of tokens alone, so a picture is pruned alike in any batch and on any
    device; average over seeds to measure.
    """

    keep: Budget = 1 / 3
    seed: int = 0

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_budget("Random", self.keep)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"Random: seed={self.seed!r} must be an int.")

    def select(self, segment: Segment, k: int) -> Selection:
        generator = torch.Generator().manual_seed(self.seed)
        index = torch.randperm(segment.size, generator=generator)[:k].sort().values.to(segment.device)
        return Selection(index, torch.zeros_like(index, dtype=torch.int8))


@methods.register("downsample")
@dataclass(frozen=True, kw_only=True)
class Downsample:
    """Keep an even lattice: nearest-neighbour down-sampling of the token grid to exactly k tokens.

    The lattice has the picture's aspect; k tokens are spread over its rows as evenly as they go. The encoder still
    sees the full picture, unlike when the picture itself is made smaller.
    """

    keep: Budget = 1 / 3

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_budget("Downsample", self.keep)

    def select(self, segment: Segment, k: int) -> Selection:
        index = torch.tensor(lattice(segment.grid, k), device=segment.device)
        return Selection(index, torch.zeros_like(index, dtype=torch.int8))


def lattice(grid: tuple[int, int], k: int) -> list[int]:
    """k evenly spread raster indices of an H x W grid, ascending and distinct."""
    height, width = grid
    rows = max(1, min(height, round(math.sqrt(k * height / width))))
    rows = max(rows, math.ceil(k / width))  # a row holds at most W tokens
    out = []
    for r in range(rows):
        y = (2 * r + 1) * height // (2 * rows)
        count = k * (r + 1) // rows - k * r // rows
        out += [y * width + (2 * c + 1) * width // (2 * count) for c in range(count)]
    return out
