"""The pictures that come with the demo, each with a question whose answer is known.

``scene-*`` are of ``vlmeff.evaluation.scenes``, ``*-shape*`` are drawn like its mosaics, ``easy-vqa-*`` are test
pictures of the easy-VQA package (MIT licence).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Example:
    file: str
    question: str
    answer: str | None = None

    @property
    def path(self) -> str:
        return str(resources.files("vlmeff.demo").joinpath("examples", self.file))


EXAMPLES = [
    Example("four-shapes.png", "describe the picture."),
    Example("four-shapes.png", "how many shapes are there?", "four"),
    Example("scene-1.png", "how many purple shapes are there?", "three"),
    Example("scene-1.png", "what color is the small star?", "purple"),
    Example("scene-2.png", "how many red shapes are there?", "two"),
    Example("easy-vqa-1.png", "what color is the circle?", "yellow"),
    Example("easy-vqa-2.png", "what shape does the image contain?", "circle"),
]
