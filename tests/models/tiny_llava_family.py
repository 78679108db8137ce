"""Tiny LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision, and prompts as their processors deliver them."""

from __future__ import annotations

import math
from typing import Any

import torch
from tiny_common import (
    IMAGE,
    PATCH,
    SIDE,
    VIDEO,
    VOCABULARY,
    dealt,
    decoder,
    interleaved,
    left_padded,
    ready,
    sharpen,
    vit,
)
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

CLIP_INIT = {"initializer_range": 0.5, "initializer_factor": 4.0}
ONEVISION_SIDE = 20  # a grid of 5 x 5: odd, as the 27 x 27 of the real tower, so that pooling it to 3 x 3 rounds up

# (height, width) of pictures, with the tokens they give. 24 px tiles: 1 x 3 cut above and below (112), 2 x 1 cut left
# and right (96), one tile cut (64), 2 x 2 uncut (192), 1 x 3 cut left and right by less than the whole margin (138).
NEXT_PICTURES = [(16, 60), (45, 17), (14, 20), (48, 48), (20, 50)]
NEXT_PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
# 20 px tiles: 1 x 2 cut (58), one tile cut (43), 3 x 4 = 12 > 9 tiles, so interpolated (241), 2 x 1 cut (65).
ONEVISION_PICTURES = [(10, 40), (12, 18), (58, 78), (40, 13)]
ONEVISION_PINPOINTS = [[20, 20], [20, 40], [40, 20], [40, 40], [60, 80]]


def tiny_llava(
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    tower: type = CLIPVisionConfig,
    layer: int = -2,
    strategy: str = "default",
    **vision: Any,
):
    """24 px pictures in 4 px patches: 6 x 6 = 36 tokens; four vision layers, layer -2 is read."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=tower(**vit(**({**CLIP_INIT, **vision} if tower is CLIPVisionConfig else vision))),
        text_config=LlamaConfig(**decoder()),
        image_token_id=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
    )
    return ready(LlavaForConditionalGeneration(config), dtype, attention)


def tiny_llava_next(
    *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, layer: int = -2, **vision: Any
):
    """A thumbnail and a mosaic of tiles, each 6 x 6, the mosaic unpadded and closed by a newline token per row."""
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vit(**{**CLIP_INIT, **vision})),
        text_config=LlamaConfig(**decoder()),
        image_token_id=IMAGE,
        image_grid_pinpoints=NEXT_PINPOINTS,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return ready(LlavaNextForConditionalGeneration(config), dtype, attention)


def tiny_llava_onevision(
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    aspect_ratio: str = "anyres_max_9",
    **vision: Any,
):
    """SigLIP tiles of 5 x 5 without CLS, layer -1; videos pooled to 3 x 3 a frame with one newline at the end."""
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vit(image_size=ONEVISION_SIDE, vision_use_head=False, **vision)),
        text_config={"model_type": "qwen2", **decoder()},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=ONEVISION_PINPOINTS,
        vision_aspect_ratio=aspect_ratio,
        tie_word_embeddings=False,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    sharpen(model.model.vision_tower)
    return ready(model, dtype, attention)


def llava_inputs(model: Any, pictures: list[int], *, seed: int = 1, words: int = 6) -> dict[str, torch.Tensor]:
    """A left-padded batch; ``pictures[i]`` pictures in row i, rows of different length."""
    g = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    n = (vision.image_size // vision.patch_size) ** 2
    rows = []
    for number, count in enumerate(pictures):
        row = torch.randint(10, VOCABULARY, (2 + number,), generator=g).tolist()
        for _ in range(count):
            row += [IMAGE] * n + torch.randint(10, VOCABULARY, (words - number % 2,), generator=g).tolist()
        rows.append(row + torch.randint(10, VOCABULARY, (3,), generator=g).tolist())
    inputs = left_padded(rows)
    if sum(pictures):
        shape = (sum(pictures), 3, vision.image_size, vision.image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=g).to(model.dtype)
    return inputs


def llava_next_inputs(
    model: Any, pictures: list[int], *, seed: int = 1, sizes: list[tuple[int, int]] | None = None
) -> dict[str, torch.Tensor]:
    """Pictures of the sizes ``sizes`` in turn; pixel_values [pictures, most tiles, 3, 24, 24], zero beyond a picture's
    own tiles."""
    g = torch.Generator().manual_seed(seed)
    rows = dealt(pictures, sizes or NEXT_PICTURES)
    pinpoints, side = model.config.image_grid_pinpoints, SIDE // PATCH
    inputs = interleaved([[[IMAGE] * packed(size, pinpoints, SIDE, side) for size in row] for row in rows], g)
    flat = [size for row in rows for size in row]
    if flat:
        inputs["pixel_values"] = _tiles([1 + math.prod(mosaic(s, pinpoints, SIDE)) for s in flat], SIDE, g, model.dtype)
        inputs["image_sizes"] = torch.tensor(flat)
    return inputs


def llava_onevision_inputs(
    model: Any,
    pictures: list[int],
    *,
    seed: int = 1,
    sizes: list[tuple[int, int]] | None = None,
    nested: bool = True,
) -> dict[str, torch.Tensor]:
    """As LLaVA-NeXT, but a row of several pictures has one tile for each (grid and one newline token).

    Rows without a picture do not appear in ``batch_num_images``, as in the real image processor. With ``nested=False``
    the processor got one flat list of pictures: it then counts each as a sample of its own and cuts all into tiles.
    """
    g = torch.Generator().manual_seed(seed)
    rows = dealt(pictures, sizes or ONEVISION_PICTURES)
    pinpoints, side = model.config.image_grid_pinpoints, ONEVISION_SIDE // PATCH
    most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    blocks, tiles = [], []
    for row in rows:
        alone = len(row) == 1 or not nested
        counts = [packed(s, pinpoints, ONEVISION_SIDE, side, most) if alone else side**2 + 1 for s in row]
        blocks.append([[IMAGE] * count for count in counts])
        tiles += [1 + math.prod(mosaic(s, pinpoints, ONEVISION_SIDE)) if alone else 1 for s in row]
    inputs = interleaved(blocks, g)
    if tiles:
        inputs["pixel_values"] = _tiles(tiles, ONEVISION_SIDE, g, model.dtype)
        inputs["image_sizes"] = torch.tensor([size for row in rows for size in row])
        inputs["batch_num_images"] = torch.tensor(
            [count for count in pictures if count] if nested else [1] * len(tiles)
        )
    return inputs


def llava_onevision_videos(model: Any, frames: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """``frames[i]`` frames in the video of row i; videos of one call share their length: they come as one tensor."""
    g = torch.Generator().manual_seed(seed)
    lengths = [count for count in frames if count]
    pooled = -(-(ONEVISION_SIDE // PATCH) // 2)
    inputs = interleaved([[[VIDEO] * (count * pooled**2 + 1)] if count else [] for count in frames], g)
    shape = (len(lengths), lengths[0], 3, ONEVISION_SIDE, ONEVISION_SIDE)
    inputs["pixel_values_videos"] = torch.randn(shape, generator=g).to(model.dtype)
    return inputs


def mosaic(size: tuple[int, int], pinpoints: list[list[int]], tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles: the canvas that shows most of the picture's pixels, then the one with least waste."""

    def merit(canvas: list[int]) -> tuple[int, int]:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    height, width = max(pinpoints, key=merit)
    return height // tile, width // tile


def packed(size: tuple[int, int], pinpoints: list[list[int]], tile: int, side: int, most: int | None = None) -> int:
    """Placeholders of one picture: the thumbnail, the mosaic without its padding, a newline per row of the mosaic.

    ``most``: a mosaic of more than 1.1^2 * most tiles shrinks to ``most`` tiles (LLaVA-OneVision's anyres_max).
    """
    rows, columns = mosaic(size, pinpoints, tile)
    height, width = rows * side, columns * side
    if size[1] / size[0] > width / height:
        height -= 2 * ((height - int(round(size[0] * width / size[1], 7))) // 2)
    else:
        width -= 2 * ((width - int(round(size[1] * height / size[0], 7))) // 2)
    excess = math.sqrt(height * width / (most * side**2)) if most else 0
    if excess > 1.1:
        height, width = int(height // excess), int(width // excess)
    return side**2 + height * (width + 1)


def _tiles(counts: list[int], side: int, g: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    pixels = torch.zeros(len(counts), max(counts), 3, side, side)
    for picture, count in zip(pixels, counts, strict=True):
        picture[:count] = torch.randn(count, 3, side, side, generator=g)
    return pixels.to(dtype)
