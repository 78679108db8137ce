"""Families on meta-device instances of the real configurations: which layers, how many, what share, how many bytes."""

import functools

import pytest
import torch
from torch import nn

from vlmeff.diffusion.families import (
    FAMILIES,
    READS_WEIGHT,
    dry_run,
    family_of,
    find_family,
    repeated_block_rules,
    rules_for,
    supported_classes,
    text_encoder_rules,
)
from vlmeff.diffusion.rules import Rule, bytes_of, choose_layers, layer_report
from vlmeff.diffusion.schemes import get_scheme
from vlmeff.errors import QuantConfigError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")

GIB = 2**30
WAN_1B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
# 2B, HunyuanVideo and LTX (2B) are the defaults of their classes, Wan-14B too.
REAL = {
    "wan-1.3b": ("WanTransformer3DModel", WAN_1B),
    "wan-14b": ("WanTransformer3DModel", {}),
    "wan-i2v-14b": ("WanTransformer3DModel", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    "wan-vace-1.3b": ("WanVACETransformer3DModel", {**WAN_1B, "vace_layers": list(range(0, 30, 2))}),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}),
    "cogvideox1.5-5b": (
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "num_layers": 42,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_height": 96,
            "sample_width": 170,
            "sample_frames": 81,
            "use_rotary_positional_embeddings": True,
        },
    ),
    "hunyuanvideo": ("HunyuanVideoTransformer3DModel", {}),
    "ltx": ("LTXVideoTransformer3DModel", {}),
}


@functools.cache
def real(name: str) -> nn.Module:
    cls, config = REAL[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return getattr(diffusers, cls)(**config)
    finally:
        torch.set_default_dtype(before)


def chosen(name, scheme="w8a8_int8"):
    return choose_layers(real(name), scheme, family_of(real(name)).rules)


def in_blocks(choice):
    return "blocks." in choice.name and "refiner" not in choice.name


@pytest.mark.parametrize(
    ("name", "linears", "quantized", "kept"),
    [
        ("wan-1.3b", 306, 30 * 10, 6),
        ("wan-14b", 406, 40 * 10, 6),
        ("wan-i2v-14b", 488, 40 * 12, 8),
        ("wan-vace-1.3b", 306 + 15 * 10 + 16, 45 * 10, 22),
        ("cogvideox-2b", 245, 30 * 8, 5),
        ("cogvideox1.5-5b", 342, 42 * 8, 6),
        # two streams: 8 of attention, 4 of feed-forward, 2 modulations; one stream: q, k, v, mlp, out, modulation
        ("hunyuanvideo", 547, 20 * 14 + 40 * 6, 27),
        ("ltx", 28 * 10 + 7, 28 * 10, 7),
    ],
)
def test_layer_counts_of_the_real_models(name, linears, quantized, kept):
    choices = chosen(name)
    assert len(choices) == sum(isinstance(m, nn.Linear) for m in real(name).modules()) == linears
    assert sum(choice.scheme is not None for choice in choices) == quantized
    assert sum(choice.scheme is None for choice in choices) == kept
    assert {choice.name for choice in choices if choice.scheme} == {c.name for c in choices if in_blocks(c)} - {
        c.name for c in choices if c.name.startswith("vace_blocks") and "proj_" in c.name.split(".")[2]
    }
    assert all(choice.pattern and choice.reason for choice in choices)  # every layer is named by some rule


@pytest.mark.parametrize(("name", "share"), [("wan-1.3b", 0.982), ("wan-14b", 0.984), ("ltx", 0.978)])
def test_quantized_share_of_linear_parameters(name, share):
    assert round(layer_report(chosen(name)).share, 3) == share


@pytest.mark.parametrize(
    ("name", "share"), [("cogvideox-2b", 0.21), ("cogvideox1.5-5b", 0.14), ("hunyuanvideo", 0.265)]
)
def test_modulation_layers_are_weight_only_whatever_the_scheme(name, share):
    choices = chosen(name, "w4a4_int")
    modulation = [choice for choice in choices if choice.scheme == "w8a16_int8"]
    assert all("norm" in choice.name for choice in modulation)
    assert not any("norm" in choice.name for choice in choices if choice.scheme == "w4a4_int")
    part = sum(choice.params for choice in modulation) / sum(choice.params for choice in choices)
    assert part == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("name", "scheme", "gib", "limit"),
    [
        ("wan-1.3b", None, 2.59, 2.60),
        ("wan-1.3b", "w8a8_int8", 1.30, 1.31),
        ("wan-1.3b", "w4a4_int", 0.65, 0.70),
        ("wan-14b", None, 26.2, 26.25),
        ("wan-14b", "w8a8_fp8", 13.1, 13.2),
        ("wan-14b", "w4a4_int", 6.5, 6.6),
    ],
)
def test_bytes_of_the_blocks_weights(name, scheme, gib, limit):
    blocks = [choice for choice in chosen(name, scheme or "w8a8_int8") if choice.scheme]
    size = sum(c.bytes_before if scheme is None else bytes_of(c, get_scheme(scheme)) for c in blocks) / GIB
    assert size == pytest.approx(gib, rel=0.011)
    assert size <= limit


@pytest.mark.parametrize(("name", "gib"), [("wan-1.3b", 0.05), ("wan-14b", 0.43)])
def test_what_stays_in_bfloat16_is_small(name, gib):
    report = layer_report(chosen(name), real(name))
    kept = sum(group.bytes_after for group in report.groups if group.scheme is None)
    assert round(kept / GIB, 2) == gib


def test_grouped_four_bits_take_the_documented_share():
    blocks = [choice for choice in chosen("wan-14b", "w4a16") if choice.scheme]
    after, before = sum(bytes_of(c, get_scheme("w4a16")) for c in blocks), sum(c.bytes_before for c in blocks)
    assert after / before == pytest.approx(0.27, abs=0.006)


def test_top_level_and_single_stream_proj_out_are_told_apart():
    found = {choice.name: choice.scheme for choice in chosen("hunyuanvideo")}
    assert found["proj_out"] is None
    assert found["single_transformer_blocks.39.proj_out"] == "w8a8_int8"
    assert found["context_embedder.token_refiner.refiner_blocks.0.attn.to_q"] is None
    wide = next(c for c in chosen("hunyuanvideo") if c.name == "single_transformer_blocks.0.proj_out")
    assert (wide.in_features, wide.out_features) == (15360, 3072)


def test_fused_projections_are_named_too():
    with torch.device("meta"):
        wan = diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=8, ffn_dim=32, num_layers=1)
    names = {"to_qkv": nn.Linear(16, 48), "to_kv": nn.Linear(16, 32)}
    wan.blocks[0].attn1.to_qkv, wan.blocks[0].attn2.to_kv = names["to_qkv"], names["to_kv"]
    found = {choice.name: choice.scheme for choice in choose_layers(wan, "w8a8_int8", family_of(wan).rules)}
    assert found["blocks.0.attn1.to_qkv"] == found["blocks.0.attn2.to_kv"] == "w8a8_int8"


@pytest.mark.parametrize("name", REAL)
def test_the_blocks_of_a_family_exist_and_run_in_that_order(name):
    family = family_of(real(name))
    lists = family.block_lists(real(name))
    assert lists
    assert all(len(blocks) for blocks in lists.values())
    assert type(real(name)).__name__ in family.classes
    assert list(lists) == [attribute for attribute in family.blocks if attribute in lists]


def test_what_the_families_say_of_guidance_and_masks_is_in_diffusers_sources():
    import inspect
    from pathlib import Path

    folder = Path(inspect.getfile(diffusers)).parent
    pipelines = {
        "wan": "wan/pipeline_wan.py",
        "cogvideox": "cogvideo/pipeline_cogvideox.py",
        "hunyuan_video": "hunyuan_video/pipeline_hunyuan_video.py",
        "ltx_video": "ltx/pipeline_ltx.py",
    }
    for family in FAMILIES:
        source = (folder / "pipelines" / pipelines[family.name]).read_text()
        assert ('cache_context("uncond"' in source) == family.separate_guidance, family.name
        assert ('cache_context("cond_uncond"' in source) != family.separate_guidance, family.name
        assert ("FlowMatch" in source or "UniPC" in source) == family.flow, family.name


def test_every_supported_class_exists():
    assert all(hasattr(diffusers, name) for name in supported_classes())


def test_rules_of_the_caller_come_first_or_alone():
    wan = real("wan-1.3b")
    found = choose_layers(wan, "w8a8_int8", rules_for(wan, [(r"blocks\.0\..*", "keep"), (r"proj_out", "w8a16_int8")]))
    by_name = {choice.name: choice.scheme for choice in found}
    assert by_name["blocks.0.attn1.to_q"] is None
    assert by_name["blocks.1.attn1.to_q"] == "w8a8_int8"
    assert by_name["proj_out"] == "w8a16_int8"
    alone = rules_for(wan, [(r"blocks\.\d+\.ffn\..*", "default")], replace=True)
    assert sum(c.scheme is not None for c in choose_layers(wan, "w8a8_int8", alone)) == 60
    assert rules_for(wan) == family_of(wan).rules
    with pytest.raises(QuantConfigError, match="replace=True"):
        rules_for(wan, replace=True)


class MochiBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(4, 12)})
        self.attn = nn.Linear(4, 4)


class Mochi(nn.Module):
    _repeated_blocks = ("MochiBlock",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MochiBlock(), MochiBlock()])
        self.head = nn.Linear(4, 4)


def test_unknown_classes_are_refused_with_the_supported_ones_and_offered_a_dry_run():
    model = Mochi()
    with pytest.raises(UnsupportedModelError, match=r"Mochi.*WanTransformer3DModel.*LTXVideo.*rules="):
        family_of(model)
    assert find_family(model) is None
    report = dry_run(model, "w8a8_int8")
    assert [(g.label, g.scheme, g.count) for g in report.groups] == [
        ("layers.*.norm1.linear", "w8a16_int8", 2),
        ("layers.*.attn", "w8a8_int8", 2),
        ("head", None, 1),
    ]
    assert "guessed from the class" in str(report)
    own = dry_run(model, "w8a8_int8", rules=[("head", "default")])
    assert [(g.label, g.scheme) for g in own.groups if g.scheme] == [("head", "w8a8_int8")]
    assert rules_for(model, [("head", "default")]) == (Rule("head", "default", "asked for by rules="),)


def test_without_repeated_blocks_or_rules_there_is_no_dry_run():
    with pytest.raises(UnsupportedModelError, match="Sequential"):
        dry_run(nn.Sequential(nn.Linear(2, 2)), "w8a8_int8")


def test_a_subclass_belongs_to_the_family_and_guessed_rules_agree_with_the_real_ones():
    class Mine(diffusers.LTXVideoTransformer3DModel):
        pass

    with torch.device("meta"):
        mine = Mine(num_layers=2)
    assert family_of(mine).name == "ltx_video"
    guessed = {c.name for c in choose_layers(mine, "w8a8_int8", repeated_block_rules(mine)) if c.scheme}
    assert guessed == {c.name for c in choose_layers(mine, "w8a8_int8", family_of(mine).rules) if c.scheme}
    # CogVideoX names no repeated blocks, so only its family helps.
    assert repeated_block_rules(real("cogvideox-2b")) == ()


def test_a_pipeline_is_pointed_at_its_transformer():
    pipe = type("Pipe", (), {"components": {}})()
    with pytest.raises(UnsupportedModelError, match=r"Pipe .*pass its \.transformer"):
        family_of(pipe)


@pytest.mark.parametrize("kind", ["UMT5", "T5"])
def test_text_encoder_rules_take_every_linear_of_the_blocks(kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    encoder = getattr(transformers, f"{kind}EncoderModel")(config).to(torch.bfloat16)
    choices = choose_layers(encoder, "w8a8_int8", text_encoder_rules(encoder))
    assert len(choices) == 2 * 7
    assert {choice.scheme for choice in choices} == {"w8a16_int8"}
    assert sum(Rule(READS_WEIGHT, "keep").matches(choice.name) for choice in choices) == 2
    # transformers loads `wo` in float32 beside float16: then it stays
    encoder.half()
    for block in encoder.encoder.block:
        block.layer[-1].DenseReluDense.wo.float()
    kept = [c for c in choose_layers(encoder, "w8a8_int8", text_encoder_rules(encoder)) if c.scheme is None]
    assert [choice.name.rpartition(".")[2] for choice in kept] == ["wo", "wo"]
    assert "float32" in kept[0].reason


def test_a_replacement_of_wo_without_a_weight_works():
    import transformers

    class Swapped(nn.Module):
        weight = None

        def __init__(self, linear):
            super().__init__()
            self.inner = nn.ParameterList([linear.weight])

        def forward(self, x):
            return nn.functional.linear(x, self.inner[0])

    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    encoder = transformers.UMT5EncoderModel(config).eval()
    ids = torch.arange(6)[None]
    before = encoder(ids).last_hidden_state
    (name,) = [n for n, m in encoder.named_modules() if Rule(READS_WEIGHT, "keep").matches(n)]
    encoder.set_submodule(name, Swapped(encoder.get_submodule(name)))
    assert torch.equal(encoder(ids).last_hidden_state, before)


def test_other_text_encoders_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"Linear has no rules.*UMT5EncoderModel"):
        text_encoder_rules(nn.Linear(2, 2))
