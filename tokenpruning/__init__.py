"""Visual-token reduction: pure functions on scores, features and grids. Each method is one file; none knows a model."""

from __future__ import annotations

from tokenpruning.budget import Budget, PerFrame, split_budget, tokens_to_keep
from tokenpruning.controls import Downsample, Random
from tokenpruning.hiprune import HiPrune, hiprune_select
from tokenpruning.layout import Layout
from tokenpruning.plan import (
    KIND_NAMES,
    InnerPruner,
    ItemPlan,
    Method,
    PrunePlan,
    Resampler,
    Segment,
    Selection,
    Selector,
    methods,
)

__all__ = [
    "KIND_NAMES",
    "Budget",
    "Downsample",
    "HiPrune",
    "InnerPruner",
    "ItemPlan",
    "Layout",
    "Method",
    "PerFrame",
    "PrunePlan",
    "Random",
    "Resampler",
    "Segment",
    "Selection",
    "Selector",
    "hiprune_select",
    "methods",
    "split_budget",
    "tokens_to_keep",
]
