"""How many bytes a key/value cache really holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def cache_tensors(cache: object) -> Iterator[Tensor]:
    """The key and value tensors of a transformers ``Cache``, layer by layer."""
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor):
                yield tensor


def cache_bytes(cache: object) -> int:
    """Bytes of the storages behind a cache: measured, so a view that keeps a larger tensor alive counts in full."""
    own: Any = getattr(cache, "nbytes", None)
    if callable(own):  # a RetainedCache, which has bookkeeping too
        return own()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache_tensors(cache)}
    return sum(storages.values())


def full_cache_bytes(cache: object) -> int:
    """What ``cache_bytes`` would be if nothing had been dropped. A cache that counts for itself is asked; of another,
    every layer counts as many tokens as the first, which keeps all of them."""
    own: Any = getattr(cache, "full_nbytes", None)
    if callable(own):
        return own()
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(getattr(layer, "keys", None), Tensor)]
    if not layers or len({layer.keys.shape[-2] for layer in layers}) == 1:
        return cache_bytes(cache)
    first = layers[0].keys.shape[-2]
    return sum(
        tensor.nbytes // tensor.shape[-2] * first if tensor.shape[-2] else 0
        for layer in layers
        for tensor in (layer.keys, layer.values)
    )


def cache_slots(cache: object) -> int:
    """Token slots summed over the layers (batch rows not counted)."""
    return sum(_slots(layer) for layer in getattr(cache, "layers", ()) if isinstance(layer.keys, Tensor))


def _slots(layer: Any) -> int:
    held = getattr(layer, "physical_length", None)  # a quantized layer has only its newest tokens in ``keys``
    return layer.keys.shape[-2] if held is None else held
