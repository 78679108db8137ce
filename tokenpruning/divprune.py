"""DivPrune: keep tokens that differ from one another ("DivPrune", arXiv 2503.02175).

Token pruning as a max-min diversity problem: among all subsets of k tokens the one whose smallest pairwise distance is
largest, approached greedily. No attention score is needed.

Shape letters: B pictures, N tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenpruning import similarity
from tokenpruning.budget import Budget, check_budget
from tokenpruning.plan import REGISTER, Segment, Selection, methods


@methods.register("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune:
    """Keep the most diverse tokens.

    Args:
        keep: tokens per image (int) or share kept (float in (0, 1]).

    Source: arXiv 2503.02175, on the tokens as the language model receives them. Written from the method's description,
    not from the official code, whose licence excludes commercial use. Differs in float32 distances whatever the
    model's dtype and in ties going to the lowest index.
    """

    keep: Budget = 1 / 3

    needs: ClassVar[tuple[str, ...]] = ("features",)

    def __post_init__(self) -> None:
        check_budget("DivPrune", self.keep)

    def select(self, segment: Segment, k: int) -> Selection:
        assert segment.features is not None, "the caller provides what a method needs"
        index = divprune_select(segment.features, k)
        return Selection(index, torch.full_like(index, REGISTER, dtype=torch.int8))


def divprune_select(features: Tensor, k: int) -> Tensor:
    """Choose k tokens greedily so that the smallest cosine distance among them is large.

    The first is the token whose nearest other token is farthest; each next one is the token that is farthest from its
    nearest chosen one. Distance d(i, j) = 1 - cos(x_i, x_j). Equal distances: lowest index first.

    Args:
        features: [N, D], or [B, N, D] for B pictures of the same size, finite floats.
        k: 1 <= k <= N.
    Returns:
        [k] or [B, k] int64 ascending. A picture's choice does not depend on its batch mates.
    Raises:
        ValueError: the shape does not fit, or k is out of range.

    O(N^2 D + k N) products and, from 4097 tokens on, when all pairs no longer fit into ``similarity.BLOCK_BYTES``,
    O(N^2 D + k N D). Never waits for the device.
    """
    similarity.check_tokens("divprune_select", features, k)
    if features.ndim == 2:
        return _select(features[None], k)[0]
    batch, n, _ = features.shape
    if batch == 0:
        return features.new_empty(0, k, dtype=torch.int64)
    together = max(1, similarity.rows_per_block(n * n, torch.promote_types(features.dtype, torch.float32)))
    return torch.cat([_select(chunk, k) for chunk in features.split(together)])


def _select(features: Tensor, k: int) -> Tensor:
    """[B, N, D] -> [B, k]. Each picture's products are its own; the steps that are shared do not round."""
    units = [similarity.unit_rows(tokens) for tokens in features]
    pairs = None
    if similarity.fits(features.shape[1], units[0].dtype):
        pairs = torch.stack([similarity.all_similarities(unit) for unit in units])
    batch = torch.arange(len(units), device=features.device)

    def row_of(token: Tensor) -> Tensor:
        """Similarities [B, N] of one token [B] of each picture."""
        if pairs is not None:
            return pairs[batch, token]
        return torch.cat([similarity.similarities_of(unit, token[b : b + 1]) for b, unit in enumerate(units)])

    # The distance to the nearest token is 1 - the largest similarity, so the farthest has the smallest of these.
    first = torch.stack([_nearest_other(unit) for unit in units])
    picks = [first.argmin(-1)]
    taken = torch.zeros_like(first, dtype=torch.bool).scatter_(1, picks[0][:, None], True)
    nearest_chosen = row_of(picks[0])
    while len(picks) < k:
        pick = nearest_chosen.masked_fill(taken, torch.inf).argmin(-1)
        taken.scatter_(1, pick[:, None], True)
        nearest_chosen = torch.maximum(nearest_chosen, row_of(pick))
        picks.append(pick)
    return torch.stack(picks, -1).sort(-1).values


def _nearest_other(unit: Tensor) -> Tensor:
    """Similarity [N] of each token to the one that is most like it, itself apart."""
    token = torch.arange(len(unit), device=unit.device)
    nearest = unit.new_full((len(unit),), -torch.inf)
    for start, block in similarity.row_blocks(unit, unit):
        # Each pair counts once, for both of its tokens: two that are nearest to each other must tie, and the products
        # (i, j) and (j, i) may differ in the last bit.
        end = start + len(block)
        block.masked_fill_(token <= token[start:end, None], -torch.inf)
        nearest[start:end] = torch.maximum(nearest[start:end], block.amax(-1))
        nearest = torch.maximum(nearest, block.amax(0))
    return nearest
