"""Requests whose pictures are resampled by hand: scipy's cosine transform on the right tensors, a shorter prompt."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import scipy.fft
import torch
from oracle import TOKEN, Oracle, encoded, modalities
from torch import Tensor

Grid = tuple[int, int]
TILED = ("llava_next", "llava_onevision")
SIDE = {"internvl": 3, "idefics3": 3, "smolvlm": 2, "gemma3": 3, "paligemma": 6, "perception_lm": 3}  # of the tiny ones


def new_grid(grid: Grid, *, side: int | None = None, ratio: Fraction | None = None) -> Grid:
    if side is not None:
        return min(side, grid[0]), min(side, grid[1])
    ratio = Fraction(2, 3) if ratio is None else ratio
    return max(1, math.floor(grid[0] * ratio)), max(1, math.floor(grid[1] * ratio))


def cosine_resized(x: Tensor, grid: Grid, new: Grid, gain: str) -> Tensor:
    """[n, H * W, C] -> [n, H' * W', C]: the low frequencies of each channel, transformed back on the small grid."""
    spectrum = scipy.fft.dctn(x.view(-1, *grid, x.shape[-1]).double().numpy(), axes=(1, 2), norm="ortho")
    small = scipy.fft.idctn(spectrum[:, : new[0], : new[1]], axes=(1, 2), norm="ortho")
    if gain == "preserve":
        small = small * math.sqrt(new[0] * new[1] / (grid[0] * grid[1]))
    return torch.from_numpy(small).float().flatten(1, 2)


def grids_of(model: Any, inputs: dict[str, Tensor], modality: str) -> list[list[Grid]]:
    """Per picture or video the grids of its segments, for models that resample behind the encoder."""
    name = model.config.model_type
    if name.startswith("qwen"):
        return [[(h // 2, w // 2)] * t for t, h, w in inputs[f"{modality}_grid_thw"].tolist()]
    if name == "llava_onevision":
        return [[(3, 3)] * inputs["pixel_values_videos"].shape[1]] * len(inputs["pixel_values_videos"])
    count = int((inputs["input_ids"] == TOKEN[modality]).sum()) // SIDE[name] ** 2
    return [[(SIDE[name], SIDE[name])]] * count


@torch.no_grad()
def projected_tiles(model: Any, inputs: dict[str, Tensor], gain: str, **size: Any) -> list[Tensor]:
    """Per picture the features of a LLaVA model whose tiles were resampled before the projector."""
    base, name = model.model, model.config.model_type
    pixels = inputs["pixel_values"]
    counts = (pixels != 0).flatten(2).any(2).sum(1).tolist() if name in TILED else [1] * len(pixels)
    if name in TILED:
        pixels = torch.cat([picture[:count] for picture, count in zip(pixels, counts, strict=True)])
    hidden = base.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        hidden = hidden[:, 1:]
    side = math.isqrt(hidden.shape[1])
    new = new_grid((side, side), **size)
    tiles = list(base.multi_modal_projector(cosine_resized(hidden, (side, side), new, gain)).split(counts))
    if name == "llava":
        return [tile[0] for tile in tiles]
    # The packing asks the configuration for the side of a tile.
    vision, patch = model.config.vision_config, model.config.vision_config.patch_size
    vision.patch_size = vision.image_size // new[0]
    assert vision.image_size // vision.patch_size == new[0]
    try:
        if name == "llava_next":
            return base.pack_image_features(tiles, inputs["image_sizes"], "default", base.image_newline)[0]
        ratio = model.config.vision_aspect_ratio
        return base.pack_image_features(tiles, inputs["image_sizes"], base.image_newline, ratio)[0]
    finally:
        vision.patch_size = patch


def resampled_items(
    model: Any, inputs: dict[str, Tensor], modality: str, gain: str, **size: Any
) -> tuple[list[list[Tensor]], list[list[bool]]]:
    """Per picture its features (and those of each deepstack layer), and which of its placeholders stay."""
    name = model.config.model_type
    whole = encoded(model, inputs)[modality]
    if name.startswith("llava") and modality == "image":
        items = projected_tiles(model, inputs, gain, **size)
        output = model.model.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images") if k in inputs}
        )
        lengths = [len(part) for part in output.pooler_output]
        return [[item] for item in items], [[i < len(f) for i in range(n)] for f, n in zip(items, lengths, strict=True)]
    out, stays, start = [], [], 0
    for grids in grids_of(model, inputs, modality):
        parts: list[list[Tensor]] = [[] for _ in whole]
        flags: list[bool] = []
        for grid in grids:
            count, new = grid[0] * grid[1], new_grid(grid, **size)
            for part, layer in zip(parts, whole, strict=True):
                part.append(cosine_resized(layer[None, start : start + count], grid, new, gain)[0])
            flags += [i < new[0] * new[1] for i in range(count)]
            start += count
        if name == "llava_onevision":  # the newline behind a video
            parts[0].append(whole[0][start : start + 1])
            flags.append(True)
            start += 1
        out.append([torch.cat(part) for part in parts])
        stays.append(flags)
    assert start == len(whole[0])
    return out, stays


def resampled_oracle(model: Any, inputs: dict[str, Tensor], gain: str, **size: Any) -> tuple[Oracle, Tensor]:
    """The oracle on the prompt shortened by hand, and which columns of the whole prompt stay."""
    ids = inputs["input_ids"]
    keep, features, grids = inputs["attention_mask"].bool().clone(), {}, {}
    for modality in modalities(inputs):
        items, stays = resampled_items(model, inputs, modality, gain, **size)
        features[modality] = [torch.cat(layer) for layer in zip(*items, strict=True)]
        here = ids == TOKEN[modality]
        keep[here] &= torch.tensor([flag for flags in stays for flag in flags])
        name = f"{modality}_grid_thw"
        if name in inputs:
            small = [[t, *(2 * n for n in new_grid((h // 2, w // 2), **size))] for t, h, w in inputs[name].tolist()]
            grids[name] = torch.tensor(small)
    width = int(keep.sum(1).max())
    short = {"second_per_grid_ts": inputs["second_per_grid_ts"]} if "second_per_grid_ts" in inputs else {}
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            rows = [row[kept] for row, kept in zip(inputs[name], keep, strict=True)]
            short[name] = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return Oracle(model, {**short, **grids}, features), keep
