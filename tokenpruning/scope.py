"""SCOPE: keep tokens that are salient and stand for many others ("SCOPE", arXiv 2510.24214).

Shape letters: N tokens, R rows of one block, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenpruning import similarity
from tokenpruning.budget import Budget, check_budget
from tokenpruning.plan import REGISTER, Segment, Selection, methods
from vlmeff.errors import ConfigError

LOOK_AGAIN = 64  # candidates whose gain is computed anew at a time when the similarities are not held


@methods.register("scope")
@dataclass(frozen=True, kw_only=True)
class Scope:
    """Keep tokens by saliency times the coverage that they add.

    Args:
        keep: tokens per image (int) or share kept (float in (0, 1]).
        alpha: exponent of the saliency, >= 0. 0 is coverage alone; 1 is what the published scripts for LLaVA use.

    Source: arXiv 2510.24214. Differs in the saliency (column mean of the deep layer's attention over all queries, not
    the attention of the CLS token, which many towers lack), in the features (as the language model receives them, not
    before the projector), and in float32 throughout.
    """

    keep: Budget = 1 / 3
    alpha: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("deep", "features")

    def __post_init__(self) -> None:
        check_budget("Scope", self.keep)
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not math.isfinite(self.alpha) or self.alpha < 0:
            raise ConfigError(f"Scope: alpha={self.alpha!r} must be a finite number >= 0.")

    def select(self, segment: Segment, k: int) -> Selection:
        assert segment.features is not None, "the caller provides what a method needs"
        index = scope_select(segment.features, segment.scores["deep"], k, alpha=self.alpha)
        return Selection(index, torch.full_like(index, REGISTER, dtype=torch.int8))


def scope_select(features: Tensor, saliency: Tensor, k: int, *, alpha: float = 1.0) -> Tensor:
    """Choose k tokens greedily by saliency and coverage.

    The coverage of a chosen set S is C(S) = sum_j max(0, max_{s in S} cos(x_j, x_s)): how well each token is stood for
    by the most similar chosen one. A token i that is not chosen yet gains

        g_i = C(S + i) - C(S) = sum_j max(0, cos(x_j, x_i) - c_j),    c_j = max(0, max_{s in S} cos(x_j, x_s)),

    and the one with the largest g_i * saliency_i ** alpha joins S. Equal products: lowest index first.

    Args:
        features: [N, D], or [B, N, D] for B pictures of the same size, finite floats.
        saliency: [N] or [B, N], finite, not negative.
        k: 1 <= k <= N.
    Returns:
        [k] or [B, k] int64 ascending. A picture's choice does not depend on its batch mates.
    Raises:
        ValueError: a shape does not fit, or k is out of range.

    O(N^2 D + k N^2) when all pairs fit into ``similarity.BLOCK_BYTES`` (4096 tokens), without waiting for the device.
    Beyond, gains are computed anew only for the tokens that may still win: gains never grow as S does, so an old gain
    is an upper bound. The choice is the same except between products that differ by rounding.
    """
    similarity.check_tokens("scope_select", features, k)
    if saliency.shape != features.shape[:-1]:
        raise ValueError(
            f"scope_select: saliency must be {tuple(features.shape[:-1])} (as features), got {tuple(saliency.shape)}"
        )
    if features.ndim == 3:  # one by one: a sum over a batch may round otherwise than a sum over one picture
        picks = [scope_select(f, s, k, alpha=alpha) for f, s in zip(features, saliency, strict=True)]
        return torch.stack(picks) if picks else features.new_empty(0, k, dtype=torch.int64)
    unit = similarity.unit_rows(features)
    weight = _weight(saliency.detach().to(unit), alpha)
    search = _greedy if similarity.fits(len(unit), unit.dtype) else _lazy_greedy
    return search(unit, weight, k).sort().values


def _weight(saliency: Tensor, alpha: float) -> Tensor:
    """saliency ** alpha, relative to the largest so that small scores do not underflow; all ones if all are zero."""
    largest = saliency.amax()
    return torch.where(largest > 0, saliency / largest, 1.0) ** alpha


def _greedy(unit: Tensor, weight: Tensor, k: int) -> Tensor:
    pairs_NN = similarity.all_similarities(unit)
    covered = unit.new_zeros(len(unit))
    taken = torch.zeros_like(covered, dtype=torch.bool)
    picks = []
    for _ in range(k):
        product = _gains(pairs_NN, covered) * weight
        pick = product.masked_fill(taken, -torch.inf).argmax()
        taken[pick] = True
        covered = torch.maximum(covered, pairs_NN[pick])
        picks.append(pick)
    return torch.stack(picks)


def _lazy_greedy(unit: Tensor, weight: Tensor, k: int) -> Tensor:
    """The same by upper bounds (M. Minoux, 1978), without the matrix of all pairs."""
    covered = unit.new_zeros(len(unit))
    blocks = torch.arange(len(unit), device=unit.device).split(similarity.rows_per_block(len(unit), unit.dtype))
    bound = torch.cat([_gains(similarity.similarities_of(unit, block), covered) for block in blocks]) * weight
    picks: list[int] = []
    fresh = torch.ones_like(bound, dtype=torch.bool)
    while len(picks) < k:
        pick = int(bound.argmax())
        if fresh[pick]:
            picks.append(pick)
            row = similarity.similarities_of(unit, torch.tensor([pick], device=unit.device))[0]
            covered = torch.maximum(covered, row)
            bound[pick] = -torch.inf
            fresh.zero_()
            continue
        stale = bound.masked_fill(fresh, -torch.inf)
        again = stale.topk(min(LOOK_AGAIN, len(unit))).indices
        again = again[stale[again] > -torch.inf]
        bound[again] = _gains(similarity.similarities_of(unit, again), covered) * weight[again]
        fresh[again] = True
    return torch.tensor(picks, device=unit.device)


def _gains(similarities_RN: Tensor, covered_N: Tensor) -> Tensor:
    """[R]: what each of R tokens would add to the coverage."""
    return (similarities_RN - covered_N).clamp_min(0).sum(-1)
