"""What ``wrap`` does to a video pipeline or transformer: its arguments and a preset, resolved to one frozen plan."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import nn

from vlmeff import zoo
from vlmeff.diffusion.families import find_family, supported_classes
from vlmeff.diffusion.rules import RuleLike
from vlmeff.diffusion.schemes import get_scheme
from vlmeff.errors import ConfigError, QuantConfigError, UnknownNameError, UnsupportedModelError

logger = logging.getLogger("vlmeff")

TRANSFORMERS = ("transformer", "transformer_2")  # components of a pipeline; Wan 2.2 has two
TEXT_ENCODERS = ("text_encoder",)
TEXT_SCHEMES = ("w8a16_int8", "w8a16_fp8", "w4a16")
OPTIONS = ("cache", "attention_backend", "compile")  # of ``wrap``, besides the fields of ``Quant``


@dataclass(frozen=True)
class Quant:
    """How the linear layers of a video transformer are quantized.

    ``scheme``: a name of ``vlmeff.diffusion.schemes.SCHEMES``, or "auto", which chooses by hardware and says why.
    ``group``, ``rank``: change the scheme's group size and the rank of its high-precision branch.
    ``rules``: (pattern, scheme, "keep" or "default") in front of the family's, or instead with ``replace_rules``.
    ``calibrate``: arguments of a pipeline call ({"prompt": [...], "num_inference_steps": 4}) or a function of the
    model that calls it, for schemes that smooth.  ``alpha``: how far smoothing goes, 0 to 1.
    ``refine``: rounds of refitting the branch.  ``text_encoder``: a weight-only scheme for the text encoder too.
    ``memory_gb``: if 8-bit weights of the transformer exceed it, "auto" takes 4-bit ones.
    ``keep_original``: keep the replaced layers in host memory for ``unwrap``.
    """

    scheme: str = "auto"
    group: int | None = None
    rank: int | None = None
    rules: Sequence[RuleLike] | None = None
    replace_rules: bool = False
    calibrate: Mapping[str, Any] | Callable[[Any], Any] | None = None
    alpha: float = 0.5
    refine: int = 0
    text_encoder: str | None = None
    memory_gb: float | None = None
    keep_original: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, str):
            raise QuantConfigError(f"quant: scheme={self.scheme!r} must be a name such as 'w8a8_int8', or 'auto'.")
        if self.scheme != "auto":
            get_scheme(self.scheme, group=self.group, rank=self.rank)
        if self.text_encoder is not None and self.text_encoder not in TEXT_SCHEMES:
            raise UnknownNameError("weight-only scheme of the text encoder", self.text_encoder, TEXT_SCHEMES)
        for name in ("alpha", "memory_gb"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise QuantConfigError(f"quant: {name}={value!r} must be a number.")
        if type(self.keep_original) is not bool:
            raise QuantConfigError(f"quant: keep_original={self.keep_original!r} must be True or False.")
        if not 0 <= self.alpha <= 1:
            raise QuantConfigError(f"quant: alpha={self.alpha} must lie in [0, 1].")
        if type(self.refine) is not int or self.refine < 0:
            raise QuantConfigError(f"quant: refine={self.refine!r} must be an int >= 0.")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise QuantConfigError(f"quant: memory_gb={self.memory_gb} must be positive.")
        if self.calibrate is not None and not isinstance(self.calibrate, Mapping) and not callable(self.calibrate):
            raise QuantConfigError(
                f"quant: calibrate={self.calibrate!r} must be arguments of a pipeline call, as {{'prompt': [...]}}, "
                "or a function that takes the model and calls it."
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionPlan:
    """What a wrapped pipeline or transformer does. ``entry`` is the zoo's, None where it knows nothing.

    ``quant_optional`` and ``cache_optional``: the technique comes from the preset, so it is left out with a log line
    where it cannot be; asked for by name it must work.
    """

    preset: str | None = None
    entry: str | None = None
    quant: Quant | None = None
    quant_optional: bool = False
    cache: str | None = None
    cache_params: Mapping[str, Any] = field(default_factory=dict)
    cache_optional: bool = False
    attention_backend: str | None = None
    compile: bool = False


def transformers_of(model: Any) -> dict[str, nn.Module]:
    """The transformers by the name of their component; "" for a transformer itself.

    Raises:
        UnsupportedModelError: a pipeline without one.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    found = {name: getattr(model, name, None) for name in TRANSFORMERS}
    present = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not present:
        raise UnsupportedModelError(
            f"wrap: {type(model).__name__} has no video transformer; supported: {', '.join(supported_classes())}."
        )
    return present


def make_plan(
    model: Any,
    preset: str | None,
    *,
    quant: Quant | str | Mapping[str, Any] | Literal[False] | None,
    inapplicable: Mapping[str, object],
    overrides: Mapping[str, Any],
) -> DiffusionPlan:
    """Resolve a preset and named techniques for a pipeline or transformer.

    Args:
        inapplicable: arguments of ``wrap`` for other kinds of models; must be None (or False).
    Raises:
        ConfigError, UnknownNameError, UnsupportedModelError
    """
    for name, value in inapplicable.items():
        if value not in (None, False):
            raise UnsupportedModelError(
                f"wrap: {name}={value!r} does not apply to {type(model).__name__}; leave {name} out."
            )
    modules = transformers_of(model)
    plan = DiffusionPlan()
    if preset is not None:
        resolved = zoo.resolve(model, preset, kind="video")
        steps = {step.method: dict(step.params) for step in resolved.steps}
        if not steps and quant is None and not overrides:
            raise UnsupportedModelError(f"preset {preset!r} has nothing for {type(model).__name__}.")
        of_preset = steps.get("quant")
        cached = steps.get("feature_cache", {})
        plan = DiffusionPlan(
            preset=resolved.preset,
            entry=resolved.entry,
            quant=None if of_preset is None else Quant(**of_preset),
            quant_optional=True,
            cache=cached.get("kind"),
            cache_params={key: value for key, value in cached.items() if key != "kind"},
            cache_optional=True,
        )
        if resolved.status not in ("verified", "fixture"):
            known = f"has status {resolved.status!r}" if resolved.status else "has no entry in the model zoo"
            warnings.warn(
                f"vlmeff: preset {preset!r} {known} for {type(model).__name__}: compare its videos with the originals.",
                stacklevel=4,
            )
    plan = _with_quant(plan, quant, overrides)
    plan = _with_options(plan, overrides)
    if plan.quant is not None and not plan.quant.replace_rules and plan.quant.rules is None:
        unknown = [type(m).__name__ for m in modules.values() if find_family(m) is None]
        if unknown:
            raise UnsupportedModelError(
                f"wrap: {unknown[0]} is not a video transformer that vlmeff has rules for; supported: "
                f"{', '.join(supported_classes())}. For another class pass quant=vlmeff.Quant(scheme, "
                "rules=[(pattern, scheme), ...]); vlmeff.diffusion.families.dry_run shows what they name."
            )
    if plan.quant is None and plan.cache is None and plan.attention_backend is None and not plan.compile:
        raise ConfigError("wrap: nothing is asked for; pass quant='auto', for example.")
    return plan


def _with_quant(plan: DiffusionPlan, quant: object, overrides: Mapping[str, Any]) -> DiffusionPlan:
    names = [f.name for f in fields(Quant)]
    own = {name: value for name, value in overrides.items() if name in names}
    chosen = plan.quant
    if quant is False:
        chosen = None
    elif isinstance(quant, str):
        chosen = Quant(quant)
    elif isinstance(quant, Mapping):
        for name in quant:
            if name not in names:
                raise UnknownNameError("argument of quant", str(name), names)
        chosen = Quant(**quant)
    elif isinstance(quant, Quant):
        chosen = quant
    elif quant is not None:
        raise QuantConfigError(f"wrap: quant={quant!r} must be a scheme's name, vlmeff.Quant(...) or False.")
    if own:
        if chosen is None:
            raise ConfigError(f"wrap: {next(iter(own))}=... changes the quantization, and none is asked for.")
        chosen = replace(chosen, **own)
    optional = plan.quant_optional and quant is None and not own
    return replace(plan, quant=chosen, quant_optional=optional)


def _with_options(plan: DiffusionPlan, overrides: Mapping[str, Any]) -> DiffusionPlan:
    names = [f.name for f in fields(Quant)]
    for name in overrides:
        if name not in (*OPTIONS, *names):
            raise UnknownNameError("argument of wrap for a video model", name, (*OPTIONS, *names))
    if "cache" in overrides:
        cache = overrides["cache"]
        if isinstance(cache, Mapping):
            if not isinstance(cache.get("kind"), str):
                raise ConfigError(f"wrap: cache={dict(cache)!r} must name its kind, as {{'kind': 'first_block'}}.")
            params = {key: value for key, value in cache.items() if key != "kind"}
            plan = replace(plan, cache=cache["kind"], cache_params=params, cache_optional=False)
        elif cache is None or cache is False:
            plan = replace(plan, cache=None, cache_params={}, cache_optional=False)
        elif isinstance(cache, str):
            plan = replace(plan, cache=cache, cache_params={}, cache_optional=False)
        else:
            raise ConfigError(f"wrap: cache={cache!r} must be a kind such as 'first_block', or False for none.")
    if "attention_backend" in overrides:
        backend = overrides["attention_backend"]
        if backend is not None and not isinstance(backend, str):
            raise ConfigError(f"wrap: attention_backend={backend!r} must be a name such as 'native' or 'sage'.")
        plan = replace(plan, attention_backend=backend)
    if "compile" in overrides:
        if not isinstance(overrides["compile"], bool):
            raise ConfigError(f"wrap: compile={overrides['compile']!r} must be True or False.")
        plan = replace(plan, compile=overrides["compile"])
    return plan
