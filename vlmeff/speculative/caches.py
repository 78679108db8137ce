"""What a key/value cache has to do for speculation: take tokens back, and keep one path of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, QuantizedCache

from kvcache.cache import EVICT_INTERVAL, RetainedCache
from kvcache.layer import RetainedLayer


def obstacle(cache: Any) -> str | None:
    """Why tokens of this cache cannot be verified several at a time with the result of one at a time; None: they can.

    To be asked when the cache is prepared and empty, or filled by earlier turns.
    """
    if cache is None:
        return "use_cache=False leaves no cache: pass use_cache=True"
    if not hasattr(cache, "crop") or not getattr(cache, "is_croppable", True):
        return (
            f"past_key_values is a {type(cache).__name__}, from which tokens cannot be taken back: use the default "
            "cache (no cache_implementation)"
        )
    if isinstance(cache, QuantizedCache):
        return "cache_implementation='quantized' stores tokens differently when several come at once: leave it out"
    if isinstance(cache, RetainedCache) and cache.storage is not None:
        return (
            f"kv_storage={cache.storage!r} quantizes token by token, so what a pass of several tokens sees is not what "
            "one token at a time sees: leave kv_storage or text_speculation out"
        )
    return None


def takes_trees(cache: Any, attention: str | None) -> bool:
    """Whether a pass may hold a tree: the mask is written out (sdpa, eager) and every layer holds every column."""
    layers = getattr(cache, "layers", ())
    plain = all(type(layer) in (DynamicLayer, RetainedLayer) for layer in layers)
    return attention in ("sdpa", "eager") and plain and not getattr(cache, "offloading", False)


def begin(cache: Any) -> None:
    """After the prompt: layers that forget old tokens (sliding windows, retention) wait for ``keep_path``."""
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()


def end(cache: Any) -> None:
    """Back to forgetting as tokens come."""
    for layer in getattr(cache, "layers", ()):
        if getattr(layer, "record_past", False):
            layer.record_past = False


def room(cache: Any) -> int | None:
    """How many tokens the next pass may add for good before something is evicted behind one of them; None: any number.

    A decode policy evicts every so many tokens. Plain decoding does it between two of them, so no pass goes across.
    """
    if not isinstance(cache, RetainedCache) or getattr(cache.policy, "decode", "grow") == "grow":
        return None
    interval = int(getattr(cache.policy, "evict_interval", EVICT_INTERVAL))
    generated = cache.layer(0).seen - (cache.prompt_length or 0)
    return interval - generated % interval


def keep_path(cache: Any, path: Sequence[int], columns: int) -> None:
    """Of the newest ``columns`` columns keep those of ``path`` (ascending, from 0), in every layer."""
    if list(path) != list(range(len(path))):
        for layer in cache.layers:
            start = layer.keys.shape[-2] - columns
            for states in (layer.keys, layer.values):
                index = torch.tensor(path, device=states.device) + start
                states[:, :, start : start + len(path)] = states.index_select(2, index)
    cache.crop(len(path) - columns)  # 0 too: layers trim what they had to wait with
