"""How many tokens a budget keeps."""

from __future__ import annotations

import math

from vlmeff.errors import ConfigError


def check_budget(method: str, keep: int | float) -> None:
    """Raise ``ConfigError`` unless ``keep`` is an int >= 1 (tokens per image) or a share in (0, 1]."""
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


def split_budget(budget: int | float, sizes: list[int]) -> list[int]:
    """Tokens kept of each segment (tile, frame) of one image with ``sizes`` tokens.

    A share applies to each segment; an int is the image's and is divided evenly, as HiPrune does over tiles
    (of that image only: the official code divides by the tiles of the whole batch).
    """
    if isinstance(budget, int):
        return [tokens_to_keep(max(1, budget // len(sizes)), n) for n in sizes]
    return [tokens_to_keep(budget, n) for n in sizes]
