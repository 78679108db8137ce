"""Tiny random models of the real classes, and prompts for them. Built from configs; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

IMAGE, VIDEO, VISION_START, VISION_END, PAD, VOCABULARY = 5, 6, 7, 8, 0, 120
SPECIAL = [IMAGE, VIDEO, VISION_START, VISION_END]
MODELS = ["llava", "qwen2_5_vl"]


def tiny(name: str, **options: Any):
    """The tiny model of ``MODELS`` under this name."""
    return {"llava": tiny_llava, "qwen2_5_vl": tiny_qwen2_5_vl}[name](**options)


def prompts(model: Any, pictures: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch for either model: ``pictures[i]`` pictures in row i. Qwen's pictures differ in size."""
    if model.config.model_type == "llava":
        return llava_inputs(model, pictures, seed=seed)
    sizes = [(8, 12), (6, 10), (4, 8)]
    grids, used = [], 0
    for count in pictures:
        grids.append([sizes[(used + i) % len(sizes)] for i in range(count)])
        used += count
    return qwen_inputs(model, grids, seed=seed)


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
        vision_config=tower(
            **{
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 24,
                "patch_size": 4,
                **({"initializer_range": 0.5, "initializer_factor": 4.0} if tower is CLIPVisionConfig else {}),
                **vision,
            }
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
    )
    return _ready(LlavaForConditionalGeneration(config), dtype, attention)


def tiny_qwen2_5_vl(
    *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, window: int = 8, **vision: Any
):
    """2 px patches merged 2 x 2, windows of 8 px (2 x 2 merged tokens), full attention in blocks 1 and 3 of four."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": window,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 32,
            "initializer_range": 0.3,
            **vision,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return _ready(Qwen2_5_VLForConditionalGeneration(config), dtype, attention)


def _ready(model: Any, dtype: torch.dtype, attention: str) -> Any:
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop early: every run has the same length
    # A random model may well choose a placeholder, and generate(use_cache=False) then looks for a picture to put there.
    model.generation_config.suppress_tokens = SPECIAL
    model = model.eval().to(dtype)
    model.set_attn_implementation(attention)
    return model


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


def qwen_inputs(
    model: Any, grids: list[list[tuple[int, int]]], *, seed: int = 1, words: int = 5
) -> dict[str, torch.Tensor]:
    """``grids[i]``: (h, w) in patches of the pictures in row i."""
    g = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    rows = []
    for number, pictures in enumerate(grids):
        row = torch.randint(10, VOCABULARY, (2 + number,), generator=g).tolist()
        for h, w in pictures:
            row += [VISION_START] + [IMAGE] * (h * w // vision.spatial_merge_size**2) + [VISION_END]
            row += torch.randint(10, VOCABULARY, (words,), generator=g).tolist()
        rows.append([*row, 11])
    inputs = left_padded(rows)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    flat = [grid for pictures in grids for grid in pictures]
    if flat:
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = sum(h * w for h, w in flat)
        inputs["pixel_values"] = torch.randn(patches, width, generator=g).to(model.dtype)
        inputs["image_grid_thw"] = torch.tensor([[1, h, w] for h, w in flat])
    return inputs


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
