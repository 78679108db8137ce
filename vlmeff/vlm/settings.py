"""Generation settings as ``generate`` will find them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def generation_setting(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """An argument of the call, else of the generation config that it brings, else of the model's; None when unset."""
    given, own = kwargs.get("generation_config"), getattr(model, "generation_config", None)
    places = [kwargs, *(vars(config) for config in (given, own) if config is not None)]
    return next((place[name] for place in places if place.get(name) is not None), None)


def mask_of_padding(model: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The [B, L] bool mask that ``generate`` infers from padding ids when none is given; None when it infers none."""
    pad, eos = (generation_setting(model, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    ends = eos.flatten().tolist() if isinstance(eos, Tensor) else eos if isinstance(eos, list) else [eos]
    if pad is None or int(pad) in ends:
        return None
    mask: Tensor = kwargs["input_ids"] != int(pad)
    return None if bool(mask.all()) else mask
