"""HiPrune: keep what two layers of the vision tower look at ("HiPrune", arXiv 2508.00553).

The object layer (middle of the tower) attends to objects: its strongest tokens are *anchors*, kept with their four
neighbours as *buffers*. The deep layer, whose output is projected, gathers global context: its strongest remaining
tokens are *registers* and fill the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenpruning.budget import Budget, check_budget
from tokenpruning.plan import ANCHOR, BUFFER, REGISTER, TEXT, Segment, Selection, methods
from vlmeff.errors import ConfigError
from vlmeff.ops import top_indices

BufferMode = Literal["linear", "grid"]
CLUSTER = 5  # an anchor and its four neighbours


@methods.register("hiprune")
@dataclass(frozen=True, kw_only=True)
class HiPrune:
    """Keep anchors, buffers and registers.

    Args:
        keep: tokens per image (int) or share kept (float in (0, 1]).
        alpha: share of the budget given to anchor clusters, in [0, 1].
        object_layer: 1-based number of the object layer, as in the paper; None takes the family's default.
        buffer_mode: "linear" takes i +- 1 and i +- W clamped to the picture, as the official code does (an anchor at
            the right border takes the first token of the next row); "grid" takes the true neighbours only.

    Source: arXiv 2508.00553. Differs from the official code where that keeps fewer tokens than the budget (score
    sums with "- 1" as exclusion) and in staying within the budget when the clusters exceed it.
    """

    keep: Budget = 1 / 3
    alpha: float = 0.1
    object_layer: int | None = None
    buffer_mode: BufferMode = "linear"

    needs: ClassVar[tuple[str, ...]] = ("object", "deep")

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_budget(name, self.keep)
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not 0 <= self.alpha <= 1:  # also false for NaN
            raise ConfigError(f"{name}: alpha={self.alpha!r} must lie in [0, 1].")
        if self.buffer_mode not in ("linear", "grid"):
            raise ConfigError(f"{name}: buffer_mode={self.buffer_mode!r} must be 'linear' or 'grid'.")
        if self.object_layer is not None and (type(self.object_layer) is not int or self.object_layer < 1):
            raise ConfigError(f"{name}: object_layer={self.object_layer!r} must be a layer number from 1 on.")

    def select(self, segment: Segment, k: int) -> Selection:
        object_score, deep_score = segment.scores["object"], segment.scores["deep"]
        return hiprune_select(
            object_score, deep_score, k=k, grid=segment.grid, alpha=self.alpha, buffer_mode=self.buffer_mode
        )


def hiprune_select(
    object_score: Tensor,
    deep_score: Tensor,
    *,
    k: int,
    grid: tuple[int, int],
    alpha: float = 0.1,
    buffer_mode: BufferMode = "linear",
    text_score: Tensor | None = None,
    beta: float = 0.0,
) -> Selection:
    """Choose k of H * W tokens from two scores, or three.

    n_a = round(k * alpha / 5) anchors are the top of the object score; buffers are their neighbours; registers are the
    top of the deep score among the rest. With a text score, round(beta * k) tokens outside the clusters are kept for it
    first, and there are as many fewer registers. When anchors and buffers exceed k, buffers with a low object score go
    first; text tokens take no more than the clusters leave. Equal scores: lowest index first.

    Args:
        object_score, deep_score, text_score: [H * W] float, finite.
        k: 1 <= k <= H * W.  grid: (H, W).
    Returns:
        index [k] int64 ascending and kind [k] int8.
    """
    height, width = grid
    n = height * width
    n_anchors = round(k * alpha / CLUSTER)
    anchors = top_indices(object_score, n_anchors)
    # One slot more than there are tokens: neighbours outside the picture land there and are cut off.
    kind = object_score.new_full((n + 1,), REGISTER, dtype=torch.int8)
    kind[_neighbours(anchors, height, width, buffer_mode)] = BUFFER
    kind[anchors] = ANCHOR
    kind = kind[:n]

    score = torch.where(kind == REGISTER, deep_score, object_score)
    if text_score is not None:
        outside = text_score.masked_fill(kind != REGISTER, -torch.inf)
        asked = top_indices(outside, round(beta * k))
        kind[asked] = torch.where(kind[asked] == REGISTER, TEXT, kind[asked])  # the clusters may leave too few
        score = torch.where(kind == TEXT, text_score, score)

    # Clusters come first, anchors before buffers, then text; each group in order of the score that chose it.
    group = torch.where(kind == ANCHOR, 3, torch.where(kind == BUFFER, 2, torch.where(kind == TEXT, 1, 0)))
    index = top_indices(score, k, groups=group)
    return Selection(index, kind[index])


def _neighbours(anchors: Tensor, height: int, width: int, mode: BufferMode) -> Tensor:
    """[4 * n_anchors] indices; H * W where "grid" finds no neighbour."""
    n = height * width
    steps = torch.tensor([-1, 1, -width, width], device=anchors.device)
    linear = anchors[:, None] + steps
    if mode == "linear":
        return linear.clamp(0, n - 1).flatten()
    column = anchors % width
    outside = (linear < 0) | (linear >= n)
    outside[:, 0] |= column == 0
    outside[:, 1] |= column == width - 1
    return torch.where(outside, n, linear).flatten()
