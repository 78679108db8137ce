"""Train tiny-llava on the CPU: ``python -m vlmeff.models.tiny_llava.train --work DIR``. Resumes where it stopped.

Stage 1, ``tower``: the CLIP tower learns dense labels. On a shape, a patch says its colour and shape; on the
background it says how many shapes the picture has; every patch says where it is; CLS says which (colour, shape) pairs
are present. Dense labels give 324 lessons a picture, which is what makes two CPU cores enough (trained end to end, the
shapes stay at chance).

Stage 2, ``language``: projector and Llama learn to answer with the tower frozen. One picture carries several
conversations: they share the picture's tokens as a prefix, a block mask hides them from each other and their positions
restart behind the picture, so each is computed exactly as if it stood alone.

Stage 3, ``joint``: everything together, with the losses of both stages. Every answer has equal weight (before, the
long describing sentences carry most of the loss), questions about places come twice as often, and patches on a shape
have to say where they are: without that the tower forgets the place of what it recognises, and "where is the red
circle?" stays at chance.

Stage 4, ``answers``: projector and Llama once more, with equal weight for every answer, on the tower as it is now.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmeff.evaluation.mosaics import (
    COLORS,
    DESCRIBE,
    SHAPES,
    TILE,
    Question,
    Scene,
    Tile,
    easy_vqa_questions,
    load_tiles,
    make_scene,
    single_description,
)
from vlmeff.models.tiny_llava.architecture import (
    GRID,
    IMAGE_SIZE,
    SHORT_ANSWER,
    build_model,
    build_processor,
)

SEED = 0
STEPS = {"tower": 900, "language": 1300, "joint": 380, "answers": 450}
BATCH = {"tower": 64, "language": 32, "joint": 32, "answers": 32}
PEAK_LR = {"tower": 2e-3, "language": 2e-3, "joint": 8e-4, "answers": 2e-3}
CONVERSATIONS = 8  # per picture
SINGLE_SHARE = 0.35  # pictures that are one easy-vqa image rather than a mosaic
COUNTS = 5  # zero to four shapes
PLACES = ("position", "position_object", "where", "occupied")


@dataclass
class Picture:
    """What one training picture needs: pixels [h, w, 3] uint8, shape mask and per-pixel class maps, questions."""

    pixels: np.ndarray
    color_map: np.ndarray  # [h, w] int, len(COLORS) on the background
    shape_map: np.ndarray
    pairs: list[int]  # color * len(SHAPES) + shape of each object
    questions: list[Question]


def augment(tile: Tile, rng: random.Random) -> Tile:
    """Flip or transpose a tile; neither changes its colour or shape."""
    pixels = tile.pixels
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.25:
        pixels = pixels[::-1]
    if rng.random() < 0.25:
        pixels = pixels.transpose(1, 0, 2)
    return Tile(tile.image_id, pixels, tile.background, tile.color, tile.shape)


def _maps(cells: list[Tile | None]) -> tuple[np.ndarray, np.ndarray]:
    side = 1 if len(cells) == 1 else 2
    color_map = np.full((side * TILE, side * TILE), len(COLORS))
    shape_map = np.full((side * TILE, side * TILE), len(SHAPES))
    for i, tile in enumerate(cells):
        if tile is not None:
            here = np.s_[TILE * (i // side) : TILE * (i // side + 1), TILE * (i % side) : TILE * (i % side + 1)]
            color_map[here][tile.mask] = COLORS.index(tile.color)
            shape_map[here][tile.mask] = SHAPES.index(tile.shape)
    return color_map, shape_map


def draw_picture(rng: random.Random, questions_of: dict[int, list[Question]], *, flips: bool) -> Picture:
    """One easy-vqa image or one mosaic, from the train split."""
    if rng.random() < SINGLE_SHARE:
        tile = rng.choice(load_tiles("train"))
        questions = questions_of[tile.image_id] + [
            Question("describe", rng.choice(DESCRIBE), single_description(tile.color, tile.shape)),
            Question("count", "how many shapes are there?", "one"),
        ]
        cells: list[Tile | None] = [augment(tile, rng) if flips else tile]
        pixels = cells[0].pixels if cells[0] is not None else tile.pixels
    else:
        scene = make_scene(rng, "train")
        questions = scene.questions()
        cells = [augment(t, rng) if t is not None and flips else t for t in scene.cells]
        pixels = Scene((cells[0], cells[1], cells[2], cells[3]), scene.fill).pixels()
    objects = [t for t in cells if t is not None]
    pairs = [COLORS.index(t.color) * len(SHAPES) + SHAPES.index(t.shape) for t in objects]
    return Picture(pixels, *_maps(cells), pairs, questions)


def to_pixel_values(pictures: list[np.ndarray], mean: Tensor, std: Tensor) -> Tensor:
    """[B, 3, 144, 144] as the image processor makes it: bicubic with anti-aliasing, rounded to 8 bits, normalised."""
    out = []
    for pixels in pictures:
        x = torch.tensor(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
        out.append(x.round().clamp(0, 255) / 255)
    return (torch.cat(out) - mean) / std


def patch_labels(class_map: np.ndarray, background: int) -> Tensor:
    """[GRID * GRID] majority class of each patch among its shape pixels; background below one fifth of the patch."""
    one_hot = F.one_hot(torch.from_numpy(class_map), background + 1).permute(2, 0, 1)[None].float()
    share = F.adaptive_avg_pool2d(one_hot, GRID)[0]
    best_share, best = share[:background].max(0)
    return torch.where(best_share >= 0.2, best, background).flatten()


class TowerHeads(nn.Module):
    """The heads of stage 1; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.color = nn.Linear(width, len(COLORS) + 1)
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.count = nn.Linear(width, COUNTS)
        self.place = nn.Linear(width, 2 * GRID)
        self.pairs = nn.Linear(width, len(COLORS) * len(SHAPES))


def tower_loss(out: Any, heads: TowerHeads, pictures: list[Picture], *, place: float) -> tuple[Tensor, str]:
    """``out``: the tower's output with hidden states. ``place``: weight of the place of patches on a shape."""
    patches = heads.norm(out.hidden_states[-2][:, 1:].float())
    color = torch.stack([patch_labels(p.color_map, len(COLORS)) for p in pictures])
    shape = torch.stack([patch_labels(p.shape_map, len(SHAPES)) for p in pictures])
    on_shape = color < len(COLORS)
    count = torch.tensor([len(p.pairs) for p in pictures])[:, None].expand_as(color)
    rows = torch.arange(GRID).repeat_interleave(GRID).expand_as(color)
    columns = torch.arange(GRID).repeat(GRID).expand_as(color)
    pairs = torch.zeros(len(pictures), len(COLORS) * len(SHAPES))
    for i, picture in enumerate(pictures):
        pairs[i, picture.pairs] = 1.0

    # A small shape covers few patches: weigh each patch by 1 / sqrt(patches of its shape), so that it is learned too.
    kind = torch.where(on_shape, color * len(SHAPES) + shape, pairs.shape[1])
    patches_of_kind = F.one_hot(kind, pairs.shape[1] + 1).sum(1, keepdim=True).float()
    weight = torch.where(
        on_shape, F.one_hot(kind, pairs.shape[1] + 1).float().mul(patches_of_kind).sum(-1) ** -0.5, 1.0
    )

    def mean_ce(logits: Tensor, target: Tensor, where: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[where], target[where], reduction="none")
        return (losses * weight[where]).sum() / weight[where].sum()

    color_logits, shape_logits = heads.color(patches), heads.shape(patches)
    row_logits, column_logits = heads.place(patches).chunk(2, -1)
    pair_logits = heads.pairs(out.pooler_output.float())
    everywhere = torch.ones_like(on_shape)
    loss = (
        mean_ce(color_logits, color, on_shape)
        + 2 * mean_ce(shape_logits, shape, on_shape)
        + 0.5 * mean_ce(color_logits, color, ~on_shape)
        + 0.5 * mean_ce(heads.count(patches), count, ~on_shape)
        + 0.1 * mean_ce(row_logits, rows, everywhere)
        + 0.1 * mean_ce(column_logits, columns, everywhere)
        + place * mean_ce(row_logits, rows, on_shape)
        + place * mean_ce(column_logits, columns, on_shape)
        + 2 * F.binary_cross_entropy_with_logits(pair_logits, pairs)
    )
    with torch.no_grad():
        color_hit = (color_logits.argmax(-1) == color)[on_shape].float().mean()
        shape_hit = (shape_logits.argmax(-1) == shape)[on_shape].float().mean()
        place_hit = (row_logits.argmax(-1) == rows)[on_shape].float().mean()
        count_hit = (heads.count(patches).argmax(-1) == count)[~on_shape].float().mean()
    return loss, f"colour {color_hit:.3f} shape {shape_hit:.3f} count {count_hit:.3f} place {place_hit:.3f}"


class Conversations:
    """Tokenizes questions and packs several conversations behind one picture."""

    def __init__(self) -> None:
        self.processor = build_processor()
        self.tokenizer = self.processor.tokenizer
        eos = self.tokenizer.eos_token
        self.eos = self.tokenizer.convert_tokens_to_ids(eos)
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        self.prefix = [*self.tokenizer("USER:").input_ids, *[image] * (GRID * GRID)]
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def turn(self, question: Question, rng: random.Random, *, first: bool) -> tuple[list[int], list[bool]]:
        """(ids, is it an answer token) of one question and its answer."""
        text = question.text
        if " " not in question.answer and rng.random() < 0.3:
            text = f"{text}\n{SHORT_ANSWER}"
        asked = self.ids(f"{text} ASSISTANT:" if first else f"USER: {text} ASSISTANT:")
        answer = [*self.ids(question.answer), self.eos]
        return asked + answer, [False] * len(asked) + [True] * len(answer)

    def choose(self, questions: list[Question], rng: random.Random, *, balance: bool) -> list[list[Question]]:
        """One describing conversation and CONVERSATIONS - 1 others; kinds are drawn evenly (those about places twice as
        often with ``balance``), some conversations have two turns."""
        by_kind: dict[str, list[Question]] = {}
        for q in questions:
            # Colour, shape and yes/no questions of easy-vqa count as kinds of their own.
            kind = q.kind if q.kind != "easy_vqa" else f"easy_{'yesno' if q.answer in ('yes', 'no') else 'open'}"
            by_kind.setdefault(kind, []).append(q)
        describe = by_kind.pop("describe")
        kinds = sorted(by_kind)
        if balance:
            kinds += [kind for kind in kinds if kind in PLACES]
        out = [[rng.choice(describe)]]
        for _ in range(CONVERSATIONS - 1):
            first = rng.choice(by_kind[rng.choice(kinds)])
            turns = [first]
            if rng.random() < 0.2:
                turns.append(rng.choice(rng.choice([describe, *by_kind.values()])))
            out.append(turns)
        return out

    def pack(self, pictures: list[Picture], rng: random.Random, *, balance: bool) -> dict[str, Tensor]:
        """input_ids, position_ids, labels, weight [B, L] and the additive block mask [B, 1, L, L].

        ``balance`` gives every answer the same weight instead of every token.
        """
        rows: list[tuple[list[int], list[int], list[int], list[float]]] = []
        start = len(self.prefix)
        for picture in pictures:
            ids, branch, position, target = list(self.prefix), [0] * start, list(range(start)), [0.0] * start
            for number, turns in enumerate(self.choose(picture.questions, rng, balance=balance), start=1):
                at = start
                for i, question in enumerate(turns):
                    tokens, answers = self.turn(question, rng, first=i == 0)
                    ids += tokens
                    target += [a / sum(answers) if balance else float(a) for a in answers]
                    branch += [number] * len(tokens)
                    position += range(at, at + len(tokens))
                    at += len(tokens)
            rows.append((ids, branch, position, target))
        length = max(len(r[0]) for r in rows)

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([v + [fill] * (length - len(v)) for v in values])

        input_ids = padded([r[0] for r in rows], self.tokenizer.pad_token_id)
        branches = padded([r[1] for r in rows], -1)
        position_ids = padded([r[2] for r in rows], 0)
        weight = torch.zeros(len(rows), length)
        for i, row in enumerate(rows):
            weight[i, : len(row[3])] = torch.tensor(row[3])
        labels = torch.where(weight > 0, input_ids, -100)
        order = torch.arange(length)
        sees = (branches[:, None, :] == branches[:, :, None]) | (branches[:, None, :] == 0)
        sees &= order[None, None, :] <= order[None, :, None]
        mask = torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)[:, None]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "weight": weight,
            "mask": mask,
        }


def language_loss(model: Any, batch: dict[str, Tensor], out: Any) -> tuple[Tensor, str]:
    """``out``: the tower's output with hidden states."""
    with torch.autocast("cpu", torch.bfloat16):
        visual = model.model.multi_modal_projector(out.hidden_states[-2][:, 1:])
        embeds = model.get_input_embeddings()(batch["input_ids"]).to(visual.dtype)
        where = (batch["input_ids"] == model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(where, visual.reshape(-1, visual.shape[-1]))
        answered_from = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=batch["mask"].to(embeds.dtype),
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
    labels = batch["labels"][:, 1:]
    answered = labels != -100
    logits = model.lm_head(answered_from[:, :-1][answered].float())
    weight = batch["weight"][:, 1:][answered]
    loss = (F.cross_entropy(logits, labels[answered], reduction="none") * weight).sum() / weight.sum()
    hit = (logits.argmax(-1) == labels[answered]).float().mean()
    return loss, f"answer tokens {hit:.4f}"


def run_stage(stage: str, work: Path, seed: int, steps: int) -> None:
    """Train one stage up to ``steps``, saving ``<stage>.pt`` every 50 steps and at the end."""
    torch.manual_seed(seed)
    model = build_model().float().train()
    heads = TowerHeads(model.config.vision_config.hidden_size)
    packer = Conversations()
    mean = torch.tensor(packer.processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(packer.processor.image_processor.image_std).view(1, 3, 1, 1)
    questions_of: dict[int, list[Question]] = {}
    for image_id, question, answer in easy_vqa_questions("train"):
        questions_of.setdefault(image_id, []).append(Question("easy_vqa", question, answer))

    previous = {"language": "tower", "joint": "language", "answers": "joint"}.get(stage)
    if previous:
        model.load_state_dict(torch.load(work / f"{previous}.pt", weights_only=True)["model"])
        heads.load_state_dict(torch.load(work / "tower.pt", weights_only=True)["heads"])
    tower, language = model.model.vision_tower, [model.model.multi_modal_projector, model.model.language_model]
    trained = {
        "tower": [tower, heads],
        "language": [*language, model.lm_head],
        "joint": [model, heads],
        "answers": [*language, model.lm_head],
    }[stage]
    parameters = list(nn.ModuleList(trained).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR[stage], weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR[stage], total_steps=steps + 1, pct_start=0.15)
    done, file, spent = 0, work / f"{stage}.pt", 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done, spent = state["step"], state["seconds"]
    start = time.monotonic() - spent
    for step in range(done, steps):
        rng = random.Random(f"{seed}-{stage}-{step}")  # a resumed run sees the batches that an unbroken one would
        pictures = [draw_picture(rng, questions_of, flips=True) for _ in range(BATCH[stage])]
        x = to_pixel_values([p.pixels for p in pictures], mean, std)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(stage in ("tower", "joint")):
            seen = tower(x, output_hidden_states=True)
        losses: list[tuple[Tensor, str]] = []
        if stage in ("tower", "joint"):
            losses.append(tower_loss(seen, heads, pictures, place=1.0 if stage == "joint" else 0.0))
        if stage != "tower":
            batch = packer.pack(pictures, rng, balance=stage != "language")
            losses.append(language_loss(model, batch, seen))
        loss = torch.stack([value for value, _ in losses]).sum()
        note = " ".join(text for _, text in losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        last = step + 1 == steps
        if step % 10 == 0 or last:
            seconds = time.monotonic() - start
            print(f"{stage} {step + 1}/{steps} loss {loss.item():.4f} {note} {seconds:.0f} s", flush=True)
        if (step + 1) % 50 == 0 or last:
            state = {
                "model": model.state_dict(),
                "heads": heads.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "seconds": time.monotonic() - start,
            }
            torch.save(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)


def export(work: Path, out: Path, seed: int) -> None:
    """Write the model of the last finished stage as a transformers folder, with how it was trained."""
    stage = next(s for s in ("answers", "joint", "language") if (work / f"{s}.pt").exists())
    model = build_model()
    model.load_state_dict(torch.load(work / f"{stage}.pt", weights_only=True)["model"])
    model.eval().save_pretrained(out)
    build_processor().save_pretrained(out)
    seconds, steps = {}, {}
    for name in STEPS:
        if (work / f"{name}.pt").exists():
            state = torch.load(work / f"{name}.pt", weights_only=True)
            seconds[name], steps[name] = round(state["seconds"]), state["step"]
    record = {"seed": seed, "steps": steps, "batch": BATCH, "peak_lr": PEAK_LR, "cpu_seconds": seconds}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; a second run resumes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="where the model goes")
    parser.add_argument("--stages", default=",".join(STEPS))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages.split(","):
        run_stage(stage, args.work, args.seed, max(1, round(STEPS[stage] * args.scale)))
    export(args.work, args.out, args.seed)


if __name__ == "__main__":
    main()
