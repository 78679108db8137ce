"""Drawn pictures of coloured shapes with true captions: what tiny-clip is trained and measured on.

A picture of 64 x 64 px shows one to four shapes on a plain background, drawn like those of easy-vqa (same colours, same
three shapes, pale backgrounds), so that one shape on its own looks like an easy-vqa picture. A caption carries what it
claims, so that it can be checked against any picture: "a red circle" is true of every picture with a red circle.
Everything is a pure function of the random generator that is passed in.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
NUMBERS = ("no", "one", "two", "three", "four")
SMALL, BIG = 8.0, 11.0  # half the height in px below and above which a shape is called small and big
MIDDLE = 5.0  # px around a midline in which a shape is neither left nor right (top nor bottom)
OVERSAMPLING = 4


@dataclass(frozen=True, eq=False)
class Thing:
    """One shape; ``x``, ``y`` its centre and ``radius`` half its height in px, ``mask`` [64, 64] bool."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    mask: np.ndarray

    @property
    def size(self) -> str | None:
        return "small" if self.radius < SMALL else "big" if self.radius > BIG else None

    def is_at(self, place: str) -> bool:
        """Whether every word of ``place`` ("top left", "right", ...) holds."""
        x, y = self.x - SIDE / 2, self.y - SIDE / 2
        holds = {"left": x < -MIDDLE, "right": x > MIDDLE, "top": y < -MIDDLE, "bottom": y > MIDDLE}
        return all(holds[word] for word in place.split())

    @property
    def place(self) -> str:
        """All place words that hold, "" in the middle."""
        return " ".join(word for word in ("top", "bottom", "left", "right") if self.is_at(word))


@dataclass(frozen=True, eq=False)
class Picture:
    """``pixels`` [64, 64, 3] uint8 and what they show."""

    pixels: np.ndarray
    things: tuple[Thing, ...]

    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Part:
    """A description of one shape; None says nothing."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            self.color in (None, thing.color)
            and self.shape in (None, thing.shape)
            and self.size in (None, thing.size)
            and (self.place is None or thing.is_at(self.place))
        )


@dataclass(frozen=True)
class Caption:
    """``text`` claims: different shapes fit ``parts``; the first stands in ``relation`` ("left", "right", "above",
    "below") to the second; exactly ``count[0]`` shapes fit ``count[1]``."""

    text: str
    parts: tuple[Part, ...] = ()
    relation: str | None = None
    count: tuple[int, Part] | None = None

    def is_true_of(self, picture: Picture) -> bool:
        if self.count is not None and sum(map(self.count[1].fits, picture.things)) != self.count[0]:
            return False
        if not all(any(map(part.fits, picture.things)) for part in self.parts):
            return False
        return any(
            all(part.fits(thing) for part, thing in zip(self.parts, chosen, strict=True))
            and (self.relation is None or stands(chosen[0], self.relation, chosen[1]))
            for chosen in itertools.permutations(picture.things, len(self.parts))
        )


def stands(a: Thing, relation: str, b: Thing) -> bool:
    """Whether ``a`` is clearly left of, right of, above or below ``b``."""
    by = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
    return by > 2 * MIDDLE


def draw_picture(
    rng: random.Random, *, things: int | None = None, kinds: list[tuple[str, str]] | None = None
) -> Picture:
    """Draw a picture with ``things`` shapes (1 to 4, drawn when None) that do not touch.

    Args:
        kinds: (colour, shape) of each; drawn when None.
    """
    if kinds is None:
        n = rng.choices((1, 2, 3, 4), (30, 35, 25, 10))[0] if things is None else things
        kinds = [(rng.choice(tuple(COLORS)), rng.choice(SHAPES)) for _ in range(n)]
    n = len(kinds)
    pale = rng.random() < 0.8
    background = np.array([rng.randint(228, 255) if pale else rng.randint(185, 255) for _ in range(3)], np.float32)
    while True:
        boxes = [_draw_box(rng, shape, 17.0 if n == 1 else 13.0 if n < 4 else 10.0) for _, shape in kinds]
        if not any(_touch(a, b) for a, b in itertools.combinations(boxes, 2)):
            break
    pixels = np.broadcast_to(background, (SIDE, SIDE, 3))
    out = []
    for (color, shape), (x, y, half_width, radius) in zip(kinds, boxes, strict=True):
        cover = _cover(shape, x, y, half_width, radius)
        shade = np.array([min(255, max(0, c + rng.randint(-12, 12))) for c in COLORS[color]], np.float32)
        pixels = pixels + cover[..., None] * (shade - pixels)
        out.append(Thing(color, shape, x, y, radius, cover > 0.5))
    return Picture(pixels.round().astype(np.uint8), tuple(out))


def _draw_box(rng: random.Random, shape: str, largest: float) -> tuple[float, float, float, float]:
    """(centre x, centre y, half width, half height) within the picture."""
    radius = rng.uniform(4.0, largest)
    half_width = min(largest, max(4.0, radius * rng.uniform(0.55, 1.6))) if shape == "rectangle" else radius
    x = rng.uniform(half_width + 1, SIDE - half_width - 1)
    return x, rng.uniform(radius + 1, SIDE - radius - 1), half_width, radius


def _touch(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return abs(a[0] - b[0]) < a[2] + b[2] + 2 and abs(a[1] - b[1]) < a[3] + b[3] + 2


def _cover(shape: str, x: float, y: float, half_width: float, radius: float) -> np.ndarray:
    """[64, 64] float32 in [0, 1]: the share of each pixel that the shape covers."""
    canvas = Image.new("L", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING))
    pen, s = ImageDraw.Draw(canvas), OVERSAMPLING
    box = ((x - half_width) * s, (y - radius) * s, (x + half_width) * s, (y + radius) * s)
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "rectangle":
        pen.rectangle(box, fill=255)
    else:
        pen.polygon([(x * s, box[1]), (box[0], box[3]), (box[2], box[3])], fill=255)
    return np.asarray(canvas.reduce(s), np.float32) / 255


def words_of(part: Part, rng: random.Random, *, plural: bool = False) -> str:
    """The words of a part: "big red circle in the top left"; without a shape "red shape" or "red object"."""
    noun = part.shape or rng.choice(("shape", "object"))
    size = {"small": ("small", "little", "tiny"), "big": ("big", "large")}.get(part.size or "")
    color = "grey" if part.color == "gray" and rng.random() < 0.3 else part.color
    where = f"{rng.choice(('in the', 'at the', 'on the'))} {part.place}" if part.place else None
    words = (rng.choice(size) if size else None, color, noun + "s" if plural else noun, where)
    return " ".join(word for word in words if word)


def describe(thing: Thing, rng: random.Random, *, detail: float = 0.35) -> Part:
    """Colour and shape, and size and place each with probability ``detail`` where they are clear."""
    place = thing.place
    if place and " " in place and rng.random() < 0.15:
        place = rng.choice(place.split())
    return Part(
        thing.color,
        thing.shape,
        thing.size if rng.random() < detail else None,
        place if place and rng.random() < detail else None,
    )


def listing(parts: list[Part], rng: random.Random) -> str:
    names = [f"{rng.choice(('a', 'a', 'the'))} {words_of(part, rng)}" for part in parts]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def full_caption(picture: Picture, rng: random.Random, *, detail: float = 0.35) -> Caption:
    """Names every shape, with colour and shape at least."""
    things = list(picture.things)
    rng.shuffle(things)
    parts = [describe(thing, rng, detail=detail) for thing in things]
    n, text = len(parts), listing(parts, rng)
    if rng.random() < 0.3:
        start = (
            rng.choice(("there is a single shape:", "only", "one shape,", "just"))
            if n == 1
            else rng.choice((f"there are {NUMBERS[n]} shapes:", f"{NUMBERS[n]} shapes,", "only"))
        )
        return Caption(f"{start} {text}", tuple(parts), count=(n, Part()))
    start = rng.choice(("", "", "a picture of ", "an image of ", "the picture shows ", "there is ", "the image has "))
    return Caption(f"{start}{text}{rng.choice(('', '.'))}", tuple(parts))


def relation_caption(picture: Picture, rng: random.Random) -> Caption | None:
    """Two shapes in relation: "a red circle left of a blue triangle"; None when no two are clearly apart."""
    found = [
        (a, relation, b)
        for a, b in itertools.permutations(picture.things, 2)
        for relation in ("left", "right", "above", "below")
        if stands(a, relation, b)
    ]
    if not found:
        return None
    a, relation, b = rng.choice(found)
    words = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of")}
    where = rng.choice(words.get(relation, (relation,)))
    parts = (Part(a.color, a.shape), Part(b.color, b.shape))
    return Caption(f"a {words_of(parts[0], rng)} {where} a {words_of(parts[1], rng)}", parts, relation)


def count_caption(picture: Picture, rng: random.Random) -> Caption:
    """How many shapes of a kind there are: "two circles", "there are three shapes"."""
    of_shape, of_color = Part(shape=rng.choice(picture.things).shape), Part(color=rng.choice(picture.things).color)
    part = rng.choice((Part(), of_shape, of_color))
    n = sum(map(part.fits, picture.things))
    words = f"{NUMBERS[n]} {words_of(part, rng, plural=n > 1)}"
    start = rng.choice(("", f"there {'are' if n > 1 else 'is'} ", "a picture of ", "exactly "))
    return Caption(f"{start}{words}", count=(n, part))


def phrase(picture: Picture, rng: random.Random) -> Caption:
    """A phrase or question about one kind of shape of the picture: "the red circle", "what color is the circle?"."""
    thing, kind = rng.choice(picture.things), rng.random()
    place = thing.place if " " in thing.place else None
    if kind < 0.5:
        part = Part(thing.color, thing.shape)
    elif kind < 0.62:
        part = Part(shape=thing.shape)
    elif kind < 0.74:
        part = Part(color=thing.color)
    elif kind < 0.86 and place:
        part = Part(place=place)
    else:
        part = describe(thing, rng, detail=0.6)
    words = words_of(part, rng)
    forms = [f"the {words}", f"a {words}", words, f"is there a {words}?", f"where is the {words}?", f"find the {words}"]
    forms += [f"a picture of a {words}", f"does the image contain a {words}?", f"how big is the {words}?"]
    if part.color is None:
        forms += [f"what color is the {words}?", f"which color does the {words} have?"] * 2
    if part.shape is None and part.color is not None:
        forms += [f"what shape is the {words}?", f"what is {part.color} in the picture?"] * 2
    if part == Part(place=place):
        forms += [f"what is in the {place}?", f"what shape is in the {place}?"] * 2
    return Caption(rng.choice(forms), (part,))


def caption(picture: Picture, rng: random.Random) -> Caption:
    """One caption of any kind."""
    kind = rng.random()
    if kind < 0.12:
        related = relation_caption(picture, rng)
        if related is not None:
            return related
    elif kind < 0.22:
        return count_caption(picture, rng)
    elif kind < 0.45:
        return phrase(picture, rng)
    return full_caption(picture, rng)


def distinct_pairs(rng: random.Random, n: int) -> tuple[list[Picture], list[Caption]]:
    """``n`` pictures and captions; each caption names every shape with its place and is true of its picture only."""
    pictures: list[Picture] = []
    captions: list[Caption] = []
    while len(pictures) < n:
        picture = draw_picture(rng)
        text = full_caption(picture, rng, detail=1.0)
        if not any(text.is_true_of(p) for p in pictures) and not any(c.is_true_of(picture) for c in captions):
            pictures.append(picture)
            captions.append(text)
    return pictures, captions


def named_pair(rng: random.Random) -> tuple[Picture, Thing, str]:
    """A picture of two shapes that differ in colour and shape kind, the one that is named, and "a <colour> <shape>"."""
    while True:
        picture = draw_picture(rng, things=2)
        named, other = picture.things
        if (named.color, named.shape) != (other.color, other.shape):
            return picture, named, f"a {named.color} {named.shape}"
