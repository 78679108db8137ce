"""Pruning inside the language model: forward pre-hooks on its decoder layers for the duration of one call.

At a pruning layer a hook scores the visual tokens from the layer's input; in front of the next layer it drops those
that were not chosen, and every layer behind goes on with fewer columns. Nothing else of the model knows: the cache of
layer 0 stays full, so positions and lengths are counted as ever; deeper layers hold fewer keys, and where the model
builds a mask for layer 0 (padding, eager attention) the hooks cut it to the keys of the layer.

Letters: B rows, L prompt columns, nv visual tokens of a row, T text rows that vote, n columns of a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kvcache.cache import RetainedCache
from tokenpruning.adaptinfer import Schedule, choose
from vlmeff import ops
from vlmeff.errors import IncompatibleError, NonFiniteScoreError
from vlmeff.vlm.voters import VisualRows, columns_of, query_key, rows_at

INNER_RECORD = "_vlmeff_inner"  # attribute of a cache whose deeper layers hold fewer keys than its first


@dataclass(eq=False)
class InnerRecord:
    """What was dropped where. Kept with the cache, whose deeper layers hold only these columns of the prompt.

    ``width`` L; per layer ``columns`` [B, n] of the prompt that it holds (None: all) and ``processed`` (columns, of
    them visual), as measured in the prefill; ``vision`` [B, nv] the visual columns at the start, ascending; per pruning
    layer ``kept`` [B, k], the visual columns that stayed.
    """

    width: int
    columns: list[Tensor | None]
    processed: list[tuple[int, int]]
    layers: tuple[int, ...]
    vision: Tensor
    kept: list[Tensor] = field(default_factory=list)

    @property
    def mean_visual(self) -> float:
        """Visual tokens processed, averaged over the layers."""
        return sum(visual for _, visual in self.processed) / len(self.processed)

    @property
    def label_visual(self) -> float:
        """The same with each pruning layer counted as pruned, which is how the paper labels its schedules."""
        visual = [count for _, count in self.processed]
        after = {layer: kept.shape[1] for layer, kept in zip(self.layers, self.kept, strict=True)}
        return sum(after.get(number, count) for number, count in enumerate(visual)) / len(visual)

    def check(self, cache: Any, rows: int) -> None:
        """Raise ``IncompatibleError`` when the cache no longer is what the prompt left plus what followed."""
        new = int(cache.get_seq_length()) - self.width
        for layer, columns in enumerate(self.columns):
            length = self.width if columns is None else columns.shape[1]
            batch = rows if columns is None else columns.shape[0]
            if new < 0 or int(cache.get_seq_length(layer)) != length + new or batch != rows:
                raise IncompatibleError(
                    "past_key_values was filled from a prompt whose visual tokens were dropped inside the language "
                    "model, and has been cropped or its rows selected since: pass the cache as generate returned it, "
                    "or the whole conversation with its pictures and no past_key_values."
                )


@dataclass(eq=False)
class _Stage:
    """The sequence as the layers between two pruning layers see it. ``columns`` [B, n] of the prompt, None: all."""

    columns: Tensor | None
    vision: Tensor
    text: Tensor
    valid: Tensor

    def without(self, choice: Tensor) -> tuple[_Stage, Tensor]:
        """The next stage, with only the visual tokens ``choice`` [B, k], and the index [B, n'] that cuts to it."""
        stays = torch.ones_like(self.valid).scatter(1, self.vision, False)
        vision = self.vision.gather(1, choice)
        stays.scatter_(1, vision, True)
        n = stays.shape[1] - self.vision.shape[1] + choice.shape[1]
        index = columns_of(stays, n)[0]
        place = stays.cumsum(1) - 1
        columns = index if self.columns is None else self.columns.gather(1, index)
        return _Stage(columns, place.gather(1, vision), place.gather(1, self.text), self.valid.gather(1, index)), index


class InnerPruning(AbstractContextManager["InnerPruning"]):
    """The hooks, for one ``generate`` or ``forward`` call: ``with InnerPruning(...) as run: output = model(...)``.

    Args:
        text_model: the language model, a module with ``layers``; ``inner_request.check_model`` must have passed.
        schedule: where and how much to drop; None when the call only goes on from a cache with an ``InnerRecord``.
        rows: the prompt's visual tokens and voters; None for such a call.

    ``record``, once the prompt has gone through, says what was dropped. A prompt is recognised by its width and an
    empty cache. Without a cache every step runs the prompt again with the generated text behind it: the choice of the
    first pass is used again, as a cache would have it. Other threads' calls pass through the hooks untouched.
    """

    def __init__(self, text_model: nn.Module, schedule: Schedule | None, rows: VisualRows | None) -> None:
        self.text_model, self.schedule, self.rows = text_model, schedule, rows
        self.record: InnerRecord | None = None
        self._layers: list[Any] = list(text_model.layers)  # type: ignore[arg-type]
        self._handles: list[Any] = []
        self._cuts: dict[int, Tensor] = {}  # by pruning layer: which columns of the stage before it stay
        self._counts: dict[int, int] = {}  # by pruning layer: how many visual tokens stay
        self._owner = 0
        self._mode: str = "untouched"
        self._continued: InnerRecord | None = None
        self._checked = False
        self._stage: _Stage | None = None
        self._text_valid = torch.empty(0)
        self._choice: Tensor | None = None
        self._arguments: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> InnerPruning:
        self._owner = threading.get_ident()
        try:
            self._handles.append(self.text_model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            for number, layer in enumerate(self._layers):
                self._handles.append(layer.register_forward_pre_hook(_LayerHook(self, number), with_kwargs=True))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stage = self._choice = self._continued = None
        self._arguments.clear()

    # A hook that another thread registers may run for an instant without its keyword arguments: hence the defaults.

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """Find out what this pass is."""
        if threading.get_ident() != self._owner or kwargs is None:
            return
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        past = 0 if cache is None else int(cache.get_seq_length())
        batch, width = (0, 0) if embeds is None else embeds.shape[:2]
        self._mode, self._arguments = "untouched", {}
        self._stage = self._choice = None
        if past:
            self._continued = getattr(cache, INNER_RECORD, None)
            if self._continued is not None:
                self._mode = "continue"
                if not self._checked:
                    self._continued.check(cache, batch)
                    self._checked = True
        elif self.rows is not None and width == self.rows.width:
            self._mode, self._cuts = "prefill", {}
            assert embeds is not None
            self._start(self.rows.repeated(batch), embeds.device)
        elif self.rows is not None and cache is None and self.record is not None and width > self.rows.width:
            self._mode = "replay"
            self._stage = None
        if cache is not None and past == 0 and hasattr(cache, INNER_RECORD):
            delattr(cache, INNER_RECORD)  # reset for another prompt

    def _start(self, rows: VisualRows, device: torch.device) -> None:
        assert self.schedule is not None
        on = [x.to(device) for x in (rows.vision, rows.text, rows.valid, rows.text_valid)]
        self._stage, self._text_valid = _Stage(None, *on[:3]), on[3]
        self._counts = dict(zip(self.schedule.layers, self.schedule.counts(rows.vision.shape[1]), strict=True))
        self.record = InnerRecord(rows.width, [], [], self.schedule.layers, rows.vision)

    def before_layer(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._owner or self._mode == "untouched":
            return None
        if self._mode == "continue":
            assert self._continued is not None
            columns = self._continued.columns[number]
            return None if columns is None else (args, self._continuing(columns, self._continued.width, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._mode == "replay":
            hidden, columns = self._replay(number, hidden)
        else:
            hidden = self._drop(number, hidden)
            columns = self._stage.columns if self._stage is not None else None
        if columns is not None:
            kwargs = self._cut_arguments(columns, kwargs)
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        if self._mode == "prefill":
            self._note(number, hidden, columns, kwargs)
        return args, kwargs

    # -- the prompt

    def _drop(self, number: int, hidden: Tensor) -> Tensor:
        """In front of the layer behind a pruning layer: cut to what was chosen."""
        if self._choice is None:
            return hidden
        assert self._stage is not None
        assert self.record is not None
        before = self._stage
        self._stage, index = before.without(self._choice)
        self._cuts[number - 1] = index
        self._choice = None
        return ops.gather_tokens(hidden, index.to(hidden.device))

    def _note(self, number: int, hidden: Tensor, columns: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Record what the layer processes, and choose when tokens are dropped behind it."""
        assert self._stage is not None
        assert self.record is not None
        vision = self._stage.vision
        self.record.columns.append(columns)
        self.record.processed.append((hidden.shape[1], vision.shape[1]))
        cache = kwargs.get("past_key_values")
        if isinstance(cache, RetainedCache):  # counts slots itself, and so cuts its masks later on
            if columns is not None:
                cache.set_query_slots(number, columns, self.record.width)
        elif cache is not None and columns is not None:
            setattr(cache, INNER_RECORD, self.record)
        k = self._counts.get(number)
        if k is None:
            return
        if k < vision.shape[1]:
            self._choice = self._choose(number, hidden, kwargs["position_embeddings"], k)
            vision = vision.gather(1, self._choice)
        self.record.kept.append(vision if columns is None else columns.to(vision.device).gather(1, vision))

    @torch.no_grad()
    def _choose(self, number: int, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], k: int) -> Tensor:
        """[B, k] of the stage's visual tokens."""
        assert self._stage is not None
        stage = self._stage
        if k == 0:
            return stage.vision[:, :0]
        layer = self._layers[number]
        text = stage.text
        q, keys = query_key(layer, hidden, position_embeddings, rows=text)
        score = ops.text_to_vision_scores(
            q,
            keys,
            text=text.to(q.device),
            vision=stage.vision.to(q.device),
            scale=layer.self_attn.scaling,
            key_valid=stage.valid.to(q.device),
            text_valid=self._text_valid.to(q.device),
        )
        if not bool(score.isfinite().all()):
            raise NonFiniteScoreError(
                f"AdaptInfer: the scores of language model layer {number} are not finite: its activations overflowed. "
                "Load the model in bfloat16 or float32."
            )
        return choose(score, k).to(stage.vision.device)

    def _replay(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same prompt again with new text behind it: cut as the first time."""
        assert self.record is not None
        cut, columns = self._cuts.get(number - 1), self.record.columns[number]
        if cut is not None:
            before = self.record.columns[number - 1]
            cut = _with_new(cut, self.record.width if before is None else before.shape[1], hidden.shape[1])
            hidden = ops.gather_tokens(hidden, cut.to(hidden.device))
        if columns is not None:
            new = hidden.shape[1] - columns.shape[1]
            columns = _with_new(columns, self.record.width, self.record.width + new)
        return hidden, columns

    def _cut_arguments(self, columns: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's keyword arguments for ``columns`` [B, n] of the sequence; the layers of a stage share them."""
        key, mask = len(columns[0]), kwargs.get("attention_mask")
        device = kwargs["position_embeddings"][0].device
        cached = self._arguments.get(key)
        if cached is None or cached["of"] is not mask or cached["device"] != device:
            columns = columns.to(device)
            cos, sin = (rows_at(x, columns) for x in kwargs["position_embeddings"])
            changed: dict[str, Any] = {"position_embeddings": (cos, sin)}
            if kwargs.get("position_ids") is not None:
                # Without gaps, or FlashAttention takes a gap for the border between two packed sequences.
                changed["position_ids"] = torch.arange(columns.shape[1], device=device).expand(len(columns), -1)
            if mask is not None:
                changed["attention_mask"] = _mask_columns(mask, columns, queries=columns)
            cached = self._arguments[key] = {"of": mask, "device": device, "changed": changed}
        return {**kwargs, **cached["changed"]}

    # -- what follows the prompt

    def _continuing(self, columns: Tensor, width: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The mask was built for the keys of layer 0: cut it to the keys of this one."""
        mask = kwargs.get("attention_mask")
        if mask is None:
            return kwargs
        key = len(columns[0])
        cached = self._arguments.get(key)
        if cached is None or cached["of"] is not mask:
            every = _with_new(columns, width, mask.shape[-1]).to(mask.device)
            cached = self._arguments[key] = {"of": mask, "mask": _mask_columns(mask, every, queries=None)}
        return {**kwargs, "attention_mask": cached["mask"]}


class _LayerHook:
    def __init__(self, run: InnerPruning, number: int) -> None:
        self._run, self._number = run, number

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        return None if kwargs is None else self._run.before_layer(self._number, args, kwargs)


def _with_new(columns: Tensor, start: int, end: int) -> Tensor:
    """[B, n] columns and behind them start .. end - 1."""
    new = torch.arange(start, end, device=columns.device).expand(len(columns), -1)
    return torch.cat([columns, new], 1)


def _mask_columns(mask: Tensor, keys: Tensor, *, queries: Tensor | None) -> Tensor:
    """The mask of some keys [B, n], and of some queries [B, m]. mask: [1 or B, ..., queries, keys] or [B, keys]."""
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise IncompatibleError(
            f"AdaptInfer cannot cut the attention mask of this attention back end ({type(mask).__name__}): use "
            "model.set_attn_implementation('sdpa')."
        )
    if mask.ndim == 2:
        return mask.gather(1, keys)
    mask = mask.expand(len(keys), -1, -1, -1)
    if queries is not None:
        mask = mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, keys[:, None, None].expand(-1, *mask.shape[1:3], -1))
