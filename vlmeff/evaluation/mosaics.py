"""Pictures with several objects: 2 x 2 mosaics of easy-vqa images, with questions whose answer depends on location.

easy-vqa (PyPI ``easy-vqa``, MIT) shows one coloured shape on a plain background, so any visual token will do. A mosaic
holds two to four of those images in the cells of a 2 x 2 grid; "what color is the shape in the top left?" can only be
answered from the tokens of that cell. Everything is a pure function of the split and a seed.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlmeff.errors import ConfigError, MissingExtraError
from vlmeff.evaluation.samples import Sample

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")  # raster order
NUMBERS = ("zero", "one", "two", "three", "four")
DESCRIBE = ("describe the picture.", "describe the image.")
TILE = 64  # easy-vqa images are 64 x 64

Split = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class Tile:
    """One easy-vqa image: ``pixels`` [64, 64, 3] uint8, its plain ``background`` [3] uint8 and what it shows."""

    image_id: int
    pixels: np.ndarray
    background: np.ndarray
    color: str
    shape: str

    @property
    def mask(self) -> np.ndarray:
        """[64, 64] bool, true on the shape."""
        return np.abs(self.pixels.astype(np.int16) - self.background).max(-1) > 24


@dataclass(frozen=True)
class Question:
    """A question with its one correct answer; ``kind`` groups questions that are scored together."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, eq=False)
class Scene:
    """A 2 x 2 mosaic; ``cells`` in raster order, ``None`` where the cell is empty."""

    cells: tuple[Tile | None, Tile | None, Tile | None, Tile | None]
    fill: np.ndarray

    @property
    def objects(self) -> list[tuple[str, Tile]]:
        """(position, tile) of every object, in raster order."""
        return [(where, tile) for where, tile in zip(POSITIONS, self.cells, strict=True) if tile is not None]

    def pixels(self) -> np.ndarray:
        """[128, 128, 3] uint8."""
        out = np.empty((2 * TILE, 2 * TILE, 3), np.uint8)
        for i, tile in enumerate(self.cells):
            y, x = TILE * (i // 2), TILE * (i % 2)
            out[y : y + TILE, x : x + TILE] = self.fill if tile is None else tile.pixels
        return out

    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels())

    def description(self) -> str:
        """One sentence that names every object, in raster order: 12 to 24 words and marks."""
        return ", ".join(f"a {t.color} {t.shape} {where}" for where, t in self.objects) + "."

    def questions(self) -> list[Question]:
        """Every question that has one correct answer on this picture, in a fixed order."""
        objects = self.objects
        named = [(t.color, t.shape) for _, t in objects]
        out = [Question("describe", text, self.description()) for text in DESCRIBE]
        for where, tile in zip(POSITIONS, self.cells, strict=True):
            out.append(Question("occupied", f"is there a shape in the {where}?", "no" if tile is None else "yes"))
            if tile is None:
                continue
            out += [
                Question("position", f"what color is the shape in the {where}?", tile.color),
                Question("position", f"what shape is in the {where}?", tile.shape),
                Question("position_object", f"what is in the {where}?", f"{tile.color} {tile.shape}"),
            ]
            if named.count((tile.color, tile.shape)) == 1:
                out.append(Question("where", f"where is the {tile.color} {tile.shape}?", where))
        out.append(Question("count", "how many shapes are there?", NUMBERS[len(objects)]))
        for shape in SHAPES:
            n = sum(s == shape for _, s in named)
            out.append(Question("count", f"how many {shape}s are there?", NUMBERS[n]))
        colors, shapes = {c for c, _ in named}, {s for _, s in named}
        for color in COLORS:
            for shape in SHAPES:
                present = (color, shape) in named
                # A hard negative shares its colour or its shape with something in the picture.
                if present or color in colors or shape in shapes:
                    answer = "yes" if present else "no"
                    out.append(Question("exists", f"is there a {color} {shape}?", answer))
        return out


def make_scene(rng: random.Random, split: Split, *, objects: int | None = None) -> Scene:
    """Draw a mosaic of ``objects`` (2 to 4, drawn when ``None``) tiles of ``split``."""
    tiles = load_tiles(split)
    count = rng.randint(2, 4) if objects is None else objects
    cells: list[Tile | None] = [None] * 4
    for cell in rng.sample(range(4), count):
        cells[cell] = rng.choice(tiles)
    return Scene((cells[0], cells[1], cells[2], cells[3]), rng.choice(tiles).background)


def samples(pictures: int, *, split: Split = "test", seed: int = 0, start: int = 0) -> Iterator[Sample]:
    """Up to five questions about each of ``pictures`` mosaics: the benchmark ``mosaics``.

    ``group`` is the mosaic, ``category`` one of "position" (two questions), "where", "exists" and "count". Where the
    answer is yes or no, it is drawn before the question. A model that never sees a picture and gives the most frequent
    training answer of each question scores about 23 % on position, 25 % on where, 50 % on exists, 35 % on count.

    Raises:
        ConfigError: ``split`` is neither "train" nor "test".  MissingExtraError: easy-vqa is not installed.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"mosaics: split={split!r} does not exist. Use 'train' or 'test'.")
    for index in range(start, start + pictures):
        name = f"mosaics/{split}/{seed}/{index}"
        rng = random.Random(f"vlmeff-1-{name}")
        scene = make_scene(rng, split)
        for number, question in enumerate(_asked(scene, rng)):
            yield Sample(
                doc_id=f"{name}/{number}",
                images=(scene.image,),
                question=question.text,
                answers=(question.answer,),
                group=name,
                category=question.kind,
                split=split,
                meta={"seed": seed, "index": index},
            )


def descriptions(pictures: int, *, split: Split = "test", seed: int = 0) -> Iterator[Sample]:
    """One request for a description of each of the mosaics of ``samples``."""
    for index in range(pictures):
        name = f"mosaics/{split}/{seed}/{index}"
        scene = make_scene(random.Random(f"vlmeff-1-{name}"), split)
        yield Sample(
            doc_id=f"{name}/describe",
            images=(scene.image,),
            question=DESCRIBE[0],
            answers=(scene.description(),),
            group=name,
            category="describe",
            split=split,
            meta={"seed": seed, "index": index},
        )


def named_objects(description: str) -> set[tuple[str, str, str]]:
    """(colour, shape, position) of every object that a describing sentence names."""
    pattern = rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) ({'|'.join(POSITIONS)})"
    return {(m[1], m[2], m[3]) for m in re.finditer(pattern, description.lower())}


def _asked(scene: Scene, rng: random.Random) -> list[Question]:
    by_kind: dict[str, list[Question]] = {}
    for question in scene.questions():
        by_kind.setdefault(question.kind, []).append(question)
    out = rng.sample(by_kind["position"], 2)
    if "where" in by_kind:
        out.append(rng.choice(by_kind["where"]))
    answer = rng.choice(("yes", "no"))
    exists = [q for q in by_kind["exists"] if q.answer == answer]
    if exists:
        out.append(rng.choice(exists))
    out.append(by_kind["count"][0])  # of all shapes: two, three and four are equally frequent
    return out


def single_description(color: str, shape: str) -> str:
    """The describing sentence for a picture with one object."""
    return f"there is a single {color} {shape} in the picture."


def _easy_vqa() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise MissingExtraError("easy_vqa", "eval", "the easy-vqa pictures") from error
    return easy_vqa


@functools.cache
def easy_vqa_questions(split: Split) -> tuple[tuple[int, str, str], ...]:
    """(image id, question, answer) of easy-vqa's ``split``, in its own order."""
    data = _easy_vqa()
    questions, answers, ids = data.get_train_questions() if split == "train" else data.get_test_questions()
    return tuple(zip(ids, questions, answers, strict=True))


@functools.cache
def easy_vqa_images(split: Split) -> dict[int, np.ndarray]:
    """image id -> [64, 64, 3] uint8."""
    data = _easy_vqa()
    paths = data.get_train_image_paths() if split == "train" else data.get_test_image_paths()
    return {i: np.asarray(Image.open(path).convert("RGB")) for i, path in paths.items()}


@functools.cache
def load_tiles(split: Split) -> tuple[Tile, ...]:
    """Every image of ``split`` whose colour and shape follow from its own questions (about 90 % of them)."""
    colors: dict[int, set[str]] = {}
    shapes: dict[int, set[str]] = {}
    for image_id, question, answer in easy_vqa_questions(split):
        for known, words in ((colors, COLORS), (shapes, SHAPES)):
            left = known.setdefault(image_id, set(words))
            named = {w for w in words if re.search(rf"\b{w}\b", question)}
            negated = re.search(r"\b(no|not)\b", question) is not None
            if answer in words:
                left &= {answer}
            elif named and answer in ("yes", "no") and (answer == "yes") == negated:
                left -= named
            elif named:
                left &= named
    tiles = []
    for image_id, pixels in easy_vqa_images(split).items():
        if len(colors[image_id]) == len(shapes[image_id]) == 1:
            background = np.median(pixels.reshape(-1, 3), axis=0).astype(np.uint8)
            (color,), (shape,) = colors[image_id], shapes[image_id]
            tiles.append(Tile(image_id, pixels, background, color, shape))
    return tuple(tiles)
