"""Tiny random video transformers and pipelines of the real diffusers classes."""

from __future__ import annotations

from typing import Any

import torch

SEED = 0


def wan_transformer(layers: int = 2) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(SEED)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=40,
        num_layers=layers,
    ).eval()


def wan_inputs(batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {
        "hidden_states": torch.randn(batch, 4, 2, 4, 4, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
    }


def wan_pipeline() -> Any:
    """tiny-wan's architecture with random weights."""
    from vlmeff.models.tiny_wan.architecture import build_pipeline

    torch.manual_seed(SEED)
    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of a short call with fixed noise."""
    options: dict[str, Any] = {
        "prompt": "a red circle moving left",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "num_frames": 9,
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "output_type": "latent",
        **changes,
    }
    return pipe(**options, generator=torch.Generator().manual_seed(SEED)).frames
