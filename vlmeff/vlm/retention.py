"""Where KV retention attaches to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kvcache import RetentionPolicy
from kvcache.cache import RetainedCache
from kvcache.controller import attention_module
from vlmeff import zoo
from vlmeff.errors import UnsupportedModelError
from vlmeff.vlm.cost import head_dim, kv_heads


def decoder_of(model: Any) -> nn.Module:
    """The stack of decoder layers of a language model, or of a vision-language model's language model."""
    base = model.base_model
    for part in (getattr(base, "language_model", None), getattr(base, "text_model", None), base):
        if isinstance(part, nn.Module) and hasattr(part, "layers"):
            return part
    raise UnsupportedModelError(
        f"kv: {type(model).__name__} has no stack of decoder layers that KV retention knows (model.layers, "
        "model.language_model.layers or model.text_model.layers)."
    )


def check_retention(model: Any, policy: RetentionPolicy, *, storage: Any = None) -> None:
    """Raise ``UnsupportedModelError`` (or what a recipe raises) for a model whose cache cannot be retained by it."""
    cache = RetainedCache(model.config, policy, storage=storage)
    for index, layer in enumerate(decoder_of(model).layers):  # type: ignore[arg-type]
        if index in cache.retained:
            attention_module(layer, index)
    recipe = getattr(policy, "recipe", None)
    if recipe is not None:
        text = model.config.get_text_config()
        names, known = names_of(model), recipe.model.get("id")
        recipe.check_model(
            layers=cache.retained,
            kv_heads=kv_heads(text),
            head_dim=head_dim(text),
            hidden_layers=text.num_hidden_layers,
            model_id=known if known in names else next(iter(names), None),
        )


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
