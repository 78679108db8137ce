"""Draw one curve over whole numbers as a small chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 56, 48
SIZE = 14
PAPER, INK, GRID = (255, 255, 255), (20, 20, 20), (222, 222, 222)
LINE = (0, 114, 178)
MARKS = ((213, 94, 0), (0, 158, 115))  # hues of Okabe and Ito, as in the overlays


def draw_curve(
    xs: Sequence[int], ys: Sequence[float], *, title: str, x_label: str, marks: Mapping[str, int] | None = None
) -> Image.Image:
    """A line through (x, y), with a dashed upright at each mark and its name in the legend.

    Args:
        xs: two or more, ascending.  ys: as many, finite.
        marks: name -> x; one that lies outside the curve stands in the legend only.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    ticks = _ticks(min(ys), max(ys))
    low, high = ticks[0], ticks[-1]

    def across(x: float) -> int:
        return round(LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT))

    def up(y: float) -> int:
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM))

    draw.text((WIDTH // 2, 16), _fitting(draw, title), fill=INK, font_size=SIZE, anchor="mm")
    for tick in ticks:
        draw.line([(LEFT, up(tick)), (WIDTH - RIGHT, up(tick))], fill=GRID)
        draw.text((LEFT - 8, up(tick)), f"{tick:.4g}", fill=INK, font_size=SIZE, anchor="rm")
    step = math.ceil(len(xs) / 25)  # more numbers would touch each other
    for x in xs[::step]:
        draw.text((across(x), HEIGHT - BOTTOM + 6), str(x), fill=INK, font_size=SIZE, anchor="mt")
    draw.text((WIDTH // 2, HEIGHT - 8), x_label, fill=INK, font_size=SIZE, anchor="mb")
    column = LEFT
    for number, (name, x) in enumerate((marks or {}).items()):
        color = MARKS[number % len(MARKS)]
        if xs[0] <= x <= xs[-1]:
            # Marks at the same x share the upright: their dashes fall between each other.
            for y in range(TOP + 8 * number, HEIGHT - BOTTOM, 16):
                draw.line([(across(x), y), (across(x), min(y + 7, HEIGHT - BOTTOM))], fill=color, width=2)
        label = f"{name}: {x}"
        draw.line([(column, 40), (column + 24, 40)], fill=color, width=2)
        draw.text((column + 30, 40), label, fill=INK, font_size=SIZE, anchor="lm")
        column += 54 + int(draw.textlength(label, font_size=SIZE))
    points = [(across(x), up(y)) for x, y in zip(xs, ys, strict=True)]
    draw.line(points, fill=LINE, width=2)
    for x, y in points:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=LINE)
    return image


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers (steps of 1, 2 or 5 times a power of ten) that enclose [low, high]."""
    span = high - low if high > low else max(abs(high), 1.0)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _fitting(draw: ImageDraw.ImageDraw, text: str) -> str:
    """``text``, cut at its end where it is wider than the chart."""
    for length in range(len(text), -1, -1):
        cut = text if length == len(text) else text[:length] + "..."
        if draw.textlength(cut, font_size=SIZE) <= WIDTH - 20:
            return cut
    return ""
