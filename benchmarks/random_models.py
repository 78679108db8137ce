"""Vision-language models of realistic geometry with random weights, and one request for each.

Time and memory do not depend on the weights' values; accuracy is measured elsewhere, with trained weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# config.json of openai/clip-vit-large-patch14-336, of the language models' hub pages, and of Qwen2.5-VL-7B's tower.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
QWEN2_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN25_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
SMOKE_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
SMOKE_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
IMAGE_TOKEN = 5
PATCHES = (48, 48)  # of the Qwen picture: 24 x 24 visual tokens after merging, as many as LLaVA's
BEFORE, AFTER = 35, 30  # text tokens: LLaVA-1.5's system prompt, and a question of a benchmark


def _llava(tower: dict[str, Any], text: dict[str, Any], text_config: str) -> Callable[..., Any]:
    def config() -> tuple[Any, Any, dict[str, Any]]:
        import transformers

        language = getattr(transformers, text_config)(**text)
        cls = transformers.LlavaForConditionalGeneration
        llava = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**tower),
            text_config=language,
            image_token_id=IMAGE_TOKEN,
            tie_word_embeddings=language.tie_word_embeddings,
        )
        return cls, llava, {"class": cls.__name__, "tower": tower, "language_model": {"config": text_config, **text}}

    return config


def _qwen() -> tuple[Any, Any, dict[str, Any]]:
    import transformers

    head = QWEN2_05B["hidden_size"] // QWEN2_05B["num_attention_heads"]
    section = [head // 8, head * 3 // 16, head * 3 // 16]  # as 16, 24, 24 of the real models' 128
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={**QWEN25_TOWER, "out_hidden_size": QWEN2_05B["hidden_size"]},
        text_config={**QWEN2_05B, "rope_parameters": rope},
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
        tie_word_embeddings=True,
    )
    cls = transformers.Qwen2_5_VLForConditionalGeneration
    return cls, config, {"class": cls.__name__, "tower": QWEN25_TOWER, "language_model": QWEN2_05B}


GEOMETRIES: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {
    "llava-7b": _llava(CLIP_L_336, VICUNA_7B, "LlamaConfig"),
    "llava-0.5b": _llava(CLIP_L_336, QWEN2_05B, "Qwen2Config"),
    "qwen2.5-vl-0.5b": _qwen,
    "smoke": _llava(SMOKE_TOWER, SMOKE_TEXT, "LlamaConfig"),
}


def build(
    name: str, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """The model in evaluation mode, what ``generate`` is called with, and the geometry in plain values.

    The weights are drawn on ``device`` in ``dtype``: a 7 B model never exists on the host.
    """
    torch.manual_seed(seed)
    cls, config, geometry = GEOMETRIES[name]()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    model = model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    inputs = _inputs(model, torch.Generator().manual_seed(seed))
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    visual = int((inputs["input_ids"] == IMAGE_TOKEN).sum())
    geometry |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "visual_tokens": visual,
        "text_tokens": inputs["input_ids"].numel() - visual,
        "attention": config._attn_implementation,
    }
    return model, inputs, geometry


def _inputs(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    vision = model.config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        height, width = PATCHES
        count = height * width // vision.spatial_merge_size**2
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(height * width, channels, generator=generator)
        extra = {"image_grid_thw": torch.tensor([[1, height, width]])}
    else:
        count = (vision.image_size // vision.patch_size) ** 2
        pixels, extra = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator), {}
    words = torch.randint(16, 120, (BEFORE + AFTER,), generator=generator)
    ids = torch.cat([words[:BEFORE], torch.full((count,), IMAGE_TOKEN), words[BEFORE:]])[None]
    if extra:
        extra["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **extra}
