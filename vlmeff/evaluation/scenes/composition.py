"""What a picture of ``scenes`` shows, drawn from a seed: shapes, signs and a texture, as plain integers.

Lengths are thousandths of the picture's side. Every draw is symmetric in the colours and in the shapes, so that no
question favours an answer (``balance.py`` measures it); how often the *theme* (a colour or a shape) occurs is drawn
evenly from zero to four, so that counting does not favour small numbers either.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from vlmeff.errors import ConfigError

COLORS = {
    "red": (214, 36, 36),
    "orange": (246, 136, 20),
    "yellow": (246, 222, 48),
    "green": (34, 150, 62),
    "blue": (36, 78, 216),
    "purple": (150, 48, 190),
    "black": (18, 18, 18),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZE_NAMES = ("small", "large")
WORDS = ("ant", "bus", "cat", "cup", "dog", "egg", "fox", "hat", "ice", "jam", "key", "map", "nut", "owl", "pen", "sun")
DIGITS = tuple("0123456789")
TEXTURES = ("noise", "stripes", "checks", "dots")
VERSION = 1  # in every seed: a change of what is drawn must raise it

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Geometry:
    """What fits a picture of one size. ``small`` and ``large``: ranges of radii; ``cell``: a font pixel, in pixels."""

    shapes: tuple[int, int]
    small: tuple[int, int]
    large: tuple[int, int]
    cell: int
    signs: float  # chance of each kind of sign (digit, word)


GEOMETRIES = {
    112: Geometry((2, 5), (82, 92), (145, 165), 2, 0.15),
    224: Geometry((3, 7), (58, 68), (110, 130), 3, 0.5),
    448: Geometry((4, 10), (40, 48), (80, 95), 3, 0.75),
}


@dataclass(frozen=True)
class Thing:
    """One shape: centre (x, y), ``radius`` of the circle around it, ``turn`` in tenths of a degree, ``rgb``."""

    color: str
    shape: str
    size: str
    x: int
    y: int
    radius: int
    turn: int
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Sign:
    """A gray plate with a digit or a word; (x, y) is its centre, ``half`` its half width and height."""

    kind: Literal["digit", "word"]
    text: str
    x: int
    y: int
    half: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """A whole picture. ``things`` from back to front. ``theme``: the colour or shape that the picture is built
    around; it occurs zero to four times. ``texture``: name and seed of the background."""

    name: str
    size: int
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    theme: str
    texture: tuple[str, int]


def compose(index: int, *, split: Split = "test", size: int = 112, seed: int = 0) -> Scene:
    """Picture ``index`` of ``split``; no two (split, size, seed, index) share a random state.

    Raises:
        ConfigError: ``split`` or ``size`` is none of those that exist, or ``index`` is negative.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"scenes: split={split!r} does not exist. Use 'train' or 'test'.")
    if size not in GEOMETRIES:
        raise ConfigError(f"scenes: size={size!r} does not exist. Use one of {', '.join(map(str, GEOMETRIES))}.")
    if index < 0:
        raise ConfigError(f"scenes: index={index} is negative. Pictures are numbered from 0.")
    name = f"scenes{size}/{split}/{seed}/{index}"
    rng = random.Random(f"vlmeff-{VERSION}-{name}")
    while True:
        scene = _attempt(rng, name, size)
        if scene is not None:
            return scene


def _attempt(rng: random.Random, name: str, size: int) -> Scene | None:
    geometry = GEOMETRIES[size]
    looks, theme = _looks(rng, geometry)
    signs: list[Sign] = []
    for kind, texts in (("digit", DIGITS), ("word", WORDS)):
        if rng.random() < geometry.signs:
            sign = _sign(rng, kind, rng.choice(texts), geometry.cell * 1000 // size, signs)
            if sign is None:
                return None
            signs.append(sign)
    things: list[Thing] = []
    for color, shape, size_name in sorted(looks, key=lambda look: look[2]):  # "large" is put down first
        thing = _place(rng, geometry, color, shape, size_name, things, signs)
        if thing is None:
            return None
        things.append(thing)
    return Scene(name, size, tuple(things), tuple(signs), theme, (rng.choice(TEXTURES), rng.getrandbits(32)))


def _looks(rng: random.Random, geometry: Geometry) -> tuple[list[tuple[str, str, str]], str]:
    """(colour, shape, size) of every thing, and the theme."""
    by_color = rng.random() < 0.5
    values, others = (list(COLORS), list(SHAPES)) if by_color else (list(SHAPES), list(COLORS))
    theme = rng.choice(values)
    count = rng.randint(0, 4)
    least, most = geometry.shapes
    total = rng.randint(max(least, count), max(most, count))
    # A few values per picture: many things then share one, which gives hard negatives and things to count.
    rest = rng.sample([v for v in values if v != theme], rng.randint(2, 3))
    free = rng.sample(others, rng.randint(2, min(4, total + 1)))
    looks = []
    for number in range(total):
        first, second = (theme if number < count else rng.choice(rest)), rng.choice(free)
        color, shape = (first, second) if by_color else (second, first)
        looks.append((color, shape, rng.choice(SIZE_NAMES)))
    rng.shuffle(looks)
    return looks, theme


def _sign(rng: random.Random, kind: str, text: str, cell: int, signs: list[Sign]) -> Sign | None:
    from vlmeff.evaluation.scenes.glyphs import ROWS, columns

    half = ((columns(text) + 4) * cell // 2, (ROWS + 4) * cell // 2)
    for _ in range(20):
        x, y = rng.randint(half[0] + 10, 990 - half[0]), rng.randint(half[1] + 10, 990 - half[1])
        if all(abs(x - s.x) > half[0] + s.half[0] + 20 or abs(y - s.y) > half[1] + s.half[1] + 20 for s in signs):
            return Sign(kind, text, x, y, half)  # type: ignore[arg-type]
    return None


def _place(
    rng: random.Random, geometry: Geometry, color: str, shape: str, size: str, things: list[Thing], signs: list[Sign]
) -> Thing | None:
    radius = rng.randint(*(geometry.small if size == "small" else geometry.large))
    shade = rng.randint(-14, 14)
    red, green, blue = (min(255, max(0, channel + shade)) for channel in COLORS[color])
    for _ in range(60):
        x, y = rng.randint(radius + 10, 990 - radius), rng.randint(radius + 10, 990 - radius)
        if all(_apart(x, y, radius, color, other) for other in things) and all(
            abs(x - s.x) > s.half[0] + radius or abs(y - s.y) > s.half[1] + radius for s in signs
        ):
            return Thing(color, shape, size, x, y, radius, rng.choice((-200, -100, 0, 100, 200)), (red, green, blue))
    return None


def _apart(x: int, y: int, radius: int, color: str, other: Thing) -> bool:
    """Things of one colour keep a gap; others may overlap by up to three tenths of the smaller one's radius."""
    gap = 15 if color == other.color else -3 * min(radius, other.radius) // 10
    return (x - other.x) ** 2 + (y - other.y) ** 2 > (radius + other.radius + gap) ** 2
