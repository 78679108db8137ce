"""Draws a scene with Pillow. Vertices, shades and blending are integers, so every machine draws the same picture."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from vlmeff.evaluation.scenes.composition import Scene, Sign, Thing
from vlmeff.evaluation.scenes.glyphs import text_mask

FINER = 4  # edges are drawn at this multiple and averaged
PLATE, INK = (150, 150, 150), (24, 24, 24)

# Corners on the circle of radius 1000 around the centre, y downwards.
_POLYGONS = {
    "square": ((-707, -707), (707, -707), (707, 707), (-707, 707)),
    "triangle": ((0, -1000), (866, 500), (-866, 500)),
    "star": (
        *((0, -1000), (235, -324), (951, -309), (380, 124), (588, 809)),
        *((0, 400), (-588, 809), (-380, 124), (-951, -309), (-235, -324)),
    ),
    "cross": (
        *((-300, -950), (300, -950), (300, -300), (950, -300), (950, 300), (300, 300)),
        *((300, 950), (-300, 950), (-300, 300), (-950, 300), (-950, -300), (-300, -300)),
    ),
}
_COS_SIN = {-200: (9397, -3420), -100: (9848, -1736), 0: (10000, 0), 100: (9848, 1736), 200: (9397, 3420)}


def draw(scene: Scene) -> Image.Image:
    """The picture: RGB, ``scene.size`` pixels square."""
    picture = _background(scene)
    for sign in scene.signs:
        _draw_sign(picture, sign, scene)
    for thing in scene.things:
        mask, corner = thing_mask(thing, scene.size)
        picture.paste(thing.rgb, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return picture


def label_map(scene: Scene) -> Image.Image:
    """Which thing each pixel shows: "L", 0 on background and signs, i + 1 on ``scene.things[i]``."""
    labels = Image.new("L", (scene.size, scene.size))
    for number, thing in enumerate(scene.things, start=1):
        mask, corner = thing_mask(thing, scene.size)
        box = (*corner, corner[0] + mask.width, corner[1] + mask.height)
        labels.paste(number, box, mask.point([0] * 128 + [255] * 128))
    return labels


def thing_mask(thing: Thing, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """Coverage of the thing ("L") and where the mask's top left corner lies in the picture."""
    radius = -(-thing.radius * size // 1000) + 1
    corner = (thing.x * size // 1000 - radius, thing.y * size // 1000 - radius)
    side = (2 * radius + 1) * FINER
    fine = Image.new("L", (side, side))
    # Millionths of the side from here on, to the fine pixel.
    cx, cy = (c * size * FINER // 1000 - at * FINER for c, at in zip((thing.x, thing.y), corner, strict=True))
    reach = thing.radius * size * FINER
    brush = ImageDraw.Draw(fine)
    if thing.shape == "circle":
        r = reach // 1000
        brush.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    else:
        cos, sin = _COS_SIN[thing.turn]
        corners = [
            (cx + (x * cos - y * sin) * reach // 10**10, cy + (x * sin + y * cos) * reach // 10**10)
            for x, y in _POLYGONS[thing.shape]
        ]
        brush.polygon(corners, fill=255)
    return fine.reduce(FINER), corner


def _draw_sign(picture: Image.Image, sign: Sign, scene: Scene) -> None:
    from vlmeff.evaluation.scenes.composition import GEOMETRIES

    letters = text_mask(sign.text, GEOMETRIES[scene.size].cell)
    margin = 2 * GEOMETRIES[scene.size].cell
    left, top = (c * scene.size // 1000 for c in (sign.x, sign.y))
    left, top = left - letters.width // 2, top - letters.height // 2
    box = (left - margin, top - margin, left + letters.width + margin - 1, top + letters.height + margin - 1)
    ImageDraw.Draw(picture).rectangle(box, fill=PLATE, outline=INK)
    picture.paste(INK, (left, top), letters)


def _background(scene: Scene) -> Image.Image:
    """A gray-brown texture of middling lightness: far from every colour of ``COLORS``, never the same twice."""
    kind, seed = scene.texture
    rng = random.Random(seed)
    size = scene.size
    base = [rng.randint(112, 150)] * 3
    base = [channel + rng.randint(-12, 12) for channel in base]
    other = [channel + rng.choice((-1, 1)) * rng.randint(8, 15) for channel in base]
    picture = Image.new("RGB", (size, size), (base[0], base[1], base[2]))
    fill = (other[0], other[1], other[2])
    brush = ImageDraw.Draw(picture)
    step = rng.randint(5, 14) * size // 112
    if kind == "stripes":
        slant = rng.choice((0, 1, -1)) * size
        for x in range(-size, 2 * size, 2 * step):
            brush.polygon(((x, 0), (x + step, 0), (x + step + slant, size), (x + slant, size)), fill=fill)
    elif kind == "checks":
        for y in range(0, size, step):
            for x in range(0, size, step):
                if (x // step + y // step) % 2:
                    brush.rectangle((x, y, x + step - 1, y + step - 1), fill=fill)
    elif kind == "dots":
        for _ in range(60):
            x, y, r = rng.randrange(size), rng.randrange(size), rng.randint(1, 3) * size // 112
            brush.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    cells = 28 if kind == "noise" else 56
    grain = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
    grain = grain.resize((size, size), Image.Resampling.NEAREST)
    return Image.blend(picture, Image.merge("RGB", (grain,) * 3), 0.14 if kind == "noise" else 0.08)
