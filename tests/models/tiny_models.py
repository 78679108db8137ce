"""Tiny random models of the real classes, and prompts for them. Built from configs; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_common import IMAGE, PAD, SPECIAL, VIDEO, VISION_END, VISION_START, VOCABULARY, dealt, left_padded
from tiny_fixed_grid import (
    gemma3_inputs,
    idefics_inputs,
    internvl_inputs,
    paligemma_inputs,
    perception_inputs,
    perception_videos,
    tiny_gemma3,
    tiny_idefics3,
    tiny_internvl,
    tiny_paligemma,
    tiny_perception_lm,
    tiny_smolvlm,
)
from tiny_llava_family import (
    llava_inputs,
    llava_next_inputs,
    llava_onevision_inputs,
    llava_onevision_videos,
    tiny_llava,
    tiny_llava_next,
    tiny_llava_onevision,
)
from tiny_qwen_family import GRIDS, qwen_inputs, qwen_videos, tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl

__all__ = [
    "ALL_MODELS",
    "IMAGE",
    "MODELS",
    "NO_CHUNKED_PREFILL",
    "PAD",
    "SPECIAL",
    "VIDEO",
    "VIDEO_MODELS",
    "VISION_END",
    "VISION_START",
    "VOCABULARY",
    "gemma3_inputs",
    "idefics_inputs",
    "internvl_inputs",
    "left_padded",
    "llava_inputs",
    "llava_next_inputs",
    "llava_onevision_inputs",
    "llava_onevision_videos",
    "paligemma_inputs",
    "perception_inputs",
    "perception_videos",
    "prompts",
    "qwen_inputs",
    "qwen_videos",
    "tiny",
    "tiny_gemma3",
    "tiny_idefics3",
    "tiny_internvl",
    "tiny_llava",
    "tiny_llava_next",
    "tiny_llava_onevision",
    "tiny_paligemma",
    "tiny_perception_lm",
    "tiny_qwen2_5_vl",
    "tiny_qwen2_vl",
    "tiny_qwen3_vl",
    "tiny_smolvlm",
    "video_prompts",
]

BUILDERS: dict[str, Callable[..., Any]] = {
    "llava": tiny_llava,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "llava_next": tiny_llava_next,
    "llava_onevision": tiny_llava_onevision,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "internvl": tiny_internvl,
    "idefics3": tiny_idefics3,
    "smolvlm": tiny_smolvlm,
    "gemma3": tiny_gemma3,
    "paligemma": tiny_paligemma,
    "perception_lm": tiny_perception_lm,
}
MODELS = ["llava", "qwen2_5_vl"]
ALL_MODELS = list(BUILDERS)
# Where generate(prefill_chunk_size=...) of the unwrapped model fails or changes the answer. Rows without pictures,
# alone or beside rows that have some, work with every class.
NO_CHUNKED_PREFILL = {
    "gemma3": "a chunk ends inside a picture, whose tokens see each other in both directions",
    "paligemma": "the prompt sees itself in both directions",
    "perception_lm": "the encoder's output class cannot be rebuilt from a slice (TypeError)",
}
VIDEO_MODELS = ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "perception_lm"]


def tiny(name: str, **options: Any):
    """The tiny model of ``ALL_MODELS`` under this name."""
    return BUILDERS[name](**options)


def prompts(model: Any, pictures: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch with everything the model's processor delivers: ``pictures[i]`` pictures in row i.

    Pictures differ in size or number of tiles where the family allows it.
    """
    family = model.config.model_type
    if family.startswith("qwen"):
        return qwen_inputs(model, dealt(pictures, GRIDS), seed=seed)
    build = {
        "llava": llava_inputs,
        "llava_next": llava_next_inputs,
        "llava_onevision": llava_onevision_inputs,
        "internvl": internvl_inputs,
        "idefics3": idefics_inputs,
        "smolvlm": idefics_inputs,
        "gemma3": gemma3_inputs,
        "paligemma": paligemma_inputs,
        "perception_lm": perception_inputs,
    }[family]
    return build(model, pictures, seed=seed)


def video_prompts(model: Any, frames: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch for a model of ``VIDEO_MODELS``: a video of ``frames[i]`` frames in row i, none for 0.

    The videos of a call differ in length with Qwen only: the others take them as one tensor.
    """
    build = {"llava_onevision": llava_onevision_videos, "perception_lm": perception_videos}
    return build.get(model.config.model_type, qwen_videos)(model, frames, seed=seed)
