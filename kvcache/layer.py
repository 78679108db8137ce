"""One layer of a retained cache: fewer columns than the tokens it has been given, one order of slots.

Letters: B rows, H key/value heads, C columns held, D head dim. A *slot* is a token's place in the padded sequence that
nothing was dropped from; it never changes. ``seen`` counts slots, ``physical_length`` counts columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vlmeff import ops
from vlmeff.errors import RetentionStateError


class RetainedLayer(DynamicLayer):
    """A ``DynamicLayer`` that can give up columns and still counts every token it was given.

    Lengths and mask sizes are logical (``seen``), so positions and the masks that the library builds are those of the
    full cache; the attention hooks cut the masks to the columns that are there. Columns are in the order of slots,
    the columns behind the prompt are consecutive slots up to the newest. Rows that keep fewer tokens than others have
    fillers on the left: finite copies of one of their entries, never attended to.

    ``keys``, ``values`` [B, H, C, D]. ``valid`` [B, C] bool, None when every column is a real token. ``kept_slots``
    int32 [B, P'] or [B, H, P']: slots of the P' prompt columns, -1 for fillers; None before the prompt is compacted.
    ``headroom``: columns allocated beyond those held once the prompt is compacted; 0 grows by ``torch.cat``.
    """

    keys: Any  # Tensor, None before the first update
    values: Any

    def __init__(self, headroom: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.headroom = headroom
        self._clear()

    def _clear(self) -> None:
        self.record_past = False
        self.seen = 0
        self.valid: Tensor | None = None
        self.kept_slots: Tensor | None = None
        self.kept: Tensor | None = None  # [B] int64: prompt tokens kept
        self.prompt_tokens: Tensor | None = None  # [B] int64: prompt tokens there were
        self.compacted = False
        self.aligned = True  # column j is slot j: masks for the full cache fit
        self.announced: tuple[int, Tensor | None] | None = None
        self.query_slots: tuple[Tensor, int] | None = None  # of the next pass, where it has not every slot
        self.column_slots: Tensor | None = None  # [B, C] int64: slots of a prompt that came thinned out; else column j
        self.unwatched = False  # tokens came in without the hooks of a wrapped model
        self.scores: Tensor | None = None  # what the hooks measure while the prompt goes through
        self.probs: Tensor | None = None
        self.kept_share = (1, 1)  # entries kept and tokens of the prompt, summed over rows
        self.evict_from = 0  # column at which decode policies take entries out
        self.decode_evicted = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    # -- sizes

    @property
    def physical_length(self) -> int:
        return 0 if self.keys is None or self.keys.ndim < 4 else self.keys.shape[-2]

    @property
    def has_fillers(self) -> bool:
        return self.valid is not None

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def tensors(self) -> list[Tensor]:
        """Everything the layer keeps in memory."""
        found = (self.keys, self.values, self.valid, self.kept_slots, self.column_slots, self.scores, self.probs)
        return [t for t in found if t is not None]

    def nbytes(self) -> int:
        """Bytes of the storages behind the layer, bookkeeping and spare columns included."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(storages.values())

    def full_nbytes(self) -> int:
        """Bytes that keys and values of all tokens seen would take, unquantized."""
        if not self.seen:
            return 0
        column = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in (self.keys, self.values))
        return column * self.seen

    def slots(self) -> Tensor:
        """The slot of every column, int32 [B, C] or [B, H, C]; -1 for fillers."""
        if self.keys is None:
            return torch.empty(0, 0, dtype=torch.int32)
        head = self.kept_slots if self.column_slots is None else self.column_slots.int()
        if head is None:
            head = torch.empty(len(self.keys), 0, dtype=torch.int32, device=self.keys.device)
        behind = self.physical_length - head.shape[-1]
        tail = torch.arange(self.seen - behind, self.seen, dtype=torch.int32, device=self.keys.device)
        return torch.cat([head, tail.expand(*head.shape[:-1], -1)], -1)

    # -- growing

    def announce(self, new: int, valid: Tensor | None) -> None:
        """Say, before ``update``, which of the ``new`` tokens [B, new] are real; None: all of them."""
        self.announced = (new, valid)

    def prompt_columns(self, prompt_length: int) -> int:
        """Columns of a prompt of ``prompt_length`` slots, before it is compacted."""
        return prompt_length if self.column_slots is None else self.column_slots.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all columns, as views of the buffers when there is headroom.

        Raises:
            RetentionStateError: the cache has lost columns and the model that uses it is not (or no longer) wrapped, or
                gradients are required.
        """
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise RetentionStateError(
                "A retained KV cache cannot be trained through: call the model under torch.no_grad(), or without "
                "KV retention (kv=False)."
            )
        new, announced = key_states.shape[-2], self.announced
        self.announced = None
        if announced is None or announced[0] != new:
            if not self.aligned:
                raise RetentionStateError(
                    "past_key_values has had entries evicted by KV retention and was passed to a model that does not "
                    "know: continue with the wrapped model that filled it (vlmeff.wrap)."
                )
            self.unwatched, announced = True, (new, None)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append_valid(len(key_states), new, announced[1])
        before = self.physical_length
        if self.compacted and self.headroom:
            self._reserve(before + new, key_states, value_states)
            assert self._buffers is not None
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, before : before + new] = states
            self._narrow(before + new)
        else:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        self._advance(new)
        return self.keys, self.values

    def _advance(self, new: int) -> None:
        slots, self.query_slots = self.query_slots, None
        if slots is None:
            self.seen += new
        else:
            self.column_slots, self.seen = slots
            self.aligned = False

    def _append_valid(self, rows: int, new: int, valid: Tensor | None) -> None:
        if self.valid is None and valid is None:
            return
        old = self.valid
        device = self.device
        if old is None:
            old = torch.ones(rows, self.physical_length, dtype=torch.bool, device=device)
        if valid is None:
            valid = torch.ones(rows, new, dtype=torch.bool, device=device)
        self.valid = torch.cat([old, valid.to(device)], 1)

    def _reserve(self, length: int, key_states: Tensor, value_states: Tensor) -> None:
        if self._buffers is not None and self._buffers[0].shape[2] >= length:
            frozen = self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
            if not frozen:  # what was made in inference mode cannot be written to outside of it
                return
        capacity, held = length + self.headroom, self.physical_length
        buffers = []
        for states, old in ((key_states, self.keys), (value_states, self.values)):
            # Zeros: spare columns are never read, but a kernel that pads its last block multiplies them by 0.
            buffer = states.new_zeros((*states.shape[:2], capacity, states.shape[3]))
            if held:
                buffer[:, :, :held] = old
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])
        self._narrow(held)

    def _narrow(self, length: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    # -- shrinking

    def compact(
        self, columns: Tensor, valid: Tensor | None, slots: Tensor, *, prompt_length: int, per_head: bool
    ) -> None:
        """Keep some columns of the prompt and everything behind it, in new storage.

        Args:
            columns: [B, 1, C'] or [B, H, C'] int64, columns of the prompt, ascending behind the fillers.
            valid: [B, C'] bool, False for fillers; None when there are none.
            slots: int32, shape of ``columns``, -1 for fillers.
            prompt_length: columns in front of which the prompt ends.
        """
        tail = torch.arange(prompt_length, self.physical_length, device=columns.device)
        index = torch.cat([columns, tail.expand(*columns.shape[:2], -1)], -1)
        behind = None if self.valid is None else self.valid[:, prompt_length:]
        self._buffers = None
        self.keys, self.values = ops.gather_kv(self.keys, self.values, index)
        if valid is None and len(tail) == 0:
            self.valid = None
        elif valid is not None or behind is not None:
            rows, count = columns.shape[0], columns.shape[2]
            head = torch.ones(rows, count, dtype=torch.bool, device=columns.device) if valid is None else valid
            rest = torch.ones(rows, len(tail), dtype=torch.bool, device=columns.device) if behind is None else behind
            self.valid = torch.cat([head, rest], 1)
        self.kept_slots = slots if per_head else slots[:, 0].contiguous()
        self.column_slots = None
        self.compacted, self.aligned = True, False

    def keep_everything(self, slots: Tensor) -> None:
        """Mark the prompt as compacted without touching a column. slots: [B, C] int32, -1 for padding."""
        self.kept_slots, self.column_slots, self.compacted = slots, None, True

    def drop_columns(self, start: int, count: int) -> None:
        """Take ``count`` columns out of every row, from column ``start``."""
        count = min(count, self.physical_length - start)
        if count <= 0:
            return
        end = start + count
        self._drop_states(start, count)
        if self.valid is not None:
            self.valid = torch.cat([self.valid[:, :start], self.valid[:, end:]], 1)
        if self.kept_slots is not None and start < self.kept_slots.shape[-1]:
            gone = (self.kept_slots[..., start:end] >= 0).sum(-1)  # of the prompt, fillers not counted
            if self.kept is not None:
                self.kept = self.kept - (gone if gone.ndim == 1 else gone[:, 0])
            self.kept_slots = torch.cat([self.kept_slots[..., :start], self.kept_slots[..., end:]], -1)
        self.decode_evicted += count
        self.aligned = False

    def check_crop(self, count: int, prompt_length: int | None) -> None:
        """Raise ``RetentionStateError`` unless the newest ``count`` slots are all still there."""
        if count == 0 or not self.seen:
            return
        newest = self.seen if prompt_length is None else self.seen - prompt_length
        if self.decode_evicted:
            newest = min(newest, self.physical_length - self.evict_from)
        if count > newest:
            raise RetentionStateError(
                f"crop({-count}) reaches slots that KV retention has scored or evicted: {newest} tokens at most can be "
                "taken back (those behind the prompt). Run the prompt again with a new cache."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; ``tokens_to_remove`` is 0 or negative. The cache has checked that they are there."""
        count = -int(tokens_to_remove)
        if count <= 0 or not self.is_initialized:
            super().crop(tokens_to_remove)
            return
        length = self.physical_length - count
        self._drop_states(length, count)
        if self.valid is not None:
            self.valid = self.valid[:, :length]
        self.seen -= count

    def _drop_states(self, start: int, count: int) -> None:
        """Take columns out of keys and values."""
        end, length = start + count, self.physical_length - count
        if self._buffers is not None:
            for buffer in self._buffers:
                buffer[:, :, start:length] = buffer[:, :, end : length + count].clone()
            self._narrow(length)
        elif start == length:
            # A view: the next update copies it. What it keeps alive until then is the rejected tokens, and counted.
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        else:
            self.keys = torch.cat([self.keys[:, :, :start], self.keys[:, :, end:]], 2)
            self.values = torch.cat([self.values[:, :, :start], self.values[:, :, end:]], 2)

    def activate_past_recording(self) -> None:
        """Evict nothing until ``crop`` has said which of the newest tokens stay (assisted decoding)."""
        self.record_past = True

    def reset(self) -> None:
        super().reset()
        self._clear()

    # -- rows

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Apply ``pick`` to the rows of everything."""
        if not self.seen:
            return
        length = self.physical_length
        if self._buffers is not None:
            self._buffers = (pick(self._buffers[0]), pick(self._buffers[1]))
            self._narrow(length)
        else:
            self.keys, self.values = pick(self.keys), pick(self.values)
        for name in ("valid", "kept_slots", "column_slots", "kept", "prompt_tokens", "scores", "probs"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, pick(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices.to(t.device) if isinstance(indices, Tensor) else indices, ...])

    def offload(self) -> None:
        self._buffers = None  # a buffer kept on the device would be what offloading is to free
        super().offload()
