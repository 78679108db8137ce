"""Suggest HiPrune's object layer from a curve over the layers of a vision tower. Pure statistics; nothing is run here.

The paper ("HiPrune", arXiv 2508.00553, section 5.4 and figure 8) chooses the object layer l by the dispersion of what a
layer looks at: the tokens of one object should be alike, so while the layers attend to objects their strongest tokens
lie close together, and at the critical point they scatter over the whole picture.

    T_l  = the strongest ``top`` of the tokens by a^[l], the mean attention that each receives in layer l
    d[l] = mean over pairs i < j of T_l of |x_i - x_j|_2, averaged over pictures
    l    = the layer before the greatest rise of d

"Distance" is that of embeddings, not of places in the grid, and x are the same for every layer: the tokens of the
tower's output, as in the official notebook. Only *which* tokens are compared changes from layer to layer, so that
layers of different scale can be compared.

The paper reads l off the plot ("turning point", "critical point"); the rule that stands here is ours. Of the usual ones
it alone gives the paper's 9 for CLIP-L/14-336 on all three curves of the figure (5, 10 and 25 % of the tokens): the
greatest second difference is misled by a later bump of the 25 % curve (11), the greatest distance to the chord between
the ends falls beside the jump (10, 10 and 8). A rise also says what is looked for: l is the last layer that attends to
objects.

Letters: N tokens, D channels, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmeff.errors import ConfigError, DataError
from vlmeff.ops import top_indices

TOP = 0.1  # the paper plots 0.05, 0.1 and 0.25


@dataclass(frozen=True, kw_only=True)
class LayerCurve:
    """The curve of a model and the object layer that it suggests.

    ``layers``: the 1-based numbers of the layers measured, ascending.  ``distances``: d of each, mean over ``samples``
    pictures.  ``object_layer``: the suggestion; None where d never rises, so that there is no turning point.
    ``agreement``: share of the pictures whose own curve suggests the same layer: a suggestion that few share is noise.
    """

    layers: tuple[int, ...]
    distances: tuple[float, ...]
    object_layer: int | None
    agreement: float
    samples: int
    top: float

    @property
    def rises(self) -> tuple[float, ...]:
        """d of the next layer measured less d of this one, for each but the last layer."""
        return tuple(after - before for before, after in itertools.pairwise(self.distances))


def check_top(top: object) -> None:
    """Raise ``ConfigError`` unless ``top`` is a share in (0, 1]."""
    if not isinstance(top, int | float) or isinstance(top, bool) or not 0 < top <= 1:
        raise ConfigError(f"calibrate hiprune: top={top!r} must be a share in (0, 1] of the tokens; the paper has 0.1.")


def top_distance(scores: Tensor, embeddings: Tensor, *, top: float = TOP) -> Tensor | None:
    """Mean distance of all pairs of the tokens with the highest scores.

    max(2, int(N * top)) tokens take part, the paper's number but at least one pair; equal scores go to the lowest
    index. Holds k (k - 1) / 2 floats for k tokens.

    Args:
        scores: [N] float.  embeddings: [N, D] float; computed in float32 (float64 for float64).
    Returns:
        [] float64, or None for fewer than two tokens, which have no distance.
    """
    check_top(top)
    if scores.ndim != 1 or embeddings.ndim != 2 or len(scores) != len(embeddings):
        raise ValueError(
            f"top_distance: scores must be [N] and embeddings [N, D], got {tuple(scores.shape)} and "
            f"{tuple(embeddings.shape)}"
        )
    n = len(scores)
    if n < 2:
        return None
    chosen = top_indices(scores, max(2, int(n * top)))
    rows = embeddings[chosen.to(embeddings.device)]
    # pdist and not cdist: cdist may go through x.x + y.y - 2 x.y, which ruins the distances of tokens that are alike.
    return torch.pdist(rows.to(torch.promote_types(rows.dtype, torch.float32))).mean(dtype=torch.float64)


def turning_point(layers: Sequence[int], distances: Sequence[float]) -> int | None:
    """The layer before the greatest rise, the first of equals; None where the curve never rises.

    The last layer measured is never chosen: nothing is known to rise behind it. Between layers that were left out (as
    windowed ones) the whole rise counts.
    """
    best, greatest = None, 0.0
    for layer, (before, after) in zip(layers, itertools.pairwise(distances), strict=False):
        if after - before > greatest:
            best, greatest = layer, after - before
    return best


def suggest_object_layer(curves: Sequence[Sequence[float]], layers: Sequence[int], *, top: float = TOP) -> LayerCurve:
    """Average the curves of pictures and find the turning point.

    Args:
        curves: per picture d of each layer [L].
        layers: [L] 1-based numbers, ascending: the legal object layers up to the one that feeds the projector.
        top: with which the distances were taken; noted only.
    Raises:
        ConfigError: fewer than two layers.  DataError: no pictures, or broken curves.
    """
    check_top(top)
    layers = tuple(layers)
    if len(layers) < 2 or list(layers) != sorted({*layers}) or layers[0] < 1:
        raise ConfigError(
            f"calibrate hiprune: layers={layers} must be at least two legal (1-based) layers, ascending: a turning "
            "point lies between layers."
        )
    if not curves:
        raise DataError("calibrate hiprune: no sample has a picture of two tokens or more; pass some that do.")
    for number, curve in enumerate(curves):
        if len(curve) != len(layers) or not all(math.isfinite(d) and d >= 0 for d in curve):
            raise DataError(
                f"calibrate hiprune: the curve of picture {number} must be {len(layers)} distances, finite and not "
                "negative."
            )
    mean = tuple(math.fsum(ds) / len(curves) for ds in zip(*curves, strict=True))
    suggested = turning_point(layers, mean)
    own = [turning_point(layers, curve) for curve in curves]
    return LayerCurve(
        layers=layers,
        distances=mean,
        object_layer=suggested,
        agreement=own.count(suggested) / len(own),
        samples=len(curves),
        top=float(top),
    )
