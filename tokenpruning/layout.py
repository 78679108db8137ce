"""How the tokens of a picture stand in the prompt: its segments, and the separators between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Grid = tuple[int, int]
Newline = Literal["drop", "keep", "rows"]
SEPARATOR = -1


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """The tokens and placeholders of one picture or video.

    ``grids``: (H, W) of its segments (tiles, frames). ``shares``: how many tiles each segment stands for when an int
    budget is divided (None: one each). ``slots`` [S] int64: for each placeholder in order the token it holds, counted
    over all segments, or ``SEPARATOR``; None: the tokens in order and nothing else. ``spans`` [separators, 2] int64:
    the slots [start, end) of the row that each separator ends; an empty span marks one that always stays.
    """

    grids: list[Grid]
    shares: list[int] | None = None
    slots: Tensor | None = None
    spans: Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        return [h * w for h, w in self.grids]

    @property
    def n_tokens(self) -> int:
        return sum(self.sizes)

    @property
    def n_slots(self) -> int:
        return self.n_tokens if self.slots is None else len(self.slots)

    def places(self, device: torch.device | str) -> Tensor:
        """[n_tokens] int64: the placeholder that holds each token."""
        if self.slots is None:
            return torch.arange(self.n_tokens, device=device)
        real = (self.slots != SEPARATOR).nonzero()[:, 0]
        out = torch.empty_like(real)
        out[self.slots[real]] = real
        return out.to(device)

    def segments(self, places: Tensor) -> Iterator[Tensor]:
        """Split [n_tokens, ...] by segment."""
        return iter(places.split(self.sizes))

    def kept_slots(self, kept_places: Tensor, newline: Newline) -> Tensor:
        """The placeholders that stay, ascending [k] int64: those of kept tokens, and separators by policy.

        "drop" keeps no separator, "keep" all, "rows" those whose row has a survivor.
        """
        if self.slots is None:
            return kept_places.sort().values
        slots = self.slots.to(kept_places.device)
        flags = torch.zeros(len(slots), dtype=torch.bool, device=kept_places.device)
        flags[kept_places] = True
        if self.spans is not None:
            start, end = self.spans.to(kept_places.device).unbind(1)
            before = torch.cat([flags.new_zeros(1, dtype=torch.int64), flags.cumsum(0)])
            stays = start == end
            if newline == "keep":
                stays = torch.ones_like(stays)
            elif newline == "rows":
                stays = stays | (before[end] > before[start])
            flags[slots == SEPARATOR] = stays
        return flags.nonzero()[:, 0]
