"""PyramidKV: SnapKV's choice, with fewer entries in each layer than in the one before (arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcache.budget import round_shares
from kvcache.checks import check_keep_ratio
from kvcache.choose import text_mask
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies
from kvcache.snapkv import Pool, check_window_vote, is_short, window_vote_select
from vlmeff.errors import ConfigError


@policies.register("pyramidkv")
@dataclass(frozen=True, kw_only=True)
class PyramidKV:
    """SnapKV with budgets that fall linearly from the first layer to the last.

    Args:
        keep_ratio: share of the prompt's entries that stays, averaged over the layers, in (0, 1].
        beta: steepness, >= 1: the last layer gets 1 / beta of the average where the prompt is long enough.
        window, kernel, pool, text_first: as ``SnapKV``.

    Source: arXiv 2406.02069, in kvpress 0.5.5's form. Differs in the rounding: the layers add up to
    round(keep_ratio * L * n), by largest remainder. Where tokens are dropped between layers each layer has the pyramid
    of its own n, so that the first layers, which get most tokens, weigh more than their share.
    """

    keep_ratio: float = 0.5
    beta: float = 20
    window: int = 32
    kernel: int = 5
    pool: Pool = "avg"
    text_first: bool = False

    selection: ClassVar[Selection] = "per_head"
    scope: ClassVar[Scope] = "layer"
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep_ratio("PyramidKV", self.keep_ratio)
        check_window_vote("PyramidKV", self.window, self.kernel, self.pool, self.text_first)
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not number or not 1 <= self.beta < float("inf"):  # also false for NaN
            raise ConfigError(f"PyramidKV: beta={self.beta!r} must be a number >= 1.")

    @property
    def needs(self) -> ScoreSpec:
        return ScoreSpec(kind="window", window=self.window, summed=True, query_heads=True)

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        return [s.n if is_short("PyramidKV", s, self.window) else self._pyramid(s.n, s.layers)[s.layer] for s in stats]

    def select(self, stats: LayerStats, k: int) -> Tensor:
        first = text_mask("PyramidKV", stats, self.text_first)
        return window_vote_select(stats, k, window=self.window, kernel=self.kernel, pool=self.pool, first=first)

    def _pyramid(self, n: int, layers: int) -> list[int]:
        ideal = pyramid(n, layers, keep_ratio=self.keep_ratio, beta=self.beta, window=self.window)
        return round_shares(ideal, total=round(self.keep_ratio * layers * n), floor=1, cap=n)


def pyramid(n: int, layers: int, *, keep_ratio: float, beta: float, window: int) -> list[float]:
    """[layers] budgets, not rounded: hi at the first layer, lo at the last, m = keep_ratio * n on average.

    lo = m / beta, hi = 2m - lo; hi is at most n - window, and lo then 2m - hi. Where that is not
    n >= hi >= lo >= window every layer gets m.
    """
    mean = n * keep_ratio
    low = mean / beta
    high = 2 * mean - low
    if high >= n - window:
        high = n - window
        low = 2 * mean - high
    if layers == 1 or not n >= high >= low >= window:
        return [mean] * layers
    return [high - layer * (high - low) / (layers - 1) for layer in range(layers)]
