"""What a retained cache holds, measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerRetention:
    """One retained layer. ``layer``: its number in the model. ``seen``: tokens it was given, evicted or not.

    ``prompt_tokens`` and ``kept``: per row, real tokens of the prompt and those of them that stayed (both empty before
    the prompt is through). ``columns``: columns held. ``bytes``: of the storages behind it.
    """

    layer: int
    seen: int
    prompt_tokens: tuple[int, ...]
    kept: tuple[int, ...]
    columns: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RetentionReport:
    """``bytes``: measured, of all storages of the cache, layers that are not retained included. ``full_bytes``:
    reference, what the same cache would hold with every column in the retained layers, padding included.
    ``keep_ratio``: share of the prompt's entries that was kept, over all retained layers and rows; None before the
    prompt is through. ``thresholds``: p* of each row, where the policy has one.
    """

    layers: tuple[LayerRetention, ...]
    bytes: int
    full_bytes: int
    keep_ratio: float | None
    thresholds: tuple[float, ...] | None = None
