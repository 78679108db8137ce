"""Visual-token reduction: pure functions on scores, features and grids. Each method is one file; none knows a model."""

from __future__ import annotations

from tokenpruning.adaptinfer import AdaptInfer, Schedule
from tokenpruning.budget import Budget, PerFrame, split_budget, tokens_to_keep
from tokenpruning.controls import Downsample, Random
from tokenpruning.divprune import DivPrune, divprune_select
from tokenpruning.fourier import Fourier
from tokenpruning.hiprune import HiPrune, hiprune_select
from tokenpruning.hiprune_plus import HiPrunePlus
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
from tokenpruning.scope import Scope, scope_select
from tokenpruning.text_topk import TextTopK
from tokenpruning.visionzip import VisionZip, visionzip_select

__all__ = [
    "KIND_NAMES",
    "AdaptInfer",
    "Budget",
    "DivPrune",
    "Downsample",
    "Fourier",
    "HiPrune",
    "HiPrunePlus",
    "InnerPruner",
    "ItemPlan",
    "Layout",
    "Method",
    "PerFrame",
    "PrunePlan",
    "Random",
    "Resampler",
    "Schedule",
    "Scope",
    "Segment",
    "Selection",
    "Selector",
    "TextTopK",
    "VisionZip",
    "divprune_select",
    "hiprune_select",
    "methods",
    "scope_select",
    "split_budget",
    "tokens_to_keep",
    "visionzip_select",
]
