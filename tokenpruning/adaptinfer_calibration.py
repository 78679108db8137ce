"""Derive an AdaptInfer schedule from samples of text-to-vision attention. Pure statistics; nothing is run here.

The paper (arXiv 2508.06084) finds its pruning layers by a change-point analysis of such attention and publishes neither
code nor how the amounts were chosen. What stands here is ours, and schedules made by it say origin "calibrated":

    shift[l] = mean over samples of 1 - cos(p_l, p_{l-1}),   p_l the attention of layer l over the visual tokens, sum 1
    layers   = the three l, some layers apart, with the greatest sum of shifts: the attention turns to other tokens
               there, and the new pattern chooses
    ratios   = those that keep most of the attention of the layers behind, at a given mean number of processed tokens

Letters: n layers, nv visual tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpruning.adaptinfer import Schedule
from vlmeff.errors import ConfigError, DataError

STAGES = 3
STEP = 0.05  # of the ratios that are searched; the last one follows from the target
MIN_RATIO = 0.05
TARGET = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A schedule and what it was derived from.

    ``shifts`` [n]: mean shift of each layer against the one before (0 for layer 0). ``processed``: share of the visual
    tokens that is processed, averaged over layers. ``retained``: share of the text's attention to the picture, summed
    over the layers behind the first pruning layer, that goes to tokens which are still there.
    """

    schedule: Schedule
    samples: int
    shifts: list[float]
    processed: float
    retained: float


def calibrate(
    maps: Sequence[Tensor], *, target: float | None = None, first_layer: int = 1, name: str = "calibrated"
) -> Calibration:
    """Derive layers and ratios.

    Args:
        maps: per sample [n, nv] >= 0: how much attention the text gives each visual token in each layer, the same n
            for all. Rows need not be normalised: a layer counts by how much it looks at the picture at all.
        target: mean share of the visual tokens that may be processed, in (0, 1); None: 0.3, or a tenth above what a
            model of few layers can reach.
        first_layer: the first layer that tokens may be dropped after; at least 1, as layer 0 has no shift.
    Raises:
        ConfigError: the target cannot be met, or the model has too few layers.  DataError: no or broken samples.
    """
    if not maps:
        raise DataError("calibrate: no sample has a picture and text behind it; pass some that do.")
    n = len(maps[0])
    for number, sample in enumerate(maps):
        if sample.ndim != 2 or len(sample) != n or not bool(sample.isfinite().all()) or bool((sample < 0).any()):
            raise DataError(f"calibrate: sample {number} must be [{n}, visual tokens], finite and not negative.")
    target = check_target(target, layers=n, first_layer=first_layer)
    mean_shift = torch.stack([shifts(sample) for sample in maps]).mean(0)
    earliest = max(1, first_layer)
    # The layers up to the first pruning layer process everything: behind this one the target is out of reach.
    latest = math.floor((target * n - 1 - (n - 1) * MIN_RATIO) / (1 - MIN_RATIO) + 1e-9)
    # A model of few layers gets fewer stages.
    room = 1 + (n - 2 - earliest) // max(1, n // 8)
    layers = change_points(mean_shift, first_layer=earliest, latest_first=latest, count=max(1, min(STAGES, room)))
    ratios, retained = stage_ratios(maps, layers, target=target)
    schedule = Schedule(layers=layers, ratios=ratios, origin="calibrated", name=name)
    return Calibration(
        schedule=schedule,
        samples=len(maps),
        shifts=mean_shift.tolist(),
        processed=processed_share(layers, ratios, n),
        retained=retained,
    )


def shifts(sample: Tensor) -> Tensor:
    """[n, nv] -> [n] float64: 1 - cos of each layer's distribution with that of the layer before; 0 for layer 0.

    A layer that does not look at the picture at all has no direction: its shift is 0.
    """
    p = sample.double()
    norm = p.norm(dim=1)
    cosine = (p[1:] * p[:-1]).sum(1) / (norm[1:] * norm[:-1]).clamp(min=torch.finfo(p.dtype).tiny)
    shift = torch.where((norm[1:] > 0) & (norm[:-1] > 0), 1 - cosine, 0.0)
    return torch.cat([shift.new_zeros(1), shift.clamp(min=0)])


def change_points(
    shift: Tensor, *, first_layer: int = 1, latest_first: int | None = None, count: int = STAGES
) -> tuple[int, ...]:
    """The ``count`` layers with the greatest sum of shifts that lie n // 8 (at least 1) apart.

    Args:
        shift: [n]; the last layer is never chosen, tokens dropped behind it would save nothing.
        first_layer: the earliest legal layer.  latest_first: the latest that the first of them may be.
    """
    n = len(shift)
    gap, legal = max(1, n // 8), range(first_layer, n - 1)
    # best[c][l]: greatest sum of c layers up to and with l, and the choice.
    values = shift.tolist()
    first = [layer for layer in legal if latest_first is None or layer <= latest_first]
    best: dict[int, tuple[float, tuple[int, ...]]] = {layer: (values[layer], (layer,)) for layer in first}
    for _ in range(count - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for layer in legal:
            before = [best[b] for b in legal if b <= layer - gap and b in best]
            if before:
                value, chosen = max(before, key=lambda entry: entry[0])
                longer[layer] = (value + values[layer], (*chosen, layer))
        best = longer
    if not best:
        raise ConfigError(
            f"calibrate: {n} layers, of which {len(legal)} can be pruned after, leave no room for {count} pruning "
            f"layers {gap} apart."
        )
    return max(best.values(), key=lambda entry: entry[0])[1]


def processed_share(layers: Sequence[int], ratios: Sequence[float], n: int) -> float:
    """Share of the visual tokens that is processed, averaged over ``n`` layers."""
    bounds = [*layers, n - 1]
    total, share = layers[0] + 1.0, 1.0
    for ratio, (start, end) in zip(ratios, itertools.pairwise(bounds), strict=True):
        share *= ratio
        total += (end - start) * share
    return total / n


def stage_ratios(maps: Sequence[Tensor], layers: Sequence[int], *, target: float) -> tuple[tuple[float, ...], float]:
    """Search the ratios that keep most attention at the target; all but the last on a grid, the last to fit.

    The tokens that would stay are chosen by each sample's own attention at the pruning layers, each stage among those
    of the one before.

    Returns:
        the ratios, and the share of attention behind the first pruning layer that goes to tokens still there.
    """
    n, stages = len(maps[0]), len(layers)
    grid = [round(MIN_RATIO + STEP * i, 2) for i in range(round((1 - MIN_RATIO) / STEP) + 1)]
    candidates = []
    for head in itertools.product(grid, repeat=stages - 1):
        last = _last_ratio(layers, head, n, target)
        if last is not None:
            candidates.append((*head, last))
    if not candidates:
        low = processed_share(layers, [MIN_RATIO] * stages, n)
        raise ConfigError(
            f"calibrate: target={target} cannot be met: pruning after layers {', '.join(map(str, layers))} of {n} "
            f"processes at least {low:.3f} of the visual tokens."
        )
    kept = dict.fromkeys(candidates, 0.0)
    everything = 0.0
    for sample in maps:
        retained = _Retained(sample.double(), layers)
        everything += retained.total
        for ratios in candidates:
            kept[ratios] += retained(ratios)
    # Of equals the mildest at the first layers, where a wrong choice costs most.
    best = max(candidates, key=lambda ratios: (round(kept[ratios], 9), ratios))
    return best, kept[best] / everything if everything else 1.0


def _last_ratio(layers: Sequence[int], head: Sequence[float], n: int, target: float) -> float | None:
    """The greatest last ratio up to 1, rounded down to 1 %, that meets the target; None if it is below MIN_RATIO."""
    without = processed_share(layers, [*head, 0.0], n)
    slope = processed_share(layers, [*head, 1.0], n) - without
    last = min(1.0, math.floor(100 * (target - without) / slope + 1e-6) / 100)
    return last if last >= MIN_RATIO else None


def check_target(target: object, *, layers: int, first_layer: int = 1) -> float:
    """The target for a model of that many layers; raises ``ConfigError`` when it is none or out of its reach.

    None: ``TARGET``, or a tenth above what a model of few layers can reach.
    """
    earliest = max(1, first_layer)
    low = (earliest + 1 + (layers - 1 - earliest) * MIN_RATIO) / layers
    if target is None:
        return max(TARGET, min(0.95, math.ceil(20 * (low + 0.1)) / 20))
    if not isinstance(target, int | float) or isinstance(target, bool) or not 0 < target < 1:
        raise ConfigError(f"calibrate: target={target!r} must be a share in (0, 1) of the visual tokens.")
    if target < low - 1e-9:
        raise ConfigError(
            f"calibrate: target={target} cannot be met: {layers} layers, the first {earliest + 1} of which process all "
            f"visual tokens, need a target of {low:.3f} or more."
        )
    return float(target)


class _Retained:
    """The attention that one sample keeps, as a function of the ratios; choices of the first stages are shared."""

    def __init__(self, sample: Tensor, layers: Sequence[int]) -> None:
        self._sample = sample
        bounds = [*layers, len(sample) - 1]
        self._orders = [torch.argsort(sample[layer], descending=True, stable=True) for layer in layers]
        # What each token receives in the layers of each stage.
        self._gains = [sample[a + 1 : b + 1].sum(0) for a, b in itertools.pairwise(bounds)]
        self._memory: dict[tuple[int, ...], tuple[Tensor, float]] = {}
        self.total = float(torch.stack(self._gains).sum())

    def __call__(self, ratios: Sequence[float]) -> float:
        counts, now = [], self._sample.shape[1]
        for ratio in ratios:
            now = max(1, int(ratio * now))
            counts.append(now)
        return self._stage(tuple(counts))[1]

    def _stage(self, counts: tuple[int, ...]) -> tuple[Tensor, float]:
        """Which tokens are left [nv] bool after these stages, and what was kept up to then."""
        if counts not in self._memory:
            if counts[:-1]:
                left, kept = self._stage(counts[:-1])
            else:
                left, kept = torch.ones(self._sample.shape[1], dtype=torch.bool), 0.0
            stage = len(counts) - 1
            order = self._orders[stage]
            chosen = order[left[order]][: counts[-1]]
            left = torch.zeros_like(left)
            left[chosen] = True
            self._memory[counts] = left, kept + float(self._gains[stage][chosen].sum())
        return self._memory[counts]
