"""Training pictures of tiny-qwen with dense labels and questions: scenes, easy-vqa images and mosaics of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmeff.evaluation import mosaics, scenes
from vlmeff.evaluation.scenes.composition import COLORS as SCENE_COLORS
from vlmeff.evaluation.scenes.composition import SHAPES as SCENE_SHAPES
from vlmeff.evaluation.scenes.composition import SIZE_NAMES
from vlmeff.evaluation.scenes.drawing import label_map
from vlmeff.models.tiny_qwen.architecture import IMAGE_SIZE, MERGE, PATCH_SIZE, SIDE

COLORS = tuple(dict.fromkeys((*SCENE_COLORS, *mosaics.COLORS)))
SHAPES = tuple(dict.fromkeys((*SCENE_SHAPES, *mosaics.SHAPES)))
UNKNOWN = -100  # ignored by the losses
ON_OBJECT = 0.2  # share of a patch or token from which on it belongs to an object

Grid = tuple[int, int]  # visual tokens: rows, columns


@dataclass(frozen=True)
class Question:
    """``kind``: what training draws evenly from."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Thing:
    """Indices into COLORS, SHAPES and SIZE_NAMES (or UNKNOWN); centre as shares of the picture's width and height."""

    color: int
    shape: int
    size: int
    x: float
    y: float


@dataclass(frozen=True, eq=False)
class Picture:
    """``pixels`` [h, w, 3] uint8; ``instances`` [h, w] uint8: 0 or 1 + index of the thing that the pixel shows."""

    pixels: np.ndarray
    instances: np.ndarray
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


def scene_things(index: int, *, seed: int) -> tuple[Thing, ...]:
    return tuple(
        Thing(COLORS.index(t.color), SHAPES.index(t.shape), SIZE_NAMES.index(t.size), t.x / 1000, t.y / 1000)
        for t in scenes.compose(index, split="train", seed=seed).things
    )


def scene_picture(index: int, *, seed: int) -> Picture:
    scene = scenes.compose(index, split="train", seed=seed)
    things = scene_things(index, seed=seed)
    return Picture(np.asarray(scenes.draw(scene)), np.asarray(label_map(scene)), things, ())


def scene_questions(index: int, *, seed: int) -> tuple[Question, ...]:
    """All but reading; the question that the benchmark asks about numbers is a kind of its own."""
    scene = scenes.compose(index, split="train", seed=seed)
    asked = [q for q in scenes.all_questions(scene) if q.type != "reading" and not q.answer.isdigit()]
    theme = [Question("theme", q.text, q.answer) for q in asked if q == scenes.theme_question(scene)]
    return (*(Question(q.form, q.text, q.answer) for q in asked), *theme)


def mosaic_picture(rng: random.Random) -> Picture:
    scene = mosaics.make_scene(rng, "train")
    instances = np.zeros((2 * mosaics.TILE,) * 2, np.uint8)
    things: list[Thing] = []
    for where, tile in scene.objects:
        cell = mosaics.POSITIONS.index(where)
        y, x = mosaics.TILE * (cell // 2), mosaics.TILE * (cell % 2)
        cut = instances[y : y + mosaics.TILE, x : x + mosaics.TILE]
        _add(things, cut, tile, offset=(y, x), side=len(instances))
    questions = tuple(Question(f"mosaic {q.kind}", q.text, q.answer) for q in scene.questions() if q.kind != "describe")
    return Picture(scene.pixels(), instances, tuple(things), questions)


def single_picture(tile: mosaics.Tile, questions: Sequence[Question]) -> Picture:
    instances = np.zeros((mosaics.TILE, mosaics.TILE), np.uint8)
    things: list[Thing] = []
    _add(things, instances, tile, offset=(0, 0), side=mosaics.TILE)
    return Picture(tile.pixels, instances, tuple(things), tuple(questions))


def _add(things: list[Thing], cut: np.ndarray, tile: mosaics.Tile, *, offset: Grid, side: int) -> None:
    mask = tile.mask
    cut[mask] = len(things) + 1
    y, x = (float(axis.mean()) + 0.5 for axis in np.nonzero(mask))
    color, shape = COLORS.index(tile.color), SHAPES.index(tile.shape)
    things.append(Thing(color, shape, UNKNOWN, (x + offset[1]) / side, (y + offset[0]) / side))


def easy_vqa_questions_of() -> dict[int, list[Question]]:
    """image id -> its training questions; open and yes/no ones are kinds of their own."""
    out: dict[int, list[Question]] = {}
    for image_id, text, answer in mosaics.easy_vqa_questions("train"):
        kind = "easy yesno" if answer in ("yes", "no") else "easy color" if answer in mosaics.COLORS else "easy shape"
        out.setdefault(image_id, []).append(Question(kind, text, answer))
    return out


def native_grid(picture: Picture) -> Grid:
    """As the image processor rounds: nearest multiple of 14 px, at most 112 x 112 (all our pictures are square)."""
    side = min(IMAGE_SIZE, round(len(picture.pixels) / SIDE) * SIDE) // SIDE
    return side, side


def patches_of(pictures: Sequence[Picture], grid: Grid, mean: Tensor, std: Tensor) -> Tensor:
    """[B, patches, 3 * 7 * 7] float32 in the processor's order (merge square by merge square), one frame only."""
    rows, columns = grid
    out = []
    for picture in pictures:
        image = Image.fromarray(picture.pixels)
        if image.size != (columns * SIDE, rows * SIDE):
            image = image.resize((columns * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
        out.append(torch.from_numpy(np.array(image)))
    x = ((torch.stack(out).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    x = x.reshape(len(pictures), 3, rows, MERGE, PATCH_SIZE, columns, MERGE, PATCH_SIZE)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(pictures), rows * columns * MERGE**2, -1)


def instance_grids(pictures: Sequence[Picture], grid: Grid) -> Tensor:
    """[B, rows, columns] int64: which thing covers most of each cell, 0 where none covers enough of it."""
    out = torch.empty(len(pictures), *grid, dtype=torch.int64)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for row, picture in enumerate(pictures):
        by_size.setdefault(picture.instances.shape, []).append(row)
    for rows in by_size.values():
        instances = torch.from_numpy(np.stack([pictures[row].instances for row in rows]).astype(np.int64))
        most = max(len(pictures[row].things) for row in rows) + 1
        share = torch.stack([F.adaptive_avg_pool2d((instances == i).float(), grid) for i in range(1, most)], -1)
        best_share, best = share.max(-1)
        out[rows] = torch.where(best_share >= ON_OBJECT, best + 1, 0)
    return out


def centres(things: Sequence[Thing], grid: Grid) -> dict[int, int]:
    """{1 + index of a thing: raster index of the token that holds its centre}, for centres inside the picture."""
    rows, columns = grid
    return {
        number: int(t.y * rows) * columns + int(t.x * columns)
        for number, t in enumerate(things, start=1)
        if 0 <= t.x < 1 and 0 <= t.y < 1
    }


def crops(picture: Picture, side: int, rng: random.Random) -> list[Picture]:
    """One square piece of ``side`` pixels around each thing, up to an eighth of it off the middle."""
    out = []
    whole = len(picture.pixels)
    for thing in picture.things:
        x, y = (
            min(max(0, int(c * whole) - side // 2 + rng.randint(-side // 8, side // 8)), whole - side)
            for c in (thing.x, thing.y)
        )
        moved = tuple(replace(t, x=(t.x * whole - x) / side, y=(t.y * whole - y) / side) for t in picture.things)
        cut = np.s_[y : y + side, x : x + side]
        out.append(Picture(picture.pixels[cut], picture.instances[cut], moved, ()))
    return out
