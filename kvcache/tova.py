"""TOVA: what the last token looks at ("Transformers are Multi-State RNNs", arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcache.budget import uniform_budget
from kvcache.checks import check_flag, check_keep_ratio
from kvcache.choose import ends_mask, text_mask, top_slots
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies


@policies.register("tova")
@dataclass(frozen=True, kw_only=True)
class TOVA:
    """Keep the last token and those that it attends to most, mean over the heads.

    Args:
        keep_ratio: share of the prompt's entries that stays, in (0, 1]; k = round(keep_ratio * n), in every layer.
        text_first: keep text before visual tokens (LOOK-M, arXiv 2406.18139).

    Source: arXiv 2401.06104.
    """

    keep_ratio: float = 0.5
    text_first: bool = False

    needs: ClassVar[ScoreSpec] = ScoreSpec(kind="window", window=1, summed=True)
    selection: ClassVar[Selection] = "shared"
    scope: ClassVar[Scope] = "layer"
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep_ratio("TOVA", self.keep_ratio)
        check_flag("TOVA", "text_first", self.text_first)

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        return [uniform_budget("TOVA", keep_ratio=self.keep_ratio, n=s.n, floor=1, say=False) for s in stats]

    def select(self, stats: LayerStats, k: int) -> Tensor:
        assert stats.scores is not None
        protected = ends_mask(stats.n, sink=0, recent=1, device=stats.scores.device)
        return top_slots(stats.scores, k, protected=protected, first=text_mask("TOVA", stats, self.text_first))
