"""Attention scores of single vision layers without attention maps.

While one picture is encoded, forward pre-hooks on the attention modules of the probed layers read their input,
recompute q and k and reduce them to the mean attention that each token receives. The attention back end of the model
stays whatever it is; nothing of size heads x tokens x tokens is ever built (``vlmeff.ops.attention_column_mass``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmeff import ops


@dataclass(frozen=True, eq=False)
class QueryKey:
    """What a family makes of an attention module's input.

    Batched: q, k [B, H, M, D] and ``cu_seqlens`` None. Packed: q, k [T, H, D] and ``cu_seqlens`` [n + 1] int32, the
    borders of the sequences that attend within themselves. ``valid`` [B, M] bool, batched only: padding takes no part.
    """

    q: Tensor
    k: Tensor
    scale: float
    cu_seqlens: Tensor | None = None
    valid: Tensor | None = None


QueryKeyFn = Callable[[nn.Module, Tensor, Mapping[str, object]], QueryKey | Iterator[QueryKey]]


def column_mean(qk: QueryKey | Iterator[QueryKey]) -> Tensor:
    """Mean over heads and queries of the attention each token receives: [B, M], or [T] when packed; float32.

    An iterator gives groups of heads, so that not all of them are there at once.
    """
    if isinstance(qk, QueryKey):
        return _mean_of(qk)
    total, heads = torch.zeros(()), 0
    for group in qk:
        count = group.q.shape[-2 if group.cu_seqlens is not None else 1]
        mean = _mean_of(group) * count
        total, heads = mean if heads == 0 else total + mean, heads + count
    return total / heads


def _mean_of(qk: QueryKey) -> Tensor:
    if qk.valid is not None:
        mass = ops.attention_column_mass(
            qk.q, qk.k, scale=qk.scale, reduce="mean", key_valid=qk.valid, query_weight=qk.valid
        )
        return mass / qk.valid.sum(1, keepdim=True)
    if qk.cu_seqlens is None:
        mass = ops.attention_column_mass(qk.q, qk.k, scale=qk.scale, reduce="mean")
        return mass / qk.q.shape[-2]
    mass = ops.attention_column_mass(qk.q, qk.k, scale=qk.scale, reduce="mean", cu_seqlens=qk.cu_seqlens)
    lengths = qk.cu_seqlens.diff()
    return mass / lengths.repeat_interleave(lengths, output_size=len(mass))


@contextmanager
def probe(layers: Mapping[str, nn.Module], query_key: QueryKeyFn) -> Iterator[dict[str, list[Tensor]]]:
    """Record ``column_mean`` of each named attention module for every call of it inside the block.

    The hooks are removed when the block is left, also by an exception.
    """
    recorded: dict[str, list[Tensor]] = {name: [] for name in layers}
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in layers.items():
        names_of.setdefault(module, []).append(name)

    owner = threading.get_ident()

    def hook(module: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if threading.get_ident() != owner:
            return  # another thread's picture goes through the same modules
        hidden = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        with torch.no_grad():
            score = column_mean(query_key(module, hidden, kwargs))
        for name in names_of[module]:
            recorded[name].append(score)

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in names_of]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
