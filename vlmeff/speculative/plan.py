"""What ``wrap`` does to a MAR generator: its arguments and a preset, resolved to one configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vlmeff import zoo
from vlmeff.errors import ConfigError, UnknownNameError, UnsupportedModelError
from vlmeff.speculative.continuous import Continuous


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
    if chosen is None:
        chosen = _of_preset(model, preset, own)
        own = {} if "mode" in own else own
    if draft is not None and chosen.mode == "coupled" and "proposal" not in own:
        own = {"proposal": "draft", **own}
    return chosen.but(**own) if own else chosen


def _of_preset(model: Any, preset: str | None, own: Mapping[str, Any]) -> Continuous:
    if "mode" in own:  # fields of another mode do not fit
        return Continuous(**own)
    if preset is None:
        if not own:
            raise ConfigError("wrap: nothing is asked for; pass mode='coupled', for example.")
        return Continuous()
    resolved = zoo.resolve(model, preset, kind="image")
    step = next((step for step in resolved.steps if step.method == "continuous"), None)
    if step is None:
        raise UnsupportedModelError(f"preset {preset!r} has nothing for {type(model).__name__}.")
    if resolved.status not in ("verified", "fixture"):
        known = f"has status {resolved.status!r}" if resolved.status else "has no entry in the model zoo"
        warnings.warn(
            f"vlmeff: preset {preset!r} {known} for {type(model).__name__}: compare its pictures with plain ones.",
            stacklevel=4,
        )
    return Continuous(**step.params)
