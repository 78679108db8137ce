"""Decode steps over a quantized layer: the attention reads the packed columns, no step unpacks the cache.

In front of an attention module that gets one new token a row the layer is told to lend what it stores instead of
returning it in full precision; at the kernel (``kvcache.tap``) ``attend`` answers from what is lent. A call that the op
does not know (a sliding window, sinks, attention weights asked for, a mask of another form) gets the columns in full
precision there, and goes to the kernel as ever. So do back ends that cannot be stood in for: eager, flex and others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache.layer import RetainedLayer
from kvcache.quantized_layer import QuantizedRetainedLayer
from kvcache.tap import Kernel
from vlmeff import ops
from vlmeff.errors import UnsupportedModelError

# Keyword arguments of a kernel that do not change what a single query, the newest, sees.
HARMLESS = frozenset(
    {
        *("scaling", "softcap", "is_causal", "position_ids", "position_embeddings", "cache_position"),
        *("use_cache", "output_hidden_states", "return_dict"),
    }
)


def has_stand_in(backend: str) -> bool:
    """Whether steps of this attention back end can be answered in its place: masks are None or bool, and its kernel is
    looked up where ``kvcache.tap`` stands."""
    return backend == "sdpa" or ("flash" in backend and "|" not in backend)


def lend(layer: RetainedLayer, new: int, backend: str) -> None:
    """In front of the module: have its ``update`` lend, if the kernel is known to get what ``update`` returns."""
    if isinstance(layer, QuantizedRetainedLayer):
        layer.lent, layer.lending = None, new == 1 and layer.handed_on and has_stand_in(backend)


def attend(
    layer: RetainedLayer,
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """At the kernel: what it returns, its own answer or, where the layer has lent its columns, the op's."""
    if not isinstance(layer, QuantizedRetainedLayer):
        return kernel(query, key, value, attention_mask, *args, **kwargs)
    lent, layer.lent = layer.lent, None
    if lent is None:
        if not layer.compacted:  # the prompt: ``update`` returned what it holds
            layer.handed_on = key is layer.keys and value is layer.values
        return kernel(query, key, value, attention_mask, *args, **kwargs)
    if key is not lent.keys or value is not lent.values:
        raise _not_handed_on()
    if _is_plain(kernel, args, kwargs) and query.shape[2] == 1 and query.dtype == lent.keys.dtype:
        known, valid = _visible(attention_mask, len(query), lent.packed_keys.length + lent.keys.shape[2])
        scale = kwargs.get("scaling")
        call: dict[str, Any] = {
            "q": query,
            "keys": lent.packed_keys.stored(lent.keys),
            "values": lent.packed_values.stored(lent.values),
            "scale": query.shape[-1] ** -0.5 if scale is None else scale,
            "valid": valid,
            "softcap": kwargs.get("softcap"),
        }
        # On a GPU the reference, in float32, is no match for a fused kernel over columns in full precision.
        if known and (not query.is_cuda or ops.explain("quantized_decode_attention", **call).backend != "reference"):
            return ops.quantized_decode_attention(**call).transpose(1, 2).contiguous(), None
    return kernel(query, *lent.whole(), attention_mask, *args, **kwargs)


def check_taken(layer: RetainedLayer) -> None:
    """Behind the module. Raises ``UnsupportedModelError`` when what the layer lent never came to the kernel."""
    if take_back(layer):
        raise _not_handed_on()


def take_back(layer: RetainedLayer) -> bool:
    """Forget what a layer has lent, or was to lend; whether there was anything."""
    if not isinstance(layer, QuantizedRetainedLayer):
        return False
    lent, layer.lent, layer.lending = layer.lent, None, False
    return lent is not None


def _not_handed_on() -> UnsupportedModelError:
    return UnsupportedModelError(
        "KV retention: in a decode step the attention did not get the keys and values that its cache returned, as it "
        "did in the prompt: kv_storage=None."
    )


def _is_plain(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the library's own kernel is called with nothing that the op does not know."""
    harmless = all(
        value is None or value is False or name in HARMLESS or (name == "dropout" and value == 0)
        for name, value in kwargs.items()
    )
    return not args and harmless and kernel.func in ALL_ATTENTION_FUNCTIONS._global_mapping.values()


def _visible(mask: Any, rows: int, columns: int) -> tuple[bool, Tensor | None]:
    """(whether the mask is of a known form, [B, C] bool: what the one query sees, None for everything)."""
    if mask is None:
        return True, None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape[-1] != columns:
        return False, None
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    return mask.ndim == 2, mask.expand(rows, -1) if mask.ndim == 2 else None
