"""Where KV retention attaches to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kvcache import RetentionPolicy
from kvcache.cache import RetainedCache
from kvcache.controller import attention_module
from kvcache.quantization import BITS, value_group
from vlmeff import zoo
from vlmeff.errors import ConfigError, UnsupportedModelError
from vlmeff.vlm.cost import head_dim, kv_heads


def decoder_of(model: Any) -> nn.Module:
    """The stack of decoder layers of a language model, or of a vision-language model's language model."""
    base = model.base_model
    for part in (getattr(base, "language_model", None), getattr(base, "text_model", None), base):
        if isinstance(part, nn.Module) and hasattr(part, "layers"):
            return part
    raise UnsupportedModelError(
        f"kv: {type(model).__name__} has no stack of decoder layers that KV retention knows (model.layers, "
        "model.language_model.layers or model.text_model.layers). kv=False."
    )


def check_retention(
    model: Any, policy: RetentionPolicy, *, storage: Any = None, headroom: Any = 0, token_pruning: str | None = None
) -> None:
    """Raise for a model whose cache cannot be retained by the policy, or cannot be stored as asked for.

    ``token_pruning``: what shortens the prompt before; a recipe that was calibrated with something else warns.

    Raises:
        UnsupportedModelError: as ``RetainedCache`` and ``attention_module``.
        ConfigError: unknown storage, or a head dim that it cannot be had for.  What a recipe raises.
    """
    if storage is not None and storage not in tuple(BITS):
        raise ConfigError(f"wrap: kv_storage={storage!r} must be one of {', '.join(map(repr, BITS))}, or None.")
    if type(headroom) is not int or headroom < 0:
        raise ConfigError(f"wrap: kv_headroom={headroom!r} must be a number of columns, 0 or more.")
    cache = RetainedCache(model.config, policy, storage=storage, headroom=headroom)
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise UnsupportedModelError(
            f"kv: {type(model).__name__} has a kind of cache of its own, which KV retention cannot work in. kv=False."
        )
    text = model.config.get_text_config()
    for index, layer in enumerate(decoder_of(model).layers):  # type: ignore[arg-type]
        if index in cache.retained:
            module = attention_module(layer, index)
            if storage is not None:
                _check_storage(storage, getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None), text)
    recipe = getattr(policy, "recipe", None)
    if recipe is not None:
        names, known = names_of(model), recipe.model.get("id")
        recipe.check_model(
            layers=cache.retained,
            kv_heads=kv_heads(text),
            head_dim=head_dim(text),
            hidden_layers=text.num_hidden_layers,
            model_id=known if known in names else next(iter(names), None),
            token_pruning=token_pruning,
        )


def _check_storage(storage: str, value_width: Any, text_config: Any) -> None:
    """``value_width``: channels of a value, of the module; else the configuration says."""
    width = value_width if isinstance(value_width, int) else head_dim(text_config)
    try:
        value_group(width)
    except ConfigError as error:
        raise ConfigError(f"wrap: kv_storage={storage!r} does not fit this model; leave it out. {error}") from error


def names_of(model: Any) -> tuple[str, ...]:
    """What a model may be called in a recipe, its name in the zoo first; empty when nothing says where it is from.

    A folder's path says nothing to others: such a model is known by its geometry, else by the folder's name.
    """
    origin = getattr(model.config, "_name_or_path", None)
    if not origin:
        return ()
    record, local = zoo.find_model(model), Path(origin).is_dir()
    if record is not None and (local or origin == record.hub_id):
        return (record.name,) if record.hub_id is None else (record.name, record.hub_id)
    return (Path(origin).name,) if local else (origin,)
