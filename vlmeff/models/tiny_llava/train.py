"""Train tiny-llava on the CPU: ``python -m vlmeff.models.tiny_llava.train --out DIR``. Resumes where it stopped.

Stage 1, ``cuts``: the CLIP tower learns dense labels on the patches around single things (``tower.py``).
Stage 2, ``tower``: the same on whole pictures.
Stage 3, ``language``: with the tower frozen and its outputs computed once, projector and Llama learn to answer
(``language.py``).

``--start FOLDER`` begins with the weights of an earlier tiny-llava, whose vocabulary may be a beginning of this one.
Every stage saves itself to ``DIR/work`` every 25 steps; a resumed run sees the pictures that an unbroken one would.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vlmeff.models.tiny_llava import language, tower
from vlmeff.models.tiny_llava.architecture import build_model, build_processor
from vlmeff.models.training import train_stage

SEED = 0
STEPS = {"cuts": 420, "tower": 440, "language": 2800}
PEAK_LR = {"cuts": 1.5e-3, "tower": 1.2e-3, "language": 2e-3}


def load_start(model: nn.Module, folder: Path) -> None:
    """Copy the weights of ``folder``; of a shorter vocabulary the words it has, the others stay as they are."""
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = model.state_dict()
    for name, value in theirs.items():
        ours[name][: len(value)] = value


def run(stage: str, work: Path, *, steps: int, seed: int, start: Path | None) -> None:
    torch.manual_seed(seed)
    model: Any = build_model().float().train()
    if start is not None:
        load_start(model, start)
    image = build_processor().image_processor
    mean, std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
    vision = model.model.vision_tower
    heads = tower.TowerHeads(vision.config.hidden_size)
    seeing = nn.ModuleDict({"vision": vision, "heads": heads})
    if stage != "cuts":
        before = {"tower": "cuts", "language": "tower"}[stage]
        seeing.load_state_dict(torch.load(work / f"{before}.pt", weights_only=True)["modules"])
    if stage in ("cuts", "tower"):

        def look(step: int) -> tuple[Tensor, str]:
            return tower.tower_loss(vision, heads, mean, std, step, seed, cut=stage == "cuts")

        train_stage(stage, seeing, look, steps=steps, peak=PEAK_LR[stage], work=work)
        return
    seen = language.SeenPictures(vision.eval(), mean, std, work / "seen", seed)
    text = model.config.text_config
    early = language.Heads(text.hidden_size, text.vocab_size)
    packer = language.Conversations()
    answering = nn.ModuleDict(
        {
            "projector": model.model.multi_modal_projector,
            "text": model.model.language_model,
            "lm_head": model.lm_head,
            "early": early,
        }
    )

    def answer(step: int) -> tuple[Tensor, str]:
        return language.language_step(model, early, seen, packer, step, steps, seed)

    train_stage(stage, answering, answer, steps=steps, peak=PEAK_LR[stage], work=work)


def export(work: Path, out: Path, seed: int, start: Path | None) -> None:
    """Write the trained model as a transformers folder, with how it was trained."""
    model: Any = build_model()
    states = {stage: torch.load(work / f"{stage}.pt", weights_only=True) for stage in STEPS}
    answering = states["language"]["modules"]
    for module, prefix, state in (
        (model.model.vision_tower, "vision.", states["tower"]["modules"]),
        (model.model.multi_modal_projector, "projector.", answering),
        (model.model.language_model, "text.", answering),
        (model.lm_head, "lm_head.", answering),
    ):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    model.eval().save_pretrained(out)
    build_processor().save_pretrained(out)
    record = {
        "seed": seed,
        "start_sha256": start and hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest(),
        "steps": {stage: state["step"] for stage, state in states.items()},
        "batch": {"cuts": tower.CUTS, "tower": tower.BATCH, "language": language.BATCH},
        "peak_lr": PEAK_LR,
        "seconds": {stage: round(state["seconds"]) for stage, state in states.items()},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the model goes; checkpoints stand in its work/")
    parser.add_argument("--start", type=Path, help="folder of an earlier tiny-llava to begin with")
    parser.add_argument("--stages", default=",".join(STEPS), help="stages to run, by default all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", default="", help="other numbers of steps, as language=4000,tower=500")
    args = parser.parse_args()
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    steps = {**STEPS, **{stage: int(n) for stage, n in (item.split("=") for item in args.steps.split(",") if item)}}
    for stage in args.stages.split(","):
        run(stage, work, steps=steps[stage], seed=args.seed, start=args.start)
    if all((work / f"{stage}.pt").exists() for stage in STEPS):
        export(work, args.out, args.seed, args.start)


if __name__ == "__main__":
    main()
