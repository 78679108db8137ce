"""Encode the pictures of a request and reduce their tokens: from pixels to a plan and to the features that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpruning import ItemPlan, Layout, Resampler, Segment, Selection, Selector, split_budget
from tokenpruning.layout import Grid, Newline
from tokenpruning.plan import all_of
from vlmeff.errors import ConfigError, IncompatibleError, NonFiniteScoreError
from vlmeff.vlm.families.base import Encoded, Family, Kwargs, Modality
from vlmeff.vlm.probe import probe
from vlmeff.vlm.relevance import Question, TextSource

TextAfter = Callable[[int], Tensor]  # the ids of the text that follows a picture


@dataclass(frozen=True, eq=False)
class Reduced:
    """The pictures (or videos) of a request after reduction: their plans, and the encoder output with what is kept."""

    plans: list[ItemPlan]
    output: Any
    new_layouts: list[Layout] | None = None


def budgets_of(selector: Selector, layouts: Sequence[Layout]) -> list[list[int]]:
    """Per picture and segment the number of tokens that the selector's budget keeps."""
    return [split_budget(selector.keep, layout.sizes, layout.shares) for layout in layouts]


def keeps_everything(method: Selector | Resampler, layouts: Sequence[Layout]) -> bool:
    """Whether the method leaves these pictures as they are."""
    if isinstance(method, Resampler):
        return all(method.new_grid(grid) == grid for layout in layouts for grid in layout.grids)
    return all(ks == layout.sizes for ks, layout in zip(budgets_of(method, layouts), layouts, strict=True))


def everything(layouts: Sequence[Layout], modality: Modality) -> list[ItemPlan]:
    """The plans of pictures that stay whole."""
    return [
        ItemPlan(
            layout=layout,
            kept=torch.arange(layout.n_slots),
            selections=[all_of(Segment(grid=grid)) for grid in layout.grids],
            modality=modality,
        )
        for layout in layouts
    ]


def resample(model: Any, family: Family, method: Resampler, kwargs: Kwargs, modality: Modality) -> Reduced:
    """Encode with every grid resampled. Of each segment's placeholders those in the middle of the new cells stay."""
    before = family.layouts(model, kwargs, modality)
    encoded = family.encode_resampled(model, kwargs, modality, method)
    plans = []
    for old, new in zip(before, encoded.layouts, strict=True):
        if old.slots is None:
            starts = torch.tensor([0, *old.sizes]).cumsum(0).tolist()
            parts = zip(starts, old.grids, new.grids, strict=False)
            kept = torch.cat([start + cell_centres(grid, small) for start, grid, small in parts])
        else:
            kept = torch.arange(new.n_slots)  # placeholders are all alike where the pictures are packed with separators
        plans.append(ItemPlan(layout=old, kept=kept, new_layout=new, modality=modality))
    return Reduced(plans, encoded.rebuilt(encoded.items, encoded.deep), encoded.layouts)


def cell_centres(grid: Grid, small: Grid) -> Tensor:
    """[h' * w'] int64 ascending: the token of an H x W grid in the middle of each cell of a smaller grid."""
    (height, width), (h, w) = grid, small
    rows = (2 * torch.arange(h) + 1) * height // (2 * h)
    columns = (2 * torch.arange(w) + 1) * width // (2 * w)
    return (rows[:, None] * width + columns).flatten()


def select(
    model: Any,
    family: Family,
    selector: Selector,
    kwargs: Kwargs,
    modality: Modality,
    *,
    newline: Newline,
    text_source: TextSource,
    text_after: TextAfter,
    lock: Any,
) -> Reduced:
    """Encode, score and let the selector choose in every segment; a picture's choice never sees another picture."""
    given = (kwargs.get("mm_encoder_outputs") or {}).get(modality) is not None
    if given and {"object", "deep"} & set(selector.needs):
        raise IncompatibleError(
            f"{type(selector).__name__} needs the vision tower's attention, which mm_encoder_outputs does not carry: "
            "pass the pixels, or use tokens='downsample'."
        )
    layers = family.score_layers(model, selector.needs, getattr(selector, "object_layer", None))
    # The hooks sit on modules that all threads share: one request is encoded at a time.
    with lock, probe(layers, family.query_key) as recorded, _tower_tokens(model, family, text_source) as tower:
        encoded = family.encode(model, kwargs, modality)
    scores = {name: family.token_scores(model, kwargs, modality, torch.cat(parts)) for name, parts in recorded.items()}
    if "text" in selector.needs:
        scores["text"] = _relevance(model, family, kwargs, modality, encoded, text_source, text_after, tower)
    _check_finite(scores)
    budgets = budgets_of(selector, encoded.layouts)
    plans, items, deep = [], [], [[] for _ in encoded.deep]  # type: ignore[var-annotated]
    for number, layout in enumerate(encoded.layouts):
        item = encoded.items[number]
        places = layout.places(item.device)
        picks = []
        for part, segment in enumerate(_segments(selector, layout, item, places)):
            of_segment = {name: pictures[number][part].to(item.device) for name, pictures in scores.items()}
            scored = Segment(grid=segment.grid, scores=of_segment, features=segment.features, device=item.device)
            k = budgets[number][part]
            picks.append(all_of(scored) if k == scored.size else selector.select(scored, k))
        parts = list(layout.segments(places))
        kept_places = torch.cat([part[pick.index] for part, pick in zip(parts, picks, strict=True)])
        # A picture that fits its budget is left alone, as it is when nothing else is reduced beside it.
        whole = budgets[number] == layout.sizes
        kept = layout.kept_slots(kept_places, "keep" if whole else newline)
        plans.append(ItemPlan(layout=layout, kept=kept, selections=picks, modality=modality))
        items.append(_take(item, parts, picks, kept))
        for out, layer in zip(deep, encoded.deep, strict=True):
            out.append(_take(layer[number], parts, picks, kept))
    return Reduced(plans, encoded.rebuilt(items, deep))


@contextmanager
def _tower_tokens(model: Any, family: Family, source: TextSource) -> Iterator[list[Tensor]]:
    """The tower's tokens before the projector, for a text source that looks at them."""
    seen: list[Tensor] = []
    if not getattr(source, "uses_tower", False):
        yield seen
        return
    handle = family.tower_module(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _segments(selector: Selector, layout: Layout, item: Tensor, places: Tensor) -> Iterator[Segment]:
    for grid, part in zip(layout.grids, layout.segments(places), strict=True):
        features = item[part] if "features" in selector.needs else None
        yield Segment(grid=grid, features=features, device=item.device)


def _take(item: Tensor, parts: list[Tensor], picks: list[Selection], kept: Tensor) -> Tensor:
    """[S, D] -> [k, D]: what stays of a picture, merged tokens averaged into the ones that stay."""
    if any(pick.into is not None for pick in picks):
        item = item.clone()
        for part, pick in zip(parts, picks, strict=True):
            if pick.into is not None:
                item[part[pick.index]] = pick.apply(item[part])
    return Selection(kept, kept).apply(item)


def _relevance(
    model: Any,
    family: Family,
    kwargs: Kwargs,
    modality: Modality,
    encoded: Encoded,
    source: TextSource,
    text_after: TextAfter,
    tower: list[Tensor],
) -> list[list[Tensor]]:
    out = []
    for number, layout in enumerate(encoded.layouts):
        item = encoded.items[number]
        question = Question(
            text_ids=text_after(number),
            features=item[layout.places(item.device)],
            grids=layout.grids,
            embed=model.get_input_embeddings(),
            tower_features=lambda number=number: _tower_of(tower, number),  # type: ignore[misc]
            pixels=lambda number=number: family.pixels(model, kwargs, modality)[number],  # type: ignore[misc]
        )
        with torch.no_grad():
            out.append(_checked(source.relevance(question), layout, source))
    return out


def _checked(scores: Any, layout: Layout, source: TextSource) -> list[Tensor]:
    """What a text source answered, or a clear error: sources may be the caller's own."""
    fits = isinstance(scores, list | tuple) and len(scores) == len(layout.grids)
    if not fits or any(not isinstance(s, Tensor) or s.shape != (n,) for s, n in zip(scores, layout.sizes, strict=True)):
        raise ConfigError(
            f"text_source: {type(source).__name__}.relevance must return one tensor [H * W] per segment, here of sizes "
            f"{layout.sizes}."
        )
    return [s.float() for s in scores]


def _tower_of(tower: list[Tensor], number: int) -> Tensor:
    if not tower:
        raise ConfigError("text_source: a source that calls tower_features must have the attribute uses_tower = True.")
    return torch.cat(tower)[number]


def _check_finite(scores: dict[str, list[list[Tensor]]]) -> None:
    for name, pictures in scores.items():
        flat = [torch.cat(segments) for segments in pictures]
        if not bool(torch.cat(flat).isfinite().all()):
            number = next(i for i, s in enumerate(flat) if not bool(s.isfinite().all()))
            part = next(i for i, s in enumerate(pictures[number]) if not bool(s.isfinite().all()))
            where = "relevance to the question is" if name == "text" else f"attention scores of the {name} layer are"
            raise NonFiniteScoreError(
                f"the {where} not finite for picture {number}, segment {part}: activations overflowed. Load the model "
                "in bfloat16 or float32."
            )
