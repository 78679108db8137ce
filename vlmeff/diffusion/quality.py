"""How far a cheaper video pipeline is from the full-precision one, from the same noise.

Three distances: of the latents after the last step (relative, Frobenius), and PSNR and SSIM of the decoded frames. They
say how far the clip moved, not whether it got worse: another clip that shows the prompt as well is far away too. For
that there are ``clip_scores`` and a ``judge`` that knows the task.

Shape letters: B clips, T frames, H x W pixels; frames are floats in [0, 1], channels last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmeff.diffusion.plan import transformers_of
from vlmeff.diffusion.report import bytes_held
from vlmeff.errors import ConfigError, UnsupportedModelError

# Constants of Wang et al. 2004, section III-C.
SSIM_SIDE, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
SAME_DB = 100.0  # PSNR of equal clips, and the most that counts: means stay finite
SEEDS_APART = 1000
PIXELS_AT_ONCE = 1 << 20

Judge = Callable[[np.ndarray, Sequence[str]], Sequence[bool]]
Clip = tuple[Any, Callable[[Any], Tensor], Callable[[list[str]], Tensor]]


def psnr(base: np.ndarray, other: np.ndarray) -> float:
    """dB of a clip against another, over all frames; ``SAME_DB`` at most.

    Args:
        base, other: floats in [0, 1] of one shape.
    """
    squared = float(np.square(base.astype(np.float64) - other).mean())
    return min(SAME_DB, -10 * math.log10(squared)) if squared > 0 else SAME_DB


def ssim(base: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of frames: 1 for equal ones.

    Per colour channel, over every 11 x 11 window that lies in the frame, weighted by a Gaussian of sigma 1.5:

        SSIM = (2 mu_x mu_y + C1)(2 cov_xy + C2) / ((mu_x^2 + mu_y^2 + C1)(var_x + var_y + C2))

    with C1 = 0.01^2 and C2 = 0.03^2 for a range of 1; the mean over windows and channels.

    Args:
        base, other: [B, H, W, 3] floats in [0, 1]; computed in float64.
    Returns:
        [B] float64.
    Raises:
        ConfigError: the shapes differ, or a side is below 11 pixels.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
    IEEE TIP 13(4), 2004; there on luminance, here on the colours, because a change of hue must count.
    """
    if base.shape != other.shape or base.ndim != 4:
        raise ConfigError(f"ssim: frames must be [B, H, W, 3] of one shape, got {base.shape} and {other.shape}.")
    if min(base.shape[1:3]) < SSIM_SIDE:
        raise ConfigError(f"ssim: frames of {base.shape[1]} x {base.shape[2]} are smaller than its window of 11.")
    x, y = (frames.double().permute(0, 3, 1, 2) for frames in (base, other))
    place = torch.arange(SSIM_SIDE, dtype=torch.float64, device=x.device) - SSIM_SIDE // 2
    line = torch.exp(-(place**2) / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    channels = x.shape[1]

    def mean(values: Tensor) -> Tensor:  # a Gaussian window is two lines, one after the other
        rows = F.conv2d(values, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(rows, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similar = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return similar.mean((1, 2, 3))


def clip_ssim(base: np.ndarray, other: np.ndarray) -> float:
    """Mean of ``ssim`` over the frames of a clip, a few at a time (float64 frames are large).

    Args:
        base, other: [T, H, W, 3] floats in [0, 1].
    """
    some = max(1, PIXELS_AT_ONCE // (base.shape[1] * base.shape[2]))
    pairs = [
        (torch.from_numpy(base[i : i + some]), torch.from_numpy(other[i : i + some])) for i in range(0, len(base), some)
    ]
    return float(torch.cat([ssim(a, b) for a, b in pairs]).mean())


@torch.no_grad()
def clip_scores(frames: np.ndarray, texts: Sequence[str], clip: Clip, *, every: int = 1) -> list[float]:
    """CLIP score of every clip: 100 max(cos(frame, text), 0), the mean over its frames (arXiv 2104.08718, without its
    factor of 2.5).

    Args:
        frames: [B, T, H, W, 3] floats in [0, 1].  texts: B prompts.
        clip: (model, preprocess, tokenizer) of open_clip, e.g. those of
            ``open_clip.create_model_from_pretrained(name, pretrained)`` and ``open_clip.get_tokenizer(name)``.
        every: look at each ``every``-th frame only.
    """
    from PIL import Image

    if len(frames) != len(texts):
        raise ConfigError(f"clip_scores: {len(frames)} clips and {len(texts)} texts; pass one text for each clip.")
    model, preprocess, tokenizer = clip
    device = next(model.parameters()).device
    words = F.normalize(model.encode_text(tokenizer(list(texts)).to(device)).float(), dim=-1)
    out = []
    for shown, word in zip(frames, words, strict=True):
        pixels = np.rint(np.clip(shown[::every], 0, 1) * 255).astype(np.uint8)
        pictures = torch.stack([preprocess(Image.fromarray(frame)) for frame in pixels]).to(device)
        seen = F.normalize(model.encode_image(pictures).float(), dim=-1)
        out.append(float(100 * (seen @ word).clamp(min=0).mean()))
    return out


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One setting against the full-precision pipeline, over ``clips`` clips.

    Measured: ``latent_error`` (relative; mean and ``latent_error_worst`` over clips), ``psnr_db`` (mean; equal clips
    count as 100), ``ssim`` (mean over clips and frames), ``clip_score`` where a CLIP was given, ``right`` (clips that
    the judge found right) where a judge was, ``transformer_bytes``, ``seconds`` of the processor and ``blocks_skipped``
    (share, by a feature cache).
    """

    clips: int
    latent_error: float
    latent_error_worst: float
    psnr_db: float
    ssim: float
    transformer_bytes: int
    seconds: float
    clip_score: float | None = None
    right: int | None = None
    blocks_skipped: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, rounded to what is meant."""
        return {
            name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in vars(self).items()
        }


@dataclass(frozen=True, eq=False)
class Rendering:
    """Clips of a pipeline: ``frames`` [B, T, H, W, 3] float32, ``latents`` [B, ...] after the last step."""

    frames: np.ndarray
    latents: Tensor
    seconds: float
    blocks_skipped: float | None


class Reference:
    """The clips of an unwrapped pipeline, to compare others with.

    Args:
        pipe: a video pipeline of diffusers, as it is.
        prompts, seeds: one clip of each prompt and seed; its noise is drawn from ``clip_seed(seed, prompt's index)``.
        call: arguments of the pipeline's call (size, steps, guidance).
        batch: clips of one call. A feature cache decides for the whole call: pass 1 where one is on.
        judge: takes frames [B, T, H, W, 3] and their prompts and says which clips are right.
        clip: see ``clip_scores``.
        progress: called with the number of clips that are done.
    Raises:
        ConfigError: no prompts or seeds.  UnsupportedModelError: not a pipeline with a transformer.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0,),
        *,
        call: Mapping[str, Any] | None = None,
        batch: int = 1,
        judge: Judge | None = None,
        clip: Clip | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        if isinstance(prompts, str) or not prompts or not seeds:
            raise ConfigError("quality: pass a list of one prompt or more, and one seed or more.")
        self.prompts = [prompt for _ in seeds for prompt in prompts]
        self.seeds = [clip_seed(seed, index) for seed in seeds for index in range(len(prompts))]
        self.call, self.batch, self.judge, self.clip, self.progress = dict(call or {}), batch, judge, clip, progress
        self.rendering = self.render(pipe)

    def render(self, pipe: Any, *, batch: int | None = None) -> Rendering:
        """The clips of a pipeline from the reference's prompts and noise, ``batch`` at a time."""
        if isinstance(pipe, nn.Module):
            raise UnsupportedModelError(f"quality: {type(pipe).__name__} is a model; pass the pipeline it belongs to.")
        transformers_of(pipe)  # there is one
        frames, latents, seconds, run, skipped = [], [], 0.0, 0, 0
        size = batch or self.batch
        for start in range(0, len(self.prompts), size):
            last: dict[str, Tensor] = {}

            def keep(
                pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor], last: dict[str, Tensor] = last
            ) -> dict[str, Tensor]:
                last.update(tensors)
                return {}

            noise = [torch.Generator().manual_seed(seed) for seed in self.seeds[start : start + size]]
            before = time.process_time()
            made = pipe(
                self.prompts[start : start + size],
                generator=noise,
                output_type="np",
                callback_on_step_end=keep,
                **self.call,
            ).frames
            seconds += time.process_time() - before
            frames.append(np.asarray(made, np.float32))
            latents.append(last["latents"].detach().float().cpu())
            parts = [part for part in _report_parts(pipe) if part.calls]
            run += sum(part.blocks_run for part in parts)
            skipped += sum(part.blocks_skipped for part in parts)
            self.progress(min(start + size, len(self.prompts)))
        return Rendering(
            np.concatenate(frames), torch.cat(latents), seconds, skipped / (run + skipped) if run + skipped else None
        )

    def compare(self, pipe: Any, *, batch: int | None = None) -> Quality:
        """Render with another pipeline (wrapped, shortened, trained, ...) and compare."""
        return self.measure(self.render(pipe, batch=batch), transformer_bytes=transformer_bytes(pipe))

    def measure(self, other: Rendering, *, transformer_bytes: int) -> Quality:
        """Compare clips that are rendered already; the reference's own give its judge's and CLIP's figures."""
        base = self.rendering
        if other.frames.shape != base.frames.shape:
            raise ConfigError(
                f"quality: clips of {other.frames.shape} cannot be compared with {base.frames.shape}; use one size."
            )
        off = (other.latents.double() - base.latents.double()).flatten(1).norm(dim=1)
        errors = off / base.latents.double().flatten(1).norm(dim=1)
        levels = [psnr(a, b) for a, b in zip(base.frames, other.frames, strict=True)]
        alike = [clip_ssim(a, b) for a, b in zip(base.frames, other.frames, strict=True)]
        scores = None if self.clip is None else clip_scores(other.frames, self.prompts, self.clip)
        right = None if self.judge is None else sum(map(bool, self.judge(other.frames, self.prompts)))
        return Quality(
            clips=len(base.frames),
            latent_error=float(errors.mean()),
            latent_error_worst=float(errors.max()),
            psnr_db=float(np.mean(levels)),
            ssim=float(np.mean(alike)),
            transformer_bytes=transformer_bytes,
            seconds=other.seconds,
            clip_score=None if scores is None else float(np.mean(scores)),
            right=right,
            blocks_skipped=other.blocks_skipped,
        )


def clip_seed(seed: int, index: int) -> int:
    """The seed of the noise of prompt number ``index``."""
    return SEEDS_APART * seed + index


def compare(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    plans: Mapping[str, Mapping[str, Any]] | Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    batch: int = 1,
    judge: Judge | None = None,
    clip: Clip | None = None,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> dict[str, Quality]:
    """Quality of each plan against the pipeline as it is; "unwrapped" is the pipeline against itself.

    Args:
        pipe: not wrapped; it is wrapped with each plan in turn, and unwrapped again.
        plans: name -> arguments of ``vlmeff.wrap`` ({"preset": "fast"}, {"quant": "w4a16"}), or names of schemes.
        Others: see ``Reference``; ``progress`` gets the plan's name too.
    Raises:
        ConfigError: the pipeline is wrapped.  VlmeffError: of ``wrap``.
    """
    import vlmeff

    if vlmeff.is_wrapped(pipe):
        raise ConfigError("quality: the pipeline is wrapped already; call vlmeff.unwrap(pipe) first.")
    if not isinstance(plans, Mapping):
        plans = {scheme: {"quant": scheme} for scheme in ([plans] if isinstance(plans, str) else plans)}
    now = ["unwrapped"]
    reference = Reference(
        pipe,
        prompts,
        seeds,
        call=call,
        batch=batch,
        judge=judge,
        clip=clip,
        progress=lambda done: progress(now[0], done),
    )
    found = {"unwrapped": reference.measure(reference.rendering, transformer_bytes=transformer_bytes(pipe))}
    for name, plan in plans.items():
        now[0] = name
        vlmeff.wrap(pipe, **{"preset": None, **plan})
        try:
            found[name] = reference.compare(pipe)
        finally:
            vlmeff.unwrap(pipe)
    return found


def transformer_bytes(pipe: Any) -> int:
    """Bytes of parameters and buffers of a pipeline's transformers."""
    return sum(bytes_held(module) for module in transformers_of(pipe).values())


def _report_parts(pipe: Any) -> tuple[Any, ...]:
    import vlmeff

    return vlmeff.report(pipe).parts if vlmeff.is_wrapped(pipe) else ()
