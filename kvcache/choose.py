"""The choice inside one layer: the tokens with the highest scores, behind those that stay anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcache.policy import LayerStats
from vlmeff.errors import ConfigError
from vlmeff.ops import top_indices


def ends_mask(n: int, *, sink: int, recent: int, device: torch.device | str = "cpu") -> Tensor:
    """[n] bool: the first ``sink`` and the last ``recent`` tokens."""
    slot = torch.arange(n, device=device)
    return (slot < sink) | (slot >= n - recent)


def text_mask(policy: str, stats: LayerStats, text_first: bool) -> Tensor | None:
    """[n] bool: the tokens that ``text_first`` ranks above the others; None when it is off.

    A prompt without visual tokens is text alone, and the rank of all its tokens is the same: text_first changes nothing
    there. Which tokens are visual is read from ``input_ids``.

    Raises:
        ConfigError: it is on and nothing says which tokens are visual, as in a request of ``inputs_embeds`` alone.
    """
    if not text_first:
        return None
    if stats.vision is None:
        raise ConfigError(
            f"{policy}: text_first=True needs to know which tokens are visual, and of this request that is unknown: "
            "pass input_ids (inputs_embeds alone do not say it), or text_first=False."
        )
    return ~stats.vision


def top_slots(
    scores: Tensor,
    k: int,
    *,
    protected: Tensor | None = None,
    first: Tensor | None = None,
    tolerance: float = 0.0,
) -> Tensor:
    """The k best tokens: the protected ones, then those of ``first``, then the others, each by score.

    Equal scores: the later token wins. Ranking ``first`` before the others is LOOK-M's "text prior" (arXiv 2406.18139),
    which subtracts a large number from the scores of visual tokens, without the rounding which that causes.

    Args:
        scores: [..., n] float.  k: 1 <= k <= n.  protected, first: [n] bool.
        tolerance: as in ``vlmeff.ops.top_indices``, of which this is the case for slots of a cache.
    Returns:
        [..., k] int64 ascending.
    """
    groups: Tensor | None = None
    for mask, weight in ((first, 1), (protected, 2)):
        if mask is not None:
            group = mask.to(scores.device, torch.int8) * weight
            groups = group if groups is None else groups + group
    return top_indices(scores, k, groups=groups, ties="last", tolerance=tolerance)
