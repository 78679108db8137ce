"""What a selector sees and what it answers. Tensors only: no model access."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from vlmeff.registry import Registry

REGISTER, ANCHOR, BUFFER = 0, 1, 2
KIND_NAMES = {REGISTER: "register", ANCHOR: "anchor", BUFFER: "buffer"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """One grid of visual tokens: a picture, a tile or a frame, H * W tokens in raster order.

    ``scores`` maps each name in the selector's ``scores`` to [H * W] float32.
    """

    grid: tuple[int, int]
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    @property
    def size(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class Selection:
    """``index`` [k] int64 ascending: the kept tokens. ``kind`` [k] int8: why each was kept (``KIND_NAMES``)."""

    index: Tensor
    kind: Tensor


@runtime_checkable
class Selector(Protocol):
    """A token reduction method that keeps a subset of the tokens of each segment.

    ``scores`` names what it needs: "object" and "deep" are column means of the vision tower's attention at the object
    layer and at the layer whose output is projected. A method is a frozen dataclass with these members, registered
    with ``methods.register``; nothing else has to know it.
    """

    scores: ClassVar[tuple[str, ...]]

    @property
    def keep(self) -> int | float:
        """The budget: tokens per image (int) or share kept (float)."""
        ...

    def select(self, segment: Segment, k: int) -> Selection:
        """Choose exactly ``k`` tokens, 1 <= k < segment.size. Must depend on nothing but its arguments."""
        ...


methods: Registry[Selector] = Registry("token reduction method")


def all_of(segment: Segment) -> Selection:
    """The selection that keeps every token of ``segment``."""
    index = torch.arange(segment.size, device=segment.device)
    return Selection(index, torch.zeros_like(index, dtype=torch.int8))


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """What was kept of each picture of a call.

    ``grids``: per picture the (H, W) of its segments. ``keep``: per picture [k] int64, ascending over all its tokens.
    ``kind``: per picture [k] int8 (``KIND_NAMES``).
    """

    grids: list[list[tuple[int, int]]]
    keep: list[Tensor]
    kind: list[Tensor]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each picture before pruning."""
        return [sum(h * w for h, w in picture) for picture in self.grids]

    @property
    def n_before(self) -> int:
        return sum(self.sizes)

    @property
    def n_after(self) -> int:
        return sum(len(index) for index in self.keep)


def join_segments(segments: list[Segment], selections: list[Selection]) -> Selection:
    """The selection over all tokens of a picture from those of its segments."""
    starts = [0]
    for segment in segments:
        starts.append(starts[-1] + segment.size)
    index = torch.cat([s.index + start for s, start in zip(selections, starts, strict=False)])
    return Selection(index, torch.cat([s.kind for s in selections]))
