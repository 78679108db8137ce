"""VisionZip: keep the dominant tokens and merge the rest into a few contextual ones ("VisionZip", arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenpruning import similarity
from tokenpruning.budget import Budget, check_budget
from tokenpruning.plan import MERGED, REGISTER, Segment, Selection, methods
from vlmeff.errors import ConfigError
from vlmeff.ops import top_indices

CONTEXTUAL = 10 / 64  # of the budget; 10 of 64, 20 of 128 and 30 of 192 in the paper


@methods.register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip:
    """Keep dominant tokens, and contextual tokens that are the mean of a group of the others.

    Args:
        keep: tokens per image (int) or share kept (float in (0, 1]).
        contextual: share of the budget for contextual tokens, in [0, 1]. 0 keeps the top of the deep score alone and
            merges nothing.

    Source: arXiv 2412.04467. Differs in four ways. A contextual token becomes the mean of its whole group, itself among
    it; the official code adds the mean of the others to it, which about doubles its length. Tokens are compared and
    averaged after the projector; officially they are compared by the attention keys and averaged before it. Dominance
    is the column mean of the deep layer's attention, not the attention of the CLS token, which many towers lack, and
    the CLS token itself is not passed on. The tokens keep their raster order; officially the contextual ones come last.
    """

    keep: Budget = 1 / 3
    contextual: float = CONTEXTUAL

    needs: ClassVar[tuple[str, ...]] = ("deep", "features")

    def __post_init__(self) -> None:
        check_budget("VisionZip", self.keep)
        number = isinstance(self.contextual, int | float) and not isinstance(self.contextual, bool)
        if not number or not 0 <= self.contextual <= 1:  # also false for NaN
            raise ConfigError(f"VisionZip: contextual={self.contextual!r} must be a share of the budget in [0, 1].")

    def select(self, segment: Segment, k: int) -> Selection:
        assert segment.features is not None, "the caller provides what a method needs"
        return visionzip_select(segment.features, segment.scores["deep"], k, contextual=self.contextual)


def visionzip_select(features: Tensor, deep_score: Tensor, k: int, *, contextual: float = CONTEXTUAL) -> Selection:
    """Choose k of N tokens, some of which take up all that are not chosen.

    n_c = round(k * contextual). The k - n_c dominant tokens are the top of the deep score. Among the M remaining, in
    raster order, every (M // n_c)-th is contextual, n_c of them from the first on; each other one goes into the
    contextual token with the largest cosine similarity. Equal scores: lowest index first.

    Args:
        features: [N, D], finite floats.  deep_score: [N] float, finite.  k: 1 <= k <= N.
    Returns:
        index [k] int64 ascending, kind [k] int8 (MERGED for contextual tokens) and into [N], where no token is dropped
        and nothing goes into a dominant one. Without contextual tokens into is None and the rest is dropped.
    Raises:
        ValueError: a shape does not fit, or k is out of range.
    """
    n = len(features)
    similarity.check_tokens("visionzip_select", features, k)
    if features.ndim != 2 or deep_score.shape != (n,):
        raise ValueError(
            "visionzip_select: features must be [N, D] and deep_score [N], "
            f"got {tuple(features.shape)} and {tuple(deep_score.shape)}"
        )
    n_contextual = round(k * contextual)
    n_dominant = k - n_contextual
    dominant = top_indices(deep_score, n_dominant).to(features.device)
    kind = torch.full((n,), -1, dtype=torch.int8, device=features.device)
    kind[dominant] = REGISTER
    if n_contextual == 0:
        return Selection(dominant, kind[dominant])

    rest = torch.argsort(kind, stable=True)[: n - n_dominant]  # -1 sorts first: what is not dominant, in raster order
    contexts = rest[:: len(rest) // n_contextual][:n_contextual].contiguous()
    kind[contexts] = MERGED
    index = torch.cat([dominant, contexts]).sort().values
    into = torch.empty(n, dtype=torch.int64, device=features.device)
    into[rest] = torch.searchsorted(index, contexts)[_most_similar(features[rest], features[contexts])]
    # After the line above: a contextual token stays itself, also where another one points the same way.
    into[index] = torch.arange(k, device=features.device)
    return Selection(index, kind[index], into)


def _most_similar(tokens: Tensor, contexts: Tensor) -> Tensor:
    """[M, D], [C, D] -> [M] the context that is most like each token."""
    blocks = similarity.row_blocks(similarity.unit_rows(tokens), similarity.unit_rows(contexts))
    return torch.cat([block.argmax(-1) for _, block in blocks])
