"""How many entries each layer keeps: PrefixKV's global threshold, solved exactly, and the rounding of shares.

All of it is float64 on the CPU, so the budgets of a prompt do not depend on the device that scored it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmeff.errors import BudgetTooSmallError, NonFiniteScoreError

OnSmallBudget = Literal["clamp", "raise"]
logger = logging.getLogger("vlmeff")


@dataclass(frozen=True)
class Allocation:
    """``kept``: entries of each layer. ``p``: the share of importance that each layer's best tokens reach.

    p is 0 where every layer holds its floor and nothing else, 1 where everything is kept.
    """

    kept: list[int]
    p: float


def cumulative_priority(scores: Tensor) -> Tensor:
    """c[k-1] = (s_(1) + ... + s_(k)) / sum(s), s_(1) >= s_(2) >= ...: the share of importance of the k best tokens.

    Args:
        scores: [n] float, n >= 1, non-negative; all zero counts as uniform.
    Returns:
        [n] float64 on the CPU, non-decreasing, 1 at the end.
    Raises:
        NonFiniteScoreError: a score is NaN or infinite.

    Source: "PrefixKV", arXiv 2412.03409.
    """
    c = scores.detach().cpu().double().sort(descending=True).values.cumsum(0)
    total = c[-1]
    if not torch.isfinite(total):
        raise NonFiniteScoreError(
            "kvcache: an attention score is NaN or infinite; the model's activations overflowed. Load it with "
            "dtype=torch.bfloat16 or torch.float32."
        )
    if total <= 0:
        c, total = torch.arange(1, len(c) + 1, dtype=torch.float64), torch.tensor(float(len(c)), dtype=torch.float64)
    return c / total


def solve_budgets(
    scores: Sequence[Tensor], *, keep_ratio: float, protected: int, on_small_budget: OnSmallBudget = "clamp"
) -> Allocation:
    """Find the one threshold p at which the layers together hold the budget, by one sort.

    A layer whose best k tokens reach the share p keeps k + P, P the protected tokens, so its (k+1)-th place opens when
    p passes c_l[k]. The places are therefore opened in order of c_l[k] until T = round(keep_ratio * sum(n_l)) are held;
    each layer holds min(n_l, P + 1) from the start. Equal values: layers in turn, lowest first.

    Args:
        scores: per retained layer [n_l] float, one row's real tokens.
        protected: P, first and last tokens that stay whatever their score.
        on_small_budget: what to do when T is less than the layers hold from the start: "clamp" to that, with one
            warning, or "raise".
    Raises:
        BudgetTooSmallError, NonFiniteScoreError.

    Source: arXiv 2412.03409. The official code bisects p, accepts a total within 5 tokens, rescales, and does not end
    where the total jumps over that window; this holds T exactly and differs from it by one token per layer at most.
    Layers "in turn" matters only to tokens of score 0, which tie within a layer: it deals them out evenly.
    """
    sizes = [len(s) for s in scores]
    floors = [min(n, protected + 1) for n in sizes]
    total = check_total(sum(sizes), keep_ratio, sum(floors), on_small_budget)
    if total >= sum(sizes):
        return Allocation(sizes, 1.0)

    values, turns, layers = [], [], []
    for layer, c in enumerate(map(cumulative_priority, _on_cpu(scores))):
        pool = c[: max(0, len(c) - protected - 1)].contiguous()
        values.append(pool)
        turns.append(torch.arange(len(pool)) - torch.searchsorted(pool, pool))  # place among the layer's equal values
        layers.append(torch.full_like(turns[-1], layer))
    value, turn, layer_of = torch.cat(values), torch.cat(turns), torch.cat(layers)
    # Stable sorts from the last key to the first: by layer (as built), by turn, by value.
    order = torch.argsort(turn, stable=True)
    order = order[torch.argsort(value[order], stable=True)]
    taken = order[: total - sum(floors)]
    opened = torch.bincount(layer_of[taken], minlength=len(sizes)).tolist()
    kept = [floor + more for floor, more in zip(floors, opened, strict=True)]
    return Allocation(kept, float(value[taken[-1]]) if len(taken) else 0.0)


def check_total(
    entries: int, keep_ratio: float, floor: int, on_small_budget: OnSmallBudget, *, say: bool = True
) -> int:
    """T = round(keep_ratio * entries), half to even; ``floor`` where T is less than that and may be raised.

    ``say``: warn when it is raised. The warning has no figures of the prompt, so that Python shows it once and not for
    every short prompt; they are logged.
    """
    total = round(keep_ratio * entries)
    if total >= floor:
        return total
    what = (
        f"kvcache: keep_ratio={keep_ratio} of {entries} entries is {total}, less than the {floor} that have to stay "
        "(the protected tokens and one more in each layer)"
    )
    if on_small_budget == "raise":
        raise BudgetTooSmallError(f'{what}. Raise keep_ratio, lower sink or recent, or pass on_small_budget="clamp".')
    if say:
        logger.info("%s; %d are kept", what, floor)
        warnings.warn(
            f"kvcache: a prompt is too short for keep_ratio={keep_ratio}: what always stays (sink and recent, and one "
            "token more in each layer) is more than that share, and is what was kept. It costs memory, not quality; to "
            "keep less of short prompts lower sink or recent.",
            stacklevel=4,
        )
    return floor


def round_shares(
    shares: Sequence[float], *, total: int, floor: int | Sequence[int], cap: int | Sequence[int]
) -> list[int]:
    """Whole numbers in proportion to ``shares``, each in [floor, cap], that add up to ``total``.

    ideal_l = share_l * total / sum(shares). Layers that this takes out of [floor, cap] stand at the bound, and the
    others share the rest in proportion. Rounded down, then the largest fractional parts get one more
    (equal: lowest layer).

    Args:
        shares: non-negative, finite. All zero counts as equal.
        total: clamped to [sum of floors, sum of caps].
        floor, cap: of all, or of each.
    """
    count = len(shares)
    floors = [floor] * count if isinstance(floor, int) else list(floor)
    caps = [cap] * count if isinstance(cap, int) else list(cap)
    total = min(max(total, sum(floors)), sum(caps))
    ideal = fill(shares, total=total, low=floors, high=caps)
    kept = [math.floor(x) for x in ideal]
    by_fraction = sorted(range(count), key=lambda layer: (kept[layer] - ideal[layer], layer))
    while sum(kept) < total:  # a second round only where float64 rounded an ideal down over a whole number
        for layer in by_fraction:
            if sum(kept) < total and kept[layer] < caps[layer]:
                kept[layer] += 1
    return kept


def fill(weights: Sequence[float], *, total: float, low: Sequence[float], high: Sequence[float]) -> list[float]:
    """x_l = w_l * scale clamped to [low, high], with the scale at which they add up to ``total``.

    The bounds that bind are found in rounds, as widths of flexible boxes are: scale the free ones to what is left,
    clamp, and fix those that break the bound which is broken more. At most L rounds.
    """
    out = [0.0] * len(weights)
    free = list(range(len(weights)))
    while free:
        rest = total - sum(x for layer, x in enumerate(out) if layer not in free)
        mass = sum(weights[layer] for layer in free)
        even = mass <= 0
        for layer in free:
            out[layer] = rest / len(free) if even else weights[layer] * (rest / mass)
        excess = sum(min(max(out[layer], low[layer]), high[layer]) - out[layer] for layer in free)
        below = [layer for layer in free if out[layer] < low[layer]]
        above = [layer for layer in free if out[layer] > high[layer]]
        bound = [*below, *above] if excess == 0 else below if excess > 0 else above
        if not bound:
            break
        for layer in bound:
            out[layer] = min(max(out[layer], low[layer]), high[layer])
        free = [layer for layer in free if layer not in bound]
    return out


def recipe_budgets(
    ratios: Sequence[float],
    *,
    keep_ratio: float,
    n: int,
    protected: int,
    on_small_budget: OnSmallBudget = "clamp",
    say: bool = True,
) -> list[int]:
    """Entries of each layer of a prompt of ``n`` tokens, from the share that each layer is to keep.

    They add up to T = round(keep_ratio * L * n) and lie in [min(n, P + 1), n].

    Raises:
        BudgetTooSmallError: as ``solve_budgets``.
    """
    floor, count = min(n, protected + 1), len(ratios)
    total = check_total(count * n, keep_ratio, count * floor, on_small_budget, say=say)
    return round_shares(ratios, total=total, floor=floor, cap=n)


def uniform_budget(policy: str, *, keep_ratio: float, n: int, floor: int, say: bool) -> int:
    """round(keep_ratio * n), half to even, at least ``floor`` and 1, at most n; warns when the floor raised it.

    ``say``: whether to warn, so that a prompt warns once and not for every layer.
    """
    k, floor = round(keep_ratio * n), min(n, floor)
    if k < floor and say:
        logger.info("%s: keep_ratio=%s of %d tokens is %d, less than the %d that stay", policy, keep_ratio, n, k, floor)
        warnings.warn(
            f"{policy}: a prompt is too short for keep_ratio={keep_ratio}: what always stays (sink and recent) is more "
            "than that share, and is what was kept. It costs memory, not quality; to keep less of short prompts lower "
            "sink or recent.",
            stacklevel=3,
        )
    return min(n, max(1, floor, k))


def _on_cpu(scores: Sequence[Tensor]) -> list[Tensor]:
    """Move the layers' scores to the CPU, in one transfer where they are on one device."""
    if len({(s.device, s.dtype) for s in scores}) == 1:
        return list(torch.cat([s.detach() for s in scores]).cpu().split([len(s) for s in scores]))
    return [s.detach().cpu() for s in scores]
