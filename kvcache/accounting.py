"""How many bytes a key/value cache really holds."""

from __future__ import annotations

from collections.abc import Iterator

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
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache_tensors(cache)}
    return sum(storages.values())


def full_cache_bytes(cache: object) -> int:
    """What ``cache_bytes`` would be if every layer held as many tokens as the first, which keeps all of them."""
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
    return sum(layer.keys.shape[-2] for layer in getattr(cache, "layers", ()) if isinstance(layer.keys, Tensor))
