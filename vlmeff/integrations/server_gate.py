"""The gate in front of the OpenAI routes: a request is not filtered but written anew from what was understood.

Only fields, roles and parts that are named here reach a handler, with the types that they should have. A key that we do
not know is refused, not passed on: transformers takes paths and addresses of pictures at several places of a request
(``chat_template_kwargs`` is one), and a new one must not open with an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vlmeff.integrations.server_images import (
    PictureLimits,
    RefusedRequest,
    check_reference,
    picture_as_png,
    refuse_picture,
)
from vlmeff.integrations.server_options import CHAT_FIELDS, RESPONSE_FIELDS, options
from vlmeff.integrations.server_shapes import list_of, mapping, only, parse_json, short, text_of


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What a request may be."""

    pictures: PictureLimits = field(default_factory=PictureLimits)
    max_request_mb: float = 32.0  # of the body, 10^6 bytes
    max_text_chars: int = 50_000  # of all texts together
    max_new_tokens: int = 1024  # also the length of an answer that names none
    placeholders: tuple[str, ...] = ()  # what stands for a picture in the model's prompts, refused in texts

    @property
    def max_request_bytes(self) -> int:
        return int(self.max_request_mb * 1e6)


def check_chat(body: dict[str, Any], limits: RequestLimits) -> dict[str, Any]:
    """A body of /v1/chat/completions, written anew; its pictures are PNG data URLs.

    Raises:
        RefusedRequest: E-SERVE-01 for a picture, E-SERVE-02 for everything else that is not understood.
    """
    made = options(
        body, CHAT_FIELDS, limits.max_new_tokens, tokens=("max_completion_tokens", "max_tokens"), own=("messages",)
    )
    messages = list_of(body.get("messages"), "messages")
    if not messages:
        raise RefusedRequest("messages is empty: send at least one.")
    made["messages"] = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _settle(made, made["messages"], limits)
    return made


def check_responses(body: dict[str, Any], limits: RequestLimits) -> dict[str, Any]:
    """A body of /v1/responses, written anew; its pictures are PNG data URLs.

    Raises:
        RefusedRequest: as ``check_chat``.
    """
    made = options(body, RESPONSE_FIELDS, limits.max_new_tokens, tokens=("max_output_tokens",), own=("input",))
    made.setdefault("stream", False)  # what OpenAI does; the handler's own default is True
    given = body.get("input")
    if isinstance(given, str):
        items = [{"role": "user", "content": [_text_part(given, "input")]}]
    else:
        raw = list_of(given, "input")
        if not raw:
            raise RefusedRequest("input is empty: send a text or at least one item.")
        if all(isinstance(item, dict) and "role" not in item and _is_part(item) for item in raw):
            items = [{"role": "user", "content": _parts(raw, "user", "input")}]
        else:
            items = [_item(item, f"input[{i}]") for i, item in enumerate(raw)]
            if "role" not in items[0]:
                raise RefusedRequest("input[0] must be a message: a function is called in answer to one.")
    made["input"] = items
    _settle(made, items, limits)
    return made


# ---- pictures and texts of the whole request


def _settle(made: dict[str, Any], messages: list[dict[str, Any]], limits: RequestLimits) -> None:
    """Check all texts, then all references, then decode the pictures into their places."""
    slots = [
        part["image_url"]
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    skip = {id(slot) for slot in slots}
    chars = 0
    for text in _strings(made, skip):
        chars += len(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RefusedRequest(f"a text holds half a surrogate pair ({error.reason}).") from error
        for placeholder in limits.placeholders:
            if placeholder in text:
                raise RefusedRequest(f"a text holds {placeholder!r}, which stands for a picture: send the picture.")
    if chars > limits.max_text_chars:
        raise RefusedRequest(f"the texts have {chars} characters, more than {limits.max_text_chars}.")
    most = limits.pictures.max_images
    if len(slots) > most:
        raise refuse_picture(
            f"the request has {len(slots)} pictures, more than {most} (--max-images)."
            if most
            else "this model takes no pictures."
        )
    for slot in slots:
        check_reference(slot["url"], limits.pictures)
    for slot in slots:
        slot["url"] = picture_as_png(slot["url"], limits.pictures)


def _strings(value: Any, skip: set[int]) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and id(value) not in skip:
        for key, inner in value.items():
            yield from _strings(key, skip)
            yield from _strings(inner, skip)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, skip)


# ---- messages, items and parts

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image_url", "input_image")
# What clients send back from an earlier answer; the handlers have no use for it.
_OF_ANSWERS = {"id", "status", "annotations", "audio", "refusal", "function_call", "reasoning_content", "phase"}


def _message(given: Any, where: str) -> dict[str, Any]:
    message = mapping(given, where)
    only(message, {"role", "content", "name", "tool_calls", "tool_call_id", *_OF_ANSWERS}, where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RefusedRequest(f"{where}.role is {role!r}: use one of {', '.join(_ROLES)}.")
    for key in _OF_ANSWERS - {"id", "status", "phase"}:
        if message.get(key) not in (None, [], ""):
            raise RefusedRequest(f"{where}.{key} is not supported: leave it out.")
    made: dict[str, Any] = {"role": _ROLES[role]}
    content = message.get("content")
    if content is None and role == "assistant":
        made["content"] = []
    elif isinstance(content, str):
        made["content"] = [_text_part(content, f"{where}.content")]
    else:
        made["content"] = _parts(list_of(content, f"{where}.content"), role, f"{where}.content")
    if message.get("tool_calls") is not None:
        if role != "assistant":
            raise RefusedRequest(f"{where}.tool_calls belongs to the assistant, not to {role!r}.")
        calls = list_of(message["tool_calls"], f"{where}.tool_calls")
        if calls:
            made["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if message.get("tool_call_id") is not None:
        made["tool_call_id"] = text_of(message["tool_call_id"], f"{where}.tool_call_id")
    return made


def _item(given: Any, where: str) -> dict[str, Any]:
    """An item of the Responses API: a message, or a call of a function or its result."""
    item = dict(mapping(given, where))
    kind = item.pop("type", "message")
    if kind == "message":
        return _message(item, where)
    if kind == "function_call":
        only(item, {"call_id", "name", "arguments", "id", "status"}, where)
        call = _function(item, where)
        return {"type": kind, "call_id": text_of(item.get("call_id"), f"{where}.call_id"), **call}
    if kind == "function_call_output":
        only(item, {"call_id", "output", "id", "status"}, where)
        call_id, output = (text_of(item.get(key), f"{where}.{key}") for key in ("call_id", "output"))
        return {"type": kind, "call_id": call_id, "output": output}
    raise RefusedRequest(f"{where}.type {short(kind)} is not supported: use message or a function call.")


def _is_part(item: dict[str, Any]) -> bool:
    return item.get("type") not in (None, "message", "function_call", "function_call_output")


def _parts(given: list[Any], role: str, where: str) -> list[dict[str, Any]]:
    return [_part(part, role, f"{where}[{i}]") for i, part in enumerate(given)]


def _part(given: Any, role: str, where: str) -> dict[str, Any]:
    part = mapping(given, where)
    kind = part.get("type")
    if isinstance(kind, str) and kind in _TEXTS:
        only(part, {"type", "text", "annotations", "logprobs"}, where)
        return _text_part(part.get("text"), f"{where}.text")
    if not isinstance(kind, str) or kind not in _PICTURES:
        # What is not understood may be a way to name a picture: the code of pictures says so to the client.
        raise refuse_picture(f"{where}.type {short(kind)} is not supported: use text or image_url.")
    if role != "user":
        raise refuse_picture(f"{where}: pictures belong to the user, not to {role!r}.")
    only(part, {"type", "image_url", "detail"}, where, refuse=refuse_picture)
    url = part.get("image_url")
    if isinstance(url, dict):
        only(url, {"url", "detail"}, f"{where}.image_url", refuse=refuse_picture)
        url = url.get("url")
    return {"type": "image_url", "image_url": {"url": url}}  # checked and replaced in _settle


def _text_part(given: Any, where: str) -> dict[str, Any]:
    return {"type": "text", "text": text_of(given, where)}


def _tool_call(given: Any, where: str) -> dict[str, Any]:
    call = mapping(given, where)
    only(call, {"id", "type", "function", "index"}, where)
    function = mapping(call.get("function"), f"{where}.function")
    only(function, {"name", "arguments"}, f"{where}.function")
    made = {"type": "function", "function": _function(function, f"{where}.function")}
    return made if call.get("id") is None else {"id": text_of(call["id"], f"{where}.id"), **made}


def _function(given: dict[str, Any], where: str) -> dict[str, Any]:
    name, arguments = text_of(given.get("name"), f"{where}.name"), text_of(given.get("arguments"), f"{where}.arguments")
    try:
        mapping(parse_json(arguments), f"{where}.arguments")
    except ValueError as error:
        raise RefusedRequest(f"{where}.arguments is no text of a JSON object.") from error
    return {"name": name, "arguments": arguments}
