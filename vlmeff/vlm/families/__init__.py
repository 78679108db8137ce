"""The model families that token reduction knows, by ``config.model_type``."""

from __future__ import annotations

from typing import Any

from vlmeff.errors import UnsupportedModelError
from vlmeff.vlm.families.base import Family
from vlmeff.vlm.families.fixed import Gemma3, Idefics3, InternVL, PaliGemma, SmolVLM
from vlmeff.vlm.families.generic import Generic
from vlmeff.vlm.families.llava import Llava
from vlmeff.vlm.families.llava_next import LlavaNext, LlavaOnevision
from vlmeff.vlm.families.perception_lm import PerceptionLM
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
        PerceptionLM(),
    )
}


def is_vlm(model: Any) -> bool:
    """Whether the model takes pictures."""
    return "image" in getattr(model, "input_modalities", ())


def family_of(model: Any) -> Family:
    """The family of a model: its own, or one that finds out the model's geometry at the first picture.

    Raises ``UnsupportedModelError`` with the list of supported model types for a class that offers neither.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if Generic.may_serve(model):
        return Generic(model)
    raise UnsupportedModelError(
        f"token reduction does not support {type(model).__name__} (model_type {model_type!r}). "
        f"Supported model types: {', '.join(sorted(FAMILIES))}, and classes that take mm_encoder_outputs and have "
        "get_image_features, where their geometry can be verified."
    )
