"""The pictures that tokens are drawn on: what the tower saw, tiles put together, and which token lies where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tokenpruning import ItemPlan, Layout
from vlmeff.vlm.families.base import Modality
from vlmeff.vlm.overlay import blurred


def restored(segments: Sequence[Tensor], processor: Any, modality: Modality = "image") -> list[Image.Image]:
    """[3, h, w] normalised pixels of each segment -> pictures."""
    settings = getattr(processor, "image_processor", None)
    if modality == "video":
        settings = getattr(processor, "video_processor", None) or settings
    pixels = [segment.detach().float().cpu() for segment in segments]
    if settings is None:
        low = min(float(p.min()) for p in pixels)
        span = max(float(p.max()) for p in pixels) - low
        scaled = [(p - low) / (span or 1.0) for p in pixels]
    elif getattr(settings, "do_normalize", True):
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (settings.image_mean, settings.image_std))
        scaled = [p * std + mean for p in pixels]
    else:
        scaled = pixels
    colours = [(p.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0) for p in scaled]
    return [Image.fromarray(np.ascontiguousarray(colour.numpy())) for colour in colours]


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture and the [H, W] numbers of the tokens that lie on it, among the tokens of its item."""

    picture: Image.Image
    tokens: npt.NDArray[np.int64]
    seams: tuple[tuple[int, int, int, int], ...] = ()


def canvases(item: ItemPlan, pictures: list[Image.Image]) -> list[list[Canvas]]:
    """Per frame of an item the pictures that are drawn side by side: one, or a thumbnail and a mosaic."""
    layout = item.new_layout or item.layout
    resampled = item.new_layout is not None
    starts = np.cumsum([0, *layout.sizes])
    mosaic, old = _Tiles.of(layout), _Tiles.of(item.layout)

    def canvas(n: int) -> Canvas:
        grid = layout.grids[n]
        picture = blurred(pictures[n], grid) if resampled else pictures[n]
        return Canvas(picture, np.arange(starts[n], starts[n + 1]).reshape(grid))

    if mosaic is None or old is None:
        return [[canvas(n)] for n in range(len(layout.grids))]
    whole = old.paste(pictures)
    if resampled:
        return [[canvas(0), Canvas(blurred(whole, mosaic.tokens.shape), mosaic.tokens)]]
    return [[canvas(0), Canvas(whole, mosaic.tokens, tuple(old.boxes))]]


@dataclass(frozen=True, eq=False)
class _Tiles:
    """The tiles of a picture behind its thumbnail. ``tokens`` [H, W]; ``boxes``: (top, left, height, width) of each."""

    tokens: npt.NDArray[np.int64]
    boxes: list[tuple[int, int, int, int]]

    @classmethod
    def of(cls, layout: Layout) -> _Tiles | None:
        """None where the segments are not a thumbnail and tiles: the separators end the mosaic's rows."""
        if layout.slots is None or layout.spans is None or len(layout.grids) < 2:
            return None
        rows = layout.spans[layout.spans[:, 0] < layout.spans[:, 1]].cpu()
        if not len(rows):
            return None
        slots = layout.slots.cpu()
        tokens = torch.stack([slots[start:end] for start, end in rows.tolist()])
        first, stride = int(rows[0, 0]), tokens.shape[1] + 1
        places, boxes = layout.places("cpu"), []
        for (h, w), start in zip(layout.grids[1:], np.cumsum(layout.sizes)[:-1], strict=True):
            boxes.append((*divmod(int(places[start]) - first, stride), h, w))
        return cls(tokens.numpy(), boxes)

    def paste(self, pictures: list[Image.Image]) -> Image.Image:
        """The tiles where they stand; ``pictures`` begin with the thumbnail."""
        cell = max(1, round(max(p.height / h for p, (_, _, h, _) in zip(pictures[1:], self.boxes, strict=True))))
        rows, columns = self.tokens.shape
        out = Image.new("RGB", (columns * cell, rows * cell), "white")
        for picture, (top, left, h, w) in zip(pictures[1:], self.boxes, strict=True):
            out.paste(picture.resize((w * cell, h * cell), Image.Resampling.BICUBIC), (left * cell, top * cell))
        return out
