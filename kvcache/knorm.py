"""KNorm: tokens with small keys ("A Simple and Effective L2 Norm-Based Strategy", arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcache.budget import uniform_budget
from kvcache.checks import check_flag, check_ints, check_keep_ratio
from kvcache.choose import ends_mask, text_mask, top_slots
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies

# Norms that differ by a thousandth are taken for equal: rounding in bfloat16 moves a norm by a few parts in ten
# thousand, in float32 by less than one in a million.
TOLERANCE = 1e-3


@policies.register("knorm")
@dataclass(frozen=True, kw_only=True)
class KNorm:
    """Keep the tokens whose keys have the smallest norm, each key/value head its own.

    The question has no part in it, so the cache serves other questions as well.

    Norms within a thousandth of the largest one kept count as equal to it, and the later token wins, so that rounding
    does not decide: models that normalise their keys (Qwen3, Gemma 3) have norms which differ by their learned weights
    alone, and where those are all the same (a model that was never trained) KNorm keeps the last tokens. What it keeps
    of such models says little: another policy is the better choice there.

    Args:
        keep_ratio: share of the prompt's entries that stays, in (0, 1]; k = round(keep_ratio * n), in every layer.
        sink, recent: first and last tokens that always stay.
        text_first: keep text before visual tokens (LOOK-M, arXiv 2406.18139).

    Source: arXiv 2406.11430.
    """

    keep_ratio: float = 0.5
    sink: int = 0
    recent: int = 0
    text_first: bool = False

    needs: ClassVar[ScoreSpec] = ScoreSpec(kind="keys")
    selection: ClassVar[Selection] = "per_head"
    scope: ClassVar[Scope] = "layer"
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep_ratio("KNorm", self.keep_ratio)
        check_ints("KNorm", 0, sink=self.sink, recent=self.recent)
        check_flag("KNorm", "text_first", self.text_first)

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        floor = self.sink + self.recent
        return [
            uniform_budget("KNorm", keep_ratio=self.keep_ratio, n=s.n, floor=floor, say=s.layer == 0) for s in stats
        ]

    def select(self, stats: LayerStats, k: int) -> Tensor:
        assert stats.key_norms is not None
        protected = ends_mask(stats.n, sink=self.sink, recent=self.recent, device=stats.key_norms.device)
        first = text_mask("KNorm", stats, self.text_first)
        return top_slots(-stats.key_norms, k, protected=protected, first=first, tolerance=TOLERANCE)
