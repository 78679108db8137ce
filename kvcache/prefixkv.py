"""PrefixKV: layers with concentrated attention keep few entries, the others many ("PrefixKV", arXiv 2412.03409).

"Prefix" is the top of the list of tokens sorted by importance. One threshold p holds for all layers: each keeps as many
of its best tokens as it takes to reach the share p of its attention, and the budget fixes p (``kvcache.budget``).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kvcache.budget import Allocation, OnSmallBudget, solve_budgets
from kvcache.checks import check_choice, check_ints, check_keep_ratio
from kvcache.choose import ends_mask, top_slots
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies
from kvcache.recipe import Metric, Recipe, read_recipe
from vlmeff.errors import ConfigError, RecipeMismatchError

Decode = Literal["grow", "fixed_point", "window"]
SINK, RECENT, WINDOW = 4, 8, 32


@policies.register("prefixkv")
@dataclass(frozen=True, kw_only=True)
class PrefixKV:
    """Keep of each layer the tokens that got most attention from the prompt, as many as one global threshold says.

    Args:
        keep_ratio: share of the prompt's entries that stays, averaged over the layers, in (0, 1].
        recipe: a ``Recipe``, or the path of a recipe file: budgets of each layer known beforehand, so that each is
            compacted right after its own attention. None: found for each prompt, after its last layer.
            Its budgets hold for what it was calibrated with: another metric, window, sink or recent warns.
        sink, recent: first and last tokens of the prompt that always stay, on top of the threshold's. None: the
            recipe's, else 4 and 8; the paper's evaluation has 1 and 1.
        metric: what a token's importance is. "full", the paper's: the attention it receives from all queries of the
            prompt, summed, so that an early token, which more queries can see, counts for more. "mean": that sum
            divided by the number of those queries, so that place does not count. "window": the attention from the
            last ``window`` queries, for long prompts. None: the recipe's, else "full".
        window: None: the recipe's, else 32.
        decode: what becomes of the cache while text is generated: "grow" keeps all of it, "fixed_point" holds each
            layer at its share of what has been seen (the paper's), "window" holds the last ``decode_window`` tokens.
        decode_window: generated tokens that "window" keeps.
        evict_distance: for "fixed_point", how far before the end of the kept prompt the deletions begin. 0 deletes
            generated tokens only; the paper's 25 first deletes the last 25 kept tokens of the prompt, which are
            usually the question.
        on_small_budget: where the budget is below the protected tokens and one more per layer: "clamp" to that, with a
            warning, or "raise" ``BudgetTooSmallError``.

    Source: arXiv 2412.03409. Differs from the official code in meeting the budget exactly (``solve_budgets``) and in
    batches, each row of which has its own budgets.
    """

    keep_ratio: float = 0.5
    recipe: Recipe | str | Path | None = None
    # The annotated types hold after construction; None stands for the recipe's value or the default.
    sink: int = None  # type: ignore[assignment]
    recent: int = None  # type: ignore[assignment]
    metric: Metric = None  # type: ignore[assignment]
    window: int = None  # type: ignore[assignment]
    decode: Decode = "grow"
    decode_window: int | None = None
    evict_distance: int = 0
    on_small_budget: OnSmallBudget = "clamp"

    selection: ClassVar[Selection] = "shared"
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep_ratio("PrefixKV", self.keep_ratio)
        if isinstance(self.recipe, str | os.PathLike):
            object.__setattr__(self, "recipe", read_recipe(self.recipe))
        recipe = self.recipe
        if not isinstance(recipe, Recipe | None):
            raise ConfigError(f"PrefixKV: recipe={recipe!r} must be a Recipe, the path of a recipe file, or None.")
        for name, value in (
            ("sink", recipe.sink if recipe else SINK),
            ("recent", recipe.recent if recipe else RECENT),
            ("metric", recipe.metric if recipe else "full"),
            ("window", recipe.metric_args.get("window", WINDOW) if recipe else WINDOW),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_ints("PrefixKV", 0, sink=self.sink, recent=self.recent, evict_distance=self.evict_distance)
        check_ints("PrefixKV", 1, window=self.window)
        check_choice("PrefixKV", "metric", self.metric, get_args(Metric))
        check_choice("PrefixKV", "decode", self.decode, get_args(Decode))
        check_choice("PrefixKV", "on_small_budget", self.on_small_budget, get_args(OnSmallBudget))
        if self.decode_window is not None:
            check_ints("PrefixKV", 1, decode_window=self.decode_window)
        elif self.decode == "window":
            raise ConfigError('PrefixKV: decode="window" needs decode_window, the generated tokens to keep.')
        self._warn_of_another_calibration()

    def _warn_of_another_calibration(self) -> None:
        """The recipe's shares are those of the scores and the protected tokens that it was measured with."""
        recipe = self.recipe
        if not isinstance(recipe, Recipe):
            return
        names = ["metric", "sink", "recent"]
        theirs = {name: getattr(recipe, name) for name in names}
        if self.metric == recipe.metric == "window":
            names.append("window")
            theirs["window"] = recipe.metric_args.get("window", WINDOW)
        other = [name for name in names if getattr(self, name) != theirs[name]]
        if other:
            was = ", ".join(f"{name}={theirs[name]!r}" for name in other)
            now = ", ".join(f"{name}={getattr(self, name)!r}" for name in other)
            warnings.warn(
                f"PrefixKV: the recipe was calibrated with {was}, and is used with {now}: calibrate it as it is used, "
                f"or build PrefixKV(recipe=...) without {', '.join(other)} (a preset sets its own).",
                stacklevel=4,  # past __post_init__ and __init__, to who builds it
            )

    @property
    def needs(self) -> ScoreSpec:
        window = self.metric == "window"
        return ScoreSpec(kind="window" if window else "full", window=self.window, summed=window)

    @property
    def scope(self) -> Scope:
        return "layer" if self.recipe is not None else "model"

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        """Entries kept of each layer of ``stats``.

        Raises:
            BudgetTooSmallError, NonFiniteScoreError.  RecipeMismatchError: the recipe has another number of layers.
        """
        if self.recipe is None:
            return self.allocate(stats).kept
        return [self._from_recipe(layer) for layer in stats]

    def allocate(self, stats: list[LayerStats]) -> Allocation:
        """The budgets found for this prompt, and the threshold p; for reports and calibration.

        Raises:
            BudgetTooSmallError, NonFiniteScoreError.
        """
        return solve_budgets(
            [self.importance(layer) for layer in stats],
            keep_ratio=self.keep_ratio,
            protected=self.sink + self.recent,
            on_small_budget=self.on_small_budget,
        )

    def select(self, stats: LayerStats, k: int) -> Tensor:
        """[k] int64 ascending: the protected tokens, then those with the highest importance; the later wins ties."""
        scores = self.importance(stats)
        protected = ends_mask(stats.n, sink=self.sink, recent=self.recent, device=scores.device)
        return top_slots(scores, k, protected=protected)

    def importance(self, stats: LayerStats) -> Tensor:
        """[n] float32: attention received, mean over the heads, summed over the queries; "mean": over n - j.

        Token j of n is seen by the n - j queries from its own on. Where the tokens of a picture see one another both
        ways, it is seen by a few more, which are not counted.
        """
        assert stats.scores is not None
        if self.metric != "mean":
            return stats.scores
        return stats.scores / torch.arange(stats.n, 0, -1, device=stats.scores.device)

    def _from_recipe(self, stats: LayerStats) -> int:
        assert isinstance(self.recipe, Recipe)
        if len(self.recipe.layers) != stats.layers:
            raise RecipeMismatchError(
                f"PrefixKV: the recipe has {len(self.recipe.layers)} layers and the model retains {stats.layers}. Pass "
                "the recipe of this model, or recipe=None."
            )
        budgets = self.recipe.budgets(
            keep_ratio=self.keep_ratio,
            n=stats.n,
            protected=self.sink + self.recent,
            on_small_budget=self.on_small_budget,
            say=stats.layer == 0,
        )
        return budgets[stats.layer]
