"""SnapKV: what the last queries of the prompt look at, smoothed along the keys ("SnapKV", arXiv 2404.14469)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from kvcache.checks import check_choice, check_flag, check_ints, check_keep_ratio
from kvcache.choose import ends_mask, text_mask, top_slots
from kvcache.policy import LayerStats, Scope, ScoreSpec, Selection, policies
from vlmeff.errors import ConfigError

Pool = Literal["avg", "max"]


@policies.register("snapkv")
@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """Keep the last ``window`` tokens and those before them that these attend to most, each key/value head its own.

    Args:
        keep_ratio: share of the prompt's entries that stays, in (0, 1]; k = max(1, int(n * keep_ratio)).
        window: queries that vote. Their own tokens come before all others; of fewer than ``window`` entries they are
            the last k tokens.
        kernel: width of the pooling along the keys, odd; 1 pools nothing.
        pool: "avg" (zeros beyond the ends count) or "max".
        text_first: keep text before visual tokens (LOOK-M, arXiv 2406.18139).

    Source: arXiv 2404.14469; the mean over each head's group and the rounding of k follow kvpress 0.5.5.
    A prompt of ``window`` tokens or fewer is kept whole, with a warning.
    """

    keep_ratio: float = 0.5
    window: int = 32
    kernel: int = 5
    pool: Pool = "avg"
    text_first: bool = False

    selection: ClassVar[Selection] = "per_head"
    scope: ClassVar[Scope] = "layer"
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep_ratio("SnapKV", self.keep_ratio)
        check_window_vote("SnapKV", self.window, self.kernel, self.pool, self.text_first)

    @property
    def needs(self) -> ScoreSpec:
        return ScoreSpec(kind="window", window=self.window, summed=True, query_heads=True)

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        return [s.n if is_short("SnapKV", s, self.window) else max(1, int(s.n * self.keep_ratio)) for s in stats]

    def select(self, stats: LayerStats, k: int) -> Tensor:
        first = text_mask("SnapKV", stats, self.text_first)
        return window_vote_select(stats, k, window=self.window, kernel=self.kernel, pool=self.pool, first=first)


def check_window_vote(policy: str, window: object, kernel: object, pool: object, text_first: object) -> None:
    """Raise ``ConfigError`` naming the first illegal argument."""
    check_ints(policy, 1, window=window, kernel=kernel)
    if kernel % 2 == 0:  # type: ignore[operator]
        raise ConfigError(
            f"{policy}: kernel={kernel!r} must be odd, so that the pooled scores stand over their tokens."
        )
    check_choice(policy, "pool", pool, get_args(Pool))
    check_flag(policy, "text_first", text_first)


def is_short(policy: str, stats: LayerStats, window: int) -> bool:
    """Whether no token stands before the window, so that nothing can be voted on; warns at the first layer."""
    short = stats.n <= window
    if short and stats.layer == 0:
        warnings.warn(
            f"{policy}: a prompt that is not longer than window={window} is kept whole.",
            stacklevel=3,
        )
    return short


def window_vote(sums: Tensor, *, window: int, kv_heads: int, kernel: int, pool: Pool) -> Tensor:
    """Score of each token before the window.

    s[h, j] = mean over the group of head h of pool_j(mean_i A[h', i, j]), i the last ``window`` queries.

    Args:
        sums: [Hq, n] float32, sum_i A[h', i, j]; n > window.
    Returns:
        [Hkv, n - window] float32.
    """
    votes = sums[:, :-window] / window  # [Hq, n - window]
    pooled = (F.avg_pool1d if pool == "avg" else F.max_pool1d)(votes[:, None], kernel, stride=1, padding=kernel // 2)
    return pooled[:, 0].view(kv_heads, -1, pooled.shape[-1]).mean(1)


def window_vote_select(
    stats: LayerStats, k: int, *, window: int, kernel: int, pool: Pool, first: Tensor | None
) -> Tensor:
    """[Hkv, k] int64 ascending: the window, then ``first``, then the others, each by ``window_vote``."""
    assert stats.scores is not None
    n, window = stats.n, min(window, stats.n)
    scores = stats.scores.new_zeros(stats.kv_heads, n)
    if n > window:
        scores[:, :-window] = window_vote(
            stats.scores, window=window, kv_heads=stats.kv_heads, kernel=kernel, pool=pool
        )
    return top_slots(scores, k, protected=ends_mask(n, sink=0, recent=window, device=scores.device), first=first)
