"""Train tiny-wan on the CPU: ``python -m vlmeff.models.tiny_wan.train --work DIR``. Resumes where it stopped.

Stage 1, ``windows``: Wan's video VAE learns to code windows of clips around the shape (``autoencoding.py``).
Stage 2, ``whole``: it goes on with whole clips, whose borders and size it has not seen.
Stage 3, ``transformer``: on latents that are encoded once and normalized by their own statistics, which go to the
VAE's config, the transformer learns the velocity of rectified flow (``flow.py``).
Stage 4, ``outline``: it goes on with the channels weighted by what they do to the picture, and with less noise; before,
circles and squares are hard to tell apart.
Stage 5, ``probe``: a classifier of colour, shape and direction learns from real clips (``probe.py``).

Checkpoints stand in DIR; the finished pipeline is written to ``DIR/weights``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from vlmeff.models.tiny_wan import autoencoding, flow, probe
from vlmeff.models.tiny_wan.architecture import (
    CALL,
    CALL_FILE,
    build_pipeline,
    build_transformer,
    build_vae,
    save_pipeline,
)
from vlmeff.models.tiny_wan.fitting import fit

STAGES = ("windows", "whole", "transformer", "outline", "probe")


def _stages(**values: Any) -> dict[str, Any]:
    assert tuple(values) == STAGES
    return values


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does; a resumed run must have the same."""

    seed: int = 0
    steps: dict[str, int] = field(
        default_factory=lambda: _stages(windows=900, whole=60, transformer=2600, outline=2000, probe=400)
    )
    peak_lr: dict[str, float] = field(
        default_factory=lambda: _stages(windows=3e-3, whole=8e-4, transformer=2e-3, outline=1e-3, probe=3e-3)
    )
    batch: dict[str, int] = field(
        default_factory=lambda: _stages(windows=16, whole=6, transformer=32, outline=32, probe=24)
    )
    average: dict[str, float] = field(
        default_factory=lambda: _stages(windows=0.99, whole=0.9, transformer=0.995, outline=0.995, probe=0.0)
    )
    cycle: dict[str, int] = field(default_factory=lambda: {"windows": 1300})  # others: as long as their steps
    latents: int = 3840  # clips that the transformer sees, equally many of every prompt
    fast: bool = True  # bfloat16 arithmetic in the VAE's training


def train_vae(work: Path, s: Settings, *, stage: str = "whole") -> AutoencoderKLWan:
    """The VAE after a stage; stages that are done are read from their checkpoints."""
    torch.manual_seed(s.seed)
    vae = (build_vae() if stage == "windows" else train_vae(work, s, stage="windows")).train()

    def loss(step: int) -> tuple[Tensor, str]:
        whole = stage == "whole"
        return autoencoding.vae_step(vae, step, s.seed, batch=s.batch[stage], whole=whole, fast=s.fast)

    _fit(stage, vae, loss, work, s)
    return vae


@dataclass(frozen=True, kw_only=True, eq=False)
class Coded:
    """What the transformer learns from: ``latents`` [N, C, 3, 8, 8] are normalized by ``mean`` and ``std``."""

    latents: Tensor
    mean: list[float]
    std: list[float]
    weights: Tensor  # [C], see ``flow.channel_weights``


def coded_clips(vae: AutoencoderKLWan, work: Path, s: Settings) -> Coded:
    latents = autoencoding.encode_clips(vae, "train", s.latents, s.seed, work / "latents.pt")
    mean, std = autoencoding.latent_statistics(latents)
    shape = (1, -1, 1, 1, 1)
    normalized = (latents - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return Coded(latents=normalized, mean=mean, std=std, weights=flow.channel_weights(vae, latents, std))


def train_transformer(work: Path, s: Settings, coded: Coded, *, stage: str = "outline") -> WanTransformer3DModel:
    """The transformer after a stage; stages that are done are read from their checkpoints."""
    torch.manual_seed(s.seed + 1)
    first = stage == "transformer"
    transformer = (build_transformer() if first else train_transformer(work, s, coded, stage="transformer")).train()
    padding, texts = flow.share_padding(transformer), flow.embed_prompts()
    weights = None if first else coded.weights

    def loss(step: int) -> tuple[Tensor, str]:
        latents, batch = coded.latents, s.batch[stage]
        return flow.flow_step(transformer, padding, latents, texts, step, s.seed, batch=batch, weights=weights)

    _fit(stage, transformer, loss, work, s)
    flow.restore_padding(transformer)
    return transformer


def train_probe(work: Path, s: Settings) -> probe.Probe:
    torch.manual_seed(s.seed + 2)
    classifier = probe.Probe().train()

    def loss(step: int) -> tuple[Tensor, str]:
        return probe.probe_step(classifier, step, s.seed, batch=s.batch["probe"])

    _fit("probe", classifier, loss, work, s)
    return classifier


def _fit(stage: str, module: nn.Module, loss: Callable[[int], tuple[Tensor, str]], work: Path, s: Settings) -> None:
    steps, rate = s.steps[stage], s.peak_lr[stage]
    fit(stage, module, loss, steps=steps, peak_lr=rate, work=work, average=s.average[stage], cycle=s.cycle.get(stage))


def run(work: Path, s: Settings, stages: tuple[str, ...] = STAGES) -> None:
    """Do the stages that are asked for and, when all are done, write ``work/weights``."""
    work.mkdir(parents=True, exist_ok=True)
    if "probe" in stages:
        train_probe(work, s)
    for stage in ("windows", "whole"):
        if stage in stages:
            train_vae(work, s, stage=stage)
    later = [stage for stage in ("transformer", "outline") if stage in stages]
    coded = coded_clips(train_vae(work, s), work, s) if later else None
    for stage in later:
        assert coded is not None
        train_transformer(work, s, coded, stage=stage)
    files = {stage: work / f"{stage}.pt" for stage in STAGES}
    if all(f.exists() and torch.load(f, weights_only=True)["step"] == s.steps[stage] for stage, f in files.items()):
        export(work, s, work / "weights", coded)


def export(work: Path, s: Settings, out: Path, coded: Coded | None = None) -> None:
    """Write the trained pipeline as a diffusers folder, its tensors stored as float16, with how it was trained."""
    trained = train_vae(work, s)  # done: reads the checkpoint
    coded = coded or coded_clips(trained, work, s)
    vae = build_vae(coded.mean, coded.std)
    vae.load_state_dict(trained.state_dict())
    save_pipeline(build_pipeline(transformer=train_transformer(work, s, coded), vae=vae), out)
    probe.save_probe(train_probe(work, s), out / "probe.safetensors")
    states = {stage: torch.load(work / f"{stage}.pt", weights_only=True) for stage in STAGES}
    record = asdict(s) | {"seconds": {stage: round(state["seconds"]) for stage, state in states.items()}}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / CALL_FILE).write_text(json.dumps(CALL, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, and at the end the folder weights")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to run, by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default="", help="other numbers of steps, as transformer=6000,windows=2000")
    args = parser.parse_args()
    settings = Settings(seed=args.seed)
    settings.steps.update({stage: int(n) for stage, n in (item.split("=") for item in args.steps.split(",") if item)})
    run(args.work, settings, tuple(args.stages.split(",")))


if __name__ == "__main__":
    main()
