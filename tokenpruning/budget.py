"""How many tokens a budget keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmeff.errors import ConfigError


@dataclass(frozen=True)
class PerFrame:
    """A budget of ``tokens`` for every tile and every frame; an int budget is divided among them instead."""

    tokens: int

    def __post_init__(self) -> None:
        if type(self.tokens) is not int or self.tokens < 1:
            raise ConfigError(f"PerFrame: tokens={self.tokens!r} must be an int >= 1.")


Budget = int | float | PerFrame


def check_budget(method: str, keep: Budget) -> None:
    """Raise ``ConfigError`` unless ``keep`` is an int >= 1, a share in (0, 1] or ``PerFrame``."""
    if isinstance(keep, PerFrame):
        return
    legal = isinstance(keep, int | float) and not isinstance(keep, bool)
    if legal and isinstance(keep, int):
        legal = keep >= 1
    elif legal:
        legal = math.isfinite(keep) and 0 < keep <= 1
    if not legal:
        raise ConfigError(
            f"{method}: keep={keep!r} is not a budget. Use an int >= 1 (tokens per image) or a share in (0, 1]."
        )


def tokens_to_keep(budget: int | float, n: int) -> int:
    """Tokens kept of ``n``: an int budget is that many, a float share is rounded half to even; clamped to [1, n].

    Rounding follows the official HiPrune code (Python's ``round``).
    """
    k = budget if isinstance(budget, int) else round(n * budget)
    return max(1, min(k, n))


def split_budget(budget: Budget, sizes: Sequence[int], shares: Sequence[int] | None = None) -> list[int]:
    """Tokens kept of each segment (tile, frame) of one picture or video with ``sizes`` tokens.

    A share applies to each segment; an int is the whole picture's (or clip's) and is divided by the number of tiles, as
    HiPrune does (of that picture only: the official code divides by the tiles of the whole batch). A segment that
    stands for several tiles gets as many parts (``shares``). What a tile cannot use (its padding was cut off) goes to
    the others. Every segment keeps one token at least.
    """
    shares = [1] * len(sizes) if shares is None else shares
    if isinstance(budget, PerFrame):
        return [tokens_to_keep(budget.tokens * part, n) for n, part in zip(sizes, shares, strict=True)]
    if isinstance(budget, int):
        if budget >= sum(sizes):
            return list(sizes)
        each = max(1, budget // sum(shares))
        return _fill(each * sum(shares), [each * part for part in shares], sizes)
    return [tokens_to_keep(budget, n) for n in sizes]


def _fill(total: int, wanted: list[int], sizes: Sequence[int]) -> list[int]:
    """``wanted`` limited to ``sizes``; what is left of ``total`` evenly to those with room, first ones first."""
    out = [min(k, n) for k, n in zip(wanted, sizes, strict=True)]
    left = min(total, sum(sizes)) - sum(out)
    while left > 0:
        room = [i for i, n in enumerate(sizes) if out[i] < n]
        for place, i in enumerate(room):
            more = min(sizes[i] - out[i], left // len(room) + (place < left % len(room)))
            out[i] += more
        left = min(total, sum(sizes)) - sum(out)
    return out
