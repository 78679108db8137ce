"""Bottleneck sampling: one full stage is the pipeline itself, stages follow the formula, work falls as computed."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from vlmeff.diffusion.acceleration import enable_cache
from vlmeff.diffusion.bottleneck import STAGES, Stage, bottleneck, bottleneck_cost, resize
from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")

SIZE = {"height": 64, "width": 96, "num_frames": 5}
STAGED = (
    Stage(steps=1, start=1.0, end=0.8),
    Stage(steps=3, scale=0.5, start=0.9, end=0.3, shift=2.0),
    Stage(steps=2, start=0.5),
)


def pipeline(vae=None, **config):
    torch.manual_seed(5)
    tiny = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 8, "num_layers": 2}
    model = diffusers.WanTransformer3DModel(**tiny, in_channels=4, out_channels=4).eval()
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=model,
        **config,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def given(**more):
    generator = torch.Generator().manual_seed(2)
    embeds, plain = torch.randn(2, 1, 3, 8, generator=generator)
    seed = torch.Generator().manual_seed(11)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": plain, "generator": seed, **SIZE, **more}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_full_stage_is_the_pipeline_bit_for_bit(guidance):
    pipe = pipeline()
    call = {"guidance_scale": guidance, "output_type": "latent"}
    wanted = pipe(**given(**call), num_inference_steps=4).frames
    got = bottleneck(pipe, [Stage(steps=4)], **given(**call)).frames
    assert torch.equal(got, wanted)
    assert torch.equal(pipe(**given(**call), num_inference_steps=4).frames, wanted)  # the pipeline is as before


def test_one_full_stage_with_a_vae_gives_the_pipelines_frames():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[0.7] * 4
    )
    pipe = pipeline(vae.eval())
    size = {"height": 32, "width": 32}
    wanted = pipe(**given(**size), num_inference_steps=2).frames
    got = bottleneck(pipe, [Stage(steps=2)], **given(**size)).frames
    assert got.shape == wanted.shape == (1, 5, 32, 32, 3)
    assert (got == wanted).all()


@torch.no_grad()
def test_stages_follow_the_formula():
    pipe = pipeline()
    got = bottleneck(pipe, STAGED, **given(guidance_scale=4.0, output_type="latent")).frames
    call = given()
    seed, model = call["generator"], pipe.transformer
    clean = None
    for stage, shift, rows, columns in zip(STAGED, (3.0, 2.0, 3.0), (8, 4, 8), (12, 6, 12), strict=True):
        u = torch.linspace(stage.start, stage.end, stage.steps + 1, dtype=torch.float64)
        sigma = (shift * u / (1 + (shift - 1) * u)).float()
        noise = torch.randn(1, 4, 2, rows, columns, generator=seed)
        if clean is None:
            x = noise
        else:
            frames = [F.interpolate(clean[:, :, f], (rows, columns), mode="bilinear", antialias=True) for f in (0, 1)]
            x = (1 - sigma[0]) * torch.stack(frames, 2) + sigma[0] * noise
        for before, after in itertools.pairwise(sigma):
            t = (1000 * before)[None]
            cond = model(x, t, call["prompt_embeds"], return_dict=False)[0]
            plain = model(x, t, call["negative_prompt_embeds"], return_dict=False)[0]
            v = plain + 4.0 * (cond - plain)
            x = x + (after - before) * v
            clean = x - after * v  # the same point as x - sigma v before the step: the path is straight
    assert got.shape == x.shape == (1, 4, 2, 8, 12)
    assert torch.allclose(got, x, atol=2e-4)
    assert pipe.scheduler.shift == 3.0


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_work_falls_as_computed(guidance):
    from torch.utils.flop_counter import FlopCounterMode

    def blocks(stages):
        pipe = pipeline()
        with FlopCounterMode(display=False) as counter:
            bottleneck(pipe, stages, **given(guidance_scale=guidance, output_type="latent"))
        counts = counter.get_flop_counts()
        seen = sum(sum(counts[path].values()) for path in counts if path.endswith((".blocks.0", ".blocks.1")))
        cost = bottleneck_cost(pipe, stages, **SIZE, guidance=guidance > 1, text_tokens=3)
        assert seen == sum(stage.flops for stage in cost)
        return seen

    low, full = blocks(STAGED), blocks([Stage(steps=6)])
    assert 0.5 < low / full < 0.66  # half of six steps at a quarter of the tokens
    sizes = [(stage.steps, stage.height, stage.width) for stage in bottleneck_cost(pipeline(), STAGED, **SIZE)]
    assert sizes == [(1, 64, 96), (3, 32, 48), (2, 64, 96)]


def test_resizing_keeps_each_frame_to_itself_and_constants_constant():
    clean = torch.randn(2, 3, 4, 8, 12)
    small = resize(clean, 4, 6)
    assert small.shape == (2, 3, 4, 4, 6)
    changed = clean.clone()
    changed[:, :, 1] += 1
    moved = resize(changed, 4, 6) - small
    assert torch.allclose(moved[:, :, 1], torch.ones(2, 3, 4, 6), atol=1e-5)
    assert moved[:, :, [0, 2, 3]].abs().max() == 0
    assert resize(clean, 8, 12) is clean


def test_sizes_of_stages_are_whole_patches():
    cost = bottleneck_cost(pipeline(), (Stage(steps=1, scale=0.3, end=0.5), Stage(steps=1, start=0.6)), **SIZE)
    assert (cost[0].height, cost[0].width) == (16, 32)  # 19 and 29 pixels, in patches of 16
    assert sum(stage.steps for stage in STAGES) == 50


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("steps", 2.0), ("scale", 0), ("scale", 1.5), ("start", 1.1), ("end", 1.0), ("shift", 0)],
)
def test_stages_that_cannot_work_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        Stage(**{"steps": 2, field: value})


@pytest.mark.parametrize(
    ("stages", "change", "text"),
    [
        ([], {}, "stages is empty"),
        ([Stage(steps=2, start=0.9)], {}, "must start at 1"),
        ([Stage(steps=2, end=0.1)], {}, "end at 0"),
        ([Stage(steps=2, scale=0.5)], {}, "with scale 1"),
        (STAGES, {"height": 60}, "height=60 must be a multiple of 16"),
        (STAGES, {"num_frames": 6}, "num_frames=6 must be 1 more than a multiple of 4"),
    ],
)
def test_calls_that_cannot_work_are_refused(stages, change, text):
    with pytest.raises(ConfigError, match=text):
        bottleneck(pipeline(), stages, **given(**change))


def test_pipelines_that_are_not_supported_say_why():
    with pytest.raises(UnsupportedModelError, match="Supported: WanPipeline"):
        bottleneck(object())
    with pytest.raises(UnsupportedModelError, match=r"Wan 2\.2"):
        bottleneck(pipeline(expand_timesteps=True))
    pipe = pipeline()
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(IncompatibleError, match=r"UniPC.*FlowMatchEulerDiscreteScheduler\(shift"):
        bottleneck(pipe)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(IncompatibleError, match="use_dynamic_shifting"):
        bottleneck(pipe)
    pipe = pipeline()
    enable_cache(pipe.transformer, "first_block")
    with pytest.raises(IncompatibleError, match="feature cache"):
        bottleneck(pipe, **given())
