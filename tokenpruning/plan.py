"""What a token reduction method sees and what it answers. Tensors only: no model access.

The tokens of a picture stand in *segments*: the picture itself, its tiles, or the frames of a video. A method works on
one segment at a time and never sees another picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokenpruning.budget import Budget
from tokenpruning.layout import Grid, Layout
from vlmeff import ops
from vlmeff.registry import Registry

REGISTER, ANCHOR, BUFFER, TEXT, MERGED = range(5)
KIND_NAMES = {REGISTER: "register", ANCHOR: "anchor", BUFFER: "buffer", TEXT: "text", MERGED: "merged"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """One grid of visual tokens: H * W in raster order.

    ``scores`` maps each score that the selector ``needs`` to [H * W] float32. ``features`` [H * W, D], the tokens as
    the language model receives them, is there when "features" is needed.
    """

    grid: Grid
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    device: torch.device | str = "cpu"

    @property
    def size(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class Selection:
    """What is kept of one segment of N tokens.

    ``index`` [k] int64 ascending: the kept tokens. ``kind`` [k] int8: why each was kept (``KIND_NAMES``).
    ``into`` [N] int64, for methods that merge: the place in ``index`` whose token takes up this one, -1 for a dropped
    token; each kept token becomes the mean of all that point at it, itself among them. None: nothing is merged.
    """

    index: Tensor
    kind: Tensor
    into: Tensor | None = None

    def apply(self, features: Tensor) -> Tensor:
        """[N, D] -> [k, D]: gather the kept tokens, or average what was merged into each (in float32 at least)."""
        if self.into is None:
            return ops.gather_tokens(features, self.index)
        taken = self.into >= 0
        wide = torch.promote_types(features.dtype, torch.float32)
        target, source = self.into[taken].to(features.device), features[taken.to(features.device)].to(wide)
        sums = source.new_zeros(len(self.index), features.shape[-1]).index_add_(0, target, source)
        counts = source.new_zeros(len(self.index)).index_add_(0, target, torch.ones_like(source[:, 0]))
        return (sums / counts[:, None]).to(features.dtype)


@runtime_checkable
class Selector(Protocol):
    """A method that keeps a subset of the tokens of each segment, before the language model.

    ``needs`` names what it looks at: "object" and "deep" are column means of the vision tower's attention at the object
    layer and at the layer whose output is projected; "text" is the relevance of each token to the question;
    "features" are the tokens themselves. A method is a frozen dataclass with these members, registered with
    ``methods.register``; nothing else has to know it.
    """

    needs: ClassVar[tuple[str, ...]]

    @property
    def keep(self) -> Budget:
        """The budget: tokens per picture (int), share kept (float) or ``PerFrame``."""
        ...

    def select(self, segment: Segment, k: int) -> Selection:
        """Choose exactly ``k`` tokens, 1 <= k < segment.size. Must depend on nothing but its arguments."""
        ...


@runtime_checkable
class Resampler(Protocol):
    """A method that replaces each segment's grid of tokens by a smaller grid, before the language model."""

    def new_grid(self, grid: Grid) -> Grid:
        """The grid that a segment of ``grid`` becomes; ``grid`` itself when it is not reduced."""
        ...

    def resample(self, features: Tensor, grid: Grid) -> Tensor:
        """[..., H * W, C] -> [..., H' * W', C] in the same dtype."""
        ...


@runtime_checkable
class InnerPruner(Protocol):
    """A method that drops visual tokens between layers of the language model."""

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based layers after which tokens are dropped, ascending."""
        ...

    def visual_per_layer(self, nv: int, layers: int) -> list[int]:
        """Visual tokens that each of ``layers`` layers processes, of ``nv`` at the start."""
        ...


Method = Selector | Resampler | InnerPruner
methods: Registry[Method] = Registry("token reduction method")


def all_of(segment: Segment) -> Selection:
    """The selection that keeps every token of ``segment``."""
    index = torch.arange(segment.size, device=segment.device)
    return Selection(index, torch.zeros_like(index, dtype=torch.int8))


@dataclass(frozen=True, eq=False, kw_only=True)
class ItemPlan:
    """What became of one picture or video.

    ``selections``: per segment, None where the segment was resampled. ``kept`` [k] int64 ascending: the placeholders
    that stay, separators included. ``new_layout``: of the resampled tokens; None when tokens were selected.
    """

    layout: Layout
    kept: Tensor
    selections: list[Selection] | None = None
    new_layout: Layout | None = None
    modality: str = "image"

    @property
    def n_before(self) -> int:
        return self.layout.n_slots

    @property
    def n_after(self) -> int:
        return len(self.kept)


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """What was kept of each picture and video of a call, pictures first, each in the order of the prompt.

    ``n_before`` and ``n_after`` count every placeholder, separators that no method touches included.
    """

    items: list[ItemPlan]

    @property
    def n_before(self) -> int:
        return sum(item.n_before for item in self.items)

    @property
    def n_after(self) -> int:
        return sum(item.n_after for item in self.items)
