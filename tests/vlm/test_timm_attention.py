"""Scores of timm towers against the attention maps that timm's own unfused attention makes."""

from __future__ import annotations

from contextlib import contextmanager

import open_clip
import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import nn

from vlmeff.errors import UnsupportedModelError
from vlmeff.vlm.families.timm_attention import timm_attention_layers, timm_query_key
from vlmeff.vlm.probe import column_mean, probe

DIM, HEADS, TOKENS = 24, 4, 11
# Means of float32 probabilities, summed in another order.
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}

EVA = [
    {"qkv_fused": fused, "qkv_bias": bias, "qkv_bias_separate": separate, "qk_norm": norm, "rotate_half": half}
    for fused in (True, False)
    for bias, separate in ((False, False), (True, False), (True, True))
    for norm, half in ((False, False), (True, True))
]
ROPE = [
    {"qkv_fused": True, "qk_norm": True, "scale_norm": True, "gated": True},
    {"qkv_fused": False, "rotate_half": True},
    {"qkv_fused": False, "num_kv_heads": 2, "qk_norm": True},
    {"qkv_fused": False, "num_kv_heads": 1, "attn_head_dim": 8},
]


@contextmanager
def maps_of(module):
    """The attention probabilities [B, H, M, M] of every call, which the unfused path hands to its dropout."""
    seen, fused = [], module.fused_attn
    module.fused_attn = False
    handle = module.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()
        module.fused_attn = fused


@torch.no_grad()
def randomised(module, seed=0):
    """Every parameter and buffer drawn anew: many start at zero or one, which hides them."""
    torch.manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.normal_()
    return module.eval()


def check(module, x, **kwargs):
    with torch.no_grad(), maps_of(module) as maps:
        module(x, **kwargs)
        score = column_mean(timm_query_key(module, x, kwargs))
    assert maps[0].std(-1).mean() > 0.02  # far from uniform, or nothing is tested
    torch.testing.assert_close(score, maps[0].mean((1, 2)), **TOLERANCE)


def picture(seed=1):
    return torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"qk_norm": True, "attn_head_dim": 10}], ids=str
)
def test_the_attention_of_a_plain_vit(options):
    check(randomised(Attention(DIM, HEADS, norm_layer=nn.LayerNorm, **options)), picture())


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("options", EVA, ids=str)
def test_the_attention_of_eva_with_and_without_rotary_positions(options, prefix):
    options = {**options, "scale_norm": False, "norm_layer": nn.LayerNorm, "num_prefix_tokens": prefix}
    module = randomised(EvaAttention(DIM, HEADS, **options))
    check(module, picture())
    check(module, picture(), rope=torch.randn(TOKENS - prefix, 2 * DIM // HEADS))


@pytest.mark.parametrize("axes", [(), (HEADS,), (2, 1)], ids=["all alike", "per head", "per picture"])
@pytest.mark.parametrize("options", ROPE, ids=str)
def test_rope_attention_with_fewer_key_heads_and_positions_per_head_or_picture(options, axes):
    if axes == (HEADS,) and "num_kv_heads" in options:
        axes = (1,)
    module = randomised(AttentionRope(DIM, HEADS, norm_layer=nn.LayerNorm, num_prefix_tokens=2, **options))
    check(module, picture(), rope=torch.randn(*axes, TOKENS - 2, 2 * module.head_dim))


@pytest.mark.parametrize(
    "kwargs", [{"attn_mask": torch.zeros(TOKENS, TOKENS)}, {"is_causal": True}], ids=["mask", "causal"]
)
def test_masked_attention_is_refused(kwargs):
    with pytest.raises(UnsupportedModelError, match=r"masked.*downsample"):
        timm_query_key(Attention(DIM, HEADS), picture(), kwargs)


SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 24, "patch_size": 4}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vit_tiny_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_pe_lang_large_patch14_448", {"ref_feat_shape": (6, 6)}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
    ],
)
def test_probed_layers_of_whole_timm_models(name, more):
    model = randomised(timm.create_model(name, num_classes=0, **SMALL, **more))
    layers = timm_attention_layers(model)
    assert len(layers) == 3
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), maps_of(layers[1]) as maps, probe({"deep": layers[1]}, timm_query_key) as recorded:
        model.forward_features(x)
    (score,) = recorded["deep"]
    torch.testing.assert_close(score, maps[0].mean((1, 2)), **TOLERANCE)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
def test_probed_layers_of_a_timm_tower_of_open_clip(name):
    vision = {"timm_model_name": name, "image_size": 160, "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CustomTextCLIP(12, vision, text).eval()
    layer = timm_attention_layers(model.visual)[-1]
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), maps_of(layer) as maps, probe({"deep": layer}, timm_query_key) as recorded:
        model.encode_image(x)
    torch.testing.assert_close(recorded["deep"][0], maps[0].mean((1, 2)), **TOLERANCE)


def test_a_tower_without_such_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"ConvNeXt.*downsample"):
        timm_attention_layers(timm.create_model("test_convnext"))
