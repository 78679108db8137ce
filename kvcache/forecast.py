"""What a retained cache of a prompt will hold, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvcache.cache import RetainedCache
from kvcache.eviction import checked_budgets
from kvcache.policy import LayerStats, RetentionPolicy
from kvcache.quantization import bits_per_entry, storage_bits, value_group
from kvcache.quantized_layer import RESIDUAL

SLOT_BYTES = 4  # kept_slots is int32


def forecast_bytes(
    config: Any,
    policy: RetentionPolicy,
    tokens: Sequence[int],
    *,
    rows: int,
    kv_heads: int,
    head_dim: int,
    bytes_per_value: int,
    storage: str | None = None,
) -> int:
    """``RetainedCache.nbytes`` behind the prompt, bookkeeping included, for rows that are equally long.

    Attention is taken as uniform. A policy that divides the budget among the layers by the attention it finds divides
    it otherwise: that changes nothing in the sum over the layers of one row. What a layer stores in few bits begins at
    a number of columns, so with ``storage`` the sum is then only close; and in a batch a layer has as many columns as
    the row that keeps most of it.

    Args:
        config: of the model.  tokens: of the prompt in each decoder layer.
        kv_heads, head_dim, bytes_per_value: of a layer, unquantized.
    Raises:
        UnsupportedModelError, ConfigError: as ``RetainedCache``.  What the policy raises of a budget.
    """
    cache = RetainedCache(config, policy, storage=storage)
    kept = dict(zip(cache.retained, _kept(cache, policy, tokens, kv_heads), strict=True))
    total = 0
    for layer, n in enumerate(tokens):
        if layer not in kept:
            total += 2 * n * kv_heads * head_dim * bytes_per_value
            continue
        per_head = policy.selection == "per_head" and kept[layer] < n
        slots = kept[layer] * SLOT_BYTES * (kv_heads if per_head else 1)
        total += kv_heads * head_bytes(kept[layer], head_dim, bytes_per_value, storage) + slots
    return rows * total


def head_bytes(columns: int, head_dim: int, bytes_per_value: int, storage: str | None) -> int:
    """Keys and values of one head in ``columns``, compacted: all in full precision, or the older ones packed."""
    plain = head_dim * bytes_per_value
    if storage is None:
        return 2 * columns * plain
    bits = storage_bits(storage)
    keys = columns // RESIDUAL * RESIDUAL
    values = max(columns - RESIDUAL, 0)
    packed = _packed(keys, head_dim, bits, bits_per_entry(bits))
    packed += _packed(values, head_dim, bits, bits_per_entry(bits, value_group(head_dim)))
    return packed + (2 * columns - keys - values) * plain


def _packed(tokens: int, head_dim: int, bits: int, bits_each: float) -> int:
    """A token's codes fill whole bytes; the rest of ``bits_each`` is the entry's share of scale and zero."""
    return tokens * -(-head_dim * bits // 8) + round(tokens * head_dim * (bits_each - bits) / 8)


def _kept(cache: RetainedCache, policy: RetentionPolicy, tokens: Sequence[int], kv_heads: int) -> list[int]:
    """Entries of each retained layer of one row."""
    sizes = [tokens[layer] for layer in cache.retained]
    if cache.keeps_all or not all(sizes):
        return sizes
    stats = [_uniform(policy, number, sizes, kv_heads) for number in range(len(sizes))]
    if policy.scope == "layer":
        return [checked_budgets(policy, [layer])[0] for layer in stats]
    return checked_budgets(policy, stats)


def _uniform(policy: RetentionPolicy, number: int, sizes: Sequence[int], kv_heads: int) -> LayerStats:
    """What would be measured if every token were attended to alike."""
    n, needs = sizes[number], policy.needs
    # As many query heads as key heads: uniform ones do not differ.
    heads = () if needs.reduction(policy.selection) == "mean" else (kv_heads,)
    rows = kv_heads, min(needs.window, n), n
    return LayerStats(
        layer=number,
        layers=len(sizes),
        n=n,
        kv_heads=kv_heads,
        scores=torch.ones(1).expand(*heads, n) if needs.sums else None,
        probs=torch.tensor(1 / n).expand(rows) if needs.kind in ("window", "post_vision") and not needs.sums else None,
        key_norms=torch.ones(1).expand(kv_heads, n) if needs.kind == "keys" else None,
    )
