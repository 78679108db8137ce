"""Train tiny-clip on one CPU core: ``python -m vlmeff.models.tiny_clip.train --work DIR``. Resumes where it stopped.

Three losses on drawn pictures (``captions.py``), each from texts:

* ``pair``: the contrastive loss between pictures and captions of a batch. A caption that is true of several pictures of
  the batch ("a red circle") counts all of them as right.
* ``rank``: a phrase ("the red circle", "what is in the top left?") picks the patches of the shapes that it names among
  all patches of its picture.
* ``name``: a patch on a shape picks "a <colour> <shape>" among the 24 such texts.

The last two make single patches comparable with texts. They also carry the training: 64 lessons a picture.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmeff.models.tiny_clip.architecture import (
    CONTEXT,
    GRID,
    MODEL,
    PREPROCESS,
    VOCABULARY,
    build_model,
    build_tokenizer,
    folder,
)
from vlmeff.models.tiny_clip.captions import COLORS, SHAPES, Caption, Picture, Thing, caption, draw_picture, phrase

SEED = 0
STEPS = 1600
BATCH = 64
PEAK_LR = 2e-3
PATCH_SCALE = 16.0  # multiplies cosines of patches and texts
LARGEST_SCALE = 50.0  # bound of CLIP's learned scale
UNKNOWN_SHARE = 0.04  # words of a caption replaced by <unk>: questions bring words that no caption has
KINDS = [(color, shape) for color in COLORS for shape in SHAPES]
NAMES = ("a {}", "the {}", "{}", "a picture of a {}", "is there a {}?", "where is the {}?")


def patch_share(thing: Thing) -> Tensor:
    """[GRID * GRID] float32: the share of each patch that the shape covers."""
    return F.adaptive_avg_pool2d(torch.from_numpy(thing.mask).float()[None], GRID).flatten()


def on_thing(thing: Thing) -> Tensor:
    """[GRID * GRID] bool: patches that belong to the shape, at least its best one."""
    share = patch_share(thing)
    return share >= min(0.2, float(share.max()))


def to_pixel_values(pictures: list[Picture]) -> Tensor:
    """[B, 3, 64, 64], as the preprocessing makes it of a picture that has this size already."""
    x = torch.stack([torch.from_numpy(p.pixels) for p in pictures]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(PREPROCESS[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return (x - mean) / std


class Texts:
    """Captions to ids [B, CONTEXT]."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.unknown = VOCABULARY.index("<unk>")

    def __call__(self, texts: list[str], rng: random.Random | None = None) -> Tensor:
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).input_ids
        if rng is not None:
            drop = torch.tensor([[rng.random() < UNKNOWN_SHARE for _ in row] for row in ids.tolist()])
            words = (ids != VOCABULARY.index("<pad>")) & (ids != VOCABULARY.index("<end>"))
            ids = ids.masked_fill(drop & words, self.unknown)
        return ids


def patch_embeddings(model: Any, pixel_values: Tensor) -> Tensor:
    """[B, GRID * GRID, E]: projected patch tokens. Their mean is ``encode_image``."""
    out = model.visual.forward_intermediates(
        pixel_values, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
    )
    return out["image_intermediates"][-1] @ model.visual.proj


def pair_loss(pictures: Tensor, texts: Tensor, truth: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, share of pictures whose best text is true); ``truth`` [B, B]: caption j is true of picture i."""
    logits = scale * F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T
    to_text, to_picture = truth / truth.sum(1, keepdim=True), truth / truth.sum(0)
    loss = -(to_text * logits.log_softmax(1)).sum(1).mean() - (to_picture * logits.log_softmax(0)).sum(0).mean()
    return loss, truth.gather(1, logits.argmax(1, keepdim=True)).mean()


def rank_loss(patches: Tensor, texts: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, share of phrases whose best patch is right); ``patches`` [B, N, E], ``texts`` [B, E], ``named`` [B, N]."""
    cosine = torch.einsum("bne,be->bn", F.normalize(patches, dim=-1), F.normalize(texts, dim=-1))
    target = named / named.sum(1, keepdim=True)
    loss = -(target * (PATCH_SCALE * cosine).log_softmax(1)).sum(1).mean()
    return loss, named.gather(1, cosine.argmax(1, keepdim=True)).mean()


def name_loss(patches: Tensor, texts: Tensor, pictures: list[Picture]) -> tuple[Tensor, Tensor]:
    """(loss, share of patches named right) over the patches on shapes; every shape has the same weight."""
    row, patch, kind, weight = [], [], [], []
    for i, picture in enumerate(pictures):
        for thing in picture.things:
            here = on_thing(thing).nonzero().flatten().tolist()
            row += [i] * len(here)
            patch += here
            kind += [KINDS.index((thing.color, thing.shape))] * len(here)
            weight += [1 / len(here)] * len(here)
    cosine = F.normalize(patches[row, patch], dim=-1) @ F.normalize(texts, dim=-1).T
    target, share = torch.tensor(kind), torch.tensor(weight)
    loss = (F.cross_entropy(PATCH_SCALE * cosine, target, reduction="none") * share).sum() / share.sum()
    return loss, (cosine.argmax(1) == target).float().mean()


def draw_batch(rng: random.Random) -> tuple[list[Picture], list[Caption], list[Caption]]:
    pictures = [draw_picture(rng) for _ in range(BATCH)]
    return pictures, [caption(p, rng) for p in pictures], [phrase(p, rng) for p in pictures]


def train(work: Path, seed: int, steps: int) -> Any:
    """Train up to ``steps``, saving ``tiny_clip.pt`` every 50 steps; returns the model."""
    torch.manual_seed(seed)
    model, tokenize = build_model().float().train(), Texts()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps + 1, pct_start=0.1)
    done, spent, file = 0, 0.0, work / "tiny_clip.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done, spent = state["step"], state["seconds"]
    start = time.monotonic() - spent
    for step in range(done, steps):
        rng = random.Random(f"{seed}-train-{step}")  # a resumed run sees the batches that an unbroken one would
        pictures, captions, phrases = draw_batch(rng)
        truth = torch.tensor([[float(c.is_true_of(p)) for c in captions] for p in pictures])
        named = torch.stack(
            [
                torch.stack([on_thing(t) for t in p.things if ph.parts[0].fits(t)]).any(0).float()
                for p, ph in zip(pictures, phrases, strict=True)
            ]
        )
        kinds = [rng.choice(NAMES).format(f"{color} {shape}") for color, shape in KINDS]
        ids = torch.cat([tokenize([c.text for c in captions + phrases], rng), tokenize(kinds)])
        with torch.autocast("cpu", torch.bfloat16):
            patches = patch_embeddings(model, to_pixel_values(pictures)).float()
        texts = model.encode_text(ids)  # narrow: bfloat16 would be slower
        of_caption, of_phrase, of_kind = texts.split([BATCH, BATCH, len(KINDS)])
        pair, pair_hit = pair_loss(patches.mean(1), of_caption, truth, model.logit_scale.exp())
        rank, rank_hit = rank_loss(patches, of_phrase, named)
        name, name_hit = name_loss(patches, of_kind, pictures)
        loss = pair + rank + name
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(torch.tensor(LARGEST_SCALE).log()))
        last, seconds = step + 1 == steps, time.monotonic() - start
        if step % 10 == 0 or last:
            print(
                f"{step + 1}/{steps} pair {pair.item():.3f} ({pair_hit:.2f}) rank {rank.item():.3f} ({rank_hit:.2f}) "
                f"name {name.item():.3f} ({name_hit:.2f}) {seconds:.0f} s",
                flush=True,
            )
        if (step + 1) % 50 == 0 or last:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "seconds": seconds,
            }
            torch.save(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    return model


def export(model: Any, work: Path, out: Path, seed: int) -> None:
    """Write an open_clip "local-dir": float16 weights, configuration, tokenizer, and how it was trained."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_tokenizer().save_pretrained(out)
    state = torch.load(work / "tiny_clip.pt", weights_only=True)
    record = {
        "seed": seed,
        "steps": state["step"],
        "batch": BATCH,
        "peak_lr": PEAK_LR,
        "wall_seconds": round(state["seconds"]),
        "threads": torch.get_num_threads(),
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; a second run resumes")
    parser.add_argument("--out", type=Path, default=folder(), help="where the model goes")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    export(train(args.work, args.seed, args.steps), args.work, args.out, args.seed)


if __name__ == "__main__":
    main()
