"""The control: tokens at random places. A policy that cannot beat it at the same budget is worth nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcache.budget import uniform_budget
from kvcache.checks import check_ints, check_keep_ratio
from kvcache.choose import ends_mask, top_slots
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies


@policies.register("random")
@dataclass(frozen=True, kw_only=True)
class RandomKV:
    """Keep tokens at random places, other ones in each layer.

    The places depend on ``seed``, the layer and the number of tokens alone, so a prompt is treated alike in any batch
    and on any device; average over seeds to measure.

    Args:
        keep_ratio: share of the prompt's entries that stays, in (0, 1]; k = round(keep_ratio * n), in every layer.
        seed: >= 0.
        sink, recent: first and last tokens that always stay.
    """

    keep_ratio: float = 0.5
    seed: int = 0
    sink: int = 0
    recent: int = 0

    needs: ClassVar[ScoreSpec] = ScoreSpec(kind="none")
    selection: ClassVar[Selection] = "shared"
    scope: ClassVar[Scope] = "layer"
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep_ratio("RandomKV", self.keep_ratio)
        check_ints("RandomKV", 0, seed=self.seed, sink=self.sink, recent=self.recent)

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        floor = self.sink + self.recent
        return [
            uniform_budget("RandomKV", keep_ratio=self.keep_ratio, n=s.n, floor=floor, say=s.layer == 0) for s in stats
        ]

    def select(self, stats: LayerStats, k: int) -> Tensor:
        # Distinct for every seed and layer: a model has fewer than 2 ** 16 layers.
        generator = torch.Generator().manual_seed(((self.seed << 16) + stats.layer) % 2**63)
        scores = torch.randperm(stats.n, generator=generator)
        return top_slots(scores, k, protected=ends_mask(stats.n, sink=self.sink, recent=self.recent))
