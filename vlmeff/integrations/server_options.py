"""The options of a request that reach a handler, each with the values that it may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmeff.integrations.server_images import RefusedRequest
from vlmeff.integrations.server_shapes import list_of, mapping, only, short, text_of

_Check = Callable[[Any, str], Any]


def _number(low: float, high: float, *, open_low: bool = False) -> _Check:
    def check(value: Any, where: str) -> float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not right or not low <= value <= high or (open_low and value == low):
            raise RefusedRequest(f"{where} is {short(value)}: use a number from {low:g} to {high:g}.")
        return value

    return check


def _whole(low: int, high: int) -> _Check:
    def check(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise RefusedRequest(f"{where} is {short(value)}: use a whole number from {low} to {high}.")
        return value

    return check


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise RefusedRequest(f"{where} is {short(value)}: use true or false.")
    return value


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Tools of either API: {"type", "function": {...}} or flat."""
    made = []
    for i, given in enumerate(list_of(value, where)):
        at = f"{where}[{i}]"
        tool = mapping(given, at)
        if tool.get("type") != "function":
            raise RefusedRequest(f"{at}.type {short(tool.get('type'))} is not supported: use function.")
        if "function" in tool:
            only(tool, {"type", "function"}, at)
            tool = mapping(tool["function"], f"{at}.function")
        only(tool, {"type", "name", "description", "parameters", "strict"}, at)
        function = {"name": text_of(tool.get("name"), f"{at}.name")}
        if tool.get("description") is not None:
            function["description"] = text_of(tool["description"], f"{at}.description")
        parameters = mapping(tool.get("parameters") or {}, f"{at}.parameters")
        made.append({"type": "function", "function": {**function, "parameters": parameters}})
    return made


def _template_options(value: Any, where: str) -> dict[str, bool]:
    options = mapping(value, where)
    only(options, {"enable_thinking"}, where)
    return {key: _boolean(inner, f"{where}.{key}") for key, inner in options.items()}


_FIELDS: dict[str, _Check] = {
    "model": text_of,
    "stream": _boolean,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, open_low=True),
    "seed": _whole(0, 2**63 - 1),
    "tools": _tools,
}
# Not "stop": with it the stock handler of transformers 5.23 fails for every model that has a processor, which it hands
# to generate as the tokenizer.
# The handler makes a repetition penalty of 1 + frequency_penalty, which has to be above 0.
CHAT_FIELDS: dict[str, _Check] = {
    **_FIELDS,
    "frequency_penalty": _number(-1, 2, open_low=True),
    "chat_template_kwargs": _template_options,
}
RESPONSE_FIELDS: dict[str, _Check] = {**_FIELDS, "instructions": text_of}
# They change no answer of ours.
_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
}
# Only these values of what we cannot do: to ignore others would be an answer to another request.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


def options(
    body: dict[str, Any],
    fields: dict[str, _Check],
    most_tokens: int,
    *,
    tokens: tuple[str, ...],
    own: tuple[str, ...],
) -> dict[str, Any]:
    """What ``body`` asks for beside its ``own`` content, with a number of new tokens under ``tokens[0]``.

    Raises:
        RefusedRequest: an option is not known, or has a value that cannot be honoured.
    """
    made: dict[str, Any] = {}
    for key, value in body.items():
        if key in own or key in tokens or key in _WITHOUT_EFFECT or value is None:
            continue
        if key in fields:
            made[key] = fields[key](value, key)
        elif key not in _NEUTRAL:
            raise RefusedRequest(f"the field {short(key)} is not supported: leave it out.")
        elif value not in _NEUTRAL[key]:
            raise RefusedRequest(f"{key}={short(value)} is not supported: leave it out.")
    asked = next((key for key in tokens if body.get(key) is not None), None)
    count = most_tokens if asked is None else _whole(1, most_tokens)(body[asked], asked)
    return {**made, tokens[0]: count}
