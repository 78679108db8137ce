"""What distillation needs to know of a diffusion model: how clips are noised, and how its transformer is called.

Teacher and student see the same noised clip, and only their outputs are compared: whether they predict a velocity (flow
matching) or v (CogVideoX) does not matter to the loss. (The official loss for CogVideoX, in the space of clean clips
with the weight 1 / (1 - alpha_bar), is the mean squared error of v.)

Shape letters: B clips, C channels, F frames, H x W latent pixels, L prompt tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmeff.errors import QuantConfigError, UnsupportedModelError

TIMESTEPS = 1000

Velocity = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Noising(Protocol):
    """How noise is added."""

    @property
    def timesteps(self) -> Tensor:
        """[1000]: what the transformer is told, one of which is drawn evenly."""
        ...

    def add(self, latents: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """[B, ...] clips noised to ``timesteps[index]``, index [B] int64."""
        ...


@dataclass(frozen=True)
class FlowNoising:
    """x_t = (1 - sigma) x + sigma noise, t = 1000 sigma, sigma = a u / (1 + (a - 1) u) with the shift a, u even.

    With the shift of inference more of the training is spent where inference spends its steps (Wan: 3 at 480p, 5 at
    720p). The official run used 1.
    """

    shift: float = 1.0

    @property
    def sigmas(self) -> Tensor:
        even = torch.arange(1, TIMESTEPS + 1) / TIMESTEPS
        return self.shift * even / (1 + (self.shift - 1) * even)

    @property
    def timesteps(self) -> Tensor:
        return self.sigmas * TIMESTEPS

    def add(self, latents: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        sigma = self.sigmas.to(latents.device)[index.to(latents.device)].view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * latents + sigma * noise


@dataclass(frozen=True)
class VariancePreservingNoising:
    """x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise, t = 0..999.

    Args:
        alphas_cumprod: [1000].
    """

    alphas_cumprod: Tensor

    @property
    def timesteps(self) -> Tensor:
        return torch.arange(TIMESTEPS)

    def add(self, latents: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        alpha = self.alphas_cumprod.to(latents)[index.to(latents.device)].view(-1, *[1] * (latents.ndim - 1))
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def noising_of(scheduler: Any, shift: float | None = None) -> Noising:
    """The noising of a diffusers scheduler, with its own shift unless another is given.

    Raises:
        UnsupportedModelError: neither a flow-matching scheduler nor one with v-prediction.
        QuantConfigError: the scheduler computes its shift from the size of the clip, or a shift does not apply.
    """
    config = dict(scheduler.config)
    steps = config.get("num_train_timesteps", TIMESTEPS)
    if steps != TIMESTEPS:
        raise UnsupportedModelError(f"{type(scheduler).__name__} has {steps} training timesteps, not {TIMESTEPS}.")
    flow = type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    if flow:
        if shift is None and config.get("use_dynamic_shifting"):
            raise QuantConfigError(
                f"{type(scheduler).__name__} computes its shift from the size of the clip; say which: shift=3.0."
            )
        own = config.get("flow_shift", config.get("shift", 1.0)) or 1.0
        return FlowNoising(float(own if shift is None else shift))
    if config.get("prediction_type") == "v_prediction" and hasattr(scheduler, "alphas_cumprod"):
        if shift is not None:
            raise QuantConfigError("shift is of flow-matching models; this scheduler has none.")
        return VariancePreservingNoising(scheduler.alphas_cumprod.float())
    raise UnsupportedModelError(
        f"{type(scheduler).__name__} with prediction_type={config.get('prediction_type')!r} cannot be trained with: "
        "flow matching (Wan) and v-prediction (CogVideoX) can."
    )


def velocity_of(transformer: nn.Module) -> Velocity:
    """How to call this class of transformer on (latents [B, C, F, H, W], t [B], prompts [B, L, D]).

    Raises:
        UnsupportedModelError: the class needs more inputs than these; pass ``velocity=`` a function of your own.
    """
    names = {cls.__name__ for cls in type(transformer).__mro__}
    if "WanTransformer3DModel" in names:
        _refuse_image_conditioning(transformer)
        return wan_velocity
    if "CogVideoXTransformer3DModel" in names:
        if transformer.config.use_rotary_positional_embeddings:  # type: ignore[union-attr]
            raise UnsupportedModelError(
                "CogVideoX with rotary positions (5B and later) needs tables that depend on the clip's size; pass "
                "velocity=, a function that adds image_rotary_emb. CogVideoX-2B works as it is."
            )
        return cogvideox_velocity
    raise UnsupportedModelError(
        f"{type(transformer).__name__} cannot be trained out of the box: only WanTransformer3DModel and "
        "CogVideoXTransformer3DModel (2B) take nothing but latents, timestep and prompt. Pass velocity=, a function "
        "(transformer, latents, timestep, prompt) -> prediction."
    )


def wan_velocity(transformer: nn.Module, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    """[B, C, F, H, W] in and out."""
    return transformer(hidden_states=x, timestep=t, encoder_hidden_states=prompt, return_dict=False)[0]


def cogvideox_velocity(transformer: nn.Module, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    """[B, C, F, H, W] in and out; the transformer itself has frames before channels."""
    x = x.transpose(1, 2)
    return transformer(hidden_states=x, timestep=t, encoder_hidden_states=prompt, return_dict=False)[0].transpose(1, 2)


def _refuse_image_conditioning(transformer: nn.Module) -> None:
    config = transformer.config
    if getattr(config, "image_dim", None) or config.in_channels != config.out_channels:  # type: ignore[union-attr]
        raise UnsupportedModelError(
            "this Wan transformer is conditioned on pictures (image to video), which the training loop does not make; "
            "pass velocity=, a function that adds them."
        )
