"""Samples for calibration: pictures with questions from a folder, a list, or generated."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from vlmeff import zoo
from vlmeff.asking import prepare
from vlmeff.errors import BudgetTooSmallError, ConfigError, DataError
from vlmeff.pictures import open_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
QUESTION = "Describe the picture in detail."


def questions_about(source: str, question: str, limit: int) -> Iterator[tuple[Any, str]]:
    """(picture, question) pairs, at most ``limit``.

    Args:
        source: a folder of pictures, each asked ``question``; a .jsonl file whose lines have "image" (a path, relative
            to the file) and "question"; or a name of ``GENERATED``, whose training pictures are asked one question
            each: "mosaics" (of easy-vqa's pictures), "scenes".
    Raises:
        ConfigError, DataError: the source does not exist or has nothing usable; a line of it is broken.
    """
    if limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1.")
    if source in GENERATED:
        yield from GENERATED[source](limit)
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
        made = ", ".join(GENERATED)
        raise DataError(f"{source!r} is neither a folder of pictures, nor a .jsonl file, nor generated ({made}).")


def _mosaics(limit: int) -> Iterator[tuple[Any, str]]:
    import random

    from PIL import Image

    from vlmeff.evaluation.mosaics import make_scene

    for number in range(limit):
        rng = random.Random(f"calibration-{number}")
        scene = make_scene(rng, "train")
        yield Image.fromarray(scene.pixels()), rng.choice(scene.questions()).text


def _scenes(limit: int) -> Iterator[tuple[Any, str]]:
    import random

    from vlmeff.evaluation.scenes import ask, compose, draw

    for number in range(limit):
        scene = compose(number, split="train", size=112, seed=0)
        question = random.Random(f"calibration-{number}").choice(ask(scene))
        yield draw(scene), question.text


GENERATED = {"mosaics": _mosaics, "scenes": _scenes}


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
    target: float | None,
    device: str | None,
    dtype: str,
    progress: Callable[[int], None],
) -> Any:
    """Load a model, measure it on samples and write an AdaptInfer schedule file; returns the calibration."""
    from vlmeff.vlm.calibrate import calibrate_adaptinfer, write_calibration

    check_file("--out", out, ".json")
    model, samples, about = _loaded(name, source, question=question, limit=limit, device=device, dtype=dtype)
    calibration = calibrate_adaptinfer(model, samples, target=target, name=about["model"], progress=progress)
    write_calibration(out, model, calibration, about)
    return calibration


def calibrate_object_layer(
    name: str,
    source: str,
    *,
    out: Path | None,
    plot: Path | None,
    limit: int,
    top: float,
    device: str | None,
    dtype: str,
    progress: Callable[[int], None],
) -> tuple[Any, int]:
    """Load a model, measure its vision layers on samples and write the curve as JSON and PNG where asked for.

    Returns the ``LayerCurve`` and the family's default object layer.
    """
    from tokenpruning.hiprune_calibration import check_top
    from vlmeff.curve import draw_curve
    from vlmeff.vlm.calibrate_layers import calibrate_hiprune, write_layers
    from vlmeff.vlm.families import family_of

    check_top(top)
    if out is not None:
        check_file("--out", out, ".json")
    if plot is not None:
        check_file("--plot", plot, ".png")
    # The vision tower does not see the question.
    model, samples, about = _loaded(name, source, question=QUESTION, limit=limit, device=device, dtype=dtype)
    curve = calibrate_hiprune(model, samples, top=top, progress=progress)
    default = family_of(model).object_layer(model)
    if out is not None:
        write_layers(out, model, curve, about)
    if plot is not None:
        title = f"{about['model']}: mean distance of the {top:.0%} strongest tokens, {curve.samples} pictures"
        marks = {"default": default} | ({} if curve.object_layer is None else {"suggested": curve.object_layer})
        draw_curve(curve.layers, curve.distances, title=title, x_label="layer of the vision tower", marks=marks).save(
            plot
        )
    return curve, default


def calibrate_recipe(
    name: str,
    source: str,
    out: Path,
    *,
    question: str,
    limit: int,
    budgets: str | None,
    sink: int | None,
    recent: int | None,
    metric: str | None,
    window: int | None,
    tokens: str | None,
    keep: float | None,
    resume: bool,
    device: str | None,
    dtype: str,
    progress: Callable[[int], None],
) -> Any:
    """Load a model, measure it on samples and write a PrefixKV recipe file; returns the recipe.

    ``budgets``: shares, separated by commas. ``metric``: of PrefixKV; ``window`` goes with "window" only. ``tokens``,
    ``keep``: the token method that shortens the prompts first, and its budget. What is known of each sample is kept
    beside ``out`` until that is written; ``resume`` goes on from there.
    """
    from kvcache import PrefixKV, write_recipe
    from kvcache.recipe import Metric
    from vlmeff.config import make_method
    from vlmeff.vlm.calibrate_kv import BUDGETS, PromptTooShortError, calibrate_prefixkv, check_budgets
    from vlmeff.wrapping import wrap

    if keep is not None and tokens is None:
        raise ConfigError(f"--keep {keep:g} is the budget of a token method; add --tokens hiprune, for example.")
    check_file("--out", out, ".json")
    try:
        wanted = check_budgets(BUDGETS if budgets is None else [float(text) for text in budgets.split(",")])
    except ValueError as error:  # also a ConfigError
        raise ConfigError(f"--budgets {budgets!r} must be shares in (0, 1) separated by commas, as 0.2,0.5.") from error
    if metric is not None and metric not in get_args(Metric):
        raise ConfigError(f"--metric {metric} must be {', '.join(get_args(Metric))}.")
    if window is not None and metric != "window":
        raise ConfigError(f"--window {window} belongs to --metric window; add that, or leave --window out.")
    policy = PrefixKV(sink=sink, recent=recent, metric=metric, window=window)  # type: ignore[arg-type]  # None: default
    partial = partial_file(out)
    if not resume:
        partial.unlink(missing_ok=True)
    model, samples, about = _loaded(name, source, question=question, limit=limit, device=device, dtype=dtype)
    if tokens is not None:
        wrap(model, None, tokens=make_method(tokens, {} if keep is None else {"keep": keep}))
    try:
        recipe = calibrate_prefixkv(
            model, samples, budgets=wanted, policy=policy, partial=partial, about=about, progress=progress
        )
    except PromptTooShortError as error:
        raise BudgetTooSmallError(
            f"--budgets: {error.what}. Leave {error.budget:g} out of --budgets, lower --sink or --recent, or take "
            "--samples with longer prompts."
        ) from error
    write_recipe(out, recipe)
    partial.unlink()
    return recipe


def partial_file(out: Path) -> Path:
    """Where the samples measured so far are kept until the recipe ``out`` is written."""
    return out.with_suffix(".partial.jsonl")


def check_file(option: str, path: Path, suffix: str) -> None:
    """Raise ``ConfigError`` unless a file of this suffix could be written there."""
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{option} {str(path)!r} must end in {suffix}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: the folder {str(path.parent)!r} does not exist.")


def _loaded(
    name: str, source: str, *, question: str, limit: int, device: str | None, dtype: str
) -> tuple[Any, Iterator[dict[str, Any]], dict[str, str]]:
    """A model, its prepared samples, and what to write down about both."""
    from vlmeff.loading import load

    pairs = questions_about(source, question, limit)
    first = next(pairs)  # a bad source is refused before a model is loaded
    model, processor = load(name, device=device, dtype=dtype)
    record = zoo.find_model(name)
    called = name if record is None else record.name
    revision = {} if record is None or record.revision is None else {"revision": record.revision}
    about = {"model": Path(called).name, "source": Path(source).name, **revision}
    return model, prepared(processor, itertools.chain([first], pairs), model.device, model.dtype), about
