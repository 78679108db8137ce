"""Visual-token reduction: pure functions on scores and grids. Each method is one file; none knows a model."""

from __future__ import annotations

from tokenpruning.budget import split_budget, tokens_to_keep
from tokenpruning.controls import Downsample, Random
from tokenpruning.hiprune import HiPrune, hiprune_select
from tokenpruning.plan import KIND_NAMES, Segment, Selection, Selector, methods

__all__ = [
    "KIND_NAMES",
    "Downsample",
    "HiPrune",
    "Random",
    "Segment",
    "Selection",
    "Selector",
    "hiprune_select",
    "methods",
    "split_budget",
    "tokens_to_keep",
]
