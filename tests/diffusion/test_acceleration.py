"""Caches, attention back ends and compilation of diffusers: what they change, what they skip, and the way back."""

import inspect
import re

import pytest
import torch

from vlmeff.diffusion.acceleration import (
    CACHES,
    WITHOUT_MASK,
    calibrate_mag_ratios,
    compile_blocks,
    enable_cache,
    set_attention_backend,
)
from vlmeff.diffusion.counting import count_work
from vlmeff.errors import BackendUnavailableError, ConfigError, IncompatibleError, UnknownNameError

diffusers = pytest.importorskip("diffusers")

LAYERS = 4
TINY = {
    "wan": ("WanTransformer3DModel", {"attention_head_dim": 12, "ffn_dim": 32, "text_dim": 8, "num_layers": LAYERS}),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {"attention_head_dim": 16, "num_layers": LAYERS, "text_embed_dim": 8, "time_embed_dim": 8}
        | {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 3},
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {"attention_head_dim": 10, "num_layers": 2, "num_single_layers": 2, "guidance_embeds": False}
        | {"text_embed_dim": 8, "pooled_projection_dim": 6, "rope_axes_dim": (2, 4, 4), "num_refiner_layers": 1},
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {"attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": LAYERS, "caption_channels": 8},
    ),
}
STEPS = 6
MAG = {"mag_ratios": [1.0] * STEPS, "num_inference_steps": STEPS, "retention_ratio": 0.3, "threshold": 0.5}


def make(name):
    torch.manual_seed(3)
    cls, config = TINY[name]
    return getattr(diffusers, cls)(num_attention_heads=2, in_channels=4, out_channels=4, **config).eval()


def inputs(name, text, x, t):
    batch = x.shape[0]
    call = {"hidden_states": x, "encoder_hidden_states": text, "timestep": torch.full((batch,), float(t))}
    if name == "hunyuan":
        call |= {"encoder_attention_mask": torch.ones(batch, 3), "pooled_projections": text.flatten(1)[:, :6]}
    if name == "ltx":
        call |= {"encoder_attention_mask": torch.ones(batch, 3), "num_frames": 2, "height": 2, "width": 2}
    return call


class Loop:
    """A denoising loop as the family's pipeline runs it: two calls a step, or one with both rows."""

    def __init__(self, name, guidance=True):
        self.name, self.guidance, self.current_timestep = name, guidance, 0

    @torch.no_grad()
    def __call__(self, model):
        generator = torch.Generator().manual_seed(1)
        shape = {"cogvideox": (1, 2, 4, 4, 4), "ltx": (1, 8, 4)}.get(self.name, (1, 4, 2, 4, 4))
        x = torch.randn(shape, generator=generator)
        text = torch.randn(2, 3, 8, generator=generator)
        for step in range(STEPS):
            self.current_timestep = t = 900 - 150 * step
            if not self.guidance:
                with model.cache_context("cond"):
                    v = model(**inputs(self.name, text[:1], x, t), return_dict=False)[0]
            elif self.name in ("wan", "hunyuan"):
                with model.cache_context("cond"):
                    cond = model(**inputs(self.name, text[:1], x, t), return_dict=False)[0]
                with model.cache_context("uncond"):
                    plain = model(**inputs(self.name, text[1:], x, t), return_dict=False)[0]
                v = plain + 3 * (cond - plain)
            else:
                with model.cache_context("cond_uncond"):
                    plain, cond = model(**inputs(self.name, text, torch.cat([x] * 2), t), return_dict=False)[0].chunk(2)
                v = plain + 3 * (cond - plain)
            x = x - v / STEPS
        model._reset_stateful_cache()
        return x


def settings_of(cache):
    return {"first_block": {"threshold": 1e9}, "mag": MAG, "taylorseer": {"cache_interval": 2}}.get(cache, {})


def on(model, cache, loop, **options):
    return enable_cache(
        model,
        cache,
        guidance=loop.guidance,
        current_timestep=lambda: loop.current_timestep,
        settings=settings_of(cache),
        **options,
    )


LEGAL = [(name, cache) for name in TINY for cache in ("first_block", "mag", "taylorseer")]
LEGAL += [("cogvideox", "pab"), ("ltx", "pab"), ("cogvideox", "faster")]


@pytest.mark.parametrize(("name", "cache"), LEGAL)
def test_a_cache_skips_work_and_undoing_it_restores_the_model(name, cache):
    model, loop = make(name), Loop(name)
    before = loop(model)
    forwards = {key: module.__dict__.get("forward") for key, module in model.named_modules()}
    with on(model, cache, loop) as switched, count_work(model) as work:
        assert switched.changed
        assert not torch.equal(loop(model), before)
    assert work.linear_share < 0.97
    skipped = work.attentions_called - work.attentions_computed
    assert skipped > 0 or work.blocks_computed < work.blocks_called or cache == "faster"
    assert not model.is_cache_enabled
    assert {key: module.__dict__.get("forward") for key, module in model.named_modules()} == forwards
    assert torch.equal(loop(model), before)


@pytest.mark.parametrize("name", TINY)
def test_a_first_block_cache_that_always_agrees_computes_only_the_first_block_after_the_first_step(name):
    model, loop = make(name), Loop(name)
    calls = 2 * STEPS if name in ("wan", "hunyuan") else STEPS
    with on(model, "first_block", loop), count_work(model) as work:
        loop(model)
    contexts = calls // STEPS
    assert (work.calls, work.blocks_called) == (calls, calls * LAYERS)
    assert work.blocks_computed == contexts * LAYERS + (calls - contexts)  # all once per context, then one a call


def test_a_cache_that_never_agrees_changes_nothing_and_saves_nothing():
    model, loop = make("wan"), Loop("wan")
    before = loop(model)
    with enable_cache(model, "first_block", settings={"threshold": 0.0}), count_work(model) as work:
        assert torch.equal(loop(model), before)
    assert work.blocks_computed == work.blocks_called == 2 * STEPS * LAYERS
    assert work.linear_share == 1.0
    assert "100% of the linear layers' work" in str(work)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
@pytest.mark.parametrize("cache", ["pab", "faster"])
def test_caches_with_one_state_are_refused_where_a_step_makes_two_calls(name, cache):
    model = make(name)
    with pytest.raises(IncompatibleError, match=r"one state per module.*'first_block'.*guidance=False"):
        on(model, cache, Loop(name))
    loop = Loop(name, guidance=False)
    with on(model, cache, loop), count_work(model) as work:
        loop(model)
    assert work.attentions_computed < work.attentions_called


def test_without_the_refusal_the_two_calls_would_share_a_state():
    model, loop = make("wan"), Loop("wan")
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: loop.current_timestep
    )
    model.enable_cache(config)
    seen = []
    hook = model.blocks[0].attn1.register_forward_hook(lambda module, args, result: seen.append(result))
    loop(model)
    hook.remove()
    assert any(torch.equal(cond, plain) for cond, plain in zip(seen[::2], seen[1::2], strict=True))


def test_faster_cache_is_refused_on_token_sequences_and_caches_on_vace():
    with pytest.raises(IncompatibleError, match="sequence of tokens"):
        on(make("ltx"), "faster", Loop("ltx"))
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "vace_layers": [0]}
    with pytest.raises(IncompatibleError, match="control hints"):
        enable_cache(diffusers.WanVACETransformer3DModel(**config), "first_block")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"name": "teacache"}, UnknownNameError, "Available: faster, first_block, mag, pab, taylorseer"),
        ({"name": "mag"}, ConfigError, "calibrate_mag_ratios"),
        ({"name": "mag", "settings": {"mag_ratios": [1.0]}}, ConfigError, "num_inference_steps"),
        ({"name": "first_block", "settings": {"treshold": 1}}, UnknownNameError, "Did you mean 'threshold'"),
        ({"name": "pab", "guidance": False}, ConfigError, r"current_timestep, e\.g\."),
        ({"name": "taylorseer", "settings": {"cache_identifiers": ["x"]}}, IncompatibleError, "match no module"),
    ],
)
def test_caches_that_cannot_work_say_why_and_leave_nothing(arguments, error, text):
    model = make("wan")
    with pytest.raises(error, match=text):
        enable_cache(model, **arguments)
    assert not model.is_cache_enabled
    assert not [key for key, module in model.named_modules() if key and hasattr(module, "_diffusers_hook")]


def test_one_cache_at_a_time_and_two_blocks_at_least():
    model = make("wan")
    enable_cache(model, "first_block")
    with pytest.raises(IncompatibleError, match="another cache is enabled"):
        enable_cache(model, "taylorseer")
    with pytest.raises(IncompatibleError, match="a cache is enabled"):
        calibrate_mag_ratios(model, lambda: None)
    model.disable_cache()
    model.blocks = model.blocks[:1]
    with pytest.raises(IncompatibleError, match="two blocks or more"):
        enable_cache(model, "first_block")


def test_diffusers_own_patterns_of_taylorseer_still_name_nothing_here():
    model = make("wan")
    model.enable_cache(diffusers.TaylorSeerCacheConfig())
    assert not [k for k, m in model.named_modules() if hasattr(m, "_diffusers_hook") and m._diffusers_hook.hooks]
    model.disable_cache()
    switched = enable_cache(model, "taylorseer")
    assert switched.changed == tuple(f"blocks.{i}.attn{j}" for i in range(LAYERS) for j in (1, 2))
    assert "called attn1" in str(switched)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_calibrated_ratios_are_those_that_diffusers_prints(name, capsys):
    model, loop = make(name), Loop(name)
    ratios = calibrate_mag_ratios(model, lambda: loop(model))
    assert "cache_context" not in vars(model)
    assert (len(ratios), ratios[0]) == (STEPS, 1.0)
    model.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    loop(model)
    printed = [
        [float(value) for value in line.strip("[]").split(",")]
        for line in capsys.readouterr().out.splitlines()
        if re.fullmatch(r"\[[\d., e-]+\]", line)
    ]
    assert len(printed) == (1 if name == "ltx" else 2)
    assert ratios == pytest.approx([sum(step) / len(step) for step in zip(*printed, strict=True)], rel=1e-5)
    model.disable_cache()
    with enable_cache(model, "mag", settings={**MAG, "mag_ratios": ratios[:3]}) as switched:
        assert switched.notes == (f"3 ratios are stretched to {STEPS} steps",)


def test_calibration_needs_a_run():
    with pytest.raises(ConfigError, match="none at all"):
        calibrate_mag_ratios(make("wan"), lambda: None)


def test_the_backends_without_masks_are_those_that_raise_in_diffusers():
    from diffusers.models import attention_dispatch as dispatch

    refusing = set()
    for name, function in dispatch._AttentionBackendRegistry._backends.items():
        source = inspect.getsource(function)
        if re.search(r"if attn_mask is not None:\s+raise", source):
            refusing.add(name.value)
    assert refusing == WITHOUT_MASK


@pytest.mark.parametrize(("name", "attentions"), [("wan", 2 * LAYERS), ("hunyuan", 4), ("ltx", 2 * LAYERS)])
def test_a_backend_that_takes_masks_changes_every_attention_and_not_the_process(name, attentions):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    model, loop = make(name), Loop(name)
    before, default = loop(model), _AttentionBackendRegistry.get_active_backend()
    with set_attention_backend(model, "_native_math") as switched:
        assert len(switched.changed) == attentions
        assert _AttentionBackendRegistry.get_active_backend() == default
        assert torch.allclose(loop(model), before, atol=1e-5)
    processors = [m.processor for m in model.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]
    assert all(processor._attention_backend is None for processor in processors)
    assert torch.equal(loop(model), before)


def test_backends_without_masks_switch_only_what_passes_none():
    switched = set_attention_backend(make("ltx"), "_native_flash")
    assert switched.changed == tuple(f"transformer_blocks.{i}.attn1" for i in range(LAYERS))
    assert switched.notes == ("cross-attention passes a mask and stays",)
    assert len(set_attention_backend(make("wan"), "_native_flash").changed) == 2 * LAYERS


@pytest.mark.parametrize(
    ("name", "backend", "error", "text"),
    [
        ("hunyuan", "sage", IncompatibleError, "always passes one.*native"),
        ("hunyuan", "_native_flash", IncompatibleError, "always passes one"),
        ("cogvideox", "_native_math", IncompatibleError, "no effect"),
        ("wan", "flash3", UnknownNameError, "_flash_3"),
    ],
)
def test_backends_that_cannot_work_say_why(name, backend, error, text):
    with pytest.raises(error, match=text):
        set_attention_backend(make(name), backend)


def test_a_missing_package_is_reported_and_nothing_stays_switched():
    from diffusers.models import attention_dispatch as dispatch

    if dispatch._CAN_USE_SAGE_ATTN:
        pytest.skip("sageattention is installed")
    model = make("wan")
    with pytest.raises(BackendUnavailableError, match="sageattention"):
        set_attention_backend(model, "sage")
    assert {m.processor._attention_backend for m in model.modules() if hasattr(m, "processor")} == {None}


@pytest.mark.parametrize(("name", "modules"), [("wan", LAYERS), ("cogvideox", LAYERS), ("ltx", LAYERS), ("hunyuan", 6)])
def test_compiled_blocks_are_named_and_can_be_taken_back(name, modules):
    model = make(name)
    with compile_blocks(model, backend="eager") as switched:
        assert len(switched.changed) == modules
        with pytest.raises(IncompatibleError, match="compiled already"):
            compile_blocks(model, backend="eager")
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_compiled_blocks_compute_the_same_from_one_graph():
    model, graphs = make("wan"), []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    call = inputs("wan", torch.randn(1, 3, 8), torch.randn(1, 4, 2, 4, 4), 500)
    with torch.no_grad():
        before = model(**call, return_dict=False)[0]
        with compile_blocks(model, backend=backend, fullgraph=True):
            assert torch.allclose(model(**call, return_dict=False)[0], before, atol=1e-5)
    assert len(graphs) == 1


def test_every_named_cache_exists_in_diffusers():
    assert all(hasattr(diffusers, config) for config in CACHES.values())
