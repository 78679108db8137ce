"""The roofline: operations against the published table, against an operation counter, and the bounds of gains."""

import functools

import pytest
import torch

from vlmeff.diffusion.cost import forecast
from vlmeff.errors import ConfigError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")

WAN_1B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
COG_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "patch_size_t": 2,
    "patch_bias": False,
    "use_rotary_positional_embeddings": True,
}


@functools.cache
def meta(name, **config):
    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


def wan_1b():
    return forecast(meta("WanTransformer3DModel", **WAN_1B), 81, 480, 832)


def wan_14b(height=480, width=832):
    return forecast(meta("WanTransformer3DModel"), 81, height, width)


TABLE = {  # TF of one block, one forward, linear share of operations and of time; gains for 2x, 1.6x, 4x
    "wan-1.3b": (wan_1b, 32760, (0.62, 0.31, 0.005, 1.80, 6.59, 0.10), 283, (0.29, 0.24), (1.13, 1.10, 1.21)),
    "wan-14b": (wan_14b, 32760, (6.87, 3.44, 0.05, 9.28, 21.98, 0.34), 1678, (0.47, 0.40), (1.25, 1.18, 1.42)),
    "wan-14b-720p": (
        lambda: wan_14b(720, 1280),
        75600,
        (15.9, 7.9, 0.05, 21.4, 117, 0.8),
        6523,
        (0.28, 0.22),
        (1.13, 1.09, 1.20),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_wan_is_reproduced(name):
    make, tokens, blocks, forward, shares, gains = TABLE[name]
    cost = make()
    assert cost.tokens == tokens
    for part, tera in zip(cost.parts, blocks, strict=True):
        digits = len(str(tera).rpartition(".")[2]) if "." in str(tera) else 0
        assert round(part.flops / 1e12, digits) == pytest.approx(tera, abs=10**-digits), part.name
    assert cost.flops / 1e12 == pytest.approx(forward, rel=0.001)
    assert (cost.linear_share, cost.linear_time_share) == pytest.approx(shares, abs=0.0055)
    assert tuple(round(cost.gain(linears=x), 2) for x in (2, 1.6, 4)) == gains
    assert cost.gain(linears=2, attention=2) == pytest.approx(2.0)
    assert cost.gain() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "config", "size", "tokens", "share"),
    [
        ("CogVideoXTransformer3DModel", {}, (49, 480, 720), 17776, 0.39),
        ("CogVideoXTransformer3DModel", COG_5B, (81, 768, 1360), 45106, 0.29),
        ("HunyuanVideoTransformer3DModel", {}, (129, 720, 1280), 119056, 0.13),
        ("LTXVideoTransformer3DModel", {}, (121, 512, 704), 5632, 0.72),
    ],
)
def test_linear_shares_of_the_other_models(name, config, size, tokens, share):
    cost = forecast(meta(name, **config), *size)
    joined = cost.text_tokens if name != "LTXVideoTransformer3DModel" else 0
    assert cost.tokens + joined == tokens
    assert cost.linear_share == pytest.approx(share, abs=0.01)


def test_a_step_of_the_14b_model_takes_about_five_seconds_at_780_tflops():
    assert wan_14b().calls * wan_14b().seconds(780) == pytest.approx(5.07, abs=0.01)


TINY = {
    "WanTransformer3DModel": {
        "config": {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 3, "text_dim": 16},
        "inputs": {"hidden_states": (1, 16, 3, 8, 12), "encoder_hidden_states": (1, 7, 16)},
        "size": (9, 64, 96),
    },
    "CogVideoXTransformer3DModel": {
        "config": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "text_embed_dim": 16}
        | {"sample_width": 12, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 7, "time_embed_dim": 8},
        "inputs": {"hidden_states": (1, 3, 16, 8, 12), "encoder_hidden_states": (1, 7, 16)},
        "size": (9, 64, 96),
    },
    "HunyuanVideoTransformer3DModel": {
        "config": {"num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2, "num_single_layers": 3}
        | {"num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
        "inputs": {
            "hidden_states": (1, 16, 3, 8, 12),
            "encoder_hidden_states": (1, 7, 16),
            "encoder_attention_mask": (1, 7),
            "pooled_projections": (1, 8),
            "guidance": (1,),
        },
        "size": (9, 64, 96),
    },
    "LTXVideoTransformer3DModel": {
        "config": {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 3}
        | {"caption_channels": 16, "in_channels": 8, "out_channels": 8},
        "inputs": {
            "hidden_states": (1, 2 * 3 * 4, 8),
            "encoder_hidden_states": (1, 7, 16),
            "encoder_attention_mask": (1, 7),
        },
        "extra": {"num_frames": 2, "height": 3, "width": 4},
        "size": (9, 96, 128),
    },
}


@pytest.mark.parametrize("name", TINY)
def test_operations_of_the_blocks_equal_those_that_a_counter_sees(name):
    from torch.utils.flop_counter import FlopCounterMode

    tiny = TINY[name]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**tiny["config"]).eval()
    inputs = {key: torch.ones(shape) for key, shape in tiny["inputs"].items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, timestep=torch.ones(1), **tiny.get("extra", {}))
    seen = 0
    for path, operations in counter.get_flop_counts().items():
        last = path.rpartition(".")[2]
        name_of_list = path.split(".")[-2] if path.count(".") >= 2 else ""
        if last.isdigit() and name_of_list in ("blocks", "transformer_blocks", "single_transformer_blocks"):
            seen += sum(operations.values())
    modulation = sum(  # one row per sample, which the forecast leaves out
        2 * m.in_features * m.out_features
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "blocks." in path and "norm" in path and "refiner" not in path
    )
    cost = forecast(model, *tiny["size"], text_tokens=7)
    assert cost.flops == seen - modulation


def test_image_tokens_and_control_blocks_are_counted():
    plain = forecast(meta("WanTransformer3DModel", **WAN_1B), 81, 480, 832)
    images = forecast(meta("WanTransformer3DModel", **WAN_1B, image_dim=1280, added_kv_proj_dim=1536), 81, 480, 832)
    d, m = 1536, 32760
    assert images.flops - plain.flops == 30 * 257 * (2 * 2 * d * d + 4 * m * d)
    control = forecast(meta("WanVACETransformer3DModel", **WAN_1B, vace_layers=(0, 15)), 81, 480, 832)
    assert control.flops - plain.flops == 2 * plain.flops / 30 + (2 + 1) * 2 * m * d * d


def test_wan_2_2_ti2v_has_a_vae_of_its_own():
    model = meta("WanTransformer3DModel", **WAN_1B, in_channels=48, out_channels=48)
    assert forecast(model, 121, 704, 1280).tokens == 31 * 22 * 40
    assert forecast(model, 121, 704, 1280, vae_scale=(4, 8, 8)).tokens == 31 * 44 * 80


@pytest.mark.parametrize(
    ("size", "text"),
    [((81, 481, 832), "height=481 must be a multiple of 16"), ((81, 480, 0), "width=0"), ((0, 480, 832), "num_frames")],
)
def test_sizes_that_cannot_be_cut_are_refused(size, text):
    with pytest.raises(ConfigError, match=text):
        forecast(meta("WanTransformer3DModel", **WAN_1B), *size)


def test_unknown_models_and_gains_that_make_no_sense_are_refused():
    with pytest.raises(UnsupportedModelError, match="Supported"):
        forecast(torch.nn.Linear(2, 2), 81, 480, 832)
    with pytest.raises(ConfigError, match="linears=0"):
        wan_1b().gain(linears=0)


def test_the_printed_forecast_names_the_bound_of_quantization_and_says_it_is_computed():
    text = str(wan_1b())
    assert "32,760 video tokens" in text
    assert "283 TF" in text
    assert "self-attention" in text
    assert "69.9%" in text
    assert "29% of the operations, 23% of the time" in text
    assert "linears 2x (8 bit, ideal)          1.13x" in text
    assert "weights only (16-bit activations)  1.00x" in text
    assert "not measured" in text
