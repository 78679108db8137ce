"""Prepare a request for pruning inside the language model, and refuse what that cannot work with before any work.

``check_model`` once, when the method is chosen for a model; ``prepare`` for each call::

    run = prepare(model, text_model, schedule, kwargs, visual=visual, generating=True)
    with run or nullcontext():
        output = model.generate(**kwargs)
    run.record                                    # what was dropped where, for the report
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvcache.cache import RetainedCache
from tokenpruning.adaptinfer import Schedule
from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.inner import INNER_RECORD, InnerPruning
from vlmeff.vlm.settings import generation_setting, mask_of_padding
from vlmeff.vlm.voters import visual_rows

# Their layers compute q and k as ``voters.query_key`` does, full causal attention.
ATTENTION_CLASSES = (
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "Qwen2VLAttention",
    "Qwen2_5_VLAttention",
    "Qwen3VLTextAttention",
    "Qwen3VLMoeTextAttention",
)
NO_MASK_TENSOR = ("flex_attention", "paged")
PICTURES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


def check_model(model: Any, text_model: nn.Module, schedule: Schedule) -> None:
    """Check once, when the method is chosen for a model.

    Raises:
        UnsupportedModelError: the language model's layers are not of a known kind.
        ConfigError: a pruning layer does not exist, or still gets visual features added behind it (Qwen3-VL).
    """
    check_layers(text_model)
    layers: Any = text_model.layers
    schedule.check_depth(len(layers))
    first = first_legal_layer(model)
    if schedule.layers[0] < first:
        raise ConfigError(
            f"AdaptInfer: layers={schedule.layers!r}: {type(model).__name__} adds visual features behind its first "
            f"{first + 1} language layers, so tokens can be dropped after layer {first} at the earliest."
        )


def first_legal_layer(model: Any) -> int:
    """The first layer that tokens may be dropped after: Qwen3-VL adds visual features behind its first layers."""
    fed = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return max(0, len(fed) - 1)


def check_layers(text_model: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` unless the decoder layers are of a known kind."""
    layers: Any = getattr(text_model, "layers", None)
    if layers is None or not len(layers):
        raise UnsupportedModelError(f"AdaptInfer: {type(text_model).__name__} has no decoder layers in 'layers'.")
    for number, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        if not any(cls.__name__ in ATTENTION_CLASSES for cls in type(attention).__mro__):
            raise UnsupportedModelError(
                f"AdaptInfer: layer {number} of the language model has {type(attention).__name__}; supported are "
                f"{', '.join(ATTENTION_CLASSES)}. Use a method that works before the language model, like HiPrune."
            )
        if _window(attention) is not None:
            raise UnsupportedModelError(
                f"AdaptInfer: layer {number} of the language model uses sliding-window attention, and dropping tokens "
                "would move the window. Use a method that works before the language model, like HiPrune."
            )


def _window(attention: Any) -> Any:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None) if "Mistral" in type(attention).__name__ else None


def prepare(
    model: Any,
    text_model: nn.Module,
    schedule: Schedule | None,
    kwargs: Mapping[str, Any],
    *,
    visual: Tensor | None,
    generating: bool,
) -> InnerPruning | None:
    """The hooks for one call, not yet installed; None when it has nothing to prune.

    Args:
        schedule: None when the method is no longer asked for; a pruned cache is still gone on from.
        kwargs: of ``generate`` or ``forward``, as the model's own method will get them.
        visual: [B, L] bool, the placeholders in ``kwargs["input_ids"]``; None when there are no input_ids.
    Raises:
        IncompatibleError, UnsupportedInputError, ConfigError: naming the argument and the remedy.
    """
    cache = kwargs.get("past_key_values")
    pictures = any(kwargs.get(name) is not None for name in PICTURES)
    if hasattr(cache, INNER_RECORD) and int(cache.get_seq_length()):  # type: ignore[union-attr]
        check_request(model, text_model, kwargs, generating=generating, pictures=pictures)
        return InnerPruning(text_model, None, None)
    if schedule is None or not pictures or visual is None:
        return None
    check_request(model, text_model, kwargs, generating=generating)
    mask = kwargs.get("attention_mask")
    if mask is None and generating:
        mask = mask_of_padding(model, kwargs)
    rows = visual_rows(visual, mask)
    return None if rows is None else InnerPruning(text_model, schedule, rows)


def check_request(
    model: Any, text_model: Any, kwargs: Mapping[str, Any], *, generating: bool, pictures: bool = True
) -> None:
    """Check the arguments of one ``generate`` or ``forward`` call.

    Args:
        pictures: whether the call brings pictures to prune; else it goes on from a cache with an ``InnerRecord``.
    Raises:
        IncompatibleError, UnsupportedInputError: naming the argument and the remedy.
    """
    if kwargs.get("labels") is not None or text_model.training:
        raise IncompatibleError(
            "AdaptInfer drops columns between layers, so labels and training cannot follow: call model.eval() and "
            "leave labels out, or use a method that works before the language model, like HiPrune."
        )
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise UnsupportedInputError(
            "AdaptInfer: logits_to_keep as a tensor names columns that the last layer no longer has; pass an int."
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UnsupportedInputError("AdaptInfer: attention_mask must be [B, L], 1 for tokens and 0 for padding.")
    implementation = str(getattr(text_model.config, "_attn_implementation", None) or "")
    if implementation.startswith(NO_MASK_TENSOR):
        raise IncompatibleError(
            f"AdaptInfer does not work with attention {implementation!r}: use "
            "model.set_attn_implementation('sdpa'), 'eager' or a FlashAttention."
        )
    if any(parameter.is_meta for parameter in text_model.parameters()):
        raise IncompatibleError(
            "AdaptInfer reads the weights of the decoder layers, and some are offloaded (device_map with cpu or disk): "
            "load the language model onto devices."
        )
    if any(_compiled(module) for module in (model, text_model, *text_model.layers)):
        raise IncompatibleError(
            "AdaptInfer changes shapes between layers by hooks, which torch.compile would freeze: use the model "
            "uncompiled."
        )
    _check_cache(kwargs.get("past_key_values"), pictures=pictures)
    if generating:
        _check_generation(model, kwargs)


def _check_cache(cache: Any, *, pictures: bool) -> None:
    if cache is None:
        return
    retained = isinstance(cache, RetainedCache)
    plain = (retained or type(cache) is DynamicCache) and not getattr(cache, "offloading", False)
    if not plain or any(type(layer) is not DynamicLayer and not retained for layer in cache.layers):
        raise IncompatibleError(
            f"AdaptInfer needs a cache whose layers may differ in length, not {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}: pass DynamicCache() or leave "
            "past_key_values out."
        )
    if pictures and int(cache.get_seq_length()):
        had = "pictures whose tokens were dropped" if hasattr(cache, INNER_RECORD) else "an earlier prompt"
        raise IncompatibleError(
            f"past_key_values holds {had} and this turn brings a picture, which AdaptInfer cannot prune behind it: "
            "pass the whole conversation with all its pictures and no past_key_values."
        )


def _check_generation(model: Any, kwargs: Mapping[str, Any]) -> None:
    def value(name: str) -> Any:
        return generation_setting(model, kwargs, name)

    assisted = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    for name in (*assisted, "prefill_chunk_size", "custom_generate", "dola_layers"):
        if value(name):
            what = "assisted decoding" if name in assisted else "it"
            raise IncompatibleError(
                f"AdaptInfer needs the prompt in one pass, and {name}={value(name)!r} gives it otherwise: leave {what} "
                f"out ({name}=None), or use a method that works before the language model, like HiPrune."
            )
    if value("cache_implementation") not in (None, "dynamic"):
        raise IncompatibleError(
            f"AdaptInfer needs a cache whose layers may differ in length: cache_implementation="
            f"{value('cache_implementation')!r} is not; leave it out."
        )
    if value("guidance_scale") not in (None, 1, 1.0):
        raise IncompatibleError(
            "AdaptInfer cannot tell the second prompt of guidance_scale from the first: leave guidance_scale out."
        )
    if value("use_cache") is False and (value("num_beams") or 1) > 1:
        raise IncompatibleError(
            "AdaptInfer without a cache runs the prompt again at every step, and beams would swap their pictures' "
            "tokens: use use_cache=True or num_beams=1."
        )


def _compiled(module: Any) -> bool:
    if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
        return True
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
