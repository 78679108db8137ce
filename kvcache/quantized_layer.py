"""A retained layer that stores what it keeps in 8, 4 or 2 bits (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcache.layer import RetainedLayer
from kvcache.quantization import GROUP, Packed, quantize_keys, quantize_values, storage_bits, value_group
from vlmeff.errors import ConfigError

RESIDUAL = 128


class Lent(NamedTuple):
    """All columns of a layer, as they are stored: ``keys``, ``values`` [B, H, R, D] behind the packed ones."""

    keys: Tensor
    values: Tensor
    packed_keys: Packed
    packed_values: Packed

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, C, D], in full precision."""
        return _whole(self.packed_keys, self.keys), _whole(self.packed_values, self.values)


class QuantizedRetainedLayer(RetainedLayer):
    """A ``RetainedLayer`` whose older columns are quantized, once, as soon as its prompt is compacted.

    The newest columns stay in full precision: of the values the last ``residual``, the rest is quantized token by
    token; of the keys up to ``residual`` - 1, which are quantized together, in whole groups of ``group`` tokens, when
    they become ``residual``. Tokens attend to what was stored before their pass, so those of the prompt to its full
    precision. While past is recorded (assisted decoding) nothing is quantized before ``crop`` took back what it has to.

    ``update`` returns all columns dequantized, in new tensors: during a layer's attention, that layer's cache is there
    in full precision too. Not so behind ``lend``: then it returns ``keys`` and ``values``, and who has asked takes
    ``lent`` to ``ops.quantized_decode_attention`` (``kvcache.decode``).

    ``keys``, ``values`` [B, H, C', D] hold the full-precision columns only, as many as there are of each. A column that
    is taken out again leaves the scale and zero of its group with those that remain.

    Args:
        storage: "int8", "int4" or "int2".
        group: tokens of a channel (keys) and channels of a token (values) that share a scale and a zero.
        residual: a multiple of ``group``.
    Raises:
        ConfigError: naming the argument; at the first ``update`` for a head dim that cannot be cut into groups.
    """

    def __init__(self, storage: str, *, group: int = GROUP, residual: int = RESIDUAL) -> None:
        if type(group) is not int or group < 1:
            raise ConfigError(f"kv storage: group={group!r} must be an int >= 1.")
        if type(residual) is not int or residual < 1 or residual % group:
            raise ConfigError(f"kv storage: residual={residual!r} must be a multiple of group={group}, from 1 on.")
        self.bits, self.group, self.residual = storage_bits(storage), group, residual
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.packed_keys: Packed | None = None
        self.packed_values: Packed | None = None
        self.handed_on = False  # the model hands what update returns to its attention kernel as it is
        self.lending = False
        self.lent: Lent | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        value_group(value_states.shape[-1], self.group)  # raises
        super().lazy_initialization(key_states, value_states)

    # -- sizes

    @property
    def physical_length(self) -> int:
        return super().physical_length + _length(self.packed_keys)

    def tensors(self) -> list[Tensor]:
        packed = [t for part in (self.packed_keys, self.packed_values) if part is not None for t in part.tensors()]
        return super().tensors() + packed

    # -- growing

    def lend(self) -> None:
        """Let the next ``update`` leave packed what is packed; both kinds of states must have packed columns."""
        self.lending = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all columns in full precision, or lends them. Raises as ``RetainedLayer.update``."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        lending, self.lending = self.lending, False
        if lending and self.packed_keys is not None and self.packed_values is not None:
            self.lent = Lent(keys, values, self.packed_keys, self.packed_values)
        else:
            keys, values = _whole(self.packed_keys, keys), _whole(self.packed_values, values)
        if self.compacted and not self.record_past:
            self._quantize()
        return keys, values

    def _quantize(self) -> None:
        """Move what has left the residual to the packed columns."""
        count = self.keys.shape[2] // self.residual * self.residual
        if count:
            start = _length(self.packed_keys)
            valid = None if self.valid is None else self.valid[:, start : start + count].to(self.keys.device)
            older = quantize_keys(self.keys[:, :, :count], bits=self.bits, group=self.group, valid=valid)
            self.packed_keys = older if self.packed_keys is None else self.packed_keys.joined(older)
            self.keys = self.keys[:, :, count:].clone()
        count = self.values.shape[2] - self.residual
        if count > 0:
            older = quantize_values(self.values[:, :, :count], bits=self.bits, group=self.group)
            self.packed_values = older if self.packed_values is None else self.packed_values.joined(older)
            self.values = self.values[:, :, count:].clone()

    # -- shrinking

    def compact(self, *args: Any, **kwargs: Any) -> None:
        super().compact(*args, **kwargs)
        self._quantize()

    def keep_everything(self, slots: Tensor) -> None:
        super().keep_everything(slots)
        self._quantize()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, then quantize what had to wait; ``tokens_to_remove`` is 0 or negative."""
        super().crop(tokens_to_remove)
        if self.compacted:
            self._quantize()

    def _drop_states(self, start: int, count: int) -> None:
        self.packed_keys, self.keys = _without(self.packed_keys, self.keys, start, count)
        self.packed_values, self.values = _without(self.packed_values, self.values, start, count)

    # -- rows and devices

    def _map_packed(self, change: Callable[[Tensor], Tensor]) -> None:
        self.packed_keys = None if self.packed_keys is None else self.packed_keys.map(change)
        self.packed_values = None if self.packed_values is None else self.packed_values.map(change)

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        super()._rows(pick)
        self._map_packed(pick)

    def offload(self) -> None:
        super().offload()
        self._map_packed(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self._map_packed(lambda t: t.to(self.device, non_blocking=True))


def new_layer(storage: str | None, *, headroom: int = 0) -> RetainedLayer:
    """An empty layer that stores as asked for; None: as the model computes.

    Raises:
        ConfigError: unknown storage, or one that has no use for headroom.
    """
    if storage is None:
        return RetainedLayer(headroom)
    if headroom:
        raise ConfigError(
            f"headroom={headroom} saves copies of a cache that is not quantized; kv storage={storage!r} packs its "
            "columns anew as they come. Leave one of the two out."
        )
    return QuantizedRetainedLayer(storage)


def _length(packed: Packed | None) -> int:
    return 0 if packed is None else packed.length


def _whole(packed: Packed | None, rest: Tensor) -> Tensor:
    return rest if packed is None else torch.cat([packed.dequantize(), rest], 2)


def _without(packed: Packed | None, rest: Tensor, start: int, count: int) -> tuple[Packed | None, Tensor]:
    """Less ``count`` columns from ``start``, counted through the packed ones into the rest."""
    border, end = _length(packed), start + count
    if packed is not None and start < border:
        packed = packed.without(start, min(end, border) - start)
        packed = packed if packed.length else None
    if end > border:
        rest = torch.cat([rest[:, :, : max(start - border, 0)], rest[:, :, end - border :]], 2)
    return packed, rest
