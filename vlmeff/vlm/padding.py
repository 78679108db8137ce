"""Padding that stands behind a prompt is moved in front of it, for a cache that keeps a part of each row.

Such a cache needs the real tokens of a row in consecutive columns up to the prompt's end. The order that they were
brought into is remembered with the cache, because whoever continues it gives the conversation in the caller's order.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmeff.errors import IncompatibleError
from vlmeff.vlm.prompt import FILL
from vlmeff.vlm.settings import mask_of_padding

MOVED = "_vlmeff_moved_padding"  # attribute of a cache that was filled from a prompt with its padding moved

ALONG = ("input_ids", *FILL)  # columns of the sequence are their last dimension


@dataclass(frozen=True, eq=False)
class MovedPadding:
    """``order`` [B, L] int64: the caller's column that stands in each column of the prompt with its padding moved."""

    order: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """[..., B or 1, L + n] in the caller's order -> [..., B, L + n]; the n columns behind the prompt stay."""
        width, rows = self.order.shape[1], x.shape[-2] if x.shape[-2] != 1 else len(self.order)
        x = x.expand(*x.shape[:-2], rows, -1)
        order = self._of_rows(rows).to(x.device).expand(*x.shape[:-1], -1)
        return torch.cat([x[..., :width].gather(-1, order), x[..., width:]], -1)

    def apply_to_vectors(self, x: Tensor) -> Tensor:
        """The same for [B, L + n, D]."""
        order = self._of_rows(len(x)).to(x.device)[..., None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, : order.shape[1]].gather(1, order), x[:, order.shape[1] :]], 1)

    def _of_rows(self, rows: int) -> Tensor:
        """[rows, L]: for several sequences of each prompt."""
        if rows % len(self.order):
            raise IncompatibleError(
                f"past_key_values was filled by {len(self.order)} rows padded on the right, and this turn has {rows}: "
                "continue with all of its rows, or pad on the left."
            )
        return self.order.repeat_interleave(rows // len(self.order), 0)

    def of_generate(self, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
        """The arguments of ``generate`` with everything that runs along the whole sequence in the new order."""
        moved, width = dict(kwargs), self.order.shape[1]
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        whole = mask.shape[-1] if isinstance(mask, Tensor) else max(past + 1, width)
        for name in ALONG:
            given = kwargs.get(name)
            if isinstance(given, Tensor) and given.ndim >= 2 and given.shape[-1] >= whole:
                moved[name] = self.apply(given)
        embeds = kwargs.get("inputs_embeds")
        if isinstance(embeds, Tensor) and (ids is None or ids.shape[-1] >= whole):
            moved["inputs_embeds"] = self.apply_to_vectors(embeds)
        return moved


def move_padding(model: Any, kwargs: dict[str, Any], *, retains: bool) -> tuple[dict[str, Any], MovedPadding | None]:
    """The arguments of ``generate`` with left padding, and what was moved; as they are when there is nothing to move.

    Args:
        retains: whether the call fills a cache that keeps a part of the prompt. What goes on from a cache with moved
            padding is moved alike in any case.
    """
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    if past:
        moved: MovedPadding | None = getattr(cache, MOVED, None)
        return (kwargs, None) if moved is None else (moved.of_generate(kwargs, past), moved)
    remember(cache, None)  # it was reset for another prompt
    mask = kwargs.get("attention_mask")
    if retains and mask is None and isinstance(kwargs.get("input_ids"), Tensor):
        mask = mask_of_padding(model, kwargs)
    if not retains or not isinstance(mask, Tensor) or mask.ndim != 2:
        return kwargs, None
    valid = mask.bool()
    if not bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        return kwargs, None
    warnings.warn(
        'vlmeff: right padding is converted to left padding for KV retention; set padding_side="left" on the processor '
        "or tokenizer.",
        stacklevel=4,
    )
    moved = MovedPadding(valid.int().argsort(dim=1, stable=True))
    return moved.of_generate({**kwargs, "attention_mask": mask}, 0), moved


def moved_forward(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a ``forward`` that goes on from a cache: its mask is of the whole sequence."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    moved: MovedPadding | None = getattr(cache, MOVED, None)
    if moved is None or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < moved.order.shape[1]:
        return kwargs
    return {**kwargs, "attention_mask": moved.apply(mask)}


def remember(cache: Any, moved: MovedPadding | None) -> None:
    """Keep with a cache what was moved of the prompt that it was filled with."""
    if moved is not None and cache is not None:
        setattr(cache, MOVED, moved)
    elif hasattr(cache, MOVED):
        delattr(cache, MOVED)
