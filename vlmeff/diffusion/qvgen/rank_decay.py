"""Fade the auxiliary module Phi out during training: a schedule of ranks, and the controller that applies it.

Source: "QVGen" (arXiv 2505.11497). In each phase the columns of Phi with the smallest singular values are faded by
gamma from 1 to 0; then they are dropped and the rest is decomposed and sorted again. Differs from the official code in
ending with a share of the training (``decay_fraction``; 1.0 reproduces it) and in zeroing the optimizer's moments of
factors that were rotated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlmeff.diffusion.qvgen.factors import product_norm, re_svd
from vlmeff.diffusion.qvgen.fake_quant import FakeQuantLinear
from vlmeff.errors import ExportError, QuantConfigError

Mode = Literal["decay", "keep", "drop"]


@dataclass(frozen=True)
class Stage:
    """What holds at one step: columns below ``kept`` count fully, those from there to ``rank`` by ``fade``."""

    rank: int
    kept: int
    fade: float


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """The rank of Phi and gamma as a pure function of the step.

    Ranks: r_{p+1} = r_p - max(1, ceil(decay r_p)) down to 0, each for T = floor((f S - w) / phases) steps after a
    warm-up of w. Within a phase u = (1 + cos(pi tau / T)) / 2 (or 1 - tau / T) for columns r_{p+1} <= j < r_p.

    Args:
        steps: S, of the whole training.
        rank: r0 at the start.
        decay: lambda in (0, 1], the share of the columns faded in a phase.
        decay_fraction: f in (0, 1], the share of the training after which Phi is gone.
        warmup: w, steps before the first phase.
        fade: "cosine" or "linear".
        mode: "decay"; "keep" never changes the rank (an upper reference that cannot be exported); "drop" removes Phi
            whole at step floor(f S).
    Raises:
        QuantConfigError: a value is out of range, or the training is too short for the phases.
    """

    steps: int
    rank: int = 32
    decay: float = 0.5
    decay_fraction: float = 0.5
    warmup: int = 0
    fade: Literal["cosine", "linear"] = "cosine"
    mode: Mode = "decay"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise QuantConfigError(f"rank={self.rank!r} must be a whole number from 0 on.")
        if not 0 < self.decay <= 1:
            raise QuantConfigError(f"decay={self.decay!r} must lie in (0, 1].")
        if not 0 < self.decay_fraction <= 1:
            raise QuantConfigError(f"decay_fraction={self.decay_fraction!r} must lie in (0, 1].")
        if self.warmup < 0:
            raise QuantConfigError(f"warmup={self.warmup!r} must not be negative.")
        if self.fade not in ("cosine", "linear"):
            raise QuantConfigError(f"fade={self.fade!r} must be 'cosine' or 'linear'.")
        if self.mode not in ("decay", "keep", "drop"):
            raise QuantConfigError(f"mode={self.mode!r} must be 'decay', 'keep' or 'drop'.")
        if self.rank and self.mode == "decay" and self.phase_length < 1:
            raise QuantConfigError(
                f"steps={self.steps} is too short: {self.decay_fraction:g} of them without a warm-up of {self.warmup} "
                f"must hold {len(self.ranks) - 1} phases of at least one step. Take more steps, a smaller rank or a "
                "larger decay_fraction."
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_0, r_1, ..., 0."""
        ranks = [self.rank]
        while ranks[-1] > 0:
            ranks.append(ranks[-1] - max(1, math.ceil(self.decay * ranks[-1])))
        return tuple(ranks)

    @property
    def phase_length(self) -> int:
        """T, in steps."""
        return math.floor((self.decay_fraction * self.steps - self.warmup) / max(len(self.ranks) - 1, 1))

    def at(self, step: int) -> Stage:
        """The stage of a step (from 0 on)."""
        if self.mode == "drop" and step >= math.floor(self.decay_fraction * self.steps):
            return Stage(0, 0, 0.0)
        if self.mode != "decay" or step < self.warmup or self.rank == 0:
            return Stage(self.rank, self.rank, 1.0)
        phase, tau = divmod(step - self.warmup, self.phase_length)
        ranks = self.ranks
        if phase >= len(ranks) - 1:
            return Stage(0, 0, 0.0)
        share = tau / self.phase_length
        fade = (1 + math.cos(math.pi * share)) / 2 if self.fade == "cosine" else 1 - share
        return Stage(ranks[phase], ranks[phase + 1], fade)

    def gamma(self, step: int) -> Tensor:
        """[r0] float32: the factor of each column."""
        stage = self.at(step)
        gamma = torch.zeros(self.rank)
        gamma[: stage.rank] = stage.fade
        gamma[: stage.kept] = 1.0
        return gamma


class RankController:
    """Write gamma into the layers, truncate where a phase has ended, and forget the moments of what was rotated.

    A layer smaller than the rank has a Phi of its own full rank; it joins when the schedule comes down to that.

    Args:
        layers: by name; each needs a Phi, unless it has decayed already (a resumed run).
        optimizer: whose moments are zeroed; may be set later.
    """

    def __init__(
        self,
        layers: Mapping[str, FakeQuantLinear],
        schedule: RankSchedule,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.layers, self.schedule, self.optimizer = dict(layers), schedule, optimizer
        # Read once: a rank in a buffer on a GPU costs a synchronisation.
        self._ranks = {name: int(layer.rank) for name, layer in self.layers.items()}

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(self._ranks.values(), default=0)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Bring all layers to the stage of a step; call before its forward pass."""
        stage, gamma = self.schedule.at(step), self.schedule.gamma(step)
        for name, layer in self.layers.items():
            if self._ranks[name] > stage.rank:
                self._truncate(layer, stage.rank)
                self._ranks[name] = stage.rank
            if layer.gamma is not None:
                layer.gamma.copy_(gamma[: len(layer.gamma)])

    def finish(self) -> None:
        """Apply the end of the schedule.

        Raises:
            ExportError: a Phi is left.
        """
        self.step(self.schedule.steps)
        left = {name: rank for name, rank in self._ranks.items() if rank}
        if left:
            name, rank = next(iter(left.items()))
            raise ExportError(
                f"{len(left)} layers still have an auxiliary module ({name}: rank {rank}); it cannot be exported with "
                f"mode={self.schedule.mode!r}."
            )

    @torch.no_grad()
    def phi_share(self) -> float:
        """Mean over the layers of |Phi| / |W| (Frobenius norms, gamma applied)."""
        shares = [
            layer.weight.new_zeros(())
            if (factors := layer.phi_factors()) is None
            else product_norm(*factors) / layer.weight.norm().clamp(min=1e-12)
            for layer in self.layers.values()
        ]
        return float(torch.stack(shares).mean()) if shares else 0.0

    def _truncate(self, layer: FakeQuantLinear, rank: int) -> None:
        left, right = layer.phi_L, layer.phi_R
        assert left is not None
        assert right is not None
        if rank == 0:
            self._forget(left, right)
            layer.remove_phi()
            return
        # The tensors keep their shapes, so that a compiled graph and the optimizer go on: what is cut becomes 0.
        new_left, new_right = re_svd(left[:, :rank], right[:rank])
        left.zero_()[:, :rank] = new_left
        right.zero_()[:rank] = new_right
        layer.rank.fill_(rank)
        if self.optimizer is not None:
            for factor in (left, right):
                for key, value in self.optimizer.state.get(factor, {}).items():
                    if key != "step":
                        value.zero_()

    def _forget(self, *factors: nn.Parameter) -> None:
        """Take parameters out of the optimizer."""
        if self.optimizer is None:
            return
        gone = {id(factor) for factor in factors}
        for factor in factors:
            self.optimizer.state.pop(factor, None)
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
