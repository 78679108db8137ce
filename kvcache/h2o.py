"""H2O: half heavy hitters, half recent tokens ("H2O", arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcache.budget import uniform_budget
from kvcache.checks import check_flag, check_ints, check_keep_ratio
from kvcache.choose import ends_mask, text_mask, top_slots
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies


@policies.register("h2o")
@dataclass(frozen=True, kw_only=True)
class H2O:
    """Keep of k entries the last k // 2 tokens and, of those before, the ones that got most attention from all queries.

    Each key/value head chooses its own.

    Args:
        keep_ratio: share of the prompt's entries that stays, in (0, 1]; k = round(keep_ratio * n), in every layer.
        sink: first tokens that stay as well.
        text_first: among the older tokens keep text before visual ones (LOOK-M, arXiv 2406.18139).

    Source: arXiv 2306.14048.
    """

    keep_ratio: float = 0.5
    sink: int = 0
    text_first: bool = False

    needs: ClassVar[ScoreSpec] = ScoreSpec(kind="full")
    selection: ClassVar[Selection] = "per_head"
    scope: ClassVar[Scope] = "layer"
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep_ratio("H2O", self.keep_ratio)
        check_ints("H2O", 0, sink=self.sink)
        check_flag("H2O", "text_first", self.text_first)

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        # With 2 * sink + 1 entries the older half has room for the sink.
        return [
            uniform_budget("H2O", keep_ratio=self.keep_ratio, n=s.n, floor=2 * self.sink + 1, say=s.layer == 0)
            for s in stats
        ]

    def select(self, stats: LayerStats, k: int) -> Tensor:
        assert stats.scores is not None
        protected = ends_mask(stats.n, sink=self.sink, recent=k // 2, device=stats.scores.device)
        return top_slots(stats.scores, k, protected=protected, first=text_mask("H2O", stats, self.text_first))
