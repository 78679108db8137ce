"""Stages 1 and 2 of training tiny-llava: the CLIP tower learns dense labels.

Every patch of the layer that the language model reads says colour, shape and size of the thing that it belongs to,
whether it holds a thing's centre (counting is then counting centres) and in which row and column it lies: without the
last the tower forgets the place of what it recognises, and "where is the red circle?" stays at chance. CLS says which
(colour, shape) pairs the picture has.

Stage 1 shows the tower only the patches around single things, each with its own position embedding: a sixth of the
patches of a picture for every shape that is seen, and shapes are what takes long.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmeff.evaluation import mosaics
from vlmeff.evaluation.scenes.composition import SIZE_NAMES
from vlmeff.models.tiny_llava.architecture import GRID, IMAGE_SIZE
from vlmeff.models.tiny_qwen.pictures import (
    COLORS,
    SHAPES,
    Picture,
    mosaic_picture,
    scene_picture,
    single_picture,
)
from vlmeff.models.tiny_qwen.tower import augmented, labelled_loss, labels_of

WINDOW = 7  # patches: side of the cut-outs of stage 1
CUTS = {"scenes": 64, "mosaics": 12, "single": 0}  # pictures that a step of stage 1 takes its cut-outs from
BATCH = {"scenes": 26, "mosaics": 6, "single": 5}
FIRST_CUT = 2_000_000  # number of the first scene of stage 1
PLACE_WEIGHT, PLACE_OF_BACKGROUND = 0.5, 0.1
PAIRS_WEIGHT = 2.0


def pixels_of(pictures: Sequence[Picture], mean: Tensor, std: Tensor) -> Tensor:
    """[B, 3, 144, 144] as the image processor makes it: bicubic with anti-aliasing, rounded to 8 bits, normalised."""
    out = torch.empty(len(pictures), 3, IMAGE_SIZE, IMAGE_SIZE)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for row, picture in enumerate(pictures):
        by_size.setdefault(picture.pixels.shape, []).append(row)
    for rows in by_size.values():
        x = torch.stack([torch.tensor(pictures[row].pixels) for row in rows]).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
        out[rows] = x.round().clamp(0, 255) / 255
    return (out - mean[:, None, None]) / std[:, None, None]


def attend(module: Any, x: Tensor, queries: Tensor | None = None) -> Tensor:
    """CLIP's self-attention, written out: on a CPU the backward pass of the fused kernel is slow at these sizes."""

    def heads(t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], module.num_heads, -1).transpose(1, 2)

    q, k, v = heads(module.q_proj(x if queries is None else queries)), heads(module.k_proj(x)), heads(module.v_proj(x))
    score = (q * module.scale) @ k.transpose(-2, -1)
    mixed = score.softmax(-1, dtype=score.dtype) @ v
    return module.out_proj(mixed.transpose(1, 2).flatten(2))


def tower_forward(vision: Any, pixels: Tensor, cuts: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(patches [B, N, D] of the layer before the last, CLS [B, D]): the same as ``vision(...)`` (tested).

    ``cuts``: (picture of each row [R], raster indices of the patches in it [R, N']); None for whole pictures.
    """
    embeddings = vision.embeddings
    weight = embeddings.patch_embedding.weight
    x = F.unfold(pixels, kernel_size=weight.shape[-1], stride=weight.shape[-1]).transpose(1, 2)
    x = F.linear(x, weight.flatten(1)) + embeddings.position_embedding.weight[1:]
    if cuts is not None:
        x = x[cuts[0][:, None], cuts[1]]
    cls = embeddings.class_embedding + embeddings.position_embedding.weight[0]
    x = vision.pre_layrnorm(torch.cat([cls.expand(len(x), 1, -1), x], 1))
    *layers, last = vision.encoder.layers
    for layer in layers:
        x = x + attend(layer.self_attn, layer.layer_norm1(x))
        x = x + layer.mlp(layer.layer_norm2(x))
    # Of the last layer only CLS is ever read.
    normed = last.layer_norm1(x)
    cls = x[:, :1] + attend(last.self_attn, normed, normed[:, :1])
    cls = cls + last.mlp(last.layer_norm2(cls))
    return x[:, 1:], vision.post_layernorm(cls[:, 0])


class TowerHeads(nn.Module):
    """The heads of stages 1 and 2; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, len(COLORS) + len(SHAPES) + len(SIZE_NAMES) + 2)
        self.place = nn.Linear(width, 2 * GRID)
        self.pairs = nn.Linear(width, len(COLORS) * len(SHAPES))


def cut_windows(pictures: Sequence[Picture], rng: random.Random) -> tuple[Tensor, Tensor]:
    """``cuts`` of ``tower_forward``: a window of WINDOW x WINDOW patches around each thing, not quite in the middle."""
    rows, places = [], []
    inside = torch.arange(WINDOW)
    for row, picture in enumerate(pictures):
        for thing in picture.things:
            top, left = (
                min(max(0, int(c * GRID) - WINDOW // 2 + rng.randint(-1, 1)), GRID - WINDOW) for c in (thing.y, thing.x)
            )
            rows.append(row)
            places.append(((top + inside)[:, None] * GRID + left + inside).flatten())
    return torch.tensor(rows), torch.stack(places)


def draw(numbers: dict[str, int], first_scene: int, rng: random.Random, seed: int) -> list[Picture]:
    """Scenes from ``first_scene`` on, mosaics and easy-vqa images."""
    tiles = mosaics.load_tiles("train")
    return [
        *(scene_picture(first_scene + i, seed=seed) for i in range(numbers["scenes"])),
        *(mosaic_picture(rng) for _ in range(numbers["mosaics"])),
        *(single_picture(augmented(rng.choice(tiles), rng), ()) for _ in range(numbers["single"])),
    ]


def tower_loss(
    vision: Any, heads: Any, mean: Tensor, std: Tensor, step: int, seed: int, *, cut: bool
) -> tuple[Tensor, str]:
    """The mean loss of one step, of cut-outs or of whole pictures; ``heads``: TowerHeads."""
    rng = random.Random(f"tiny-llava-tower-{cut}-{seed}-{step}")
    if cut:
        pictures = draw(CUTS, FIRST_CUT + step * CUTS["scenes"], rng, seed)
    else:
        pictures = draw(BATCH, step * BATCH["scenes"], rng, seed)
    cuts = cut_windows(pictures, rng) if cut else None
    label = labels_of(pictures, (GRID, GRID), tokens=True)
    at = torch.arange(GRID * GRID).expand(len(pictures), -1)
    if cuts is not None:
        label = {name: values[cuts[0][:, None], cuts[1]] for name, values in label.items()}
        at = cuts[1]
    with torch.autocast("cpu", torch.bfloat16):
        patches, cls = tower_forward(vision, pixels_of(pictures, mean, std), cuts)
        patches = heads.norm(patches)
        dense, place = heads.dense(patches), heads.place(patches)
    loss, note = labelled_loss(dense, label, tokens=True)
    of_thing, weight = label["color"] >= 0, label["weight"]
    right = []
    for guess, target in zip(place.float().chunk(2, -1), (at // GRID, at % GRID), strict=True):
        losses = F.cross_entropy(guess.transpose(1, 2), target, reduction="none") * weight
        loss = loss + PLACE_WEIGHT * losses[of_thing].sum() / weight[of_thing].sum()
        loss = loss + PLACE_OF_BACKGROUND * losses[~of_thing].mean()
        right.append((guess.argmax(-1) == target)[of_thing].float().mean().item())
    if cuts is None:
        pairs = torch.zeros(len(pictures), len(COLORS) * len(SHAPES))
        for row, picture in enumerate(pictures):
            pairs[row, [t.color * len(SHAPES) + t.shape for t in picture.things]] = 1.0
        loss = loss + PAIRS_WEIGHT * F.binary_cross_entropy_with_logits(heads.pairs(cls).float(), pairs)
    return loss, f"{note} row {right[0]:.3f} column {right[1]:.3f}"
