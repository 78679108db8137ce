"""wrap, unwrap and report on video pipelines and transformers."""

import copy
import warnings

import pytest
import torch
from tiny_video import generate, wan_inputs, wan_pipeline, wan_transformer

import vlmeff
from vlmeff import ops
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.plan import DiffusionPlan, make_plan
from vlmeff.errors import (
    AlreadyQuantizedError,
    ConfigError,
    IncompatibleError,
    QuantConfigError,
    UnknownNameError,
    UnsupportedModelError,
    VlmeffError,
)

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:vlmeff. preset")


def state_of(pipe) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


@pytest.fixture(scope="module")
def pipe():
    return wan_pipeline()


@pytest.fixture(scope="module")
def plain(pipe):
    return generate(pipe)


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast", "smallest"])
def test_presets_change_little_and_unwrap_gives_the_model_back(pipe, plain, preset):
    before, kind = state_of(pipe), type(pipe)
    wrapped = vlmeff.wrap(pipe, preset)
    try:
        assert wrapped is pipe
        assert isinstance(pipe, kind)
        assert vlmeff.is_wrapped(pipe)
        out = generate(pipe)
        error = float((out - plain).norm() / plain.norm())
        assert 0 < error < (0.1 if preset == "smallest" else 0.02)
        report = vlmeff.report(pipe)
        part = report.parts[0]
        assert part.calls == 4  # two steps, with and without prompt
        assert part.bytes_after < 0.45 * part.bytes_before
        assert part.bytes_after == sum(t.nbytes for t in [*pipe.transformer.parameters(), *pipe.transformer.buffers()])
    finally:
        vlmeff.unwrap(pipe)
    assert not vlmeff.is_wrapped(pipe)
    assert type(pipe) is kind
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(generate(pipe), plain)
    assert not [m for m in pipe.transformer.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_wrapping_again_replaces_the_configuration(pipe, plain):
    vlmeff.wrap(pipe, None, quant="w8a8_int8")
    vlmeff.wrap(pipe, None, quant="w4a16")
    schemes = {m.spec.scheme for m in pipe.transformer.modules() if isinstance(m, QuantLinear)}
    assert schemes == {"w4a16"}
    vlmeff.unwrap(pipe)
    assert torch.equal(generate(pipe), plain)


def test_the_quantized_layers_really_run(pipe):
    vlmeff.wrap(pipe, None, quant="w8a8_int8")
    try:
        with ops.counters() as ran:
            generate(pipe)
    finally:
        vlmeff.unwrap(pipe)
    blocks, calls = len(pipe.transformer.blocks), 4
    assert ran["linear_w8a8_int8", "reference"] == 10 * blocks * calls
    # q, k and v of self-attention share one quantization, k and v of cross-attention another.
    assert ran["act_quant_int8", "reference"] == 7 * blocks * calls


def test_a_cache_skips_blocks_and_the_report_says_how_many(pipe, plain):
    vlmeff.wrap(pipe, None, cache={"kind": "first_block", "threshold": 1e9})
    try:
        out = generate(pipe, num_inference_steps=4)
        part = vlmeff.report(pipe).parts[0]
    finally:
        vlmeff.unwrap(pipe)
    blocks = len(pipe.transformer.blocks)
    # The first step of both passes runs everything, later ones the first block only.
    assert part.blocks_run == 2 * blocks + 6
    assert part.blocks_skipped == 6 * (blocks - 1)
    assert out.isfinite().all()
    assert torch.equal(generate(pipe), plain)


def test_the_report_is_there_before_and_after_a_call(pipe):
    vlmeff.wrap(pipe, "fast", cache=False)
    try:
        report = vlmeff.report(pipe)
        assert report.total_ms is None
        assert "w8a8_int8" in str(report)
        assert "int8 products are exact on the cpu" in str(report)
        generate(pipe)
        report = vlmeff.report(pipe)
        assert report.total_ms > 0
        assert report.estimate.width == 32
        assert report.to_dict()["parts"][0]["scheme"] == "w8a8_int8"
        assert "computed, not measured" in str(report)
    finally:
        vlmeff.unwrap(pipe)


@torch.no_grad()
def test_a_bare_transformer():
    model, inputs = wan_transformer(), wan_inputs()
    plain = model(**inputs).sample
    vlmeff.wrap(model, None, quant=vlmeff.Quant("svdq_w4a8", calibrate=lambda m: m(**inputs), rank=4))
    assert vlmeff.report(model).parts[0].calibrated
    assert not torch.equal(model(**inputs).sample, plain)
    assert vlmeff.report(model).parts[0].calls == 1
    vlmeff.unwrap(model)
    assert torch.equal(model(**inputs).sample, plain)


def test_a_pipeline_calibrates_with_its_own_prompts(pipe, plain):
    calibrate = {"prompt": ["a red circle moving left"], "num_inference_steps": 2, "height": 32, "width": 32}
    vlmeff.wrap(pipe, None, quant="svdq_w4a8", calibrate={**calibrate, "num_frames": 9, "max_sequence_length": 16})
    try:
        assert vlmeff.report(pipe).parts[0].calibrated
        smooth = pipe.transformer.blocks[0].ffn.net[2].smooth
        assert float(smooth.std()) > 0
    finally:
        vlmeff.unwrap(pipe)
    vlmeff.wrap(pipe, None, quant="svdq_w4a8")
    try:
        assert "not smoothed" in str(vlmeff.report(pipe))
    finally:
        vlmeff.unwrap(pipe)
    assert torch.equal(generate(pipe), plain)


def test_weights_that_were_not_kept_cannot_come_back():
    model = wan_transformer()
    vlmeff.wrap(model, None, quant="w8a16_int8", keep_original=False)
    with pytest.raises(QuantConfigError, match="not kept"):
        vlmeff.unwrap(model)
    assert vlmeff.is_wrapped(model)


def test_a_quantized_model_is_not_quantized_again(tmp_path):
    from vlmeff.diffusion.convert import quantize_

    model = wan_transformer()
    quantize_(model, "w8a8_int8")
    with pytest.raises(AlreadyQuantizedError, match="quantized already"):
        vlmeff.wrap(model, None, quant="w8a8_int8")
    vlmeff.wrap(model, "fast")  # the preset leaves that step out, and says so
    assert "is quantized already" in str(vlmeff.report(model))
    vlmeff.unwrap(model)


def test_a_failure_leaves_the_pipeline_as_it_was(pipe, plain):
    with pytest.raises(VlmeffError):
        vlmeff.wrap(pipe, None, quant="w8a8_int8", cache="pab")  # one state for two calls a step: refused
    assert not vlmeff.is_wrapped(pipe)
    assert not any(isinstance(m, QuantLinear) for m in pipe.transformer.modules())
    assert torch.equal(generate(pipe), plain)


def test_copies_are_wrapped_models_of_their_own():
    model, inputs = wan_transformer(), wan_inputs()
    vlmeff.wrap(model, None, quant="w8a8_int8")
    with torch.no_grad():
        expected = model(**inputs).sample
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).sample, expected)
    vlmeff.unwrap(twin)
    assert not any(isinstance(m, QuantLinear) for m in twin.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"quant": "w8a8"}, UnknownNameError, "w8a8_int8"),
        ({"quant": "nvfp4"}, UnknownNameError, "scheme"),
        ({"quant": {"skeme": "auto"}}, UnknownNameError, "scheme"),
        ({"quant": 8}, QuantConfigError, "name"),
        ({"quant": "w4a16", "group": 0, "refine": -1}, QuantConfigError, "refine"),
        ({"quant": "w4a16", "group": -5}, QuantConfigError, "group"),
        ({"quant": "w8a8_int8", "rank": 8}, QuantConfigError, "svdq"),
        ({"quant": "svdq_w4a8", "alpha": 2.0}, QuantConfigError, "alpha"),
        ({"quant": "auto", "text_encoder": "w8a8_int8"}, UnknownNameError, "text encoder"),
        ({"quant": "auto", "memory_gb": 0}, QuantConfigError, "memory_gb"),
        ({"quant": "auto", "calibrate": 3}, QuantConfigError, "calibrate"),
        ({"quant": "auto", "keep": 0.5}, UnknownNameError, "keep"),
        ({"rank": 8}, ConfigError, "none is asked for"),
        ({}, ConfigError, "nothing is asked for"),
        ({"quant": "auto", "tokens": "hiprune"}, UnsupportedModelError, "tokens"),
        ({"quant": "auto", "kv": "snapkv"}, UnsupportedModelError, "kv"),
        ({"cache": "teacache"}, UnknownNameError, "first_block"),
        ({"cache": {"threshold": 1}}, ConfigError, "kind"),
        ({"cache": {"kind": "first_block", "treshold": 1}}, UnknownNameError, "threshold"),
        ({"attention_backend": "nonsense"}, UnknownNameError, "nonsense"),
        ({"compile": "yes"}, ConfigError, "compile"),
        ({"quant": vlmeff.Quant("auto", rules=[("blocks", "w8a8_int8")])}, QuantConfigError, "match none"),
    ],
)
def test_arguments_that_cannot_work_name_themselves(pipe, plain, arguments, error, words):
    with pytest.raises(error, match=words):
        vlmeff.wrap(pipe, None, **arguments)
    assert not vlmeff.is_wrapped(pipe)


def test_an_unknown_class_needs_rules():
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(UnsupportedModelError, match="rules"):
        vlmeff.wrap(model, None, quant="w8a16_int8")
    vlmeff.wrap(model, None, quant=vlmeff.Quant("w8a16_int8", rules=[(r"time_embedding\..*", "default")]))
    assert isinstance(model.time_embedding.linear_1, QuantLinear)
    vlmeff.unwrap(model)


def test_a_preset_warns_where_nothing_is_known(pipe):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan = make_plan(wan_transformer(), "fast", quant=None, inapplicable={}, overrides={})
    assert isinstance(plan, DiffusionPlan)
    assert any("no entry in the model zoo" in str(w.message) for w in seen)


def test_auto_counts_memory():
    from vlmeff.diffusion.wrapped import choose_scheme

    model = wan_transformer()
    assert choose_scheme(model, vlmeff.Quant())[0] == "w8a8_int8"
    assert choose_scheme(model, vlmeff.Quant(memory_gb=1e-6))[0] == "w4a16"
    assert choose_scheme(model, vlmeff.Quant(memory_gb=1e-6, calibrate=print))[0] == "svdq_w4a8"


def test_the_wrong_encoder_is_named(pipe):
    model = wan_transformer()
    with pytest.raises((ConfigError, IncompatibleError), match="text_encoder"):
        vlmeff.wrap(model, None, quant="w8a16_int8", text_encoder="w8a16_int8")
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_a_text_encoder_is_quantized_and_comes_back(pipe, plain):
    vlmeff.wrap(pipe, None, quant="w8a8_int8", text_encoder="w8a16_int8")
    part = next(p for p in vlmeff.report(pipe).parts if p.component == "text_encoder")
    assert part.scheme == "w8a16_int8"
    assert part.bytes_after < 0.4 * part.bytes_before
    vlmeff.unwrap(pipe)
    assert torch.equal(generate(pipe), plain)


def test_an_aborted_call_leaves_nothing_in_the_cache(pipe):
    def abort(*_):
        raise KeyboardInterrupt

    vlmeff.wrap(pipe, None, cache={"kind": "first_block", "threshold": 0.9})
    try:
        expected = generate(pipe, num_inference_steps=4)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, prompt="a blue square moving up", callback_on_step_end=abort)
        assert torch.equal(generate(pipe, num_inference_steps=4), expected)
    finally:
        vlmeff.unwrap(pipe)


def test_a_cast_after_wrapping_is_followed_when_unwrapping():
    model, inputs = wan_transformer(), wan_inputs()
    vlmeff.wrap(model, None, quant="w8a8_int8")
    model.to(torch.bfloat16)
    vlmeff.unwrap(model)
    expected = wan_transformer().to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    with torch.no_grad():
        model(**{name: value.to(torch.bfloat16) for name, value in inputs.items()})


def test_a_quantized_model_pickles_and_a_cached_one_says_why_not(pipe):
    import pickle

    model, inputs = wan_transformer(), wan_inputs()
    vlmeff.wrap(model, None, quant="w8a8_int8")
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(twin(**inputs).sample, model(**inputs).sample)
    vlmeff.wrap(pipe, None, cache="first_block")
    try:
        with pytest.raises(IncompatibleError, match="unwrap"):
            copy.deepcopy(pipe)
    finally:
        vlmeff.unwrap(pipe)
