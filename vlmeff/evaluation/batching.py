"""One padded ``generate`` call for several documents, with each document's own share of what it cost.

A document's figures are those that it has when it is answered alone: padding that the batch adds is not counted, nor
what other rows generate after this one has ended. Times and peak memory belong to the batch, so a document has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcache.cache import EVICT_INTERVAL, RetainedCache
from vlmeff.evaluation.measuring import Generated, greedy
from vlmeff.reporting import Report, report, text_flops, visual_tokens
from vlmeff.wrapping import is_wrapped


class NotSeparable(Exception):
    """What a batch cost cannot be dealt out to its documents."""


@torch.no_grad()
def generate_together(
    model: Any, inputs: Mapping[str, Any], pictures: Sequence[int], *, max_new_tokens: int, fixed_output: bool = False
) -> list[Generated]:
    """Greedy ``generate`` of B prompts; returns a ``Generated`` of one row, without times, for each.

    Args:
        inputs: the processor's; ``input_ids`` and ``attention_mask`` [B, L], padded on the left.
        pictures: of each prompt.
    Raises:
        NotSeparable: the counts of the rows do not add up to those of the call.
    """
    ids: Tensor = inputs["input_ids"]
    meter = _RowMeter()
    handle = model.register_forward_hook(meter.after_forward)
    try:
        out: Tensor = model.generate(**inputs, **greedy(model, max_new_tokens, fixed_output=fixed_output))
    finally:
        handle.remove()
    about = report(model) if is_wrapped(model) else None
    ends = () if fixed_output else end_ids(model)
    new = [until_end(row, ends) for row in out[:, ids.shape[1] :].tolist()]
    prompts = inputs["attention_mask"].sum(1).tolist()
    visual = [visual_tokens(model, row[None]) for row in ids]
    kept = _kept(about, visual, pictures)
    prefill = [p - v + k for p, v, k in zip(prompts, visual, kept, strict=True)]
    if about is not None and (sum(prefill), sum(kept)) != (about.prompt_tokens_after, about.visual_tokens_after):
        raise NotSeparable("the tokens of the rows do not add up to those of the call")
    inner = None if about is None else about.inner
    held = [
        (meter.bytes_of(row, tokens, 0, inner), meter.bytes_of(row, tokens, len(made) - 1, inner))
        for row, (tokens, made) in enumerate(zip(prefill, new, strict=True))
    ]
    return [
        Generated(
            tokens=torch.tensor([made]),
            visual_tokens_in=visual[row],
            visual_tokens_kept=kept[row],
            visual_tokens_layer_mean=None if inner is None else inner.mean_visual,
            prompt_tokens=int(prompts[row]),
            prefill_tokens=int(prefill[row]),
            prefill_gflops=text_flops(model, ids[row][None], int(prefill[row]), inner),
            ttft_ms=None,
            e2e_ms=math.nan,  # of the batch, so of none of them
            kv_bytes_prefill=held[row][0],
            kv_bytes_end=held[row][1],
            peak_bytes=None,
            report=about,
        )
        for row, made in enumerate(new)
    ]


def end_ids(model: Any) -> set[int]:
    """The tokens that end an answer."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else {found} if isinstance(found, int) else set()


def until_end(tokens: Sequence[int], ends: Iterable[int]) -> list[int]:
    """Up to the first token that ends the answer, that one included."""
    ends = set(ends)
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return list(tokens[: last + 1])


def _kept(about: Report | None, visual: Sequence[int], pictures: Sequence[int]) -> list[int]:
    """Visual tokens of each row that enter the language model; pictures fill the rows in their order."""
    if about is None or about.plan is None:
        return list(visual)
    items = about.plan.items
    if len(items) != sum(pictures):
        raise NotSeparable("the plan has another number of pictures than the batch")
    out, start = [], 0
    for count in pictures:
        out.append(sum(item.n_after for item in items[start : start + count]))
        start += count
    return out


@dataclass(eq=False)
class _RowMeter:
    """What the cache holds behind the pass that ends the prompt.

    ``layers``: per layer the bytes of one row's column of keys and values, the columns, and per row the bytes of what
    is kept once and entries of the prompt, where the layer knows them (a retained one does).
    """

    layers: list[_Layer] | None = None
    _seen: bool = field(default=False, repr=False)

    def after_forward(self, module: Any, args: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if not self._seen and cache is not None:
            self._seen = True
            self.layers = _layers_of(cache)

    def bytes_of(self, row: int, tokens: int, generated: int, inner: Any) -> int | None:
        """Of a row of ``tokens`` behind the prompt and ``generated`` more; None where rows cannot be told apart."""
        if not self.layers:
            return None
        total, width = 0, self.layers[0].columns
        for layer in self.layers:
            if layer.entries is not None:
                held = layer.entries[row]
            elif layer.columns == width or inner is not None:
                held = tokens - (width - layer.columns)  # the same columns are dropped from every row
            else:
                return None  # a sliding window
            if generated >= layer.grows_for:
                return None
            total += layer.per_column * (held + generated) + layer.per_entry * held
        return total


@dataclass(frozen=True)
class _Layer:
    """``per_column``: bytes of a column of one row; ``per_entry``: of the bookkeeping of one entry of the prompt.

    ``entries``: of the prompt, per row; None: all columns that are no padding. ``grows_for``: generated tokens from
    which entries may be evicted again.
    """

    per_column: int
    per_entry: int
    columns: int
    entries: tuple[int, ...] | None
    grows_for: float


def _layers_of(cache: Any) -> list[_Layer] | None:
    retained = isinstance(cache, RetainedCache)
    if retained and cache.storage is not None:
        return None  # quantized in groups of columns
    grows_for = math.inf
    if retained and getattr(cache.policy, "decode", "grow") != "grow":
        grows_for = getattr(cache.policy, "evict_interval", EVICT_INTERVAL)
    out = []
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.ndim != 4:
            return None
        kept, per_entry = getattr(layer, "kept", None), 0
        for name in ("kept_slots", "column_slots"):
            slots = getattr(layer, name, None)
            per_entry += 0 if slots is None else slots.element_size() * slots[0, ..., 0].numel()
        out.append(
            _Layer(
                per_column=sum(t.shape[1] * t.shape[3] * t.element_size() for t in (keys, values)),
                per_entry=per_entry,
                columns=keys.shape[2],
                entries=None if kept is None else tuple(kept.tolist()),
                grows_for=1 if getattr(layer, "is_sliding", False) else grows_for,
            )
        )
    return out
