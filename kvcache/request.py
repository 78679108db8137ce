"""Prepare a call of a wrapped model for KV retention, and refuse what that cannot work with before any work.

``retained_call`` for each call; its answer goes around the model's own method::

    call = retained_call(model, text_model, policy, kwargs, generating=True, vision=placeholders)
    with call or nullcontext():
        output = model.generate(**kwargs)       # kwargs has got the cache
    call.cache.report()
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvcache.cache import RetainedCache
from kvcache.controller import RetainedCall
from kvcache.policy import RetentionPolicy
from vlmeff.errors import RetentionStateError, UnsupportedCacheError, UnsupportedMaskError

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "seq_idx")
# "hybrid" stands in old generation configs and is ignored by transformers.
DYNAMIC = (None, "dynamic", "hybrid")


def retained_call(
    model: Any,
    text_model: nn.Module,
    policy: RetentionPolicy | None,
    kwargs: dict[str, Any],
    *,
    generating: bool,
    vision: Tensor | None = None,
    headroom: int = 0,
    storage: str | None = None,
) -> RetainedCall | None:
    """The hooks for one call, not yet installed; None when it has nothing to retain. Adds the cache to ``kwargs``.

    Args:
        policy: None when retention is no longer asked for; a cache that has it is still gone on from.
        kwargs: of ``generate`` or ``forward``, as the model's own method will get them; ``past_key_values`` is set to a
            new ``RetainedCache`` where the call brings none. A ``forward`` with ``use_cache`` off, or unset in the
            configuration, is left alone.
        vision: [B, prompt] bool, visual tokens among the prompt's columns; None: unknown.
        headroom, storage: of a new cache.
    Raises:
        UnsupportedCacheError, UnsupportedMaskError, RetentionStateError, UnsupportedModelError: naming the argument.
    """
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, RetainedCache):
        if policy is None:
            return None
        if cache is not None:
            _leave_alone(cache)
            return None
        if not generating and not _uses_cache(model, kwargs):
            return None
        _check_generation(model, kwargs, generating=generating)
    _check_not_compiled(model, text_model)
    _check_inputs(kwargs, cache if isinstance(cache, RetainedCache) else None, generating=generating)
    if torch.is_grad_enabled() and text_model.training:
        raise RetentionStateError(
            "KV retention cannot be trained through: call model.eval() and torch.no_grad(), or use kv=False."
        )
    if not isinstance(cache, RetainedCache):
        assert policy is not None
        cache = RetainedCache(model.config, policy, headroom=headroom, storage=storage)
        kwargs["past_key_values"] = cache
    prompt_end = _prompt_end(kwargs, cache.get_seq_length()) if generating else None
    if generating:
        for position in range(len(cache.retained)):  # left on by assisted decoding, which switches it on itself
            cache.layer(position).record_past = False
    if not cache.get_seq_length():
        cache.prompt_length = prompt_end or cache.prompt_length
    if vision is not None:
        _note_vision(cache, vision)
    return RetainedCall(text_model, cache, prompt_end=prompt_end, model=model if generating else None)


def _note_vision(cache: RetainedCache, vision: Tensor) -> None:
    """The prompt may come in passes of one call each; ``vision`` is of the call's tokens or of the whole sequence."""
    seen, length = cache.get_seq_length(), cache.prompt_length
    if length is not None and seen >= length:
        return  # behind the prompt
    if not seen or vision.shape[1] >= (length or 0):
        cache.vision = vision
    elif cache.vision is not None and cache.vision.shape[1] == seen:
        cache.vision = torch.cat([cache.vision, vision.to(cache.vision.device)], 1)


def _leave_alone(cache: Any) -> None:
    if type(cache) is not DynamicCache:
        raise UnsupportedCacheError(
            f"past_key_values: KV retention cannot work in a {type(cache).__name__}. Pass none, or a RetainedCache, or "
            "wrap with kv=False."
        )
    warnings.warn(
        "past_key_values: entries of a DynamicCache that is brought along are not retained; pass none, or a "
        "RetainedCache, to have KV retention.",
        stacklevel=4,
    )


def _uses_cache(model: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    if asked is None:
        asked = getattr(model.config.get_text_config(decoder=True), "use_cache", True)
    return bool(asked)


def _check_generation(model: Any, kwargs: dict[str, Any], *, generating: bool) -> None:
    if not generating:
        return
    given = kwargs.get("generation_config")

    def setting(name: str) -> Any:
        places = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
        return next((value for value in places if value is not None), None)

    if setting("use_cache") is False:
        raise UnsupportedCacheError(
            "use_cache=False: KV retention needs the cache. Pass use_cache=True, or wrap with kv=False."
        )
    if setting("is_assistant"):
        raise UnsupportedCacheError(
            "assistant_model: an assistant drafts tokens that are taken back, into its prompt too, which KV retention "
            "cannot. Pass an assistant that is not wrapped, or wrap it with kv=False."
        )
    kind = setting("cache_implementation")
    if kind not in DYNAMIC:
        hint = (
            " (or past_key_values=vlmeff.RetainedCache(model.config, policy, offloading=True))"
            if kind == "offloaded"
            else ""
        )
        raise UnsupportedCacheError(
            f"cache_implementation={kind!r}: KV retention brings its own cache. Leave it out{hint}, or use kv=False."
        )


def _check_not_compiled(model: Any, text_model: Any) -> None:
    compiled = (getattr(module, "_compiled_call_impl", None) for module in (model, text_model, *text_model.layers))
    if torch.compiler.is_compiling() or any(call is not None for call in compiled):
        raise UnsupportedCacheError(
            "torch.compile: KV retention gives layers caches of different lengths and cannot be compiled. Use the "
            "model as it was before compile(), or wrap with kv=False."
        )


def _check_inputs(kwargs: dict[str, Any], cache: RetainedCache | None, *, generating: bool) -> None:
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    begun = cache is not None and cache.get_seq_length() > 0
    if begun and mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UnsupportedMaskError(
            "attention_mask: a cache that KV retention has evicted from takes the 2-D mask of the whole sequence; "
            "other masks name columns that are gone."
        )
    if begun and generating and mask is not None and bool((mask[:, -1] == 0).any()):
        raise UnsupportedMaskError(
            "attention_mask: a row of the new turn ends with padding, so generate would go on from padding: put it in "
            "front of the row's new tokens."
        )
    packed = next((name for name in PACKED if kwargs.get(name) is not None), None)
    if packed is None and mask is None and isinstance(positions, Tensor) and positions.ndim == 2:
        packed = "position_ids" if bool((positions[:, 1:] < positions[:, :-1]).any()) else None
    if packed is not None:
        raise UnsupportedMaskError(
            f"{packed}: KV retention cannot keep a share of several sequences packed into one row; put each in a row "
            "of its own, padded on the left."
        )


def _prompt_end(kwargs: dict[str, Any], past: int) -> int:
    """The slot behind what ``generate`` is given: the whole sequence, or what is new since the cache."""
    embeds, ids, mask = (kwargs.get(name) for name in ("inputs_embeds", "input_ids", "attention_mask"))
    if embeds is not None:
        return embeds.shape[1]  # always the whole sequence
    width = 0 if ids is None else ids.shape[1]
    whole = mask.shape[-1] == width if isinstance(mask, Tensor) else width > past
    return width if whole else past + width
