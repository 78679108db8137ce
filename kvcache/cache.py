"""The cache that keeps a part of the prompt: ``DynamicCache`` whose full-attention layers can give up entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvcache.eviction import (
    PromptRows,
    checked_budgets,
    compact_layer,
    on_cpu,
    prompt_rows,
    row_stats,
    vision_columns,
)
from kvcache.layer import RetainedLayer
from kvcache.measure import ATTENTION_KINDS
from kvcache.policy import LayerStats, RetentionPolicy
from kvcache.quantized_layer import new_layer
from kvcache.report import LayerRetention, RetentionReport
from vlmeff.errors import IncompatibleError, RetentionStateError, UnsupportedCacheError, UnsupportedModelError

EVICT_INTERVAL = 16  # tokens between two deletions of a decode policy that does not say


class RetainedCache(DynamicCache):
    """A ``DynamicCache`` for one model that keeps of each prompt what its policy chooses, once per cache.

    It is filled by a wrapped model, whose hooks measure the prompt and cut the masks (``kvcache.controller``). What
    comes behind the prompt is kept, unless the policy has a decode rule:

    * ``decode="grow"`` (default): everything.
    * ``"fixed_point"``: after t tokens floor((1 - keep_l) * t) entries have been taken out of layer l, keep_l its share
      of the prompt, at the column ``evict_distance`` (default 0) before the end of the kept prompt.
    * ``"window"``: the last ``decode_window`` tokens.

    Decode rules act every ``evict_interval`` tokens (default 16), so up to that many less one more are held meanwhile.
    A second turn's tokens count as generated ones.

    Args:
        config: of the model; only plain full-attention layers are retained.
        policy: what to keep.
        prompt_length: slots of the prompt, padding included. None: what the first pass brings; give it when the prompt
            comes in several passes. ``generate`` of a wrapped model sets it.
        vision: [B, prompt_length] bool, visual tokens, for policies that ask for them.
        headroom: columns allocated ahead behind the compacted prompt, so that a step need not copy the cache; counted
            by ``nbytes``.
        storage: "int8", "int4" or "int2": how the retained layers store what stays, once the prompt is compacted
            (``QuantizedRetainedLayer``); None: as the model computes. Other layers are never quantized.
        offloading: as in ``DynamicCache``.
    Raises:
        UnsupportedCacheError: encoder-decoder model.
        UnsupportedModelError: no full-attention layer, or layers that use the keys of others.

    Eviction happens after the layer's own attention of the pass that ends the prompt, so the first new token is always
    computed with the full cache. Peak: with a policy of scope "layer" the compacted layers so far and one full layer;
    of scope "model" the full cache; with a prompt in several passes always the full cache.
    """

    def __init__(
        self,
        config: Any,
        policy: RetentionPolicy,
        *,
        prompt_length: int | None = None,
        vision: Tensor | None = None,
        headroom: int = 0,
        storage: str | None = None,
        offloading: bool = False,
    ) -> None:
        if headroom < 0:
            raise ValueError(f"RetainedCache: headroom={headroom} must be 0 or more columns.")
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedCacheError(
                f"KV retention needs a decoder-only model, and {type(config).__name__} is encoder-decoder: kv=False."
            )
        text_config = config.get_text_config(decoder=True)
        if "reuse" in (getattr(text_config, "kv_sharing_modes", None) or ()):
            raise UnsupportedModelError(
                f"KV retention: layers of {type(text_config).__name__} use the keys of others, none can go. kv=False."
            )
        super().__init__(config=config, offloading=offloading)
        self.layers = [
            new_layer(storage, headroom=headroom) if type(layer) is DynamicLayer else layer for layer in self.layers
        ]
        self.retained = tuple(i for i, layer in enumerate(self.layers) if isinstance(layer, RetainedLayer))
        if not self.retained:
            raise UnsupportedModelError(
                f"KV retention: {type(text_config).__name__} has no full-attention layer. kv=False."
            )
        self.policy = policy
        self.storage = storage
        self.prompt_length = prompt_length
        self.vision = vision
        self.thresholds: tuple[float, ...] | None = None
        self.watched = False  # the hooks of a call are at work
        self._rows: dict[int, PromptRows] = {}  # by the columns of it that came to a layer
        self._decode_marks = [0] * len(self.retained)

    # -- the prompt

    @property
    def keeps_all(self) -> bool:
        return self.policy.keep_ratio >= 1

    @property
    def changes_anything(self) -> bool:
        """Whether what follows the prompt sees anything but the plain cache."""
        return not self.keeps_all or self.storage is not None

    def layer(self, position: int) -> RetainedLayer:
        """The ``position``-th retained layer."""
        layer = self.layers[self.retained[position]]
        assert isinstance(layer, RetainedLayer)
        return layer

    def begin_pass(self, new: int) -> None:
        """A pass of ``new`` tokens is about to go through the layers."""
        first = self.layer(0)
        if first.seen:
            return
        self._rows, self.thresholds = {}, None
        if self.prompt_length is None:
            if first.record_past:
                raise RetentionStateError(
                    "Assisted decoding puts candidates behind the prompt, and RetainedCache was not told where that "
                    "ends: give it prompt_length."
                )
            self.prompt_length = new

    def set_query_slots(self, layer: int, slots: Tensor, logical_end: int) -> None:
        """Say, in front of a layer, that the prompt comes to it thinned out: tokens were dropped between layers.

        Args:
            layer: its number in the model.
            slots: [B, W] int64 ascending, the slots of the tokens that it gets.
            logical_end: slots of the whole pass; the layer counts them all as seen.
        Raises:
            IncompatibleError: the layer is not retained, or the pass is not the whole prompt.
        """
        if layer not in self.retained:
            raise IncompatibleError(
                f"KV retention: tokens were dropped in front of layer {layer}, which is no full-attention layer. Use a "
                "method that drops tokens before the language model, or kv=False."
            )
        position = self.retained.index(layer)
        if self.layer(position).seen or logical_end != (self.prompt_length or logical_end):
            raise IncompatibleError(
                f"KV retention: tokens were dropped between layers in a pass of {logical_end} tokens, which is not the "
                f"whole prompt ({self.prompt_length}): give the prompt in one pass, or use kv=False."
            )
        self.layer(position).query_slots = (slots, logical_end)

    @property
    def wants_attention(self) -> bool:
        """Whether the policy wants the attention of a prompt measured."""
        return self.policy.needs.kind in ATTENTION_KINDS and not self.keeps_all

    def measures(self, position: int) -> bool:
        """Whether attention has to be measured in this layer's next pass."""
        layer = self.layer(position)
        return self.wants_attention and not layer.compacted and layer.seen < (self.prompt_length or 0)

    def after_layer(self, position: int) -> None:
        """A layer's attention is done: evict what can be. While past is recorded, ``crop`` does it."""
        if not self.layer(position).record_past:
            self._evict(position)

    def _evict(self, position: int) -> None:
        layer, length = self.layer(position), self.prompt_length
        if layer.compacted:
            self._evict_generated(position)
        elif length is None or layer.seen < length:
            return
        elif layer.unwatched:
            raise RetentionStateError(
                "RetainedCache: a part of the prompt went through an unwrapped model, so it was not measured. Run the "
                "whole prompt through the wrapped model, with a new cache."
            )
        elif self.keeps_all or self.policy.scope == "layer":
            self._evict_prompt([position])
        elif position == len(self.retained) - 1:
            self._evict_prompt(list(range(len(self.retained))))

    @torch.no_grad()
    def _evict_prompt(self, positions: list[int]) -> None:
        assert self.prompt_length is not None
        layers = [self.layer(p) for p in positions]
        if self.wants_attention and any(layer.scores is None and layer.probs is None for layer in layers):
            raise UnsupportedModelError(
                "KV retention: the model's attention was never heard: its modules do not look their kernel up in "
                "transformers' ALL_ATTENTION_FUNCTIONS. Use a policy that does not look at attention (streaming_llm, "
                "knorm), or kv=False."
            )
        batch = len(layers[0].keys)
        vision = self.vision
        if vision is not None and len(vision) != batch:  # beams, several sequences per prompt
            vision = vision.repeat_interleave(batch // len(vision), 0)
        rows = [self._prompt_rows(layer, vision) for layer in layers]
        stats = [self._stats(p, r, vision) for p, r in zip(positions, rows, strict=True)]  # [layer][row]
        kept = [list(r.lengths) for r in rows]
        if not self.keeps_all:
            by_row = [self._budgets([s[row] for s in stats]) for row in range(batch)]
            kept = [[budgets[i] for budgets, _ in by_row] for i in range(len(positions))]
            found = [p for _, p in by_row if p is not None]
            self.thresholds = tuple(found) if len(found) == batch else None
        for i, layer in enumerate(layers):
            compact_layer(layer, self.policy, rows[i], stats[i], kept[i])
            stats[i] = []  # they hold the scores of the whole prompt

    def _prompt_rows(self, layer: RetainedLayer, vision: Tensor | None) -> PromptRows:
        """Layers drop ever more tokens, so those with equally many columns have the same ones."""
        assert self.prompt_length is not None
        columns = layer.prompt_columns(self.prompt_length)
        if columns not in self._rows:
            self._rows[columns] = prompt_rows(layer, self.prompt_length, vision_columns(layer, vision))
        return self._rows[columns]

    def _stats(self, position: int, rows: PromptRows, vision: Tensor | None) -> list[LayerStats]:
        layer, count = self.layer(position), len(self.retained)
        vision = vision_columns(layer, vision)
        return [
            row_stats(layer, self.policy, rows, row, number=position, layers=count, vision=vision)
            for row in range(len(layer.keys))
        ]

    def _budgets(self, stats: list[LayerStats]) -> tuple[list[int], float | None]:
        """Entries of each layer of one row, and the threshold behind them if the policy has one."""
        if stats[0].n == 0:
            return [0] * len(stats), None
        tensors = [t for s in stats for t in (s.scores, s.probs, s.key_norms) if t is not None]
        if len({t.device for t in tensors}) > 1:
            stats = [on_cpu(s) for s in stats]
        allocate = getattr(self.policy, "allocate", None)
        if allocate is None or self.policy.scope == "layer":
            return checked_budgets(self.policy, stats), None
        allocation = allocate(stats)
        return [int(k) for k in allocation.kept], float(allocation.p)

    # -- what follows

    def _evict_generated(self, position: int) -> None:
        decode = getattr(self.policy, "decode", "grow")
        if decode == "grow":
            return
        layer = self.layer(position)
        generated = layer.seen - (self.prompt_length or 0)
        mark = generated // getattr(self.policy, "evict_interval", EVICT_INTERVAL)
        if mark <= self._decode_marks[position]:
            return
        self._decode_marks[position] = mark
        if decode == "fixed_point":
            kept, tokens = layer.kept_share
            evicted = (tokens - kept) * generated // max(tokens, 1)
        else:
            evicted = generated - (getattr(self.policy, "decode_window", None) or generated)
        layer.drop_columns(layer.evict_from, evicted - layer.decode_evicted)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, then evict what had to wait.

        Raises:
            RetentionStateError: they reach into the prompt, or were evicted meanwhile.
        """
        count = -int(tokens_to_remove)
        if count > 0:
            for position in range(len(self.retained)):
                self.layer(position).check_crop(count, self.prompt_length)
        super().crop(-count)
        for position in range(len(self.retained)):
            if self.layer(position).seen:
                self._evict(position)

    def reset(self) -> None:
        """Empty the cache for another prompt."""
        super().reset()
        self.prompt_length, self.vision = None, None
        self._rows, self.thresholds = {}, None
        self._decode_marks = [0] * len(self.retained)

    # -- rows. ``_rows`` and ``thresholds`` are of the batch that the prompt came in.

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._rows, self.thresholds = {}, None
        if self.vision is not None and len(self.vision) == len(beam_idx):
            self.vision = self.vision.index_select(0, beam_idx.to(self.vision.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows, self.thresholds = {}, None
        if self.vision is not None:
            self.vision = self.vision.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows, self.thresholds = {}, None
        if self.vision is not None:
            self.vision = self.vision[indices.to(self.vision.device)]

    # -- accounting

    def nbytes(self) -> int:
        """Bytes of the storages of all layers, bookkeeping and headroom included."""
        return sum(_nbytes(layer) for layer in self.layers)

    def full_nbytes(self) -> int:
        """Bytes that the same cache would hold had nothing been evicted."""
        return sum(_full_nbytes(layer) for layer in self.layers)

    def report(self) -> RetentionReport:
        """What the cache holds now; reads the device."""
        layers = []
        for index in self.retained:
            layer: Any = self.layers[index]
            layers.append(
                LayerRetention(
                    layer=index,
                    seen=layer.seen,
                    prompt_tokens=() if layer.prompt_tokens is None else tuple(layer.prompt_tokens.tolist()),
                    kept=() if layer.kept is None else tuple(layer.kept.tolist()),
                    columns=layer.physical_length,
                    bytes=layer.nbytes(),
                )
            )
        tokens = sum(sum(layer.prompt_tokens) for layer in layers)
        return RetentionReport(
            layers=tuple(layers),
            bytes=self.nbytes(),
            full_bytes=self.full_nbytes(),
            keep_ratio=sum(sum(layer.kept) for layer in layers) / tokens if tokens else None,
            thresholds=self.thresholds,
        )


def _nbytes(layer: Any) -> int:
    if isinstance(layer, RetainedLayer):
        return layer.nbytes()
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if isinstance(t, Tensor)}
    return sum(storages.values())


def _full_nbytes(layer: Any) -> int:
    if not isinstance(layer, RetainedLayer):
        return _nbytes(layer)
    return layer.full_nbytes()
