"""Stages 1 and 2 of training tiny-qwen: the vision tower learns dense labels.

Every patch (last block) and every visual token (what the merger hands to the language model) says colour, shape and
size of the thing that it belongs to, and a token says whether it holds a thing's centre: counting is then counting
centres. Places are not asked for: rotations tell a tower only relative places, the language model gets them anyway.
Dense labels are 64 to 320 lessons a picture; trained end to end on answers, shapes stay at chance on a CPU's budget.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vlmeff.evaluation import mosaics
from vlmeff.evaluation.scenes.composition import SIZE_NAMES
from vlmeff.models.tiny_qwen.architecture import IMAGE_SIZE, MERGE, SIDE
from vlmeff.models.tiny_qwen.pictures import (
    COLORS,
    SHAPES,
    UNKNOWN,
    Grid,
    Picture,
    centres,
    crops,
    instance_grids,
    mosaic_picture,
    patches_of,
    scene_picture,
    single_picture,
)

FULL_GRID: Grid = (IMAGE_SIZE // SIDE, IMAGE_SIZE // SIDE)
SMALL_GRIDS: tuple[Grid, ...] = ((4, 5), (5, 4), (5, 5), (6, 6), (6, 8), (7, 7))
CROP_GRID: Grid = (3, 3)
CROPS = {"crops": 320, "single": 24}
BATCH = {"scenes": 32, "mosaics": 8, "single": 20, "small": 16}
# Every step has a large group (scenes and mosaics) and one of these: easy-vqa images twice as often.
SECOND = ("single", "small", "single")


FIRST_CROP = 2_000_000  # number of the first scene that is cut up
Group = tuple[Sequence[Picture], Grid]


@functools.cache
def _geometry(grid: Grid, window: int, patch: int) -> tuple[Tensor, list[int], Tensor]:
    """(order of the tokens by windows, patches of each window, [patches, 2] place of each patch)."""
    thw = torch.tensor([[1, grid[0] * MERGE, grid[1] * MERGE]])
    order, boundaries = get_vision_window_index(thw, MERGE, window, patch)
    lengths = [n for n in boundaries.diff().tolist() if n]
    return order, lengths, get_vision_position_ids(thw, MERGE)


def tower_forward(visual: Any, patches_BNP: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The tower on a batch of equally large pictures: (patches [B, N, D] after the last block, tokens [B, N / 4, D']).

    Both in the processor's order. The same computation as ``visual(...)``, which takes pictures one after another and
    windows one by one (tested); here windows of equal size are one batch.
    """
    order, lengths, places = _geometry(grid, visual.window_size, visual.patch_size)
    weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of a picture are the same
    x = F.linear(patches_BNP, weight)
    batch, number, width = x.shape
    x = x.view(batch, -1, MERGE**2, width)[:, order].reshape(batch, number, width)
    cos, sin = (
        part.view(-1, MERGE**2, part.shape[-1])[order].flatten(0, 1) for part in visual.rotary_pos_emb(x, places)
    )
    for index, block in enumerate(visual.blocks):
        whole = index in visual.fullatt_block_indexes
        x = x + _attention(block.attn, block.norm1(x), cos, sin, [number] if whole else lengths)
        x = x + block.mlp(block.norm2(x))
    tokens = visual.merger(x.reshape(-1, width)).view(batch, number // MERGE**2, -1)
    back = torch.argsort(order)
    return x.view(batch, -1, MERGE**2, width)[:, back].flatten(1, 2), tokens[:, back]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def _attention(module: Any, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
    batch, number, width = x.shape
    q, k, v = module.qkv(x).view(batch, number, 3, module.num_heads, -1).unbind(2)
    q, k = (_rotated(t, cos.to(t.dtype), sin.to(t.dtype)) for t in (q, k))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Written out: on a CPU the backward pass of the fused kernel takes several times as long at these sizes.
        q, k, v = (t.transpose(1, 2).to(x.dtype) for t in (q, k, v))
        score = (q * module.scaling) @ k.transpose(-2, -1)
        return (score.softmax(-1, dtype=score.dtype) @ v).transpose(1, 2)

    if len(set(lengths)) == 1:
        q, k, v = (t.reshape(batch * len(lengths), lengths[0], *t.shape[2:]) for t in (q, k, v))
        out = attend(q, k, v)
    else:
        out = torch.cat([attend(*part) for part in zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True)], 1)
    return module.proj(out.reshape(batch, number, width))


class TowerHeads(nn.Module):
    """The heads of stages 1 and 2; thrown away afterwards."""

    def __init__(self, patch_width: int, token_width: int) -> None:
        super().__init__()
        for name, width in (("patch", patch_width), ("token", token_width)):
            classes = len(COLORS) + len(SHAPES) + len(SIZE_NAMES) + 1 + (name == "token")
            self.add_module(name, nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes)))


def labels_of(pictures: Sequence[Picture], grid: Grid, *, tokens: bool) -> dict[str, Tensor]:
    """{"color", "shape", "size", "weight", "centre"}: [B, cells]; tokens in raster order, patches as in the model."""
    if tokens:
        cells = instance_grids(pictures, grid).flatten(1)
    else:
        fine = instance_grids(pictures, (grid[0] * MERGE, grid[1] * MERGE))
        cells = fine.view(-1, grid[0], MERGE, grid[1], MERGE).transpose(2, 3).flatten(1)
    centre = torch.zeros(cells.shape)
    if tokens:
        for row, picture in enumerate(pictures):
            for number, at in centres(picture.things, grid).items():
                cells[row, at], centre[row, at] = number, 1.0
    most = max(len(p.things) for p in pictures) + 1
    of_thing = torch.full((len(pictures), most, 3), UNKNOWN)
    for row, picture in enumerate(pictures):
        of_thing[row, 1 : len(picture.things) + 1] = torch.tensor([[t.color, t.shape, t.size] for t in picture.things])
    # A small shape covers few cells: each weighs 1 / sqrt(cells of its thing), so that it is learned too.
    counts = F.one_hot(cells, most).sum(1).gather(1, cells)
    out = {name: of_thing[..., i].gather(1, cells) for i, name in enumerate(("color", "shape", "size"))}
    return {**out, "weight": torch.where(cells > 0, counts**-0.5, 1.0), "centre": centre}


def dense_loss(logits: Tensor, pictures: Sequence[Picture], grid: Grid, *, tokens: bool) -> tuple[Tensor, str]:
    """``labelled_loss`` with the labels of whole pictures."""
    return labelled_loss(logits, labels_of(pictures, grid, tokens=tokens), tokens=tokens)


def labelled_loss(logits: Tensor, label: dict[str, Tensor], *, tokens: bool) -> tuple[Tensor, str]:
    """Mean losses over things and over background; ``logits`` [B, cells, classes] of one head."""
    sizes = [len(COLORS), len(SHAPES), len(SIZE_NAMES), 1] + [1] * tokens
    color, shape, size, thing, *centre = logits.float().split(sizes, -1)
    here = label["color"] != UNKNOWN
    loss = F.binary_cross_entropy_with_logits(thing[..., 0], here.float())
    notes = []
    for name, guess, factor in (("color", color, 1.0), ("shape", shape, 2.0), ("size", size, 0.5)):
        known = label[name] != UNKNOWN
        if known.any():
            weight = label["weight"][known]
            losses = F.cross_entropy(guess[known], label[name][known], reduction="none")
            loss = loss + factor * (losses * weight).sum() / weight.sum()
            notes.append(f"{name} {(guess[known].argmax(-1) == label[name][known]).float().mean():.3f}")
    if tokens:
        target = label["centre"]
        losses = F.binary_cross_entropy_with_logits(centre[0][..., 0], target, reduction="none")
        loss = loss + losses[target > 0].mean() + 3 * losses[target == 0].mean()
        notes.append(f"centre {(centre[0][..., 0] > 0)[target > 0].float().mean():.3f}")
        right = (color.argmax(-1) == label["color"]) & (shape.argmax(-1) == label["shape"])
        notes.append(f"both at centres {right[target > 0].float().mean():.3f}")
    return loss, " ".join(notes)


def augmented(tile: mosaics.Tile, rng: random.Random) -> mosaics.Tile:
    """Flip or transpose a tile; neither changes its colour or shape."""
    pixels = tile.pixels
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.5:
        pixels = pixels.transpose(1, 0, 2)
    return mosaics.Tile(tile.image_id, pixels.copy(), tile.background, tile.color, tile.shape)


def crop_groups(step: int, seed: int) -> list[Group]:
    """Pieces of 42 px around single things, and easy-vqa images of 56 px: per shape a fraction of a scene's patches."""
    rng = random.Random(f"tiny-qwen-crops-{seed}-{step}")
    pieces: list[Picture] = []
    index = FIRST_CROP + step * CROPS["crops"]
    while len(pieces) < CROPS["crops"]:
        pieces += crops(scene_picture(index, seed=seed), CROP_GRID[0] * SIDE, rng)
        index += 1
    tiles = mosaics.load_tiles("train")
    images = [single_picture(augmented(rng.choice(tiles), rng), ()) for _ in range(CROPS["single"])]
    return [(pieces[: CROPS["crops"]], CROP_GRID), (images, (4, 4))]


def picture_groups(step: int, seed: int) -> list[Group]:
    """Whole scenes and mosaics, and in turn easy-vqa images or smaller scenes."""
    rng = random.Random(f"tiny-qwen-{seed}-{step}")
    first = step * (BATCH["scenes"] + BATCH["small"])
    large = [scene_picture(first + i, seed=seed) for i in range(BATCH["scenes"])]
    groups: list[Group] = [(large + [mosaic_picture(rng) for _ in range(BATCH["mosaics"])], FULL_GRID)]
    if SECOND[step % len(SECOND)] == "single":
        tiles = mosaics.load_tiles("train")
        images = [single_picture(augmented(rng.choice(tiles), rng), ()) for _ in range(BATCH["single"])]
        groups.append((images, (5, 5)))
    else:
        small = range(first + BATCH["scenes"], first + BATCH["scenes"] + BATCH["small"])
        groups.append(([scene_picture(i, seed=seed) for i in small], rng.choice(SMALL_GRIDS)))
    return groups


def tower_loss(
    visual: Any,
    heads: Any,  # TowerHeads
    mean: Tensor,
    std: Tensor,
    groups: Sequence[Group],
    *,
    forward: Any = tower_forward,
) -> tuple[Tensor, str]:
    """The mean loss over all pictures. ``forward``: ``tower_forward`` or a compiled one, used for whole scenes."""
    total, notes = torch.zeros(()), []
    count = sum(len(pictures) for pictures, _ in groups)
    for pictures, grid in groups:
        with torch.autocast("cpu", torch.bfloat16):
            run = forward if grid == FULL_GRID else tower_forward
            patches, tokens = run(visual, patches_of(pictures, grid, mean, std), grid)
            guesses = heads.patch(patches), heads.token(tokens)
        for guess, is_token, factor in ((guesses[0], False, 0.5), (guesses[1], True, 1.0)):
            loss, note = dense_loss(guess, pictures, grid, tokens=is_token)
            total = total + loss * factor * len(pictures) / count
        notes.append(note)  # of the tokens
    return total, " | ".join(notes)
