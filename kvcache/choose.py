"""The choice inside one layer: the tokens with the highest scores, behind those that stay anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcache.policy import LayerStats
from vlmeff.errors import ConfigError


def ends_mask(n: int, *, sink: int, recent: int, device: torch.device | str = "cpu") -> Tensor:
    """[n] bool: the first ``sink`` and the last ``recent`` tokens."""
    slot = torch.arange(n, device=device)
    return (slot < sink) | (slot >= n - recent)


def text_mask(policy: str, stats: LayerStats, text_first: bool) -> Tensor | None:
    """[n] bool: the tokens that ``text_first`` ranks above the others; None when it is off.

    Raises:
        ConfigError: it is on and nothing says which tokens are visual.
    """
    if not text_first:
        return None
    if stats.vision is None:
        raise ConfigError(
            f"{policy}: text_first=True needs to know which tokens are visual, and of this model that is unknown. "
            "Pass text_first=False."
        )
    return ~stats.vision


def top_slots(scores: Tensor, k: int, *, protected: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    """The k best tokens: the protected ones, then those of ``first``, then the others, each by score.

    Equal scores: the later token wins. Ranking ``first`` before the others is LOOK-M's "text prior" (arXiv 2406.18139),
    which subtracts a large number from the scores of visual tokens, without the rounding which that causes.

    Args:
        scores: [..., n] float.  k: 1 <= k <= n.  protected, first: [n] bool.
    Returns:
        [..., k] int64 ascending.
    """
    n = scores.shape[-1]
    # Later tokens first, so that the stable sorts leave them first among equals.
    order = n - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    for group in (first, protected):
        if group is not None:
            rank = group.to(order.device, torch.int8)[order].argsort(dim=-1, descending=True, stable=True)
            order = order.gather(-1, rank)
    return order[..., :k].sort(dim=-1).values
