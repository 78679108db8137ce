"""From what was measured of a prompt to the columns that stay: ask the policy, row by row, and lay the rows out.

Letters: B rows, P slots of the padded prompt, W columns of it that came to the layer (P, unless tokens were dropped
between layers), n real tokens of a row (the last n columns), C columns kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvcache.layer import RetainedLayer
from kvcache.policy import LayerStats, RetentionPolicy
from kvcache.scores import key_norms
from vlmeff.errors import RetentionStateError, UnsupportedMaskError


@dataclass(frozen=True)
class PromptRows:
    """``end`` P, ``width`` W; per row the real tokens ``lengths`` and those ``behind_vision``, the last visual one."""

    end: int
    width: int
    lengths: list[int]
    behind_vision: list[int]


def vision_columns(layer: RetainedLayer, vision: Tensor | None) -> Tensor | None:
    """[B, W] bool: the visual tokens among the columns that came to the layer, of those [B, P] of the prompt."""
    if vision is None or layer.column_slots is None:
        return vision
    return vision.gather(1, layer.column_slots.to(vision.device))


def prompt_rows(layer: RetainedLayer, end: int, vision: Tensor | None) -> PromptRows:
    """The rows of a prompt of ``end`` slots. vision: [B, W] bool.

    Raises ``UnsupportedMaskError`` when a row is padded anywhere but on the left.
    """
    rows, width = len(layer.keys), layer.prompt_columns(end)
    lengths = [width] * rows
    if layer.valid is not None:
        valid = layer.valid[:, :width].cpu()
        if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise UnsupportedMaskError(
                "attention_mask: a row of the prompt has padding behind real tokens, and KV retention needs padding on "
                'the left: set padding_side="left" on the processor or tokenizer.'
            )
        lengths = valid.sum(1).tolist()
    behind = [0] * rows
    if vision is not None:
        places = torch.arange(1, width + 1) * vision[:, :width].cpu()
        behind = (width - places.amax(1)).tolist() if width else behind
    return PromptRows(end, width, lengths, behind)


def row_stats(
    layer: RetainedLayer,
    policy: RetentionPolicy,
    rows: PromptRows,
    row: int,
    *,
    number: int,
    layers: int,
    vision: Tensor | None,
) -> LayerStats:
    """What the policy sees of one layer and row, ``number`` among the ``layers`` retained ones."""
    n, real = rows.lengths[row], slice(rows.width - rows.lengths[row], rows.width)
    kind = policy.needs.kind
    probs = None
    if layer.probs is not None:
        count = min(n, layer.probs.shape[2])
        if kind == "post_vision" and rows.behind_vision[row]:  # nothing behind the picture: the window it is
            count = min(count, rows.behind_vision[row])
        probs = layer.probs[row, :, layer.probs.shape[2] - count :, real]
    return LayerStats(
        layer=number,
        layers=layers,
        n=n,
        kv_heads=layer.keys.shape[1],
        scores=None if layer.scores is None else layer.scores[row, ..., real],
        probs=probs,
        key_norms=key_norms(layer.keys[row, :, real]) if kind == "keys" else None,
        vision=None if vision is None else vision[row, real].to(layer.keys.device),
    )


def on_cpu(stats: LayerStats) -> LayerStats:
    """The same on the CPU: the layers of a model that is spread over devices have to be compared somewhere."""
    given: dict[str, Any] = {name: getattr(stats, name) for name in ("scores", "probs", "key_norms", "vision")}
    return replace(stats, **{name: t.cpu() for name, t in given.items() if t is not None})


def checked_budgets(policy: RetentionPolicy, stats: list[LayerStats]) -> list[int]:
    """The policy's budgets of one row; raises ``RetentionStateError`` when they cannot be met."""
    budgets = policy.budgets(stats)
    if len(budgets) != len(stats) or any(not 0 <= k <= s.n for k, s in zip(budgets, stats, strict=True)):
        raise RetentionStateError(
            f"{type(policy).__name__}.budgets answered {list(budgets)} for {len(stats)} layers of {stats[0].n} tokens: "
            "it must be one number in 0 .. n for each layer."
        )
    return [int(k) for k in budgets]


def compact_layer(
    layer: RetainedLayer, policy: RetentionPolicy, rows: PromptRows, stats: Sequence[LayerStats], kept: Sequence[int]
) -> None:
    """Let the layer keep ``kept[b]`` of row b's tokens, those that the policy selects.

    Rows that keep fewer get fillers on the left, copies of their first kept entry.
    """
    device, origin = layer.keys.device, layer.column_slots
    if origin is None:
        origin = torch.arange(rows.width, device=device).expand(len(kept), -1)
    origin = origin.to(device)
    if max(rows.lengths) == rows.width and list(kept) == rows.lengths:
        slots = origin.int()
        if layer.valid is not None:
            slots = slots.masked_fill(~layer.valid[:, : rows.width].to(device), -1)
        layer.keep_everything(slots.contiguous())
    else:
        columns = max(kept)
        heads = layer.keys.shape[1] if policy.selection == "per_head" else 1
        index = torch.stack(
            [
                _laid_out(_selected(policy, s, k, heads, device) + rows.width - s.n, columns)
                for s, k in zip(stats, kept, strict=True)
            ]
        )
        first = torch.tensor([columns - k for k in kept], device=device)
        valid = torch.arange(columns, device=device) >= first[:, None]
        slots = origin[:, None].expand(-1, heads, -1).gather(2, index).masked_fill(~valid[:, None], -1).int()
        fillers = any(k != columns for k in kept)
        layer.compact(
            index, valid if fillers else None, slots, prompt_length=rows.width, per_head=policy.selection == "per_head"
        )
    layer.kept = torch.tensor(list(kept), device=device)
    layer.prompt_tokens = torch.tensor(rows.lengths, device=device)
    layer.kept_share = (sum(kept), sum(rows.lengths))
    layer.scores = layer.probs = None
    distance: int = getattr(policy, "evict_distance", 0) or 0
    held = layer.physical_length - (layer.seen - rows.end)
    layer.evict_from = held - distance if held - distance >= 1 else held // 2


def _selected(policy: RetentionPolicy, stats: LayerStats, k: int, heads: int, device: torch.device) -> Tensor:
    """[heads, k] of the row's tokens."""
    if k in (0, stats.n):
        return torch.arange(k, device=device).expand(heads, -1)
    chosen = policy.select(stats, k)
    expected = (heads, k) if policy.selection == "per_head" else (k,)
    if tuple(chosen.shape) != expected:
        raise RetentionStateError(
            f"{type(policy).__name__}.select answered {tuple(chosen.shape)}, expected {expected} (selection "
            f"{policy.selection!r})."
        )
    return chosen.to(device).view(heads, k)


def _laid_out(slots: Tensor, columns: int) -> Tensor:
    """[heads, k] -> [heads, columns]: fillers in front, slot 0 where a row keeps nothing."""
    missing = columns - slots.shape[1]
    first = slots[:, :1] if slots.shape[1] else slots.new_zeros(len(slots), 1)
    return torch.cat([first.expand(-1, missing), slots], 1)
