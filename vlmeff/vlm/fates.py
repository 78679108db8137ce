"""What became of each visual token of a call, before the language model and at each pruning layer inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenpruning import ItemPlan
from tokenpruning.layout import SEPARATOR
from tokenpruning.plan import TEXT
from vlmeff.errors import ConfigError
from vlmeff.reporting import Report
from vlmeff.vlm.families.base import Family, present
from vlmeff.vlm.overlay import DROPPED, RESAMPLED, TAKEN, Marks


@dataclass(frozen=True, eq=False)
class Stage:
    """``alive``: per item the placeholders (of its layout in the prompt) that are left; None: as the plan says."""

    name: str
    alive: list[Tensor] | None


def other_call() -> ConfigError:
    return ConfigError(
        "overlays: inputs are not those of the model's last call, or that call went on from past_key_values: pass the "
        "inputs with which the pictures came, right after that call."
    )


def stages_of(model: Any, family: Family, items: list[ItemPlan], of: Report, call: dict[str, Any]) -> list[Stage]:
    """What is left of each item before and after each pruning layer.

    The record counts columns of the prompt as the language model got it. A row's visual columns there are, in order,
    the placeholders that the plan left in that row.
    """
    record = of.inner
    assert record is not None
    ids = call["input_ids"].cpu()
    mask = call.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    owner = torch.full_like(ids, -1)  # [B, L] the item that a column belongs to
    slot = torch.full_like(ids, -1)  # [B, L] its placeholder among those that the plan left
    for modality in present(call):
        numbers = [n for n, item in enumerate(items) if item.modality == modality]
        here = ids == family.placeholder_id(model, modality)
        owners, slots = [], []
        for n in numbers:
            of_item = torch.full((items[n].n_before,), -1)
            kept = items[n].kept.cpu()
            of_item[kept] = torch.arange(len(kept)) if items[n].new_layout is not None else kept
            owners.append(torch.full_like(of_item, n))
            slots.append(of_item)
        owner[here], slot[here] = torch.cat(owners), torch.cat(slots)
    vision = record.vision.cpu()
    copies = len(vision) // len(ids)  # beams and returned sequences repeat a row

    def left(columns: Tensor) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in items]
        for row in range(len(ids)):
            entries = ((slot[row] >= 0) & valid[row]).nonzero()[:, 0]
            start = vision[row * copies]
            if len(entries) != len(start):
                raise other_call()
            entries = entries[torch.searchsorted(start, columns[row * copies].cpu())]
            for n in set(owner[row, entries].tolist()):
                found[n].append(slot[row, entries[owner[row, entries] == n]])
        return [torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64) for parts in found]

    after = [Stage(f"after layer {layer}", left(kept)) for layer, kept in zip(record.layers, record.kept, strict=True)]
    return [Stage("before", left(vision)), *after]


def what_became(item: ItemPlan, alive: Tensor | None, *, chosen: bool) -> tuple[Marks, int]:
    """[tokens] what became of each token of an item, and how many of its placeholders are left.

    Args:
        alive: the placeholders that are left; None: those that the plan left.
        chosen: the text chose them, inside the language model.
    """
    layout = item.new_layout or item.layout
    marks = np.full(layout.n_tokens, DROPPED, np.int8)
    follows = np.full(layout.n_tokens, -1, np.int64)  # the token that takes up this one
    if item.selections is None:
        marks[:] = RESAMPLED
    else:
        starts = np.cumsum([0, *layout.sizes])
        for start, size, pick in zip(starts, layout.sizes, item.selections, strict=False):
            index = pick.index.cpu().numpy()
            if pick.into is not None:
                into = pick.into.cpu().numpy()
                follows[start : start + size] = np.where(into >= 0, start + index[into], -1)
                marks[start : start + size][into >= 0] = TAKEN
            marks[start + index] = pick.kind.cpu().numpy()
    if alive is None:
        return marks, item.n_after
    tokens = alive if layout.slots is None else layout.slots.cpu()[alive]
    left = np.zeros(layout.n_tokens, bool)
    left[tokens[tokens != SEPARATOR].numpy()] = True
    if chosen and item.selections is not None:
        marks[marks >= 0] = TEXT
    marks[(marks >= 0) & ~left] = DROPPED
    lost = (marks == TAKEN) & ~left[follows]
    marks[lost] = DROPPED
    return marks, len(alive)
