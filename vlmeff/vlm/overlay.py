"""Draw which visual tokens were kept over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tokenpruning.plan import ANCHOR, BUFFER, REGISTER

# Colour-blind safe (Okabe and Ito).
COLORS = {ANCHOR: (213, 94, 0), BUFFER: (230, 159, 0), REGISTER: (0, 158, 115)}
LABELS = {ANCHOR: "anchor", BUFFER: "buffer", REGISTER: "register"}


def draw_overlay(
    picture: Image.Image,
    grid: tuple[int, int],
    keep: Tensor,
    kind: Tensor,
    *,
    width: int = 720,
    legend: bool = True,
) -> Image.Image:
    """The picture with dropped tokens dimmed and kept tokens framed in the colour of their kind.

    Args:
        picture: what the vision tower saw (``picture_seen``); any size.
        grid: (H, W) of its tokens.  keep: [k] int64 raster indices.  kind: [k] int8 (``tokenpruning.KIND_NAMES``).
        width: width of the result in pixels; the height follows the picture.
    """
    rows, columns = grid
    height = round(width * picture.height / picture.width)
    out = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    pixels = np.asarray(out).astype(np.float32)
    kept = np.zeros(rows * columns, bool)
    kept[keep.cpu().numpy()] = True
    y = (np.arange(height) * rows // height)[:, None]
    x = (np.arange(width) * columns // width)[None, :]
    dimmed = 0.3 * pixels + 0.7 * 255
    out = Image.fromarray(np.where(kept.reshape(rows, columns)[y, x][..., None], pixels, dimmed).astype(np.uint8))
    draw = ImageDraw.Draw(out)
    line = max(2, width // (columns * 14))
    for index, why in zip(keep.tolist(), kind.tolist(), strict=True):
        r, c = divmod(index, columns)
        box = (c * width // columns, r * height // rows, (c + 1) * width // columns - 1, (r + 1) * height // rows - 1)
        draw.rectangle(box, outline=COLORS[why], width=line)
    present = [why for why in (ANCHOR, BUFFER, REGISTER) if why in set(kind.tolist())]
    return _with_legend(out, present, len(keep), rows * columns) if legend else out


def _with_legend(picture: Image.Image, kinds: Sequence[int], kept: int, total: int) -> Image.Image:
    bar = 34
    out = Image.new("RGB", (picture.width, picture.height + bar), "white")
    out.paste(picture)
    draw = ImageDraw.Draw(out)
    x, y = 10, picture.height + 9
    for kind in kinds:
        draw.rectangle((x, y, x + 16, y + 16), outline=COLORS[kind], width=4)
        draw.text((x + 24, y), LABELS[kind], fill="black", font_size=15)
        x += 44 + int(draw.textlength(LABELS[kind], font_size=15))
    text = f"{kept} of {total} visual tokens kept"
    draw.text((picture.width - 10 - draw.textlength(text, font_size=15), y), text, fill="black", font_size=15)
    return out


def picture_seen(picture: Image.Image, processor: Any, pixel_values: Tensor) -> Image.Image:
    """What the vision tower saw of ``picture``, so that the token grid covers it exactly.

    [3, H, W] pixel values are turned back into a picture (crops and padding of the image processor show); packed
    patches (Qwen-VL) cover the whole picture, so it is returned as it is.
    """
    if pixel_values.ndim != 3:
        return picture
    settings = processor.image_processor
    mean = torch.tensor(settings.image_mean).view(3, 1, 1)
    std = torch.tensor(settings.image_std).view(3, 1, 1)
    restored = (pixel_values.float().cpu() * std + mean).clamp(0, 1)
    return Image.fromarray((restored * 255).round().byte().permute(1, 2, 0).numpy())
