"""From a request with pictures to a shorter request: encode, score, select, shorten.

``shorten_request`` is the whole of route "shorten the request, not the model": the picture is encoded by the model's
own encoder, a selector chooses among its tokens, and the prompt loses the placeholders of the others. What remains is
an ordinary request with ``mm_encoder_outputs`` for the unchanged model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenpruning import Segment, Selection, Selector, split_budget
from tokenpruning.plan import PrunePlan, all_of, join_segments
from vlmeff import ops
from vlmeff.errors import IncompatibleError, NonFiniteScoreError, UnsupportedInputError
from vlmeff.vlm.families import Family
from vlmeff.vlm.probe import probe
from vlmeff.vlm.prompt import FILL, contiguous_positions, keep_mask, plan_shortening

logger = logging.getLogger("vlmeff")
RECORD = "_vlmeff_record"  # attribute of a cache that was filled from a shortened prompt


@dataclass(eq=False)
class PromptRecord:
    """Kept with the cache of a shortened prompt, so that a continuation is shortened alike.

    ``prompt_ids`` [B, L] as the caller gave them; ``short_ids``, ``short_mask`` [B, S] what the cache was filled with.
    """

    prompt_ids: Tensor
    short_ids: Tensor
    short_mask: Tensor
    rope_deltas: Tensor | None

    def repeated(self, cache: Any) -> PromptRecord:
        """For a cache with several rows for each row of the prompt (returned sequences, beams)."""
        keys = getattr(cache.layers[0], "keys", None) if cache is not None and getattr(cache, "layers", None) else None
        n = 1 if keys is None else keys.shape[0] // len(self.prompt_ids)
        if n == 1:
            return self
        ids, short, mask, deltas = self.prompt_ids, self.short_ids, self.short_mask, self.rope_deltas
        ids, short, mask = (x.repeat_interleave(n, 0) for x in (ids, short, mask))
        return PromptRecord(ids, short, mask, None if deltas is None else deltas.repeat_interleave(n, 0))


@dataclass(eq=False)
class ShortRequest:
    """``kwargs`` call the original method; ``keep`` [B, L] is the mask over the caller's prompt (None when continuing
    a shortened cache); ``dropped`` columns lost."""

    kwargs: dict[str, Any]
    prompt_ids: Tensor
    record: PromptRecord
    dropped: int
    tokens_before: int
    tokens_after: int
    plan: PrunePlan | None = None
    keep: Tensor | None = None


@dataclass(eq=False)
class Untouched:
    """The request goes to the model as it came; ``plan`` says what its pictures are."""

    plan: PrunePlan | None = field(default=None)


def shorten_request(
    model: Any,
    family: Family | None,
    selector: Selector | None,
    kwargs: dict[str, Any],
    *,
    generating: bool,
    lock: Any,
    clock: Any,
) -> ShortRequest | Untouched:
    """Shorten the request ``kwargs`` of ``generate`` or ``forward``. ``kwargs`` itself is not changed.

    Raises:
        UnsupportedInputError, IncompatibleError, NonFiniteScoreError: before the language model has run.
    """
    input_ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    has_pictures = kwargs.get("pixel_values") is not None
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    record: PromptRecord | None = getattr(cache, RECORD, None)
    if record is not None and cache is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, RECORD)  # reset for another prompt
        record = None
    if record is not None:
        if has_pictures or encoded is not None:
            raise IncompatibleError(
                "past_key_values holds a prompt with reduced pictures and this turn brings another picture: pass the "
                "whole conversation with all its pictures and no past_key_values."
            )
        return _continue(model, record, kwargs, generating=generating)
    if selector is None or family is None or (isinstance(selector.keep, float) and selector.keep == 1.0):
        return Untouched()
    family.refuse_unsupported(kwargs)
    if not has_pictures and encoded is None:
        return Untouched()
    if input_ids is None or kwargs.get("inputs_embeds") is not None:
        warnings.warn(
            "vlmeff: inputs_embeds given, so the pictures are not reduced; pass input_ids and pixel_values.",
            stacklevel=4,
        )
        return Untouched()
    if encoded is not None and selector.scores:
        raise IncompatibleError(
            f"{type(selector).__name__} needs the vision tower's attention, which mm_encoder_outputs does not carry: "
            "pass pixel_values, or use tokens='downsample'."
        )

    grids = family.grids(model, kwargs)
    budgets = [split_budget(selector.keep, [h * w for h, w in picture]) for picture in grids]
    if all(
        k == h * w for picture, ks in zip(grids, budgets, strict=True) for (h, w), k in zip(picture, ks, strict=True)
    ):
        if isinstance(selector.keep, int):
            logger.info("vlmeff: the budget of %d tokens is not below what a picture has: all are kept", selector.keep)
        everything = [torch.arange(sum(h * w for h, w in picture)) for picture in grids]
        return Untouched(PrunePlan(grids, everything, [torch.zeros_like(i, dtype=torch.int8) for i in everything]))

    scores: dict[str, list[list[Tensor]]] = {}
    if encoded is None:
        layers = family.score_layers(model, selector.scores, getattr(selector, "object_layer", None))
        # The hooks sit on modules that all threads share: one picture is encoded at a time.
        with lock, probe(layers, family.query_key) as recorded:
            encoded = family.encode(model, kwargs)
        scores = {name: family.token_scores(model, kwargs, torch.cat(parts)) for name, parts in recorded.items()}
        _check_finite(scores)
    plan = _select(selector, grids, budgets, scores, device=encoded.pooler_output[0].device)
    clock.mark("encoded")

    token_id = family.image_token_id(model)
    keep = keep_mask(input_ids, token_id, zip(plan.keep, plan.sizes, strict=True))
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UnsupportedInputError("attention_mask must be [B, L] where pictures are reduced.")
    if mask is None and generating:
        mask = _mask_of_padding(model, input_ids)
    valid = torch.ones_like(keep) if mask is None else mask.to(keep.device).bool()
    if mask is not None and bool((~valid[:, -1]).any()):
        warnings.warn("vlmeff: right padding is converted to left padding in the shortened prompt.", stacklevel=4)
    shortening = plan_shortening(keep, valid)

    short = {k: v for k, v in kwargs.items() if k not in family.encoder_inputs}
    positions = _positions(model, family, kwargs, mask)
    pad = _pad_id(model, input_ids)
    short["input_ids"] = shortening.apply(input_ids, pad)
    for name in ("mm_token_type_ids", "token_type_ids", "labels"):
        if kwargs.get(name) is not None:
            short[name] = shortening.apply(kwargs[name], FILL[name])
    short_mask = shortening.mask
    if mask is not None or shortening.padded:
        short["attention_mask"] = short_mask
    features = [ops.gather_tokens(f, index) for f, index in zip(encoded.pooler_output, plan.keep, strict=True)]
    short["mm_encoder_outputs"] = {"image": type(encoded)(pooler_output=features)}

    rope_deltas = None
    if positions is not None:
        position_ids = shortening.apply(positions, FILL["position_ids"])
        # The text row must count without gaps, or transformers takes the gaps for borders of packed sequences.
        position_ids[0] = contiguous_positions(short_mask)
        short["position_ids"] = position_ids
        rope_deltas = position_ids[1:].amax((0, 2))[:, None] + 1 - short_mask.sum(1, keepdim=True)
        model.base_model.rope_deltas = rope_deltas
    elif not generating and shortening.padded:
        short["position_ids"] = contiguous_positions(short_mask)
    return ShortRequest(
        kwargs=short,
        prompt_ids=input_ids,
        record=PromptRecord(input_ids, short["input_ids"], short_mask, rope_deltas),
        dropped=input_ids.shape[1] - shortening.width,
        tokens_before=int(valid.sum()),
        tokens_after=int(short_mask.sum()),
        plan=plan,
        keep=keep,
    )


def attach_record(cache: Any, record: PromptRecord) -> None:
    """Remember with a cache what it was filled with. A static cache is reused across prompts and gets no record."""
    if cache is not None and hasattr(cache, "layers"):
        setattr(cache, RECORD, record)


def _continue(model: Any, record: PromptRecord, kwargs: dict[str, Any], *, generating: bool) -> ShortRequest:
    """A call that goes on from the cache of a shortened prompt."""
    input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    rows, length = record.prompt_ids.shape
    if input_ids is None or len(input_ids) != rows:
        raise IncompatibleError(
            f"past_key_values was filled by {rows} rows with reduced pictures: continue with as many rows of input_ids."
        )
    short = dict(kwargs)
    ids, short_mask = record.short_ids, record.short_mask
    if generating:
        history = input_ids[:, :length]
        if history.shape != record.prompt_ids.shape or bool((history != record.prompt_ids).any()):
            raise IncompatibleError(
                "past_key_values was filled from a prompt with reduced pictures, and input_ids does not begin with "
                "that prompt: pass the whole conversation's input_ids, or no past_key_values."
            )
        new = input_ids[:, length:]
        ids = torch.cat([ids, new], 1)
        new_mask = torch.ones_like(new) if mask is None else mask[:, length:]
        short_mask = torch.cat([short_mask, new_mask.to(short_mask)], 1)
        short["input_ids"] = ids
        short["attention_mask"] = short_mask
        for name in ("mm_token_type_ids", "token_type_ids"):
            if kwargs.get(name) is not None:
                kept = torch.zeros_like(record.short_ids)
                short[name] = torch.cat([kept.to(kwargs[name]), kwargs[name][:, length:]], 1)
    elif mask is not None and mask.shape[1] != int(kwargs["past_key_values"].get_seq_length()) + input_ids.shape[1]:
        # A hand-written loop grows the mask of the whole prompt; the cache holds the short one.
        short["attention_mask"] = torch.cat([short_mask, mask[:, length:].to(short_mask)], 1)
    if record.rope_deltas is not None:
        model.base_model.rope_deltas = record.rope_deltas  # another conversation may have run in between
        for name in ("image_grid_thw", "mm_token_type_ids"):
            short.pop(name, None)
    return ShortRequest(
        kwargs=short,
        prompt_ids=input_ids,
        record=PromptRecord(input_ids, ids, short_mask, record.rope_deltas) if generating else record,
        dropped=length - record.short_ids.shape[1],
        tokens_before=input_ids.numel() if mask is None else int(mask.sum()),
        tokens_after=int(short_mask.sum()) if generating else input_ids.numel(),
    )


def _select(
    selector: Selector,
    grids: list[list[tuple[int, int]]],
    budgets: list[list[int]],
    scores: dict[str, list[list[Tensor]]],
    device: torch.device,
) -> PrunePlan:
    """Let the selector choose in every segment of every picture; a picture's choice never sees another picture."""

    def segments(number: int) -> Iterator[Segment]:
        for part, grid in enumerate(grids[number]):
            yield Segment(grid=grid, scores={n: s[number][part].to(device) for n, s in scores.items()}, device=device)

    chosen: list[Selection] = []
    for number, ks in enumerate(budgets):
        parts = list(segments(number))
        picks = [all_of(s) if k == s.size else selector.select(s, k) for s, k in zip(parts, ks, strict=True)]
        chosen.append(join_segments(parts, picks))
    return PrunePlan(grids, [s.index for s in chosen], [s.kind for s in chosen])


def _positions(model: Any, family: Family, kwargs: dict[str, Any], mask: Tensor | None) -> Tensor | None:
    """[4, B, L] positions of the unshortened prompt where the family keeps them, else None."""
    given = kwargs.get("position_ids")
    if family.positions == "repack":
        if given is not None:
            raise IncompatibleError(
                f"position_ids cannot be given to {family.model_type} while its pictures are reduced: the shortened "
                "prompt is numbered anew. Leave position_ids out."
            )
        return None
    if given is None:
        given = model._prepare_position_ids_for_generation(kwargs["input_ids"], {**kwargs, "attention_mask": mask})
    if given.ndim != 3 or given.shape[0] not in (3, 4):
        raise UnsupportedInputError(
            f"{family.model_type}: position_ids must be [3, B, L] or [4, B, L], got {tuple(given.shape)}."
        )
    rows = kwargs["input_ids"].shape[0]
    given = given.expand(-1, rows, -1)
    return torch.cat([given[:1], given]) if given.shape[0] == 3 else given.clone()


def _check_finite(scores: dict[str, list[list[Tensor]]]) -> None:
    for name, pictures in scores.items():
        flat = [torch.cat(segments) for segments in pictures]
        if not bool(torch.cat(flat).isfinite().all()):
            number = next(i for i, s in enumerate(flat) if not bool(s.isfinite().all()))
            raise NonFiniteScoreError(
                f"the attention scores of the vision tower's {name} layer are not finite for picture {number}: its "
                "activations overflowed. Load the model in bfloat16 or float32."
            )


def _mask_of_padding(model: Any, input_ids: Tensor) -> Tensor | None:
    """The mask that ``generate`` infers from padding ids when none is given."""
    config = getattr(model, "generation_config", None)
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if pad is None or pad == eos or (isinstance(eos, list) and pad in eos) or not bool((input_ids == pad).any()):
        return None
    return (input_ids != pad).long()


def _pad_id(model: Any, input_ids: Tensor) -> int:
    """An id to pad with: masked, so any legal id that is no placeholder will do."""
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        pad = getattr(config, "pad_token_id", None)
        if isinstance(pad, int) and pad >= 0:
            return pad
    return 0
