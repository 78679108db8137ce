"""Keep what the question is about: the plainest use of the text, to measure others against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenpruning.budget import Budget, check_budget
from tokenpruning.plan import TEXT, Segment, Selection, methods
from vlmeff.ops import top_indices


@methods.register("text")
@dataclass(frozen=True, kw_only=True)
class TextTopK:
    """Keep the tokens that are most relevant to the question; among equals the lowest index first.

    An ablation, not a published method: the answer often needs more of the picture than the words name.

    Args:
        keep: tokens per image (int) or share kept (float in (0, 1]).
    """

    keep: Budget = 1 / 3

    needs: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        check_budget("TextTopK", self.keep)

    def select(self, segment: Segment, k: int) -> Selection:
        index = top_indices(segment.scores["text"], k)
        return Selection(index, torch.full_like(index, TEXT, dtype=torch.int8))
