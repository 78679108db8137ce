"""Train tiny-qwen on the CPU: ``python -m vlmeff.models.tiny_qwen.train --out DIR``. Resumes where it stopped.

Stage 1, ``shapes``: the vision tower and its merger learn dense labels on pieces of scenes around single things, which
have a quarter of the patches for each shape that is seen (``tower.py``). Shapes are what takes long.
Stage 2, ``tower``: the same on whole pictures of all sizes.
Stage 3, ``language``: with both frozen and their outputs computed once, the language model learns to answer
(``language.py``).

Every stage saves itself to ``DIR/work`` every 25 steps; a resumed run sees the pictures that an unbroken one would.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmeff.models.tiny_qwen import language, tower
from vlmeff.models.tiny_qwen.architecture import build_model, build_processor
from vlmeff.models.training import train_stage

SEED = 0
STEPS = {"shapes": 320, "tower": 300, "language": 4000}
PEAK_LR = {"shapes": 2e-3, "tower": 1.5e-3, "language": 2e-3}


def train(
    stage: str, modules: nn.Module, step_loss: Callable[[int], tuple[Tensor, str]], *, steps: int, work: Path
) -> None:
    """``train_stage`` with the stage's own learning rate."""
    train_stage(stage, modules, step_loss, steps=steps, peak=PEAK_LR[stage], work=work)


def run(stage: str, work: Path, *, steps: int, seed: int, compiled: bool) -> None:
    torch.manual_seed(seed)
    model: Any = build_model().float().train()
    image = build_processor().image_processor
    mean, std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
    visual = model.model.visual
    heads = tower.TowerHeads(visual.config.hidden_size, visual.config.out_hidden_size)
    stage_one = nn.ModuleDict({"visual": visual, "heads": heads})
    if stage == "shapes":

        def shapes_loss(step: int) -> tuple[Tensor, str]:
            return tower.tower_loss(visual, heads, mean, std, tower.crop_groups(step, seed))

        train(stage, stage_one, shapes_loss, steps=steps, work=work)
        return
    before = {"tower": "shapes", "language": "tower"}[stage]
    stage_one.load_state_dict(torch.load(work / f"{before}.pt", weights_only=True)["modules"])
    if stage == "tower":
        forward = torch.compile(tower.tower_forward) if compiled else tower.tower_forward

        def pictures_loss(step: int) -> tuple[Tensor, str]:
            groups = tower.picture_groups(step, seed)
            return tower.tower_loss(visual, heads, mean, std, groups, forward=forward)

        train(stage, stage_one, pictures_loss, steps=steps, work=work)
        return
    seen = language.SeenPictures(visual.eval(), mean, std, work / "seen", seed)
    text = model.config.text_config
    early = language.EarlyHeads(text.hidden_size, text.vocab_size)
    packer = language.Conversations()
    run_layer = torch.compile(language.text_layer, dynamic=False) if compiled else language.text_layer
    trained = nn.ModuleDict({"text": model.model.language_model, "lm_head": model.lm_head, "early": early})

    def answers_loss(step: int) -> tuple[Tensor, str]:
        return language.language_step(model, early, seen, packer, step, steps, seed, run_layer=run_layer)

    train(stage, trained, answers_loss, steps=steps, work=work)


def export(work: Path, out: Path, seed: int) -> None:
    """Write the trained model as a transformers folder, its tensors stored as float16, with how it was trained."""
    model: Any = build_model()
    states = {stage: torch.load(work / f"{stage}.pt", weights_only=True) for stage in STEPS}
    language_part = states["language"]["modules"]
    for module, prefix, state in (
        (model.model.visual, "visual.", states["tower"]["modules"]),
        (model.model.language_model, "text.", language_part),
        (model.lm_head, "lm_head.", language_part),
    ):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    model.eval().half().save_pretrained(out)
    # Stored in half precision, computed in single: the configuration is what ``dtype="auto"`` goes by.
    config = json.loads((out / "config.json").read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    build_processor().save_pretrained(out)
    record = {
        "seed": seed,
        "steps": {stage: state["step"] for stage, state in states.items()},
        "batch": {"shapes": tower.CROPS, "tower": tower.BATCH, "language": language.BATCH},
        "peak_lr": PEAK_LR,
        "seconds": {stage: round(state["seconds"]) for stage, state in states.items()},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the model goes; checkpoints stand in its work/")
    parser.add_argument("--stages", default=",".join(STEPS), help="stages to run, by default all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", default="", help="other numbers of steps, as language=4000,tower=500")
    parser.add_argument("--compile", action="store_true", help="torch.compile the tower (needs a C++ compiler)")
    args = parser.parse_args()
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    steps = {**STEPS, **{stage: int(n) for stage, n in (item.split("=") for item in args.steps.split(",") if item)}}
    for stage in args.stages.split(","):
        run(stage, work, steps=steps[stage], seed=args.seed, compiled=args.compile)
    if all((work / f"{stage}.pt").exists() for stage in STEPS):
        export(work, args.out, args.seed)


if __name__ == "__main__":
    main()
