"""Training of tiny-wan's video VAE, and the statistics of its latents that the pipeline needs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from vlmeff.models.tiny_wan import clips
from vlmeff.models.tiny_wan.fitting import seeded

WINDOW = 32  # pixels; most of a clip is ground, which is learned quickly
KL_WEIGHT = 1e-4


def video_tensor(pixels: np.ndarray) -> Tensor:
    """[B, T, H, W, 3] uint8 -> [B, 3, T, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def window_batch(step: int, seed: int, count: int) -> np.ndarray:
    """[count, frames, 32, 32, 3] uint8: windows around the middle of the path; shapes enter and leave them."""
    rng = np.random.default_rng([seed, 11, step])
    out = []
    for _ in range(count):
        clip = clips.draw("train", int(rng.integers(2**31)), seed=seed)
        left, top = (c - WINDOW / 2 + rng.uniform(-12, 12) for c in (clip.x, clip.y))
        window = dataclasses.replace(clip, x=clip.x - round(left), y=clip.y - round(top))
        out.append(window.pixels(side=WINDOW))
    return np.stack(out)


def whole_batch(step: int, seed: int, count: int) -> np.ndarray:
    """[count, frames, 64, 64, 3] uint8."""
    indices = np.random.default_rng([seed, 12, step]).integers(2**31, size=count)
    return clips.clip_batch("train", indices, seed=seed)[0]


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """What ``vae.decode`` computes before it clamps: a clamped pixel would send no gradient.

    Args:
        latents: [B, C, T', H', W'].
    Returns:
        [B, 3, 4 T' - 3, 8 H', 8 W'].
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        part = hidden[:, :, i : i + 1]
        frames.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), patch_size=vae.config.patch_size)


def vae_loss(vae: AutoencoderKLWan, video: Tensor, generator: torch.Generator, *, fast: bool) -> tuple[Tensor, str]:
    """Absolute and squared error of a sampled latent's picture, and a weak pull of the latents to a unit Gaussian."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        posterior = vae.encode(video).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator)
        shown = decode_unclamped(vae, mean + (logvar / 2).exp() * noise).float()
    difference = shown - video
    squared = difference.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = difference.abs().mean() + 2 * squared + KL_WEIGHT * kl
    return loss, f"psnr {psnr(squared.item()):.1f} dB, kl {kl.item():.2f}"


def psnr(mean_squared: float) -> float:
    """dB, of values whose range is 2."""
    return 10 * math.log10(4 / max(mean_squared, 1e-12))


def vae_step(vae: AutoencoderKLWan, step: int, seed: int, *, batch: int, whole: bool, fast: bool) -> tuple[Tensor, str]:
    pixels = whole_batch(step, seed, batch) if whole else window_batch(step, seed, batch)
    return vae_loss(vae, video_tensor(pixels), seeded(seed, 13, step), fast=fast)


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, split: str, count: int, seed: int, cache: Path | None = None) -> Tensor:
    """[count, C, 3, 8, 8] float32: means of the latents of the first clips of a split, kept in ``cache``."""
    if cache is not None and cache.exists():
        return torch.load(cache, weights_only=True).float()
    out = []
    for start in range(0, count, 16):
        pixels, _ = clips.clip_batch(split, range(start, min(start + 16, count)), seed=seed)
        out.append(vae.encode(video_tensor(pixels)).latent_dist.mean)
    latents = torch.cat(out)
    if cache is not None:
        torch.save(latents, cache)
    return latents


def latent_statistics(latents: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel, as ``latents_mean`` and ``latents_std`` of the VAE's config."""
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    return [round(v, 5) for v in mean.tolist()], [round(v, 5) for v in std.tolist()]


@torch.no_grad()
def heldout_psnr(vae: AutoencoderKLWan, count: int, seed: int = 0) -> list[float]:
    """dB of every held-out clip through ``encode`` and ``decode`` (peak 255, all pixels and frames)."""
    found = []
    for index in range(count):
        video = video_tensor(clips.draw("heldout", index, seed=seed).pixels()[None])
        shown = vae.decode(vae.encode(video).latent_dist.mean, return_dict=False)[0]
        found.append(psnr((shown - video).square().mean().item()))
    return found
