"""From a request with pictures to a shorter request: encode, score, select, shorten.

``shorten_request`` is the whole of route "shorten the request, not the model": the picture is encoded by the model's
own encoder, a method chooses among its tokens or resamples them, and the prompt loses the placeholders of the others.
What remains is an ordinary request with ``mm_encoder_outputs`` for the unchanged model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenpruning import ItemPlan, Layout, Resampler, Selector
from tokenpruning.layout import Newline
from tokenpruning.plan import PrunePlan
from vlmeff.errors import IncompatibleError, UnsupportedInputError
from vlmeff.vlm.choose import Reduced, everything, keeps_everything, resample, select
from vlmeff.vlm.families.base import MODALITIES, Family, Modality, Positions, present
from vlmeff.vlm.prompt import FILL, contiguous_positions, keep_mask, plan_shortening
from vlmeff.vlm.record import PromptRecord, ShortRequest, continue_shortened, record_of
from vlmeff.vlm.relevance import EmbeddingText, TextSource
from vlmeff.vlm.settings import generation_setting, mask_of_padding

logger = logging.getLogger("vlmeff")


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How a request is shortened. ``method`` None: not at all.

    ``newline``: which separators of tiled pictures stay ("drop", "keep", "rows": of rows with a survivor).
    ``text_source``: what scores tokens against the question, for methods that need it.
    ``positions``: how the surviving tokens of models with one-dimensional positions are numbered: "repack" from 0
    without gaps, "keep" as in the whole prompt; None takes the family's own.
    ``min_visual_tokens``: below this many visual tokens, averaged over the rows with pictures, nothing is reduced.
    """

    method: Selector | Resampler | None = None
    newline: Newline = "drop"
    positions: Positions | None = None
    text_source: TextSource = field(default_factory=EmbeddingText)
    min_visual_tokens: int = 0


@dataclass(eq=False)
class Untouched:
    """The request goes to the model as it came; ``plan`` says what its pictures are. ``skipped``: it has fewer visual
    tokens than the preset's threshold."""

    plan: PrunePlan | None = None
    skipped: bool = False


def shorten_request(
    model: Any,
    family: Family | None,
    reduction: Reduction,
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
    method, input_ids = reduction.method, kwargs.get("input_ids")
    modalities = present(kwargs)
    record = record_of(kwargs.get("past_key_values"))
    if record is not None:
        if modalities:
            raise IncompatibleError(
                "past_key_values holds a prompt with reduced pictures and this turn brings another picture: pass the "
                "whole conversation with all its pictures and no past_key_values."
            )
        return continue_shortened(model, record, kwargs, generating=generating)
    if method is None or family is None:
        return Untouched()
    if isinstance(method, Selector) and isinstance(method.keep, float) and method.keep == 1.0:
        return Untouched()
    family.refuse_unsupported(model, kwargs)
    if not modalities:
        return Untouched()
    if input_ids is None or kwargs.get("inputs_embeds") is not None:
        warnings.warn(
            "vlmeff: inputs_embeds given, so the pictures are not reduced; pass input_ids and pixel_values.",
            stacklevel=4,
        )
        return Untouched()

    layouts = {modality: family.layouts(model, kwargs, modality) for modality in modalities}
    untouched = PrunePlan([plan for m in modalities for plan in everything(layouts[m], m)])
    if all(keeps_everything(method, layouts[m]) for m in modalities):
        if isinstance(method, Selector) and isinstance(method.keep, int):
            logger.info("vlmeff: the budget of %d tokens is not below what a picture has: all are kept", method.keep)
        return Untouched(untouched)
    rows = rows_with_pictures(model, family, input_ids, modalities)
    if untouched.n_before < reduction.min_visual_tokens * rows:
        logger.info(
            "vlmeff: %d visual tokens in %d rows are below the preset's min_visual_tokens=%d: not reduced",
            untouched.n_before,
            rows,
            reduction.min_visual_tokens,
        )
        return Untouched(untouched, skipped=True)
    reduced = {
        modality: _reduce(model, family, reduction, kwargs, modality, layouts[modality], lock)
        for modality in modalities
    }
    clock.mark("encoded")
    return _shorten(model, family, kwargs, reduced, positions=reduction.positions, generating=generating)


def _reduce(
    model: Any,
    family: Family,
    reduction: Reduction,
    kwargs: dict[str, Any],
    modality: Modality,
    layouts: Sequence[Layout],
    lock: Any,
) -> Reduced:
    if isinstance(reduction.method, Resampler):
        with lock:  # hooks on shared modules, as in ``select``
            return resample(model, family, reduction.method, kwargs, modality)
    assert isinstance(reduction.method, Selector)
    token_id = family.placeholder_id(model, modality)
    rows = rows_of_items(kwargs["input_ids"], token_id, [layout.n_slots for layout in layouts])
    return select(
        model,
        family,
        reduction.method,
        kwargs,
        modality,
        newline=reduction.newline,
        text_source=reduction.text_source,
        text_after=lambda number: text_after(kwargs, family, model, token_id, rows[number]),
        lock=lock,
    )


def rows_with_pictures(model: Any, family: Family, input_ids: Tensor, modalities: Sequence[Modality]) -> int:
    """Rows of [B, L] ids that have placeholders."""
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for modality in modalities:
        found |= input_ids == family.placeholder_id(model, modality)
    return int(found.any(1).sum())


def rows_of_items(input_ids: Tensor, token_id: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Per picture (its row, the column of its last placeholder); pictures fill placeholders in batch order."""
    places = (input_ids == token_id).nonzero().tolist()
    out, end = [], 0
    for size in sizes:
        end += size
        row, column = places[min(end, len(places)) - 1] if places else (0, 0)
        out.append((row, column))
    return out


def text_after(kwargs: dict[str, Any], family: Family, model: Any, token_id: int, last: tuple[int, int]) -> Tensor:
    """[T] ids of the text behind a picture, or of the whole row's text where nothing follows."""
    row, column = last
    ids, mask = kwargs["input_ids"][row], kwargs.get("attention_mask")
    text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row].to(ids.device).bool()
    for modality in MODALITIES:
        if modality in family.encoder_inputs:
            text = text & (ids != family.placeholder_id(model, modality))
    behind = text.clone()
    behind[: column + 1] = False
    return ids[behind] if bool(behind.any()) else ids[text]


def _shorten(
    model: Any,
    family: Family,
    kwargs: dict[str, Any],
    reduced: Mapping[Modality, Reduced],
    *,
    positions: Positions | None,
    generating: bool,
) -> ShortRequest:
    positions = positions or family.positions
    input_ids = kwargs["input_ids"]
    keep = torch.ones_like(input_ids, dtype=torch.bool)
    for modality, part in reduced.items():
        kept = [(plan.kept, plan.n_before) for plan in part.plans]
        keep &= keep_mask(input_ids, family.placeholder_id(model, modality), kept)
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UnsupportedInputError("attention_mask must be [B, L] where pictures are reduced.")
    if mask is None and generating:
        mask = mask_of_padding(model, kwargs)
    valid = torch.ones_like(keep) if mask is None else mask.to(keep.device).bool()
    if mask is not None and bool((~valid[:, -1]).any()):
        warnings.warn("vlmeff: right padding is converted to left padding in the shortened prompt.", stacklevel=5)
    shortening = plan_shortening(keep, valid)

    consumed = {name for names in family.encoder_inputs.values() for name in names} | set(family.grid_inputs)
    short = {k: v for k, v in kwargs.items() if k not in consumed}
    short["input_ids"] = shortening.apply(input_ids, _pad_id(model, input_ids))
    for name in ("mm_token_type_ids", "token_type_ids", "labels"):
        if kwargs.get(name) is not None:
            short[name] = shortening.apply(kwargs[name], FILL[name])
    short_mask = shortening.mask
    if mask is not None or shortening.padded:
        short["attention_mask"] = short_mask
    short["mm_encoder_outputs"] = {modality: part.output for modality, part in reduced.items()}

    rope_deltas: Tensor | None = None
    numbers: Tensor | None = None
    last: Tensor | None = None
    jump: Tensor | None = None
    resampled = {modality: part.new_layouts for modality, part in reduced.items() if part.new_layouts is not None}
    given = kwargs.get("position_ids")
    if family.positions == "repack":
        if given is not None and positions == "repack":
            raise IncompatibleError(
                f"position_ids cannot be given to {family.model_type} while its pictures are reduced: the shortened "
                "prompt is numbered anew. Leave position_ids out, or use positions='keep'."
            )
        if positions == "keep":
            _check_kept_positions(model, kwargs, generating=generating)
            if any(layout.slots is not None for layouts in resampled.values() for layout in layouts):
                raise IncompatibleError(
                    f"positions='keep' does not go with resampled tiles of {family.model_type}, which have no place in "
                    "the whole prompt: use positions='repack'."
                )
            full = contiguous_positions(valid.long()) if given is None else given.expand(len(input_ids), -1)
            numbers = shortening.apply(full, FILL["position_ids"])
            last = _at_end(full[None], valid)
            jump = _jump(last, numbers[..., -1])
            short["attention_mask"] = short_mask  # without it a jump would be taken for two packed sequences
        elif shortening.padded:
            numbers = contiguous_positions(short_mask)
        if numbers is not None and (positions == "keep" or not generating):
            ready = generating or given is not None  # generate adds the first position itself
            short["position_ids"] = numbers if ready else numbers + family.first_position
    else:
        if resampled:
            if given is not None:
                raise IncompatibleError(
                    f"position_ids cannot be given to {family.model_type} while its pictures are resampled: they "
                    "follow the new grids. Leave position_ids out."
                )
            of_new_grids = {**kwargs, **short, **family.regrid(model, kwargs, resampled), "attention_mask": short_mask}
            position_ids = _multi_positions(model, family, of_new_grids)
            highest = position_ids[1:].amax((0, 2))
        else:
            full = _multi_positions(model, family, {**kwargs, "attention_mask": mask})
            position_ids = shortening.apply(full, FILL["position_ids"])
            highest = full[1:].masked_fill(~valid, 0).amax((0, 2))  # of the tokens that are dropped too
            jump = _jump(_at_end(full, valid), position_ids[..., -1])
        # The text row must count without gaps, or transformers takes the gaps for borders of packed sequences.
        position_ids[0] = contiguous_positions(short_mask)
        short["position_ids"] = position_ids
        rope_deltas = highest[:, None] + 1 - short_mask.sum(1, keepdim=True)
        model.base_model.rope_deltas = rope_deltas
    plans: list[ItemPlan] = [plan for part in reduced.values() for plan in part.plans]
    return ShortRequest(
        kwargs=short,
        prompt_ids=input_ids,
        record=PromptRecord(
            input_ids,
            short["input_ids"],
            short_mask,
            rope_deltas,
            numbers,
            numbered=positions == "keep",
            first_position=family.first_position,
            last=None if last is None else last[0][:, None],
        ),
        dropped=input_ids.shape[1] - shortening.width,
        tokens_before=int(valid.sum()),
        tokens_after=int(short_mask.sum()),
        plan=PrunePlan(plans),
        keep=keep,
        jump=jump,
    )


def _at_end(positions: Tensor, valid: Tensor) -> Tensor:
    """[D, B] position of the last token of each row that is no padding; positions [D, B, L]."""
    place = torch.arange(valid.shape[1], device=valid.device)
    column = (place * valid).amax(1)
    return positions.gather(2, column[None, :, None].expand(len(positions), -1, -1))[..., 0]


def _jump(last: Tensor, survivor: Tensor) -> Tensor | None:
    """[D, B] from the last survivor's position to that of the prompt's last token; None when they are the same.

    The text row of [4, B] counts columns, so nothing is added to it: packed sequences are told by its gaps.
    """
    jump = last - survivor.to(last.device)
    if len(jump) == 4:
        jump[0] = 0
    return jump if bool(jump.any()) else None


def _check_kept_positions(model: Any, kwargs: dict[str, Any], *, generating: bool) -> None:
    """Gaps look like packed sequences to FlashAttention, and to any model that has neither a cache nor a mask."""
    implementation = str(getattr(model.config.get_text_config(), "_attn_implementation", None) or "")
    if "flash" in implementation:
        raise IncompatibleError(
            f"positions='keep' leaves gaps, which attention {implementation!r} takes for borders of packed sequences: "
            "use model.set_attn_implementation('sdpa') or positions='repack'."
        )
    if generating and generation_setting(model, kwargs, "use_cache") is False:
        raise IncompatibleError("positions='keep' needs generate's cache: use use_cache=True or positions='repack'.")


def _multi_positions(model: Any, family: Family, kwargs: dict[str, Any]) -> Tensor:
    """[4, B, L] positions of a prompt: a text row and three of the pictures' grids."""
    given = kwargs.get("position_ids")
    if given is None:
        given = model._prepare_position_ids_for_generation(kwargs["input_ids"], kwargs)
    if given.ndim != 3 or given.shape[0] not in (3, 4):
        raise UnsupportedInputError(
            f"{family.model_type}: position_ids must be [3, B, L] or [4, B, L], got {tuple(given.shape)}."
        )
    given = given.expand(-1, len(kwargs["input_ids"]), -1)
    return torch.cat([given[:1], given]) if given.shape[0] == 3 else given.clone()


def _pad_id(model: Any, input_ids: Tensor) -> int:
    """An id to pad with: masked, so any legal id that is no placeholder will do."""
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        pad = getattr(config, "pad_token_id", None)
        if isinstance(pad, int) and pad >= 0:
            return pad
    return 0
