"""Frames as files: an mp4, and a sheet that shows the runs of one prompt above each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmeff.diffusion.generating import Videos

SHORT_SIDE = 256  # small clips are enlarged to this, each pixel to a square
COLUMNS, CELL = 9, 96
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (110, 110, 118)


def enlarged(frames: np.ndarray, short_side: int = SHORT_SIDE) -> np.ndarray:
    """[T, H, W, 3] floats in [0, 1] -> uint8, enlarged by a whole factor so that H264 keeps the edges."""
    pixels = np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)
    factor = max(1, short_side // min(pixels.shape[1:3]))
    return pixels.repeat(factor, 1).repeat(factor, 2)


def write_mp4(frames: np.ndarray, file: Path, *, fps: int = 8) -> None:
    """H264 by the ffmpeg that imageio-ffmpeg brings."""
    import imageio.v2 as imageio

    # Odd sides cannot be coded in yuv420p; imageio enlarges to a multiple of this.
    writer: Any
    with imageio.get_writer(file, fps=fps, codec="libx264", quality=9, macro_block_size=2) as writer:
        for frame in enlarged(frames):
            writer.append_data(frame)


def caption(label: str, seconds: float, size: int, differences: dict[str, float]) -> str:
    text = f"{label}: {seconds:.2f} s, transformer {size / 2**20:.2f} MiB"
    if differences:
        text += f", latent error {differences['latent_error']:.4f}, PSNR {differences['psnr_db']:.1f} dB"
    return text


def draw_sheet(videos: Videos) -> Image.Image:
    """Each run a row of frames with its label and numbers; the last one's differences are to the first."""
    fonts: Any = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    shown = np.linspace(0, len(videos.runs[0].frames) - 1, min(COLUMNS, len(videos.runs[0].frames))).round().astype(int)
    height, width = videos.runs[0].frames.shape[1:3]
    cell = (round(CELL * width / height), CELL)
    row_height = cell[1] + 28
    sheet = Image.new("RGB", (max(len(shown) * (cell[0] + 4) + 12, 640), 36 + row_height * len(videos.runs) + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    steps = videos.call.get("num_inference_steps", "default")
    draw.text((8, 8), f'"{videos.prompt}", seed {videos.seed}, {steps} steps', fill=INK, font=fonts[0])
    for row, run in enumerate(videos.runs):
        top = 36 + row * row_height
        numbers = videos.differences if row and row + 1 == len(videos.runs) else {}
        text = caption(run.label, run.seconds, run.transformer_bytes, numbers)
        draw.text((8, top), text, fill=FAINT, font=fonts[1])
        for column, index in enumerate(shown):
            frame = Image.fromarray(np.rint(np.clip(run.frames[index], 0, 1) * 255).astype(np.uint8))
            sheet.paste(frame.resize(cell, Image.Resampling.NEAREST), (8 + column * (cell[0] + 4), top + 20))
    return sheet
