"""What ``wrap`` does to a MAR generator: its arguments and a preset, resolved to one configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vlmeff import zoo
from vlmeff.errors import ConfigError, UnknownNameError, UnsupportedModelError
from vlmeff.speculative.continuous import OWN_FIELDS, Continuous


def make_plan(
    model: Any,
    preset: str | None,
    *,
    draft: Any,
    inapplicable: Mapping[str, object],
    overrides: Mapping[str, Any],
) -> Continuous:
    """Resolve a preset, a draft and named fields for a generator.

    A draft without a mode that says otherwise makes the guesses of ``coupled``.

    Raises:
        ConfigError, UnknownNameError, UnsupportedModelError
    """
    for name, value in inapplicable.items():
        if value not in (None, False):
            raise UnsupportedModelError(
                f"wrap: {name}={value!r} does not apply to {type(model).__name__}; leave {name} out."
            )
    names = [f.name for f in fields(Continuous)]
    for name in overrides:
        if name not in (*names, "continuous"):
            raise UnknownNameError("argument of wrap for a generator", name, ("continuous", *names))
    chosen = overrides.get("continuous")
    own = {name: value for name, value in overrides.items() if name != "continuous"}
    if chosen is not None and not isinstance(chosen, Continuous):
        raise ConfigError(f"wrap: continuous={chosen!r} must be vlmeff.Continuous(...).")
    if chosen is not None:
        _check_beside(chosen, own)
        return chosen.but(**own) if own else chosen
    chosen = _of_preset(model, preset, own)
    asks_proposal = own.get("proposal") is not None
    own = {} if "mode" in own else own
    if draft is not None and chosen.mode == "coupled" and not asks_proposal:
        own = {**own, "proposal": "draft"}
    return chosen.but(**own) if own else chosen


def _check_beside(chosen: Continuous, own: Mapping[str, Any]) -> None:
    """Raise ConfigError where fields named beside ``continuous`` contradict it."""
    if "mode" in own:
        raise ConfigError(
            f"wrap: continuous=... and mode={own['mode']!r} do not go together: continuous says the mode "
            f"({chosen.mode!r}). Leave one of the two out."
        )
    fits = OWN_FIELDS.get(chosen.mode or "", ())
    foreign = sorted({name for names in OWN_FIELDS.values() for name in names if name in own} - set(fits))
    if foreign:
        named = ", ".join(f"{name}={own[name]!r}" for name in foreign)
        raise ConfigError(
            f"wrap: continuous=... and {named} do not go together: continuous has mode={chosen.mode!r}, which takes no "
            f"{', '.join(foreign)}."
        )


def _of_preset(model: Any, preset: str | None, own: Mapping[str, Any]) -> Continuous:
    if preset is None:
        if not own:
            raise ConfigError("wrap: nothing is asked for; pass mode='coupled', for example.")
        return Continuous(**own) if "mode" in own else Continuous()
    resolved = zoo.resolve(model, preset, kind="image")
    step = next((step for step in resolved.steps if step.method == "continuous"), None)
    if "mode" in own and (step is None or step.params.get("mode", "coupled") != own["mode"]):
        return Continuous(**own)  # fields of another mode do not fit
    if step is None:
        raise UnsupportedModelError(f"preset {preset!r} has nothing for {type(model).__name__}.")
    if resolved.status not in ("verified", "fixture"):
        known = f"has status {resolved.status!r}" if resolved.status else "has no entry in the model zoo"
        warnings.warn(
            f"vlmeff: preset {preset!r} {known} for {type(model).__name__}: compare its pictures with plain ones.",
            stacklevel=4,
        )
    params = dict(step.params)
    if "mode" not in own:
        return Continuous(**params)
    if "window" in own or "gamma" in own:  # one field
        params = {name: value for name, value in params.items() if name not in ("window", "gamma")}
    return Continuous(**{**params, **own})
