"""Tiny models of classes without a family of their own, and prompts for them."""

from __future__ import annotations

import torch
from tiny_common import IMAGE, SIDE, decoder, interleaved, ready, sharpen, vit
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

SIGLIP = {"model_type": "siglip_vision_model", **vit(vision_use_head=False)}


def build(model_class, config, attention="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    model = model_class(config)
    sharpen(model.model)
    return ready(model, dtype, attention)


def aya(attention="sdpa", layer=-2, dtype=torch.float32):
    """SigLIP's last but one layer, 2 x 2 patches shuffled into one token."""
    config = AyaVisionConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "cohere2", **decoder(head_dim=8)},
        image_token_id=IMAGE,
        downsample_factor=2,
        vision_feature_layer=layer,
    )
    return build(AyaVisionForConditionalGeneration, config, attention, dtype)


def vipllava(attention="sdpa", layers=-2):
    """CLIP's last but one layer without the class token, or several layers."""
    config = VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vit()},
        text_config={"model_type": "llama", **decoder()},
        image_token_index=IMAGE,
        vision_feature_layers=layers,
    )
    return build(VipLlavaForConditionalGeneration, config, attention)


def deepseek(attention="sdpa", dtype=torch.float32):
    """SigLIP's normalised output, one token per patch."""
    config = DeepseekVLConfig(
        vision_config=SIGLIP, text_config={"model_type": "llama", **decoder()}, image_token_id=IMAGE
    )
    return build(DeepseekVLForConditionalGeneration, config, attention, dtype)


def fast(attention="sdpa"):
    """A tower of convolutions: maps [channels, 5, 5] and no attention."""
    tower = TimmWrapperConfig(architecture="test_convnext", do_pooling=True, hidden_size=64)
    config = FastVlmConfig(vision_config=tower, text_config={"model_type": "qwen2", **decoder()}, image_token_id=IMAGE)
    return build(FastVlmForConditionalGeneration, config, attention)


def idefics2():
    perceiver = {"hidden_size": 32, "resampler_n_latents": 9, "resampler_depth": 1, "resampler_n_heads": 4}
    config = Idefics2Config(
        vision_config=vit(),
        perceiver_config={**perceiver, "resampler_head_dim": 8, "num_key_value_heads": 2},
        text_config={"model_type": "llama", **decoder()},
        image_token_id=IMAGE,
    )
    return build(Idefics2ForConditionalGeneration, config)


# name: (builder, side of the pictures, tower tokens (raster and before it), tokens, 0-based layer that is projected)
UNLISTED = {
    "aya": (aya, SIDE, (6, 0), 3, 2),
    "vipllava": (vipllava, SIDE, (6, 1), 6, 2),
    "deepseek": (deepseek, SIDE, (6, 0), 6, 3),
    "fast": (fast, 160, (5, 0), 5, None),
}


def inputs_of(name, pictures=(1, 0, 2), seed=1):
    _, side, _, tokens, _ = UNLISTED[name]
    g = torch.Generator().manual_seed(seed)
    inputs = interleaved([[[IMAGE] * tokens**2] * count for count in pictures], g)
    return {**inputs, "pixel_values": torch.randn(sum(pictures), 3, side, side, generator=g)}
