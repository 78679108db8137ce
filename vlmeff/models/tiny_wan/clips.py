"""Clips of one coloured shape that moves over a plain ground, drawn from a seed: "a red circle moving left".

Nothing is stored: ``draw(split, index)`` is the same clip on every machine. Splits never share a clip, because the
split is part of the seed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from vlmeff.errors import ConfigError

FRAMES, SIDE = 9, 64
COLORS = {"red": (225, 40, 40), "green": (40, 190, 70), "blue": (50, 90, 235), "yellow": (240, 215, 50)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
GROUND = (24, 26, 32)
SPLITS = ("train", "probe", "heldout")

RADIUS = (8.0, 10.5)  # pixels
SPEED = (3.0, 3.8)  # pixels per frame
DRIFT_ALONG, DRIFT_ACROSS = 3.5, 8.0  # how far the middle of the path lies from the picture's, pixels

# Half width of the square and circumradius of the triangle as multiples of the radius: areas alike within 15 %.
SQUARE, TRIANGLE = 0.9, 1.45


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A shape of ``radius`` pixels whose centre is at (``x``, ``y``) half-way and moves ``speed`` pixels a frame."""

    color: str
    shape: str
    direction: str
    x: float
    y: float
    radius: float
    speed: float

    @property
    def prompt(self) -> str:
        return prompt_of(self.color, self.shape, self.direction)

    def centres(self, frames: int = FRAMES) -> np.ndarray:
        """[frames, 2] (x, y) of the shape's centre."""
        steps = np.arange(frames) - (frames - 1) / 2
        return np.array([self.x, self.y]) + steps[:, None] * self.speed * np.array(DIRECTIONS[self.direction])

    def coverage(self, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
        """[frames, side, side] float64 in [0, 1]: how much of each pixel the shape covers, by its distance."""
        pixel = np.arange(side) + 0.5
        cx, cy = self.centres(frames).T[:, :, None, None]
        x, y = pixel[None, None, :] - cx, pixel[None, :, None] - cy
        if self.shape == "circle":
            distance = np.hypot(x, y) - self.radius
        elif self.shape == "square":
            distance = np.maximum(abs(x), abs(y)) - SQUARE * self.radius
        else:  # point up: three half-planes, half the circumradius from the centroid, which lies below the box's centre
            inner = TRIANGLE * self.radius / 2
            y = y - inner / 2
            distance = np.maximum(y, np.sqrt(3) / 2 * abs(x) - y / 2) - inner
        return np.clip(0.5 - distance, 0, 1)

    def pixels(self, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
        """[frames, side, side, 3] uint8."""
        cover = self.coverage(frames, side)[..., None]
        drawn = cover * np.array(COLORS[self.color]) + (1 - cover) * np.array(GROUND)
        return np.rint(drawn).astype(np.uint8)


def prompt_of(color: str, shape: str, direction: str) -> str:
    return f"a {color} {shape} moving {direction}"


def prompts() -> list[str]:
    """All prompts that the model was trained on, in a fixed order."""
    return [prompt_of(*kind) for kind in product(COLORS, SHAPES, DIRECTIONS)]


def parse_prompt(prompt: str) -> tuple[str, str, str]:
    """(colour, shape, direction) of a prompt.

    Raises:
        ConfigError: it is not of the form of the training prompts.
    """
    found = re.fullmatch(
        rf"\s*a\s+({'|'.join(COLORS)})\s+({'|'.join(SHAPES)})\s+moving\s+({'|'.join(DIRECTIONS)})\s*", prompt.lower()
    )
    if found is None:
        raise ConfigError(
            f'prompt {prompt!r} is not "a <colour> <shape> moving <direction>" with a colour of {", ".join(COLORS)}, a '
            f"shape of {', '.join(SHAPES)} and a direction of {', '.join(DIRECTIONS)}; tiny-wan knows no other words."
        )
    color, shape, direction = found.groups()
    return color, shape, direction


def draw(split: str, index: int, *, seed: int = 0, kind: tuple[str, str, str] | None = None) -> Clip:
    """Clip number ``index`` of a split: kinds are taken in turn, place, size and speed at random.

    Args:
        split: one of ``SPLITS``.  index: from 0.  seed: another set of clips.
        kind: (colour, shape, direction); ``index % 48`` chooses it when left out.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is none of {', '.join(SPLITS)}.")
    kinds = list(product(COLORS, SHAPES, DIRECTIONS))
    color, shape, direction = kinds[index % len(kinds)] if kind is None else kind
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    radius, speed = rng.uniform(*RADIUS), rng.uniform(*SPEED)
    along, across = rng.uniform(-DRIFT_ALONG, DRIFT_ALONG), rng.uniform(-DRIFT_ACROSS, DRIFT_ACROSS)
    dx, dy = DIRECTIONS[direction]
    x = SIDE / 2 + (along if dx else across)
    y = SIDE / 2 + (along if dy else across)
    return Clip(color=color, shape=shape, direction=direction, x=x, y=y, radius=radius, speed=speed)


def clip_batch(split: str, indices: Any, *, seed: int = 0) -> tuple[np.ndarray, list[Clip]]:
    """([B, frames, side, side, 3] uint8, the clips) of some indices of a split."""
    drawn = [draw(split, int(index), seed=seed) for index in indices]
    return np.stack([clip.pixels() for clip in drawn]), drawn
