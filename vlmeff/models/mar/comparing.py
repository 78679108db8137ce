"""Plain and accelerated samples of the same noise side by side, with what each run cost.

Decoding with fewer steps is always among the runs: it is the cheap way to save passes, which speculation has to beat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmeff.models.mar.trunk import MAR, MAROutput

if TYPE_CHECKING:
    from vlmeff.speculative.continuous import Continuous

SHARES = (0.5, 0.25)  # of the steps, the baselines


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One way to decode. ``deviation_rms``: to plain decoding with all steps, in units of the latents."""

    label: str
    mode: str
    num_iter: int
    seconds: float
    target_passes: int
    draft_passes: int
    tokens_per_round: float | None
    acceptance_rate: float | None
    deviation_rms: float | None
    images: Tensor  # [B, C, H, W] in [-1, 1]

    def numbers(self, plain: Run | None = None) -> str:
        """One line; ``plain`` is the run that a speed-up is given against."""
        parts = [f"{self.target_passes} passes"]
        if self.draft_passes:
            parts.append(f"{self.draft_passes} of the draft")
        if self.tokens_per_round is not None:
            parts.append(f"{self.tokens_per_round:.2f} tokens per round")
        if self.deviation_rms is not None and self is not plain:
            parts.append(f"RMS deviation {self.deviation_rms:.4f}")
        seconds = f"{self.seconds:.2f} s"
        if plain is not None and plain is not self and self.seconds > 0:
            seconds += f" ({plain.seconds / self.seconds:.1f}x)"
        return ", ".join([*parts, seconds])

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "images"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Runs of one call, plain decoding first where there is one; ``labels`` are the classes of the samples."""

    runs: list[Run]
    labels: list[int]
    seed: int
    cfg: float
    guarantee: str

    @property
    def plain(self) -> Run | None:
        """The run with all steps that the others are held against."""
        first = self.runs[0]
        return first if first.mode == "plain" else None

    def to_dict(self) -> dict[str, Any]:
        speedups = {}
        if self.plain is not None:
            speedups = {run.label: self.plain.seconds / run.seconds for run in self.runs[1:] if run.seconds > 0}
        return {
            **{"labels": self.labels, "seed": self.seed, "cfg": self.cfg, "guarantee": self.guarantee},
            **{"runs": [run.to_dict() for run in self.runs], "speedups": speedups},
        }


def compare_modes(
    model: MAR,
    labels: list[int],
    *,
    config: Continuous,
    num_iter: int | None = None,
    cfg: float = 1.0,
    seed: int = 0,
    compare: bool = True,
    progress: Callable[[str], None] = lambda run: None,
) -> Comparison:
    """Sample as configured; with ``compare`` also plainly, with all steps and with a half and a quarter of them.

    Args:
        model: wrapped with ``config``, unless that is plain decoding.
        progress: told of each run before it begins; what it raises ends the comparison.
    Raises:
        ConfigError: an argument cannot work.
    """
    steps = model.config.seq_len if num_iter is None else num_iter

    def sample(steps: int, **mode: Any) -> MAROutput:
        return model.sample(torch.tensor(labels), num_iter=steps, cfg=cfg, seed=seed, **mode)

    plain = [steps] if compare or config.plain else []
    fewer = [max(1, round(share * steps)) for share in SHARES] if compare else []
    order = [(n, True) for n in plain] + ([] if config.plain else [(steps, False)])
    order += [(n, True) for n in dict.fromkeys(fewer) if n < steps]
    progress("warming up")
    sample(max(1, steps // 8), mode=None)  # the first call in a process is slower
    runs: list[Run] = []
    full: MAROutput | None = None
    for n, plainly in order:
        label = f"plain, {n} steps" if plainly else _describe(config)
        progress(label)
        output = sample(n, mode=None) if plainly else sample(n)
        full = output if full is None and plainly else full
        runs.append(_run(label, output, full))
    return Comparison(runs=runs, labels=labels, seed=seed, cfg=cfg, guarantee=config.guarantee)


def _describe(config: Continuous) -> str:
    parts = [f"cspd ({config.variant})" if config.mode == "cspd" else str(config.mode or "plain")]
    parts.append(f"window {config.window}")
    if config.delta is not None:
        parts.append(f"delta {config.delta:g}")
    if config.proposal == "draft":
        parts.append("draft proposes")
    return ", ".join(parts)


def _run(label: str, output: MAROutput, full: MAROutput | None) -> Run:
    stats, images = output.stats, output.images
    assert images is not None
    speculative = label.split(",")[0] != "plain"
    return Run(
        label=label,
        mode=stats.mode,
        num_iter=stats.steps,
        seconds=stats.wall_s or 0.0,
        target_passes=stats.target_passes,
        draft_passes=stats.draft_passes,
        tokens_per_round=stats.tokens_per_round if speculative else None,
        acceptance_rate=stats.acceptance_rate,
        deviation_rms=None if full is None else float((output.latents - full.latents).square().mean().sqrt()),
        images=images,
    )
