"""Make a clip with a wrapped pipeline beside the unwrapped one: what ``vlmeff generate video`` does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmeff.diffusion.report import bytes_held
from vlmeff.errors import ConfigError, MissingExtraError, UnsupportedModelError

CALL_FILE = "call.json"


@dataclass(frozen=True, eq=False)
class VideoRun:
    """One clip and what it cost."""

    label: str
    frames: np.ndarray  # [T, H, W, 3] float32 in [0, 1]
    latents: Tensor  # of the last denoising step
    seconds: float  # of the pipeline's call, measured
    transformer_bytes: int  # of parameters and buffers, measured
    report: Any  # of vlmeff.report; None for the unwrapped pipeline


@dataclass(frozen=True, eq=False)
class Videos:
    """The runs of one prompt and seed, the unwrapped pipeline first where it was asked for."""

    prompt: str
    seed: int
    call: dict[str, Any]
    runs: list[VideoRun]

    @property
    def differences(self) -> dict[str, float]:
        """Of the last run against the first: relative latent error, PSNR of the frames, ratios of time and bytes."""
        if len(self.runs) < 2:
            return {}
        base, run = self.runs[0], self.runs[-1]
        return {
            "latent_error": relative_error(base.latents, run.latents),
            "psnr_db": frames_psnr(base.frames, run.frames),
            "speedup": base.seconds / run.seconds,
            "bytes_ratio": run.transformer_bytes / base.transformer_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        runs = [
            {"label": r.label, "seconds": r.seconds, "transformer_bytes": r.transformer_bytes, "frames": len(r.frames)}
            for r in self.runs
        ]
        # JSON knows neither infinity (equal frames) nor NaN.
        differences = {name: value if np.isfinite(value) else None for name, value in self.differences.items()}
        return {"prompt": self.prompt, "seed": self.seed, "call": self.call, "runs": runs, **differences}


def relative_error(base: Tensor, other: Tensor) -> float:
    """Frobenius norm of the difference over that of ``base``."""
    return float((other.double() - base.double()).norm() / base.double().norm())


def frames_psnr(base: np.ndarray, other: np.ndarray) -> float:
    """dB between frames in [0, 1]; infinite when they are equal."""
    squared = float(np.square(base.astype(np.float64) - other).mean())
    return float("inf") if squared == 0 else float(-10 * np.log10(squared))


def check_extra() -> None:
    """Raise the error that names the extra when a package that videos need is missing."""
    for module in ("diffusers", "ftfy", "imageio", "imageio_ffmpeg"):
        try:
            __import__(module)
        except ImportError as error:
            raise MissingExtraError(module, "diffusion", "video pipelines") from error


def call_defaults(pipe: Any) -> dict[str, Any]:
    """Arguments that a pipeline's folder recommends in its ``call.json``; a pipeline without one gets its own."""
    folder = getattr(pipe, "name_or_path", None) or pipe.config.get("_name_or_path", "")
    file = Path(str(folder)) / CALL_FILE
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def run_video(
    pipe: Any, prompt: str, *, label: str, seed: int, call: dict[str, Any], report: Any = None,
    on_step: Callable[[], None] = lambda: None,
) -> VideoRun:  # fmt: skip
    """One timed call with ``output_type="np"``; the latents are those that the last step leaves.

    ``on_step`` is called after every denoising step; what it raises ends the call.
    """
    last: dict[str, Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step()
        last.update(tensors)
        return {}

    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    frames = pipe(prompt, generator=generator, output_type="np", callback_on_step_end=keep, **call).frames[0]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return VideoRun(
        label=label,
        frames=np.asarray(frames, np.float32),
        latents=last["latents"].detach().cpu(),
        seconds=seconds,
        transformer_bytes=bytes_held(pipe.transformer),
        report=None if report is None else report(pipe),
    )


def generate_video(
    prompt: str,
    *,
    model: str = "tiny-wan",
    preset: str | None = "fast",
    seed: int = 0,
    compare: bool = True,
    call: dict[str, Any] | None = None,
    device: str | None = None,
    dtype: Any = "auto",
    progress: Callable[[str], None] = lambda what: None,
    on_step: Callable[[], None] = lambda: None,
) -> Videos:
    """Load a pipeline, make the clip as it is (``compare``), wrap it and make the clip again from the same noise.

    Args:
        call: arguments of the pipeline's call; they win over those of the folder's ``call.json``.
        progress: told what is about to be done.  on_step: called after every denoising step. What they raise ends the
            call.
    Raises:
        UnsupportedModelError: the model is no diffusers video pipeline.
        MissingExtraError: diffusers, ftfy or imageio is missing.
    """
    check_extra()
    import vlmeff

    progress(f"loading {model}")
    pipe, _ = vlmeff.load(model, device=device, dtype=dtype)
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "transformer") or not hasattr(pipe, "vae"):
        raise UnsupportedModelError(
            f"generate video: {model!r} is a {type(pipe).__name__}, not a video pipeline of diffusers. "
            'Use --model tiny-wan or a folder or hub id with "model_index.json".'
        )
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    arguments = call_defaults(pipe) | (call or {})
    warm = arguments | {"num_inference_steps": 1}
    runs = []
    if compare:
        progress("unwrapped: warming up")
        run_video(pipe, prompt, label="", seed=seed, call=warm)
        progress("unwrapped: measuring")
        runs.append(run_video(pipe, prompt, label="unwrapped", seed=seed, call=arguments, on_step=on_step))
    if preset is not None:
        progress(f"wrapping with {preset}")
        vlmeff.wrap(pipe, preset)
        run_video(pipe, prompt, label="", seed=seed, call=warm)
        progress(f"{preset}: measuring")
        runs.append(
            run_video(pipe, prompt, label=preset, seed=seed, call=arguments, report=vlmeff.report, on_step=on_step)
        )
    if not runs:
        raise ConfigError("generate video: nothing to run with --preset none and --no-compare.")
    return Videos(prompt=prompt, seed=seed, call=arguments, runs=runs)
