"""Draw what became of visual tokens over the picture: panels, their legend, and how they are arranged.

A token is kept (its cell is framed in the colour of its kind), dropped (its cell fades to grey) or merged into another
(its cell fades and carries a dot). What it means does not hang on hue alone, and the hues are Okabe and Ito's, which
colour blind readers tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tokenpruning.plan import ANCHOR, BUFFER, MERGED, REGISTER, TEXT

DROPPED, TAKEN, RESAMPLED = -1, -2, 5  # marks beside the kinds of ``tokenpruning.plan``; kept tokens have marks >= 0

COLORS = {
    ANCHOR: (213, 94, 0),
    BUFFER: (230, 159, 0),
    REGISTER: (0, 158, 115),
    TEXT: (0, 114, 178),
    MERGED: (204, 121, 167),
    TAKEN: (204, 121, 167),
    RESAMPLED: (0, 114, 178),
}
LABELS = {
    ANCHOR: "anchor",
    BUFFER: "buffer",
    REGISTER: "register",
    TEXT: "chosen by the text",
    MERGED: "mean of its group",
    RESAMPLED: "resampled token",
    TAKEN: "merged into another",
    DROPPED: "dropped",
}
FADED, VEIL = 0.3, 200  # where a token is gone this share of the picture shows through a grey veil
TINTED = 0.5  # of the picture that shows through where cells are too small for frames
SMALLEST_FRAMED = 5  # pixels along an edge of a cell
LEAST_CELL, LEAST_PANEL = 7, 150  # pixels, where panels stand side by side
TALLEST = 1.5  # times as high as wide is the highest panel
INK, SEAM = (20, 20, 20), (60, 60, 60)

Marks = npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture and what became of each token of its grid.

    ``marks`` [H, W] int8: a kind of ``tokenpruning.plan`` or ``RESAMPLED`` for kept tokens, else ``DROPPED`` or
    ``TAKEN``. ``seams``: (top, left, height, width) in tokens of the tiles it was put together from.
    """

    picture: Image.Image
    marks: Marks
    seams: tuple[tuple[int, int, int, int], ...] = ()

    def height(self, width: int) -> int:
        return max(1, round(width * self.picture.height / self.picture.width))


@dataclass(frozen=True, eq=False)
class View:
    """What is drawn as one: a picture, or the thumbnail and the mosaic of a tiled one. ``caption`` stands above."""

    panels: Sequence[Panel]
    caption: str = ""

    @property
    def columns(self) -> int:
        return sum(panel.marks.shape[1] for panel in self.panels)


def edges(count: int, length: int) -> npt.NDArray[np.int64]:
    """[count + 1]: the pixel where each of ``count`` cells begins on ``length`` pixels, and the end."""
    return np.arange(count + 1) * length // count


def blurred(picture: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The picture with no more detail than a grid of (H, W) cells holds, in its own size."""
    small = picture.convert("RGB").resize((grid[1], grid[0]), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.BICUBIC)


def draw_panel(panel: Panel, width: int) -> Image.Image:
    """The panel on ``width`` pixels; its height follows the picture."""
    height = panel.height(width)
    rows, columns = panel.marks.shape
    picture = panel.picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture).astype(np.float32)
    ys, xs = edges(rows, height), edges(columns, width)
    y = np.searchsorted(ys, np.arange(height), side="right") - 1
    x = np.searchsorted(xs, np.arange(width), side="right") - 1
    marks = panel.marks[y][:, x]
    out = np.where((marks >= 0)[..., None], pixels, FADED * pixels + (1 - FADED) * VEIL)
    cell = min(width / columns, height / rows)
    framed = cell >= SMALLEST_FRAMED
    if not framed:
        for mark in set(np.unique(panel.marks).tolist()) - {DROPPED}:
            here = marks == mark
            out[here] = TINTED * out[here] + (1 - TINTED) * np.array(COLORS[mark], np.float32)
    drawn = Image.fromarray(out.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    if framed:
        for (r, c), mark in np.ndenumerate(panel.marks):
            if mark != DROPPED:
                _draw_mark(draw, (int(xs[c]), int(ys[r]), int(xs[c + 1]), int(ys[r + 1])), int(mark))
    for top, left, h, w in panel.seams:
        line = 1 if cell < 12 else 2
        if left + w < columns:
            draw.rectangle((xs[left + w] - line, ys[top], xs[left + w] + line - 1, ys[top + h] - 1), fill=SEAM)
        if top + h < rows:
            draw.rectangle((xs[left], ys[top + h] - line, xs[left + w] - 1, ys[top + h] + line - 1), fill=SEAM)
    return drawn


def _draw_mark(draw: ImageDraw.ImageDraw, cell: tuple[int, int, int, int], mark: int) -> None:
    x0, y0, x1, y1 = cell
    side = min(x1 - x0, y1 - y0)
    if mark == TAKEN:
        reach = max(1.0, 0.16 * side)
        x, y = (x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=COLORS[mark])
        return
    line = 1 if side < 16 else 2 if side < 36 else 3
    if side >= 16:  # a white edge inside sets the frame off from a picture of its own colour
        draw.rectangle((x0 + line, y0 + line, x1 - 1 - line, y1 - 1 - line), outline="white", width=1)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=COLORS[mark], width=line)


def draw_view(view: View, width: int) -> Image.Image:
    """The view on ``width`` pixels; tall pictures become narrower. A mosaic stands beside its thumbnail where cells
    stay large enough, else below it, both in the same scale."""
    if len(view.panels) == 1:
        return _fitting(view.panels[0], width, round(TALLEST * width))
    gap = _gap(width)
    counts = [panel.marks.shape[1] for panel in view.panels]
    beside = (width - gap * (len(counts) - 1)) / sum(counts)
    if beside >= LEAST_CELL:
        parts = [_fitting(p, int(beside * n), round(TALLEST * width)) for p, n in zip(view.panels, counts, strict=True)]
        out = Image.new("RGB", (width, max(part.height for part in parts)), "white")
        x = 0
        for part in parts:
            out.paste(part, (x, 0))
            x += part.width + gap
        return out
    scale = width / max(counts)
    parts = [_fitting(p, int(scale * n), round(TALLEST * width)) for p, n in zip(view.panels, counts, strict=True)]
    return stack(parts, width, gap=gap)


def _fitting(panel: Panel, width: int, height: int) -> Image.Image:
    return draw_panel(panel, max(1, min(width, round(height * panel.picture.width / panel.picture.height))))


def arrange(views: Sequence[View], width: int) -> Image.Image:
    """The views in rows, in order, as many side by side as stay legible."""
    gap, size = _gap(width), font_size(width)
    least = max(LEAST_PANEL, LEAST_CELL * max(view.columns for view in views))
    fit = max(1, (width + gap) // (least + gap))
    rows = -(-len(views) // fit)
    columns = -(-len(views) // rows)
    each = (width - gap * (columns - 1)) // columns
    captioned = any(view.caption for view in views)
    strips = []
    for start in range(0, len(views), columns):
        drawn = [draw_view(view, each if columns > 1 else width) for view in views[start : start + columns]]
        bar = size + size // 2 if captioned else 0
        strip = Image.new("RGB", (width, bar + max(part.height for part in drawn)), "white")
        draw = ImageDraw.Draw(strip)
        for i, part in enumerate(drawn):
            x = i * (each + gap)
            if captioned:
                _write(draw, (x, size // 6), views[start + i].caption, size, each)
            strip.paste(part, (x + ((each if columns > 1 else width) - part.width) // 2, bar))
        strips.append(strip)
    return stack(strips, width, gap=gap)


def heading(text: str, width: int) -> Image.Image:
    """One line of text, larger than captions."""
    size = font_size(width) + 2
    out = Image.new("RGB", (width, 2 * size), "white")
    _write(ImageDraw.Draw(out), (0, size // 2), text, size, width)
    return out


def legend(marks: Iterable[int], text: str, width: int) -> Image.Image:
    """What the marks mean, and ``text`` at the right or in a line of its own."""
    present = set(marks)
    order = [m for m in (ANCHOR, BUFFER, REGISTER, TEXT, MERGED, RESAMPLED, TAKEN, DROPPED) if m in present]
    size = font_size(width)
    step, swatch, margin = size + 12, size + 4, 4
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, x, y = [], margin, step // 4
    for mark in order:
        label = "kept" if mark == REGISTER and not {ANCHOR, BUFFER} & present else LABELS[mark]
        need = swatch + size // 2 + int(measure.textlength(label, font_size=size)) + size
        if x > margin and x + need > width:
            x, y = margin, y + step
        places.append((x, y, mark, label))
        x += need
    length = int(measure.textlength(text, font_size=size))
    if x > margin and x + length + margin > width:
        x, y = margin, y + step
    at = max(margin, width - margin - length)
    out = Image.new("RGB", (width, y + step), "white")
    draw = ImageDraw.Draw(out)
    for x, row, mark, label in places:
        faded = mark in (TAKEN, DROPPED)
        draw.rectangle((x, row, x + swatch - 1, row + swatch - 1), fill=(215, 215, 215) if faded else "white")
        if mark != DROPPED:
            _draw_mark(draw, (x, row, x + swatch, row + swatch), mark)
        draw.text((x + swatch + size // 2, row), label, fill=INK, font_size=size)
    _write(draw, (at, y), text, size, width - 2 * margin)
    return out


def stack(parts: Sequence[Image.Image], width: int, *, gap: int = 0) -> Image.Image:
    """The parts one below another on white, at the left edge."""
    out = Image.new("RGB", (width, sum(part.height for part in parts) + gap * (len(parts) - 1)), "white")
    y = 0
    for part in parts:
        out.paste(part, (0, y))
        y += part.height + gap
    return out


def font_size(width: int) -> int:
    return min(20, max(11, width // 48))


def _gap(width: int) -> int:
    return max(6, width // 80)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, width: int) -> None:
    """Text in a smaller size where it would be wider than ``width``."""
    while size > 7 and draw.textlength(text, font_size=size) > width:
        size -= 1
    draw.text(at, text, fill=INK, font_size=size)
