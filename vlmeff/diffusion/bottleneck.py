"""Bottleneck Sampling (arXiv 2503.18940) for Wan pipelines: denoise at high, then low, then high resolution.

Where the resolution changes, the clean estimate x_0 = x - sigma v is resized in latent space and noised again to the
next stage's starting level with fresh noise; every stage has its own timestep shift. Nothing is trained, so the model
must be able to generate at the low resolution too.

The paper's stage constants are per model and were not at hand: ``STAGES`` are ours, untuned. It replaces the pipeline's
denoising loop, because no callback of the pipeline may change the size of its latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmeff.diffusion.cost import forecast
from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps at one resolution.

    Attributes:
        steps: denoising steps.  scale: of height and width, in (0, 1].
        start, end: noise levels before the shift, 1 >= start > end >= 0; the last stage of all must end at 0.
        shift: of the flow's timesteps; None is the scheduler's own.
    """

    steps: int
    scale: float = 1.0
    start: float = 1.0
    end: float = 0.0
    shift: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"Stage: steps={self.steps!r} must be an integer of 1 or more.")
        if not 0 < self.scale <= 1:
            raise ConfigError(f"Stage: scale={self.scale} must be in (0, 1].")
        if not 0 <= self.end < self.start <= 1:
            raise ConfigError(f"Stage: start={self.start}, end={self.end} must satisfy 1 >= start > end >= 0.")
        if self.shift is not None and self.shift <= 0:
            raise ConfigError(f"Stage: shift={self.shift} must be positive.")


# Ours, not the paper's: 10 of 50 steps lay out the scene at full size, 25 at half size (a quarter of the tokens), 15
# add detail. Each stage starts above the noise level that the one before reached, to hide the resizing.
STAGES = (
    Stage(steps=10, start=1.0, end=0.85),
    Stage(steps=25, scale=0.5, start=0.9, end=0.3),
    Stage(steps=15, start=0.5, end=0.0),
)


# Settings of the scheduler that make another schedule than the plain shifted one.
_OTHER_SCHEDULES = (
    "use_dynamic_shifting",
    "shift_terminal",
    "stochastic_sampling",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """A stage at its real size in pixels, with the computed operations of all its forward passes."""

    steps: int
    height: int
    width: int
    flops: float


def bottleneck_cost(
    pipe: Any,
    stages: Sequence[Stage] = STAGES,
    *,
    height: int,
    width: int,
    num_frames: int,
    guidance: bool = True,
    text_tokens: int | None = None,
) -> tuple[StageCost, ...]:
    """What each stage costs, computed (not measured) by the roofline of ``forecast``."""
    _check(pipe, stages)
    scale = (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_spatial)
    costs = []
    for stage in stages:
        rows, columns = (side * scale[1] for side in _latent_size(pipe, stage, height, width))
        one = forecast(pipe.transformer, num_frames, rows, columns, text_tokens=text_tokens, vae_scale=scale)
        calls = stage.steps * (2 if guidance else 1)
        costs.append(StageCost(steps=stage.steps, height=rows, width=columns, flops=calls * one.flops))
    return tuple(costs)


@torch.no_grad()
def bottleneck(
    pipe: Any,
    stages: Sequence[Stage] = STAGES,
    *,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    height: int = 480,
    width: int = 832,
    num_frames: int = 81,
    guidance_scale: float = 5.0,
    max_sequence_length: int = 512,
    generator: torch.Generator | None = None,
    output_type: str = "np",
) -> Any:
    """Generate videos with a ``WanPipeline`` in stages of different resolution.

    One stage of full scale from 1 to 0 gives what the pipeline gives, bit for bit. Arguments besides ``stages`` are the
    pipeline's; the number of steps is the sum of the stages'.

    Returns:
        diffusers' ``WanPipelineOutput``: ``frames`` as ``output_type`` says ("latent": the last latents).
    Raises:
        UnsupportedModelError: another pipeline, a two-transformer or per-token-timestep one (Wan 2.2).
        IncompatibleError: another scheduler than FlowMatchEulerDiscreteScheduler, or a feature cache is enabled.
        ConfigError: stages that cannot work, or a size that the latents' patches do not divide.
    """
    _check(pipe, stages)
    transformer, scheduler, device = pipe.transformer, pipe.scheduler, pipe._execution_device
    _latent_size(pipe, stages[0], height, width)
    if num_frames < 1 or (num_frames - 1) % pipe.vae_scale_factor_temporal:
        raise ConfigError(
            f"bottleneck: num_frames={num_frames} must be 1 more than a multiple of {pipe.vae_scale_factor_temporal}."
        )
    pipe.check_inputs(prompt, negative_prompt, height, width, prompt_embeds, negative_prompt_embeds)
    guided = guidance_scale > 1.0
    embeds, plain_embeds = pipe.encode_prompt(
        prompt=prompt,
        negative_prompt=negative_prompt,
        do_classifier_free_guidance=guided,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        max_sequence_length=max_sequence_length,
        device=device,
    )
    embeds = embeds.to(transformer.dtype)
    plain_embeds = plain_embeds.to(transformer.dtype) if guided else None
    own_shift = scheduler.shift
    clean: Tensor | None = None
    try:
        for stage in stages:
            rows, columns = _latent_size(pipe, stage, height, width)
            sigmas = _schedule(scheduler, stage, own_shift, device)
            side = pipe.vae_scale_factor_spatial
            noise = pipe.prepare_latents(
                embeds.shape[0],
                transformer.config.in_channels,
                rows * side,
                columns * side,
                num_frames,
                torch.float32,
                device,
                generator,
            )
            latents = noise
            if clean is not None:
                latents = (1 - sigmas[0]) * resize(clean, rows, columns) + sigmas[0] * noise
            for index, t in enumerate(scheduler.timesteps[: stage.steps]):
                timestep, x = t.expand(latents.shape[0]), latents.to(transformer.dtype)
                velocity = _velocity(transformer, x, timestep, embeds, plain_embeds, guidance_scale)
                clean = latents - sigmas[index] * velocity
                latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    finally:
        scheduler.set_shift(own_shift)
    return _finished(pipe, latents, output_type)


def resize(clean: Tensor, rows: int, columns: int) -> Tensor:
    """[B, C, F, H, W] -> [B, C, F, rows, columns], each latent frame by itself; the same tensor if nothing changes."""
    if clean.shape[-2:] == (rows, columns):
        return clean
    batch, _, frames = clean.shape[:3]
    flat = clean.transpose(1, 2).flatten(0, 1)
    resized = F.interpolate(flat.float(), (rows, columns), mode="bilinear", antialias=True, align_corners=False)
    return resized.unflatten(0, (batch, frames)).transpose(1, 2).to(clean.dtype)


def _schedule(scheduler: Any, stage: Stage, own_shift: float, device: Any) -> Tensor:
    """Set the scheduler for a stage; returns its sigmas. A stage from 1 to 0 is the scheduler's ordinary run."""
    scheduler.set_shift(own_shift if stage.shift is None else stage.shift)
    if (stage.start, stage.end) == (1.0, 0.0):
        scheduler.set_timesteps(stage.steps, device=device)
    else:
        # The scheduler appends a final 0: where the stage ends above that, the last entry is where it ends.
        levels = [stage.start + (stage.end - stage.start) * i / stage.steps for i in range(stage.steps + 1)]
        scheduler.set_timesteps(sigmas=levels if stage.end else levels[:-1], device=device)
    scheduler.set_begin_index(0)
    return scheduler.sigmas


def _velocity(
    transformer: Any, x: Tensor, timestep: Tensor, embeds: Tensor, plain_embeds: Tensor | None, guidance_scale: float
) -> Tensor:
    with transformer.cache_context("cond"):
        velocity = transformer(hidden_states=x, timestep=timestep, encoder_hidden_states=embeds, return_dict=False)[0]
    if plain_embeds is None:
        return velocity
    with transformer.cache_context("uncond"):
        plain = transformer(hidden_states=x, timestep=timestep, encoder_hidden_states=plain_embeds, return_dict=False)[
            0
        ]
    return plain + guidance_scale * (velocity - plain)


def _finished(pipe: Any, latents: Tensor, output_type: str) -> Any:
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

    video: Any = latents
    if output_type != "latent":
        vae, shape = pipe.vae, (1, -1, 1, 1, 1)
        latents = latents.to(vae.device, vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
        inverse = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
        video = vae.decode(latents / inverse + mean, return_dict=False)[0]
        video = pipe.video_processor.postprocess_video(video, output_type=output_type)
    pipe.maybe_free_model_hooks()
    return WanPipelineOutput(frames=video)


def _latent_size(pipe: Any, stage: Stage, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a stage's latents: whole patches, as near to its scale as they come."""
    _, *patch = pipe.transformer.config.patch_size
    sides = []
    for name, size, cells in (("height", height, patch[0]), ("width", width, patch[1])):
        unit = pipe.vae_scale_factor_spatial * cells
        if size < unit or size % unit:
            raise ConfigError(f"bottleneck: {name}={size} must be a multiple of {unit}.")
        sides.append(max(1, round(size * stage.scale / unit)) * cells)
    return sides[0], sides[1]


def _check(pipe: Any, stages: Sequence[Stage]) -> None:
    if not stages:
        raise ConfigError("bottleneck: stages is empty. Pass Stage(...)s, or leave it out for the default ones.")
    if stages[0].start != 1.0 or stages[-1].end != 0.0 or stages[-1].scale != 1.0:
        raise ConfigError(
            "bottleneck: the first stage must start at 1 (pure noise), and the last end at 0 with scale 1."
        )
    kind = type(pipe).__name__
    if "WanPipeline" not in {cls.__name__ for cls in type(pipe).__mro__}:
        raise UnsupportedModelError(f"bottleneck: {kind} is not supported. Supported: WanPipeline.")
    if getattr(pipe, "transformer_2", None) is not None or pipe.config.expand_timesteps or pipe.transformer is None:
        raise UnsupportedModelError(
            "bottleneck: Wan 2.2 pipelines (two transformers, or timesteps per token) are unsupported."
        )
    scheduler = type(pipe.scheduler).__name__
    settings = pipe.scheduler.config
    odd = [name for name in _OTHER_SCHEDULES if settings.get(name)]
    if scheduler != "FlowMatchEulerDiscreteScheduler" or odd:
        raise IncompatibleError(
            f"bottleneck: {' with '.join([scheduler, *odd[:1]])} cannot be used: each stage needs its own plain flow "
            "schedule. Set pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=...)."
        )
    if getattr(pipe.transformer, "is_cache_enabled", False):
        raise IncompatibleError("bottleneck: a feature cache is enabled, whose features have one size. Undo it first.")
