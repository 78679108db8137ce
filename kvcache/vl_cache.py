"""VL-Cache: dense layers keep more; the text behind the picture decides ("VL-Cache", arXiv 2410.23317)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcache.budget import check_total, round_shares
from kvcache.checks import check_flag, check_ints, check_keep_ratio
from kvcache.choose import ends_mask, text_mask, top_slots
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies

SPARSE_BELOW = 0.01  # of the row's maximum
LEAST_SHARE = 0.01  # that a layer keeps


@policies.register("vl_cache")
@dataclass(frozen=True, kw_only=True)
class VLCache:
    """Share the budget by how dense each layer's attention is; keep what the queries behind the picture attend to.

    Args:
        keep_ratio: share of the prompt's entries that stays, averaged over the layers, in (0, 1].
        window: queries that are measured at most, and those of a prompt that ends with the picture.
        sink, recent: first and last tokens of the prompt that always stay.
        text_first: keep text before visual tokens (LOOK-M, arXiv 2406.18139).

    Source: arXiv 2410.23317 (not VLCache, arXiv 2512.12977, which reuses caches). Differs in one index set for all
    heads of a layer, and in shares that add up to the budget after they were clipped.
    """

    keep_ratio: float = 0.5
    window: int = 32
    sink: int = 0
    recent: int = 0
    text_first: bool = False

    selection: ClassVar[Selection] = "shared"
    scope: ClassVar[Scope] = "model"
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep_ratio("VLCache", self.keep_ratio)
        check_ints("VLCache", 1, window=self.window)
        check_ints("VLCache", 0, sink=self.sink, recent=self.recent)
        check_flag("VLCache", "text_first", self.text_first)

    @property
    def needs(self) -> ScoreSpec:
        return ScoreSpec(kind="post_vision", window=self.window)

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        """beta_l in proportion to the density 1 - gamma_l, with the mean ``keep_ratio``, in [0.01, 1]."""
        densities = torch.stack([density(_rows(s)).cpu() for s in stats]).tolist()
        sizes = [s.n for s in stats]
        floors = [min(n, max(self.sink + self.recent + 1, math.ceil(LEAST_SHARE * n))) for n in sizes]
        total = check_total(sum(sizes), self.keep_ratio, sum(floors), "clamp")
        shares = [d * n for d, n in zip(densities, sizes, strict=True)]
        return round_shares(shares, total=total, floor=floors, cap=sizes)

    def select(self, stats: LayerStats, k: int) -> Tensor:
        """Score of a token: the attention of the rows, mean over heads, summed over rows."""
        scores = _rows(stats).mean(0).sum(0)
        protected = ends_mask(stats.n, sink=self.sink, recent=self.recent, device=scores.device)
        return top_slots(scores, k, protected=protected, first=text_mask("VLCache", stats, self.text_first))


def density(probs: Tensor) -> Tensor:
    """1 - gamma: the share of the entries a row may see that reach 1 % of its maximum, averaged over rows and heads.

    Every head has the same entries, so this is the mean over heads of gamma as well.

    Args:
        probs: [Hq, w, n] float32, the attention of the last w queries: row i sees the first n - w + i + 1 tokens.
    Returns:
        scalar float64, in (0, 1].
    """
    rows, n = probs.shape[1:]
    seen = torch.ones(rows, n, dtype=torch.bool, device=probs.device).tril(n - rows)
    dense = (probs >= SPARSE_BELOW * probs.amax(-1, keepdim=True)) & seen
    return dense.sum().double() / (seen.sum() * probs.shape[0])


def _rows(stats: LayerStats) -> Tensor:
    assert stats.probs is not None
    return stats.probs
