"""Key/value cache: which entries of a prompt stay, and how much memory they hold. Each policy is one file."""

from __future__ import annotations

from kvcache.accounting import cache_bytes, cache_slots, full_cache_bytes
from kvcache.budget import Allocation, cumulative_priority, recipe_budgets, solve_budgets
from kvcache.h2o import H2O
from kvcache.knorm import KNorm
from kvcache.policy import LayerStats, RetentionPolicy, ScoreSpec, policies
from kvcache.prefixkv import PrefixKV
from kvcache.pyramidkv import PyramidKV
from kvcache.random_kv import RandomKV
from kvcache.recipe import Recipe, convert_official, read_recipe, write_recipe
from kvcache.recipe_averaging import half_difference, mean_shares, renormalise, std_shares
from kvcache.snapkv import SnapKV
from kvcache.streaming_llm import StreamingLLM
from kvcache.tova import TOVA
from kvcache.vl_cache import VLCache

__all__ = [
    "H2O",
    "TOVA",
    "Allocation",
    "KNorm",
    "LayerStats",
    "PrefixKV",
    "PyramidKV",
    "RandomKV",
    "Recipe",
    "RetentionPolicy",
    "ScoreSpec",
    "SnapKV",
    "StreamingLLM",
    "VLCache",
    "cache_bytes",
    "cache_slots",
    "convert_official",
    "cumulative_priority",
    "full_cache_bytes",
    "half_difference",
    "mean_shares",
    "policies",
    "read_recipe",
    "recipe_budgets",
    "renormalise",
    "solve_budgets",
    "std_shares",
    "write_recipe",
]
