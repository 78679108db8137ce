"""The model families that token reduction knows, by ``config.model_type``."""

from __future__ import annotations

from typing import Any

from vlmeff.errors import UnsupportedModelError
from vlmeff.vlm.families.base import Family
from vlmeff.vlm.families.fixed import Gemma3, Idefics3, InternVL, PaliGemma, SmolVLM
from vlmeff.vlm.families.llava import Llava
from vlmeff.vlm.families.llava_next import LlavaNext, LlavaOnevision
from vlmeff.vlm.families.qwen import Qwen2_5VL, Qwen2VL, Qwen3VL, Qwen3VLMoe

__all__ = ["FAMILIES", "Family", "family_of", "is_vlm"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Llava(),
        LlavaNext(),
        LlavaOnevision(),
        Qwen2VL(),
        Qwen2_5VL(),
        Qwen3VL(),
        Qwen3VLMoe(),
        InternVL(),
        Idefics3(),
        SmolVLM(),
        Gemma3(),
        PaliGemma(),
    )
}


def is_vlm(model: Any) -> bool:
    """Whether the model takes pictures."""
    return "image" in getattr(model, "input_modalities", ())


def family_of(model: Any) -> Family:
    """The family of a model; raises ``UnsupportedModelError`` with the list of supported ones."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"token reduction does not support {type(model).__name__} (model_type {model_type!r}). "
            f"Supported model types: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
