"""Samples for calibration: pictures with questions from a folder, a list, or generated scenes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmeff import zoo
from vlmeff.asking import prepare
from vlmeff.errors import ConfigError, DataError
from vlmeff.pictures import open_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SCENES = "scenes"


def questions_about(source: str, question: str, limit: int) -> Iterator[tuple[Any, str]]:
    """(picture, question) pairs, at most ``limit``.

    Args:
        source: a folder of pictures, each asked ``question``; a .jsonl file whose lines have "image" (a path, relative
            to the file) and "question"; or "scenes": generated mosaics of easy-vqa's training pictures.
    Raises:
        ConfigError, DataError: the source does not exist or has nothing usable; a line of it is broken.
    """
    if limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1.")
    if source == SCENES:
        yield from _scenes(limit)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"the folder {source!r} has no pictures ({', '.join(SUFFIXES)}).")
        yield from ((open_picture(file), question) for file in files[:limit])
    elif path.is_file() and path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:limit], 1):
            try:
                record = json.loads(line)
                image, asked = Path(record["image"]), str(record["question"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{source}, line {number}: needs 'image' and 'question' ({error!r}).") from error
            yield open_picture(image if image.is_absolute() else path.parent / image), asked
    else:
        raise DataError(f"{source!r} is neither a folder of pictures, nor a .jsonl file, nor {SCENES!r}.")


def _scenes(limit: int) -> Iterator[tuple[Any, str]]:
    import random

    from PIL import Image

    from vlmeff.evaluation.mosaics import make_scene

    for number in range(limit):
        rng = random.Random(f"calibration-{number}")
        scene = make_scene(rng, "train")
        yield Image.fromarray(scene.pixels()), rng.choice(scene.questions()).text


def prepared(processor: Any, pairs: Iterator[tuple[Any, str]], device: Any, dtype: Any) -> Iterator[dict[str, Any]]:
    """The processor's outputs for each pair."""
    for picture, question in pairs:
        inputs = prepare(processor, picture, question).to(device)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        yield dict(inputs)


def calibrate_schedule(
    name: str,
    source: str,
    out: Path,
    *,
    question: str,
    limit: int,
    target: float,
    device: str | None,
    dtype: str,
    progress: Callable[[int], None],
) -> Any:
    """Load a model, measure it on samples and write an AdaptInfer schedule file; returns the calibration."""
    from vlmeff.loading import load
    from vlmeff.vlm.calibrate import calibrate_adaptinfer, write_calibration

    if out.suffix != ".json":
        raise ConfigError(f"--out {str(out)!r} must end in .json.")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: the folder {str(out.parent)!r} does not exist.")
    pairs = questions_about(source, question, limit)
    first = next(pairs)  # a bad source is refused before a model is loaded
    model, processor = load(name, device=device, dtype=dtype)

    def every() -> Iterator[tuple[Any, str]]:
        yield first
        yield from pairs

    samples = prepared(processor, every(), model.device, model.dtype)
    record = zoo.find_model(name)
    called = name if record is None else record.name
    calibration = calibrate_adaptinfer(model, samples, target=target, name=Path(called).name, progress=progress)
    revision = {} if record is None or record.revision is None else {"revision": record.revision}
    about = {"model": Path(called).name, "source": Path(source).name, **revision}
    write_calibration(out, model, calibration, about)
    return calibration
