"""The shapes of JSON that a request may have; what differs is refused by name of the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vlmeff.integrations.server_images import RefusedRequest

MAX_DEPTH = 32  # of nested objects and lists


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
        RefusedRequest: it is no UTF-8, no JSON, no object, nested too deeply, or names a key twice.
    """
    try:
        body = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise RefusedRequest(f"the body is no valid JSON ({str(error)[:200]}).") from error
    return mapping(body, "the body")


def mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RefusedRequest(f"{where} must be a JSON object, not {type(value).__name__}.")
    return value


def list_of(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RefusedRequest(f"{where} must be a list, not {type(value).__name__}.")
    return value


def only(
    value: dict[str, Any], known: set[str], where: str, *, refuse: Callable[[str], RefusedRequest] = RefusedRequest
) -> None:
    unknown = sorted(value.keys() - known)
    if unknown:
        raise refuse(f"{where} has the unknown key {short(unknown[0])}: leave it out.")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def parse_json(text: str) -> Any:
    """What JSON text stands for; ValueError where it is none, nested too deeply, or names a key twice."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError("nested too deeply")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object names a key twice")
    return made


def text_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RefusedRequest(f"{where} must be a text, not {type(value).__name__}.")
    return value
