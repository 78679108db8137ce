"""Text speculation of a wrapped model: what ``wrap(text_speculation=...)`` means, and its loop for one call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import StoppingCriteriaList, StopStringCriteria

from vlmeff.errors import ConfigError, UnsupportedModelError
from vlmeff.speculative.assistant import Assistant, check_assistant
from vlmeff.speculative.drafting import Drafter
from vlmeff.speculative.text import TextDecoding, TextSpeculation, named_drafter

if TYPE_CHECKING:
    from vlmeff.config import Plan


def speculation_of(asked: object) -> TextSpeculation:
    """What is asked for: a ``TextSpeculation``, a drafter, its name, or an assistant model.

    Raises:
        ConfigError: none of them.
    """
    if isinstance(asked, TextSpeculation):
        return asked
    if isinstance(asked, str):
        return TextSpeculation(drafter=named_drafter(asked))
    if isinstance(asked, nn.Module):
        return TextSpeculation(drafter=Assistant(asked))
    if isinstance(asked, Drafter) and not isinstance(asked, type):
        return TextSpeculation(drafter=asked)
    raise ConfigError(
        f"wrap: text_speculation={asked!r} must be 'lookup', 'recycle', a smaller model, vlmeff.TextSpeculation(...) "
        "or None (False)."
    )


def with_text_speculation(model: Any, plan: Plan, asked: object) -> Plan:
    """The plan with speculation added; ``False`` is off.

    Raises:
        ConfigError: not a speculation, an assistant that does not fit, or ``kv_storage``, under which it is not exact.
        UnsupportedModelError: nothing that generates text token by token.
    """
    if asked is False:
        return dataclasses.replace(plan, text_speculation=None)
    speculation = speculation_of(asked)
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"text_speculation: {type(model).__name__} is no decoder-only model with generate(); leave it out."
        )
    assistant = getattr(speculation.drafter, "model", None)
    if assistant is not None:
        check_assistant(model, assistant)
    if plan.kv_storage is not None:
        raise ConfigError(
            f"wrap: text_speculation and kv_storage={plan.kv_storage!r} do not go together: a cache that is quantized "
            "token by token looks different to a pass of several tokens, so the text would not be that of plain "
            "decoding. Leave one of the two out."
        )
    return dataclasses.replace(plan, text_speculation=speculation)


def speculate(
    model: Any, plan: Plan, named: Mapping[str, Any], kwargs: dict[str, Any], *, assistant_inputs: Any
) -> TextDecoding | None:
    """Put the loop into ``kwargs``, the arguments of the model's own ``generate``; None without speculation.

    Args:
        named: the arguments as the caller gave them, whole pictures included.
    """
    speculation = plan.text_speculation
    if speculation is None:
        return None
    decoding = TextDecoding(
        speculation, inputs=named, assistant_inputs=assistant_inputs, streamer=kwargs.get("streamer")
    )
    reason = _own_decoding(kwargs) or _stop_strings(model, kwargs)
    if reason is not None:
        decoding.statistics.fallback = reason
        return decoding
    kwargs["custom_generate"] = decoding
    return decoding


def _own_decoding(kwargs: Mapping[str, Any]) -> str | None:
    """The call names a decoding loop of its own: that is what it gets."""
    name = next((name for name in ("custom_generate", "assistant_model") if kwargs.get(name) is not None), None)
    return None if name is None else f"the call has {name}=..."


def _stop_strings(model: Any, kwargs: dict[str, Any]) -> str | None:
    """``generate`` hands no tokenizer on with a loop given to it, so it refuses stop strings: make them a criterion."""
    config = kwargs.get("generation_config")
    if getattr(model.generation_config, "stop_strings", None) is not None:
        return "stop_strings of the model's own generation_config"
    places = (kwargs.get("stop_strings"), getattr(config, "stop_strings", None))
    strings = next((s for s in places if s is not None), None)
    if strings is None or kwargs.get("tokenizer") is None:
        return None  # without a tokenizer, generate says what is missing
    given = kwargs.get("stopping_criteria") or []
    given = list(given) if isinstance(given, list) else [given]
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=kwargs["tokenizer"])
    kwargs["stopping_criteria"] = StoppingCriteriaList([*given, criterion])
    kwargs.pop("stop_strings", None)
    if config is not None and config.stop_strings is not None:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    return None
