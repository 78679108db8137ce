"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and prompts as their processors deliver them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_common import IMAGE, VIDEO, VISION_END, VISION_START, dealt, decoder, left_padded, ready, text
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

GRIDS = [(8, 12), (6, 10), (4, 8)]  # (h, w) in patches
FRAME = (4, 6)

TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}
# 2 px patches merged 2 x 2
VISION = {
    "depth": 4,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.3,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def tiny_qwen2_vl(*, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **vision: Any):
    """2 px patches merged 2 x 2; every block attends to the whole picture."""
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        vision_config={**VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, **vision},
        text_config=decoder(rope_parameters=MROPE),
        **TOKENS,
    )
    return ready(Qwen2VLForConditionalGeneration(config), dtype, attention)


def tiny_qwen2_5_vl(
    *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, window: int = 8, **vision: Any
):
    """2 px patches merged 2 x 2, windows of 8 px (2 x 2 merged tokens), full attention in blocks 1 and 3 of four."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config={
            **VISION,
            "hidden_size": 32,
            "intermediate_size": 48,
            "window_size": window,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 32,
            **vision,
        },
        text_config=decoder(rope_parameters=MROPE),
        **TOKENS,
    )
    return ready(Qwen2_5_VLForConditionalGeneration(config), dtype, attention)


def tiny_qwen3_vl(*, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **vision: Any):
    """2 px patches merged 2 x 2, a learned 6 x 6 grid of positions, blocks 0 and 2 feed decoder layers 0 and 1."""
    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        vision_config={
            **VISION,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
            **vision,
        },
        text_config=decoder(head_dim=8, rope_parameters={**MROPE, "mrope_section": [2, 1, 1]}),
        **TOKENS,
    )
    return ready(Qwen3VLForConditionalGeneration(config), dtype, attention)


def qwen_inputs(
    model: Any, grids: list[list[tuple[int, int]]], *, seed: int = 1, words: int = 5
) -> dict[str, torch.Tensor]:
    """``grids[i]``: (h, w) in patches of the pictures in row i."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for number, pictures in enumerate(grids):
        row = text(g, 2 + number)
        for h, w in pictures:
            row += _picture(model, h, w) + text(g, words)
        rows.append([*row, 11])
    inputs = _typed(rows)
    _add_pixels(model, inputs, "image", [(1, h, w) for pictures in grids for h, w in pictures], g)
    return inputs


def qwen_videos(
    model: Any,
    frames: list[int],
    *,
    seed: int = 1,
    words: int = 5,
    size: tuple[int, int] = FRAME,
    pictures: list[int] | None = None,
) -> dict[str, torch.Tensor]:
    """``frames[i]`` frames in the video of row i (0: none), ``pictures[i]`` pictures before it.

    Two frames make one slice of the grid, the last frame doubled if their number is odd. Qwen2-VL and Qwen2.5-VL give
    a video one run of placeholders; Qwen3-VL writes a time before each slice and gives each slice a run of its own.
    """
    g = torch.Generator().manual_seed(seed)
    model_type = model.config.model_type
    merged = size[0] * size[1] // model.config.vision_config.spatial_merge_size**2
    grids = dealt(pictures or [0] * len(frames), GRIDS)
    rows = []
    for number, (count, row_grids) in enumerate(zip(frames, grids, strict=True)):
        row = text(g, 2 + number)
        for h, w in row_grids:
            row += _picture(model, h, w) + text(g, words)
        slices = (count + 1) // 2
        if count and model_type == "qwen3_vl":
            row += [VISION_START]
            for _ in range(slices):
                row += [*text(g, 3), VISION_START, *[VIDEO] * merged, VISION_END]
            row += [VISION_END]
        elif count:
            row += [VISION_START, *[VIDEO] * (slices * merged), VISION_END]
        rows.append(row + text(g, words))
    inputs = _typed(rows)
    _add_pixels(model, inputs, "image", [(1, h, w) for row in grids for h, w in row], g)
    videos = [((count + 1) // 2, *size) for count in frames if count]
    _add_pixels(model, inputs, "video", videos, g)
    if videos and model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([0.5 * (1 + i % 2) for i in range(len(videos))])
    return inputs


def _picture(model: Any, h: int, w: int) -> list[int]:
    merged = h * w // model.config.vision_config.spatial_merge_size**2
    return [VISION_START, *[IMAGE] * merged, VISION_END]


def _typed(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    inputs = left_padded(rows)
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


def _add_pixels(
    model: Any,
    inputs: dict[str, torch.Tensor],
    modality: str,
    grids: list[tuple[int, int, int]],
    g: torch.Generator,
) -> None:
    if not grids:
        return
    vision = model.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), width, generator=g).to(model.dtype)
    inputs["pixel_values" if modality == "image" else "pixel_values_videos"] = pixels
    inputs[f"{modality}_grid_thw"] = torch.tensor(grids)
