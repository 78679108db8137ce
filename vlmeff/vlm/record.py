"""What is remembered with a cache that was filled from a shortened prompt, and how a conversation goes on from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenpruning.plan import PrunePlan
from vlmeff.errors import IncompatibleError
from vlmeff.vlm.prompt import contiguous_positions

RECORD = "_vlmeff_record"  # attribute of a cache that was filled from a shortened prompt


@dataclass(eq=False)
class PromptRecord:
    """Kept with the cache of a shortened prompt, so that a continuation is shortened alike.

    ``prompt_ids`` [B, L] as the caller gave them; ``short_ids``, ``short_mask`` [B, S] what the cache was filled with.
    ``positions`` [B, S] of the short prompt where the model's own numbering would be another, None elsewhere;
    ``numbered``: whether ``generate`` has to be told them too (it counts past padding by itself). They count from 0;
    ``first_position`` is where the model's forward begins. Positions of several dimensions have ``rope_deltas``.
    ``last`` [B, 1]: the position of the last token of the caller's prompt, which what follows counts on from; None:
    that of ``positions``. The token itself may have been dropped.
    """

    prompt_ids: Tensor
    short_ids: Tensor
    short_mask: Tensor
    rope_deltas: Tensor | None
    positions: Tensor | None = None
    numbered: bool = False
    first_position: int = 0
    last: Tensor | None = None

    def repeated(self, cache: Any) -> PromptRecord:
        """For a cache with several rows for each row of the prompt (returned sequences, beams)."""
        keys = getattr(cache.layers[0], "keys", None) if cache is not None and getattr(cache, "layers", None) else None
        n = 1 if keys is None else keys.shape[0] // len(self.prompt_ids)
        if n == 1:
            return self
        ids, short, mask, deltas = self.prompt_ids, self.short_ids, self.short_mask, self.rope_deltas
        ids, short, mask = (x.repeat_interleave(n, 0) for x in (ids, short, mask))
        given = (deltas, self.positions, self.last)
        deltas, positions, last = (None if x is None else x.repeat_interleave(n, 0) for x in given)
        return PromptRecord(ids, short, mask, deltas, positions, self.numbered, self.first_position, last)


@dataclass(eq=False)
class ShortRequest:
    """``kwargs`` call the original method; ``keep`` [B, L] is the mask over the caller's prompt (None when continuing
    a shortened cache); ``dropped`` columns lost. ``jump`` [1 or 4, B]: what ``generate`` has to add to the positions of
    new tokens, which it counts on from the last survivor; None: nothing."""

    kwargs: dict[str, Any]
    prompt_ids: Tensor
    record: PromptRecord
    dropped: int
    tokens_before: int
    tokens_after: int
    plan: PrunePlan | None = None
    keep: Tensor | None = None
    jump: Tensor | None = None


def attach_record(cache: Any, record: PromptRecord) -> None:
    """Remember with a cache what it was filled with. A static cache is reused across prompts and gets no record."""
    if cache is not None and hasattr(cache, "layers"):
        setattr(cache, RECORD, record)


def record_of(cache: Any) -> PromptRecord | None:
    """What a cache was filled with; forgotten once the cache was reset for another prompt."""
    record: PromptRecord | None = getattr(cache, RECORD, None)
    if record is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, RECORD)
        return None
    return record


def _behind(record: PromptRecord, short: dict[str, Any], ids: Tensor, *, generating: bool) -> Tensor:
    """[4, B, n] positions of what follows the cache: a text row, and three that go on behind the pictures.

    For ``generate`` of the whole sequence, of which only the part behind the cache is looked at.
    """
    assert record.rope_deltas is not None
    past = int(short["past_key_values"].get_seq_length())
    total = ids.shape[1] if generating else past + short["input_ids"].shape[1]
    mask = short.get("attention_mask")
    if mask is None or mask.ndim != 2:
        mask = ids.new_ones(len(ids), total)
        mask[:, : record.short_mask.shape[1]] = record.short_mask
    text = contiguous_positions(mask[:, -total:])
    positions = torch.stack([text, *[text + record.rope_deltas.to(text.device)] * 3])
    return positions if generating else positions[..., past:]


def continue_shortened(model: Any, record: PromptRecord, kwargs: dict[str, Any], *, generating: bool) -> ShortRequest:
    """A call that goes on from the cache of a shortened prompt."""
    input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    rows, length = record.prompt_ids.shape
    if input_ids is None or len(input_ids) != rows:
        raise IncompatibleError(
            f"past_key_values was filled by {rows} rows with reduced pictures: continue with as many rows of input_ids."
        )
    short = dict(kwargs)
    ids, short_mask = record.short_ids, record.short_mask
    if generating:
        history = input_ids[:, :length]
        if history.shape != record.prompt_ids.shape or bool((history != record.prompt_ids).any()):
            raise IncompatibleError(
                "past_key_values was filled from a prompt with reduced pictures, and input_ids does not begin with "
                "that prompt: pass the whole conversation's input_ids, or no past_key_values."
            )
        new = input_ids[:, length:]
        ids = torch.cat([ids, new], 1)
        new_mask = torch.ones_like(new) if mask is None else mask[:, length:]
        short_mask = torch.cat([short_mask, new_mask.to(short_mask)], 1)
        short["input_ids"] = ids
        short["attention_mask"] = short_mask
        for name in ("mm_token_type_ids", "token_type_ids"):
            if kwargs.get(name) is not None:
                kept = torch.zeros_like(record.short_ids)
                short[name] = torch.cat([kept.to(kwargs[name]), kwargs[name][:, length:]], 1)
    elif mask is not None and mask.shape[1] != int(kwargs["past_key_values"].get_seq_length()) + input_ids.shape[1]:
        # A hand-written loop grows the mask of the whole prompt; the cache holds the short one.
        short["attention_mask"] = torch.cat([short_mask, mask[:, length:].to(short_mask)], 1)
    positions, last = record.positions, record.last
    if positions is not None and kwargs.get("position_ids") is None and (record.numbered or not generating):
        # Left alone, the model would count the columns of the short prompt, as when the cache was filled it did not.
        whole = short.get("attention_mask")
        total = ids.shape[1] if generating else int(kwargs["past_key_values"].get_seq_length()) + input_ids.shape[1]
        behind = short_mask.new_ones(rows, total - positions.shape[1])
        behind = behind if whole is None else whole[:, positions.shape[1] :].to(behind)
        last = positions[:, -1:] if last is None else last
        positions, last = torch.cat([positions, last + behind.cumsum(1)], 1), None
        short["position_ids"] = positions if generating else positions[:, -input_ids.shape[1] :] + record.first_position
    if record.rope_deltas is not None:
        if kwargs.get("position_ids") is None:
            # Told, not left to the model's rope_deltas: another conversation may have run on it in between.
            short["position_ids"] = _behind(record, short, ids, generating=generating)
        for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids"):
            short.pop(name, None)
    return ShortRequest(
        kwargs=short,
        prompt_ids=input_ids,
        record=(
            replace(
                record,
                prompt_ids=input_ids,
                short_ids=ids,
                short_mask=short_mask,
                positions=positions,
                last=last,
            )
            if generating
            else record
        ),
        dropped=length - record.short_ids.shape[1],
        tokens_before=input_ids.numel() if mask is None else int(mask.sum()),
        tokens_after=int(short_mask.sum()) if generating else input_ids.numel(),
    )
