"""Show what became of the visual tokens of a call: ``vlmeff.overlays(model, inputs, processor)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tokenpruning import ItemPlan
from vlmeff.errors import ConfigError, UnsupportedModelError
from vlmeff.reporting import Report, report, visual_tokens
from vlmeff.vlm.canvas import canvases, restored
from vlmeff.vlm.choose import everything
from vlmeff.vlm.families import Family, family_of
from vlmeff.vlm.families.base import PIXELS, present
from vlmeff.vlm.fates import Stage, other_call, stages_of, what_became
from vlmeff.vlm.overlay import COLORS, LABELS, VEIL, Panel, View, arrange, draw_panel, heading, legend, stack
from vlmeff.vlm.wrapped import STATE

WIDTH, NARROWEST = 720, 240
STAGE_FPS, VIDEO_FPS = 2, 4
SUFFIXES = (".png", ".gif", ".webp")


@dataclass(frozen=True, eq=False)
class Overlay:
    """What became of the tokens of one picture or video.

    ``sheet`` shows everything at once. ``frames``: of a video one per frame (temporal slice); of a picture whose tokens
    were dropped between layers one per stage, before and after each pruning layer; else the sheet alone.
    """

    label: str
    sheet: Image.Image
    frames: list[Image.Image]
    fps: int

    def save(self, path: str | Path) -> None:
        """Write the sheet (.png) or an animation of the frames that repeats (.gif, .webp).

        Raises:
            ConfigError: another suffix.  OSError: the file cannot be written.
        """
        suffix = check_suffix(path)
        if suffix == ".png":
            self.sheet.save(path)
            return
        first, *rest = self.frames
        options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": 1000 // self.fps, "loop": 0}
        if suffix == ".webp":
            options["quality"] = 90
        first.save(path, **options)


def check_suffix(path: str | Path) -> str:
    """The suffix of a file that ``Overlay.save`` can write, in lower case."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"overlay: {str(path)!r} must be a file name that ends in .png (one picture), .gif or .webp (animation)."
        )
    return suffix


def overlays(model: Any, inputs: Mapping[str, Any], processor: Any = None, *, width: int = WIDTH) -> list[Overlay]:
    """Draw what the last call of a wrapped model kept, merged and dropped: one ``Overlay`` per picture and video.

    Pictures come before videos, each in the order of the prompt. Models whose inputs do not say which tiles belong
    together (InternVL, Idefics3, PerceptionLM, ...) have one per tile.

    Args:
        inputs: what the model was called with: ``input_ids``, the pixels and what describes them.
        processor: the model's; its mean and standard deviation give the colours back. Without it the range of the
            pixels of a picture is stretched to black and white.
        width: pixels of each picture that is drawn, 240 or more.
    Raises:
        ConfigError: the model is not wrapped or not called, or ``inputs`` are not those of its last call.
        UnsupportedModelError: the pictures cannot be recovered from this model's inputs.
    """
    return draw_call(model, report(model), inputs, processor, width=width)


def draw_call(
    model: Any,
    of: Report,
    inputs: Mapping[str, Any],
    processor: Any = None,
    *,
    width: int = WIDTH,
    one_picture: bool = False,
) -> list[Overlay]:
    """``overlays`` of a given report of a wrapped model. ``one_picture``: all tiles belong to the same picture."""
    if type(width) is not int or width < NARROWEST:
        raise ConfigError(f"overlays: width={width!r} must be an int of {NARROWEST} pixels or more.")
    state = model.__dict__[STATE]
    family = state.family or family_of(model)
    call = dict(inputs)
    if call.get("input_ids") is None or not any(call.get(name) is not None for name in PIXELS.values()):
        raise ConfigError("overlays: inputs must have the input_ids and pixel values that the model was called with.")
    items = _items(model, family, of, call)
    pictures = _pictures(model, family, items, call, processor)
    stages = [Stage("", None)]
    if of.inner is not None:
        stages = stages_of(model, family, items, of, call)
    elif state.plan.inner is not None and not of.skipped:
        raise other_call()
    out: list[Overlay] = []
    counts = {"image": 0, "video": 0}
    for group in _groups(items, call, one_picture=one_picture):
        modality = items[group[0]].modality
        counts[modality] += 1
        label = f"{'picture' if modality == 'image' else 'video'} {counts[modality]}"
        out.append(_draw(label, [(items[n], pictures[n], n) for n in group], stages, width))
    return out


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A picture as the vision tower saw it, and the same picture with what became of its tokens; both of one size.

    ``kept`` of ``total`` tokens. ``legend``: (meaning, RGB colour) of the kinds of tokens in it. A resampled picture
    has no map of kept tokens: ``resampled`` is True and ``after`` shows what detail the smaller grid holds.
    """

    label: str
    before: Image.Image
    after: Image.Image
    kept: int
    total: int
    legend: list[tuple[str, tuple[int, int, int]]]
    resampled: bool = False


def token_maps(
    model: Any, of: Report, inputs: Mapping[str, Any], processor: Any = None, *, width: int = WIDTH
) -> list[TokenMap]:
    """Like ``draw_call``, without captions: one map per picture, tile mosaic or frame, at the end of the call."""
    family, call = model.__dict__[STATE].family or family_of(model), dict(inputs)
    if not any(call.get(name) is not None for name in PIXELS.values()):
        return []
    items = _items(model, family, of, call)
    pictures = _pictures(model, family, items, call, processor)
    last = stages_of(model, family, items, of, call)[-1] if of.inner is not None else Stage("", None)
    out: list[TokenMap] = []
    for n, (item, shown) in enumerate(zip(items, pictures, strict=True)):
        marks, _ = what_became(item, None if last.alive is None else last.alive[n], chosen=of.inner is not None)
        frames = canvases(item, shown)
        plain = [canvas.picture for frame in canvases(replace(item, new_layout=None), shown) for canvas in frame]
        flat = [canvas for frame in frames for canvas in frame]
        for i, (canvas, picture) in enumerate(zip(flat, plain, strict=True)):
            panel = Panel(canvas.picture, marks[canvas.tokens], canvas.seams)
            drawn = draw_panel(panel, width)
            kinds = sorted(set(panel.marks.flatten().tolist()))
            name = f"{item.modality} {n + 1}" + (f", part {i + 1}" if len(flat) > 1 else "")
            out.append(
                TokenMap(
                    name,
                    picture.convert("RGB").resize(drawn.size, Image.Resampling.BICUBIC),
                    drawn,
                    int((panel.marks >= 0).sum()),
                    panel.marks.size if item.new_layout is None else item.n_before,
                    [(LABELS[kind], COLORS.get(kind, (VEIL,) * 3)) for kind in kinds],
                    resampled=item.new_layout is not None,
                )
            )
    return out


# -- the facts of the call ---------------------------------------------------------------------------------------------


def _items(model: Any, family: Family, of: Report, call: dict[str, Any]) -> list[ItemPlan]:
    """The plans of the call's pictures and videos; of whole ones where nothing was reduced before the model."""
    if of.plan is not None:
        items = of.plan.items
    else:
        items = [plan for m in present(call) for plan in everything(family.layouts(model, call, m), m)]
        if of.prompt_tokens_before != of.prompt_tokens_after:
            raise other_call()
    placeholders = {m: int((call["input_ids"] == family.placeholder_id(model, m)).sum()) for m in present(call)}
    expected = {m: sum(item.n_before for item in items if item.modality == m) for m in placeholders}
    reported = sum(expected.values()) if of.plan is not None else visual_tokens(model, call["input_ids"])
    if placeholders != expected or of.visual_tokens_before != reported:
        raise other_call()
    return items


def _pictures(
    model: Any, family: Family, items: list[ItemPlan], call: dict[str, Any], processor: Any
) -> list[list[Image.Image]]:
    """Per item and segment what the tower saw."""
    out = []
    for modality in present(call):
        if call.get(PIXELS[modality]) is None:
            raise ConfigError(f"overlays: pass {PIXELS[modality]} too; features (mm_encoder_outputs) cannot be drawn.")
        try:
            segments = family.pixels(model, call, modality)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"overlays: the pictures cannot be recovered from the inputs of {type(model).__name__} (model_type "
                f"{family.model_type!r}), so there is nothing to draw on: its family has no pixels()."
            ) from error
        out += [restored(parts, processor, modality) for parts in segments]
    if [len(parts) for parts in out] != [len(item.layout.grids) for item in items]:
        raise other_call()
    return out


def _groups(items: list[ItemPlan], call: dict[str, Any], *, one_picture: bool) -> list[list[int]]:
    """The items that are drawn together: frames that a family plans as videos of their own are one video."""
    images = [n for n, item in enumerate(items) if item.modality == "image"]
    videos = [n for n, item in enumerate(items) if item.modality == "video"]
    out = [images] if one_picture and images else [[n] for n in images]
    pixels = call.get(PIXELS["video"])
    frames = 1
    if videos and pixels is not None and pixels.ndim == 5 and len(videos) == pixels.shape[0] * pixels.shape[1]:
        frames = pixels.shape[1]
    return out + [videos[start : start + frames] for start in range(0, len(videos), frames)]


# -- from facts to pictures --------------------------------------------------------------------------------------------


def _draw(label: str, parts: list[tuple[ItemPlan, list[Image.Image], int]], stages: list[Stage], width: int) -> Overlay:
    """One overlay of the items ``parts`` (plan, pictures, number), which are one picture or one video."""
    video = parts[0][0].modality == "video"
    before = sum(item.n_before for item, _, _ in parts)
    drawn_on = [canvases(item, pictures) for item, pictures, _ in parts]
    several, single = sum(map(len, drawn_on)) > 1, len(stages) == 1
    shown: list[list[View]] = []  # [stage][frame]; frames are captioned with their counts
    counts: list[int] = []
    used: set[int] = set()
    for number, stage in enumerate(stages):
        views: list[View] = []
        counts.append(0)
        for (item, _, n), frames in zip(parts, drawn_on, strict=True):
            marks, left = what_became(item, None if stage.alive is None else stage.alive[n], chosen=number > 0)
            used |= set(marks.tolist())
            counts[-1] += left
            sizes = item.layout.sizes if len(frames) == len(item.layout.grids) else [item.layout.n_tokens]
            for frame, size in zip(frames, sizes, strict=True):
                panels = [Panel(canvas.picture, marks[canvas.tokens], canvas.seams) for canvas in frame]
                kept = sum(int((panel.marks >= 0).sum()) for panel in panels)
                views.append(View(panels, f"{kept} of {size}"))
        shown.append(views)
    titles = [f"{stage.name}: {count} of {before}" for stage, count in zip(stages, counts, strict=True)]
    key = legend(used, _summary(parts[0][0], before, counts), width)

    blocks: list[Image.Image] = []  # one per stage
    for title, views in zip(titles, shown, strict=True):
        if several:
            name = "frame" if video else "tile"
            named = [View(view.panels, f"{name} {i}: {view.caption}") for i, view in enumerate(views, 1)]
            blocks.append(stack([*([] if single else [heading(title, width)]), arrange(named, width)], width))
        else:
            blocks.append(arrange([View(views[0].panels, "" if single else title)], width))
    if several:
        sheet = stack([*blocks, key], width)
    else:
        rows = [View(views[0].panels, "" if single else title) for title, views in zip(titles, shown, strict=True)]
        sheet = stack([arrange(rows, width), key], width)
    if not video:
        return Overlay(label, sheet, [stack([block, key], width) for block in blocks], STAGE_FPS)
    strip = []
    for i in range(len(shown[0])):
        row = [
            View(views[i].panels, f"{stage.name}{'' if single else ': '}{views[i].caption}")
            for stage, views in zip(stages, shown, strict=True)
        ]
        # The number also keeps frames that look alike apart: writers of animations join equal ones.
        strip.append(stack([arrange(row, width), legend(used, f"frame {i + 1} of {len(shown[0])}", width)], width))
    return Overlay(label, sheet, strip, VIDEO_FPS)


def _summary(item: ItemPlan, before: int, counts: list[int]) -> str:
    if len(counts) == 1 and item.new_layout is not None:
        return f"{before} visual tokens resampled to {counts[0]}"
    if len(counts) == 1:
        return f"{counts[0]} of {before} visual tokens kept"
    steps = counts if counts[0] == before else [before, *counts]
    return "visual tokens: " + " -> ".join(map(str, steps))
