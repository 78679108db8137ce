"""Validation that every retention policy's arguments go through."""

from __future__ import annotations

import math

from vlmeff.errors import ConfigError


def check_keep_ratio(policy: str, keep_ratio: object) -> None:
    """Raise ``ConfigError`` unless ``keep_ratio`` is a share in (0, 1]."""
    legal = isinstance(keep_ratio, int | float) and not isinstance(keep_ratio, bool)
    if not legal or not math.isfinite(keep_ratio) or not 0 < keep_ratio <= 1:  # type: ignore[operator, arg-type]
        raise ConfigError(
            f"{policy}: keep_ratio={keep_ratio!r} must be the share of the prompt's entries that stays, in (0, 1]."
        )


def check_ints(policy: str, least: int, **arguments: object) -> None:
    """Raise ``ConfigError`` naming the first argument that is not an int of ``least`` or more."""
    for name, value in arguments.items():
        if type(value) is not int or value < least:
            raise ConfigError(f"{policy}: {name}={value!r} must be an int >= {least}.")


def check_choice(policy: str, name: str, value: object, legal: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``legal``."""
    if value not in legal:
        raise ConfigError(f"{policy}: {name}={value!r} must be one of {', '.join(map(repr, legal))}.")


def check_flag(policy: str, name: str, value: object) -> None:
    """Raise ``ConfigError`` unless ``value`` is a bool."""
    if type(value) is not bool:
        raise ConfigError(f"{policy}: {name}={value!r} must be True or False.")
