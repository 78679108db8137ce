"""A sheet of samples: each run a row of enlarged pictures with its label and its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vlmeff.models.mar.comparing import Comparison

CELL, GAP, MARGIN = 96, 6, 14
COLUMNS = 10
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (100, 100, 108)
LABEL_SIZE, TEXT_SIZE = 15, 13
NARROWEST = 640


def to_picture(image: Tensor) -> Image.Image:
    """[C, H, W] in [-1, 1], C 1 or 3, to a picture of ``CELL`` pixels. Tiny ones are easier to read interpolated."""
    pixels = np.rint((image.clamp(-1, 1).cpu().numpy() + 1) * 127.5).astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")
    return picture.resize((CELL, CELL), Image.Resampling.LANCZOS if picture.width >= CELL else Image.Resampling.BICUBIC)


def draw_sheet(comparison: Comparison, *, title: str = "") -> Image.Image:
    """All runs below each other. Samples beyond a row's ten columns go on in the next line."""
    count = len(comparison.labels)
    columns = min(count, COLUMNS)
    lines = -(-count // COLUMNS)
    fonts: Any = ImageFont.load_default(size=LABEL_SIZE), ImageFont.load_default(size=TEXT_SIZE)
    block = 2 * 20 + lines * (CELL + GAP) + 12
    width = max(2 * MARGIN + columns * (CELL + GAP) - GAP, NARROWEST)
    top = MARGIN + (26 if title else 0)
    sheet = Image.new("RGB", (width, top + block * len(comparison.runs) + MARGIN - 12), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN - 2), title, fill=INK, font=fonts[0])
    for run in comparison.runs:
        draw.text((MARGIN, top), run.label, fill=INK, font=fonts[0])
        for n, image in enumerate(run.images):
            at = (MARGIN + n % COLUMNS * (CELL + GAP), top + 21 + n // COLUMNS * (CELL + GAP))
            sheet.paste(to_picture(image), at)
        below = top + 21 + lines * (CELL + GAP) - 2
        draw.text((MARGIN, below), run.numbers(comparison.plain), fill=FAINT, font=fonts[1])
        top += block
    return sheet
