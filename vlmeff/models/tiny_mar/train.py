"""Train tiny-mar and its draft on the CPU: ``python -m vlmeff.models.tiny_mar.train --work DIR``. It can be resumed.

Both learn scikit-learn's digits with the loss of MAR (``vlmeff/models/mar/training.py``), the target first. Checkpoints
stand in DIR; the finished pair, with its scores, is written to ``DIR/weights``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.training import Averaged, draw, optimizer_groups, training_loss
from vlmeff.models.mar.trunk import MAR
from vlmeff.models.tiny_mar import digits

MODELS = {"target": "mar_tiny_digits", "draft": "mar_nano_digits"}
SAVE_EVERY, PRINT_EVERY = 50, 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does; a resumed run must have the same."""

    seed: int = 0
    steps: dict[str, int] = field(default_factory=lambda: {"target": 1900, "draft": 1500})
    batch: int = 64
    peak_lr: float = 1e-3
    warm_up: int = 100
    final_share: float = 0.05  # of the peak, where the cosine ends
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 3.0
    average: float = 0.999


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Linear warm-up, then a cosine to ``final_share`` of the peak."""
    if step < s.warm_up:
        return s.peak_lr * (step + 1) / s.warm_up
    progress = (step - s.warm_up) / max(1, steps - s.warm_up)
    falling = 0.5 * (1 + float(torch.tensor(progress * torch.pi).cos()))
    return s.peak_lr * (s.final_share + (1 - s.final_share) * falling)


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for every step, so that a resumed run draws what an unbroken one would."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def train(role: str, work: Path, s: Settings) -> MAR:
    """The averaged model of a role, from ``work/<role>.pt`` on if there is one."""
    torch.manual_seed(s.seed)
    model = MAR(MARConfig.named(MODELS[role])).train()
    optimizer = torch.optim.AdamW(optimizer_groups(model, s.weight_decay), lr=s.peak_lr, betas=s.betas)
    averaged, steps = Averaged(model, s.average), s.steps[role]
    file, done, spent, curve = work / f"{role}.pt", 0, 0.0, []
    if file.exists():
        state = torch.load(file, weights_only=True)
        if state["steps"] != steps:
            raise SystemExit(f"{file} is of a run with {state['steps']} steps, not {steps}; use another --work.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.shadow, averaged.updates = state["averaged"], state["step"]
        done, spent, curve = state["step"], state["seconds"], state["curve"]
    images, labels = digits.pictures()
    latents = model.encode_images(images)
    start, losses = time.monotonic() - spent, []
    for step in range(done, steps):
        generator = seeded(s.seed, len(role), step)
        rows = torch.randint(len(latents), (s.batch,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, s)
        loss = training_loss(model, latents[rows], labels[rows], draw(model, s.batch, generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        averaged.update(model)
        losses.append(loss.item())
        seconds = time.monotonic() - start
        if (step + 1) % PRINT_EVERY == 0 or step + 1 == steps:
            curve.append((step + 1, sum(losses) / len(losses)))
            left = seconds / (step + 1) * (steps - step - 1)
            print(f"{role} {step + 1}/{steps} {seconds:.0f} s, {left:.0f} s left, loss {curve[-1][1]:.4f}", flush=True)
            losses = []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                **{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged.shadow},
                **{"step": step + 1, "steps": steps, "seconds": seconds, "curve": curve},
            }
            torch.save(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    model.load_state_dict(averaged.shadow)
    return model.eval()


def scores(model: MAR, *, count: int = 200, seed: int = 1000) -> dict[str, float]:
    """Share of ``count`` plain samples that the classifier recognises, without guidance and with cfg 2."""
    machine, _ = digits.classifier()
    labels = torch.arange(count) % model.config.class_num
    out = {}
    for cfg in (1.0, 2.0):
        images = model.sample(labels, cfg=cfg, seed=seed).images
        assert images is not None
        out[f"recognised_cfg_{cfg:g}"] = round(digits.recognised(machine, images, labels), 4)
    return out


def export(work: Path, s: Settings, out: Path) -> None:
    """Write both models (float16) with their configurations, scores and how they were trained."""
    from vlmeff.models.mar.loading import save_mar

    record: dict[str, Any] = asdict(s) | {"models": {}}
    record["classifier_accuracy"] = round(digits.classifier()[1], 4)
    for role, name in MODELS.items():
        model = train(role, work, s)  # done: reads the checkpoint
        folder = out if role == "target" else out / "draft"
        save_mar(model, folder, dtype=torch.float16)
        state = torch.load(work / f"{role}.pt", weights_only=True)
        last = [loss for _, loss in state["curve"][-10:]]
        record["models"][role] = {
            "configuration": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(state["seconds"]),
            "final_loss": round(sum(last) / len(last), 4),
            "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            **scores(_reread(folder)),
        }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _reread(folder: Path) -> MAR:
    from vlmeff.models.mar.loading import load_mar

    return load_mar(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, and at the end the folder weights")
    parser.add_argument("--models", default=",".join(MODELS), help="which to train, by default both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default="", help="other numbers of steps, as target=3000,draft=2000")
    args = parser.parse_args()
    settings = Settings(seed=args.seed)
    settings.steps.update({role: int(n) for role, n in (item.split("=") for item in args.steps.split(",") if item)})
    args.work.mkdir(parents=True, exist_ok=True)
    for role in args.models.split(","):
        train(role, args.work, settings)
    if set(args.models.split(",")) == set(MODELS):
        export(args.work, settings, args.work / "weights")


if __name__ == "__main__":
    main()
