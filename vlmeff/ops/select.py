"""The choice of the best k under one rule for equals, which every method shares.

Shape letter: n candidates.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vlmeff.ops._dispatch import dispatch, may_read, operator

Ties: TypeAlias = Literal["first", "last"]


@operator
def top_indices(
    scores: Tensor, k: int, *, groups: Tensor | None = None, ties: Ties = "first", tolerance: float = 0.0
) -> Tensor:
    """Choose the k best of n, in ascending order of their places.

    i goes before j if (group_i, score_i) > (group_j, score_j), compared from the left; among equals the lower index
    goes first, or with ties="last" the higher one. The first k are taken. So the choice does not depend on how a sort
    happens to arrange equals, which differs between devices.

    Args:
        scores: [..., n], float of 16 bits or more, integer or bool. Any strides.
        k: 0 <= k <= n.
        groups: [n], or [..., n] as scores: bool or integer. All of a higher group go before any of a lower one,
            whatever their scores.
        ties: who goes first among equals.
        tolerance: scores that differ from the k-th one by this share of it or less count as equal to it. Where many
            scores are equal but for rounding, which of them stay must not be decided by that. One is passed over for
            another with a lower score only if they differ by 2 * tolerance at most. 0 compares exactly.
    Returns:
        [..., k] int64 ascending, on the device of scores. k = 0 and rows of no candidates are legal.
    Raises:
        ValueError: a shape, a device or a value does not fit.
        TypeError: k is no int, or a dtype has no order.

    -inf is a score like any other, below all finite ones: it is taken when nothing else is left, so what must never be
    taken needs a budget that excludes it. NaN counts as larger than +inf, and as equal to NaN: it is taken first, and
    nothing hides that it was there. -0.0 equals 0.0. Nothing here has a gradient: scores may require one, the indices
    carry none.

    PyTorch only: a stable sort over n (two with groups), a few thousand candidates once a request or a layer. That is
    what ``torch.sort`` is made for; a kernel of ours would save launches and no traffic, and a selection by histogram
    would have to reproduce the rule for equals. Nothing is read back to the host; on a CPU, where that costs nothing,
    float32 and float64 scores without groups are counted instead of sorted.
    """
    _check(scores, k, groups, ties, tolerance)
    return dispatch(
        "top_indices", _top_indices_reference, scores=scores, k=k, groups=groups, ties=ties, tolerance=tolerance
    )


def _top_indices_reference(*, scores: Tensor, k: int, groups: Tensor | None, ties: Ties, tolerance: float) -> Tensor:
    if k and groups is None and not tolerance and may_read(scores) and scores.dtype in (torch.float32, torch.float64):
        one = scores.numel() == scores.shape[-1]
        chosen = _of_one_row(scores.detach(), k, ties) if one else _of_rows(scores.detach(), k, ties)
        if chosen is not None:
            return chosen.view(*scores.shape[:-1], k)
    order = _ranking(scores, groups, ties)
    if tolerance and k:
        # The k-th score moves by no more than the scores do, so nothing but what is near the edge of the band around it
        # can change sides; with fixed steps, equal scores may lie on the edge of one. The k-th one's group is the only
        # one that is kept in part, so only there does the band decide anything.
        last = scores.gather(-1, order[..., k - 1 : k])
        near = (scores - last).abs() <= tolerance * last.abs()
        order = _ranking(torch.where(near, last, scores), groups, ties)
    return order[..., :k].sort(dim=-1).values.contiguous()


def _of_one_row(scores: Tensor, k: int, ties: Ties) -> Tensor | None:
    """[k]: the places of the k best of a row (any leading dimensions of 1), without a sort; None where the k-th score
    is NaN."""
    row = scores.reshape(-1)
    last = row.kthvalue(len(row) - k + 1).values
    chosen = (row < last).logical_not_()  # a NaN is not below anything
    surplus = int(chosen.count_nonzero()) - k
    if surplus:
        equal = (row == last).nonzero().view(-1)
        if not len(equal):  # NaN equals nothing
            return None
        chosen.index_fill_(0, equal[-surplus:] if ties == "first" else equal[:surplus], False)
    return chosen.nonzero().view(-1)


def _of_rows(scores: Tensor, k: int, ties: Ties) -> Tensor | None:
    """[rows * k]: the same of each row of [..., n]."""
    last = scores.kthvalue(scores.shape[-1] - k + 1, dim=-1, keepdim=True).values
    chosen = (scores < last).logical_not_()
    surplus = chosen.sum(-1, keepdim=True) - k
    if bool(surplus.any()):
        if bool(last.isnan().any()):
            return None
        equal = scores == last
        turn = equal.cumsum(-1)
        chosen &= ~(equal & (turn > turn[..., -1:] - surplus if ties == "first" else turn <= surplus))
    return chosen.nonzero()[:, -1].clone()  # without the rows' numbers


def _ranking(scores: Tensor, groups: Tensor | None, ties: Ties) -> Tensor:
    """[..., n] int64: the candidates from the best to the worst."""
    if ties == "first":
        order = scores.argsort(dim=-1, descending=True, stable=True)
    else:  # the later ones first, so that the stable sorts leave them first among equals
        order = scores.shape[-1] - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    if groups is None:
        return order
    # A stable sort by group over a stable sort by score: the lexicographic order, exactly.
    in_order = groups.expand(scores.shape).gather(-1, order)
    return order.gather(-1, in_order.argsort(dim=-1, descending=True, stable=True))


def _check(scores: Tensor, k: int, groups: Tensor | None, ties: str, tolerance: float) -> None:
    op = "top_indices"
    if not isinstance(scores, Tensor) or scores.is_complex() or (scores.is_floating_point() and scores.itemsize == 1):
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{op}: scores must be a tensor of numbers that can be ordered, got {got}")
    if scores.ndim == 0:
        raise ValueError(f"{op}: scores must be [..., n], got a scalar")
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{op}: k must be an int, got {k!r}")
    n = scores.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"{op}: k must lie in [0, {n}] (n from scores), got {k}")
    if groups is not None:
        if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
            got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
            raise TypeError(f"{op}: groups must be a bool or integer tensor, got {got}")
        if groups.shape not in ((n,), scores.shape):
            raise ValueError(
                f"{op}: groups must be [{n}] or {list(scores.shape)} (from scores), got {list(groups.shape)}"
            )
        if groups.device != scores.device:
            raise ValueError(f"{op}: groups must be on {scores.device} (as scores), got {groups.device}")
    if ties not in get_args(Ties):
        raise ValueError(f"{op}: ties must be 'first' or 'last', got {ties!r}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"{op}: tolerance must be finite and not negative, got {tolerance!r}")
    if tolerance and not scores.is_floating_point():
        raise TypeError(f"{op}: a tolerance needs float scores, got {scores.dtype}")
