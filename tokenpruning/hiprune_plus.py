"""HiPrune++: HiPrune with a share of the budget for what the question asks about (arXiv 2508.00553)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenpruning.hiprune import HiPrune, hiprune_select
from tokenpruning.plan import Segment, Selection, methods
from vlmeff.errors import ConfigError


@methods.register("hiprune++")
@dataclass(frozen=True, kw_only=True)
class HiPrunePlus(HiPrune):
    """Keep anchors, buffers, text tokens and registers.

    Args:
        beta: share of the budget for the tokens most relevant to the question, in [0, 1].
        keep, alpha, object_layer, buffer_mode: as in ``HiPrune``.

    Source: arXiv 2508.00553, which has no code for it and leaves the count open: the text says beta * N tokens, the
    pseudo-code round(N' * beta / 5). Here it is round(beta * k), inside the budget, as the published FLOPs imply. On
    Qwen2.5-VL the paper finds no gain over HiPrune.
    """

    beta: float = 0.1

    needs: ClassVar[tuple[str, ...]] = ("object", "deep", "text")

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not number or not 0 <= self.beta <= 1:  # also false for NaN
            raise ConfigError(f"HiPrunePlus: beta={self.beta!r} must lie in [0, 1].")

    def select(self, segment: Segment, k: int) -> Selection:
        return hiprune_select(
            segment.scores["object"],
            segment.scores["deep"],
            k=k,
            grid=segment.grid,
            alpha=self.alpha,
            buffer_mode=self.buffer_mode,
            text_score=segment.scores["text"],
            beta=self.beta,
        )
