"""Turn videos and prompts into training data with the encoders of a pipeline (Wan)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmeff.diffusion.qvgen.data import write_clips
from vlmeff.errors import DataError, UnsupportedModelError


def encode_clips(
    pipe: Any,
    clips: Iterable[tuple[Any, str]],
    folder: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int = 512,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Encode (video, prompt) pairs and write them as shards, with the empty prompt beside them.

    The most likely latents of the VAE (no sampling) in float32, normalised as the pipeline undoes it:
    (z - mean) / std. Videos may come from a generator: one is held at a time.

    Args:
        pipe: a WanPipeline with VAE, text encoder and tokenizer.
        clips: videos as [F, H, W, 3] uint8 arrays or as the pipeline's ``video_processor`` takes them (list of PIL
            pictures, array in [0, 1], [F, 3, H, W] tensor in [0, 1]), of 4 n + 1 frames.
        height, width: pixels to resize to; the video's own by default.
        max_sequence_length: tokens of a prompt, as the pipeline will be called with (its default is 512).
        dtype: of what is written; bfloat16 halves the folder.
    Returns:
        The number of clips.
    Raises:
        UnsupportedModelError: not a Wan pipeline.
        DataError: a video of another number of frames, or no clips.
    """
    check_pipeline(pipe)

    def encoded() -> Iterator[tuple[Tensor, Tensor]]:
        known: dict[str, Tensor] = {}
        for number, (video, prompt) in enumerate(clips):
            if isinstance(video, np.ndarray) and video.dtype == np.uint8:
                video = video.astype(np.float32) / 255
            pixels = pipe.video_processor.preprocess_video(video, height=height, width=width)
            frames, step = pixels.shape[2], pipe.vae_scale_factor_temporal
            if frames % step != 1 % step:
                raise DataError(f"clip {number} has {frames} frames; this VAE takes {step} n + 1.")
            if prompt not in known:
                known[prompt] = encode_prompt(pipe, prompt, max_sequence_length).to(dtype)
            yield encode_video(pipe, pixels)[0].to(dtype), known[prompt]

    with torch.no_grad():
        return write_clips(encoded(), folder, empty_prompt=encode_prompt(pipe, "", max_sequence_length).to(dtype))


@torch.no_grad()
def encode_video(pipe: Any, pixels: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1] -> latents [B, C, F', H', W'] float32, mean 0 and deviation 1 or so."""
    vae = pipe.vae
    parameter = next(vae.parameters(), None)
    device, dtype = (pixels.device, torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    latents = vae.encode(pixels.to(device, dtype)).latent_dist.mode().float()
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (
        torch.tensor(values, device=latents.device).view(shape)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str, max_sequence_length: int = 512) -> Tensor:
    """[L, D], as the pipeline would hand it to its transformer."""
    embeddings, _ = pipe.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return embeddings[0].float()


def check_pipeline(pipe: Any) -> None:
    """Refuse pipelines whose encoders are used in another way."""
    if type(pipe).__name__ != "WanPipeline" or getattr(pipe, "vae", None) is None:
        raise UnsupportedModelError(
            f"{type(pipe).__name__}: clips can be encoded with a WanPipeline that has its VAE and text encoder. For "
            "another model write (latents, prompt embedding) pairs with vlmeff.diffusion.qvgen.data.write_clips."
        )


def read_videos(folder: str | Path, *, frames: int | None = None, step: int = 4) -> Iterator[tuple[np.ndarray, str]]:
    """(frames [F, H, W, 3] uint8, prompt) of every .mp4 in a folder that has a .txt of the same name beside it.

    Args:
        frames: the first so many of each; by default as many as there are, cut to ``step`` n + 1.
    Raises:
        DataError: no such pairs, or a video that is too short or cannot be decoded.
    """
    import imageio.v3 as iio

    videos = [path for path in sorted(Path(folder).glob("*.mp4")) if path.with_suffix(".txt").is_file()]
    if not videos:
        raise DataError(
            f"{str(folder)!r} holds neither shards of clips nor videos (.mp4) with their prompts beside them (.txt)."
        )
    for path in videos:
        try:
            video = np.stack(list(islice(iio.imiter(path), frames)))
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"the video {str(path)!r} cannot be decoded: {error}") from error
        if frames is not None and len(video) < frames:
            raise DataError(f"the video {str(path)!r} has {len(video)} frames, fewer than {frames}.")
        if frames is None:
            video = video[: (len(video) - 1) // step * step + 1]
        yield video, path.with_suffix(".txt").read_text(encoding="utf-8").strip()
