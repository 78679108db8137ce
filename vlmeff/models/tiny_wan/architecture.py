"""tiny-wan: Wan small enough to ship and to train on a CPU, built from the ordinary diffusers and transformers classes.

A clip of 9 x 64 x 64 pixels becomes latents of 3 x 8 x 8 with eight channels (Wan's factors, 4 in time and 8 in
space), which the transformer reads in patches of 1 x 2 x 2: 48 tokens. The text encoder is not trained: it is a random
UMT5 whose word vectors are orthogonal, so that the transformer can tell the words apart.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vlmeff.diffusion import generating
from vlmeff.models.tiny_wan.clips import COLORS, DIRECTIONS, FRAMES, SHAPES, SIDE

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # ids as in UMT5
WORDS = ("a", "moving", *COLORS, *SHAPES, *DIRECTIONS)
TEXT_DIM = 64
LATENT_CHANNELS = 8
FLOW_SHIFT = 3.0  # Wan's at 480p
MAX_TEXT = 16
CALL_FILE = generating.CALL_FILE

# What to pass to the pipeline: ``pipe("a red circle moving left", **CALL)``. Its own defaults are Wan's 480 x 832 x 81.
# A folder's ``call.json`` holds the same for programs that load it.
CALL: dict[str, Any] = {
    "height": SIDE,
    "width": SIDE,
    "num_frames": FRAMES,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "max_sequence_length": MAX_TEXT,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over the words of the prompts; ends every text with </s>, as UMT5's does."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    """UMT5 of one layer with random weights, frozen; its word vectors are orthogonal with norm sqrt(width)."""
    config = UMT5Config(
        vocab_size=len(SPECIAL_TOKENS) + len(WORDS),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(config)
        # The layer may colour a word with its context but not drown it.
        words = torch.linalg.qr(torch.randn(TEXT_DIM, TEXT_DIM)).Q[: config.vocab_size] * TEXT_DIM**0.5
    with torch.no_grad():
        encoder.shared.weight.copy_(words)
    return encoder.eval().requires_grad_(False)


def build_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLWan:
    """Wan's causal video VAE, random (seed torch first): pixels in patches of 2 x 2 as in Wan 2.2, then two levels."""
    return AutoencoderKLWan(
        base_dim=12,
        decoder_base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS,
        latents_std=latents_std or [1.0] * LATENT_CHANNELS,
    )


def build_transformer() -> WanTransformer3DModel:
    """Wan's transformer with four blocks of width 128, random (seed torch first)."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=512,
        num_layers=4,
        rope_max_seq_len=32,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=FLOW_SHIFT)


def build_pipeline(
    *, transformer: WanTransformer3DModel | None = None, vae: AutoencoderKLWan | None = None
) -> WanPipeline:
    """The pipeline with random weights where no part is given (seed torch first)."""
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        vae=(vae or build_vae()).eval(),
        scheduler=build_scheduler(),
        transformer=(transformer or build_transformer()).eval(),
    )


def save_pipeline(pipe: WanPipeline, folder: Path) -> None:
    """Write a pipeline with its tensors stored as float16; they load as float32. The pipeline itself is left alone."""
    pipe.save_pretrained(str(folder))
    for file in folder.glob("*/*.safetensors"):
        halved = {name: value.half() for name, value in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})


def load_pipeline(folder: str | Path) -> WanPipeline:
    """The pipeline of a folder that ``save_pipeline`` wrote, computed in float32."""
    pipe = WanPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digests(folder: Path) -> dict[str, str]:
    """{file of weights: its sha256}, in the order of their names."""
    files = sorted(folder.glob("**/*.safetensors"))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
