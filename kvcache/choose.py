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
        tolerance: scores that differ from the last one taken by this share of it or less count as equal to it. Where
            many scores are equal but for rounding, which of them stay must not be decided by that. A token is passed
            over for one with a lower score only if they differ by 2 * tolerance at most. 0 compares exactly.
    Returns:
        [..., k] int64 ascending.
    """
    order = _ranking(scores, protected, first)
    if tolerance:
        # The k-th score moves by no more than the scores do, so nothing but what is near the edge of the band around it
        # can change sides; with fixed steps, equal scores may lie on the edge of one. The k-th token's group is the
        # only one that is kept in part, so only there does the band decide anything.
        last = scores.gather(-1, order[..., k - 1 : k])
        scores = torch.where((scores - last).abs() <= tolerance * last.abs(), last, scores)
        order = _ranking(scores, protected, first)
    return order[..., :k].sort(dim=-1).values


def _ranking(scores: Tensor, protected: Tensor | None, first: Tensor | None) -> Tensor:
    """[..., n] int64: the tokens from the best to the worst."""
    n = scores.shape[-1]
    # Later tokens first, so that the stable sorts leave them first among equals.
    order = n - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    for group in (first, protected):
        if group is not None:
            rank = group.to(order.device, torch.int8)[order].argsort(dim=-1, descending=True, stable=True)
            order = order.gather(-1, rank)
    return order
