"""Turns the arguments of ``wrap`` and a preset into one frozen plan, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from dataclasses import dataclass
from typing import Any

from tokenpruning import Selector, methods
from vlmeff import zoo
from vlmeff.errors import ConfigError, UnknownNameError, UnsupportedModelError
from vlmeff.vlm.families import Family, family_of, is_vlm

logger = logging.getLogger("vlmeff")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a wrapped model does. ``preset`` and ``entry`` say where it comes from."""

    preset: str | None = None
    entry: str | None = None
    tokens: Selector | None = None

    @property
    def method_name(self) -> str:
        return "none" if self.tokens is None else methods.name_of(self.tokens)


def make_plan(
    model: Any,
    preset: str | None,
    *,
    tokens: Selector | str | None,
    unavailable: dict[str, object],
    overrides: dict[str, Any],
) -> tuple[Plan, Family | None]:
    """Resolve a preset and named techniques for ``model``.

    Args:
        unavailable: arguments of ``wrap`` for techniques that this version does not have; must be None.
        overrides: fields of the token method that replace those of the preset.
    Raises:
        ConfigError, UnknownNameError, UnsupportedModelError
    """
    for name, value in unavailable.items():
        if value is not None:
            raise ConfigError(f"wrap: {name}={value!r} is not available in this version of vlmeff; leave {name} out.")
    entry: str | None = None
    method: Selector | None = None
    if preset is not None:
        resolved = zoo.resolve(model, preset)
        entry = resolved.entry
        preset = resolved.preset
        for step in resolved.steps:
            method = make_method(step.method, {"keep": step.keep, **step.params})
        if resolved.status not in ("verified", "fixture"):
            known = f"has status {resolved.status!r}" if resolved.status else "has no entry in the model zoo"
            warnings.warn(
                f"vlmeff: preset {preset!r} {known} for {type(model).__name__}: measure what it costs on your data.",
                stacklevel=3,
            )
    by_name = tokens is not None
    if isinstance(tokens, str):
        keep = {} if method is None else {"keep": method.keep}
        method = make_method(tokens, {**keep, **overrides})
    elif tokens is not None:
        if isinstance(tokens, type) or not isinstance(tokens, Selector):
            raise ConfigError(
                f"wrap: tokens={tokens!r} must be a token reduction method such as vlmeff.HiPrune(keep=0.5), or one of "
                f"the names {', '.join(methods.names())}."
            )
        method = _replace(tokens, overrides)
    elif method is not None:
        method = _replace(method, overrides)
    elif overrides:
        raise ConfigError(f"wrap: {next(iter(overrides))}=... changes a token method, and none is asked for.")

    if method is None:
        return Plan(preset=preset, entry=entry), None
    if not is_vlm(model):
        if by_name:
            raise UnsupportedModelError(
                f"tokens: {type(model).__name__} takes no pictures, so it has no visual tokens."
            )
        raise UnsupportedModelError(
            f"preset {preset!r} has only a token step, and {type(model).__name__} takes no pictures."
        )
    family = family_of(model)
    family.refuse_model(model)
    family.score_layers(model, method.scores, getattr(method, "object_layer", None))  # raises on an illegal layer
    logger.info("vlmeff: %s on %s", method, type(model).__name__)
    return Plan(preset=preset, entry=entry, tokens=method), family


def make_method(name: str, arguments: dict[str, Any]) -> Selector:
    """Build a registered token method; unknown arguments list the legal ones."""
    cls = methods.get(name)
    _check_fields(cls, name, arguments)
    return cls(**arguments)


def _replace(method: Selector, overrides: dict[str, Any]) -> Selector:
    _check_fields(type(method), methods.name_of(method), overrides)
    return dataclasses.replace(method, **overrides) if overrides else method  # type: ignore[type-var]


def _check_fields(cls: type[Selector], name: str, arguments: dict[str, Any]) -> None:
    legal: list[str] = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    for argument in arguments:
        if argument not in legal:
            raise UnknownArgumentError(f"argument of {name}", argument, legal)


class UnknownArgumentError(UnknownNameError, TypeError):
    """A keyword argument of ``wrap`` belongs to no technique."""
