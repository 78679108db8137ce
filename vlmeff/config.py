"""Turns the arguments of ``wrap`` and a preset into one frozen plan, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kvcache import RetentionPolicy, policies
from tokenpruning import InnerPruner, Method, Resampler, Selector, methods
from tokenpruning.layout import Newline
from vlmeff import zoo
from vlmeff.errors import ConfigError, UnknownNameError, UnsupportedCacheError, UnsupportedModelError
from vlmeff.speculative.text import TextSpeculation
from vlmeff.vlm.families import Family, family_of, is_vlm
from vlmeff.vlm.families.base import Positions
from vlmeff.vlm.inner_request import check_model
from vlmeff.vlm.reduce import Reduction
from vlmeff.vlm.retention import check_retention
from vlmeff.zoo_schema import ModelRecord

logger = logging.getLogger("vlmeff")

OPTIONS = (
    "newline",
    "positions",
    "text_source",
    "min_visual_tokens",
    "kv_storage",
    "kv_headroom",
)  # of ``wrap``, besides the fields of methods
TokensArgument = Method | str | Sequence[Method | str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a wrapped model does. ``preset`` and ``entry`` say where it comes from.

    ``reduction`` shortens the prompt before the language model, ``inner`` drops tokens between its layers, ``kv`` says
    which entries of the prompt the cache keeps. ``kv_optional``: it comes from the preset, so a call that it cannot
    take part in goes without it. ``text_speculation`` drafts and verifies what ``generate`` writes.
    """

    preset: str | None = None
    entry: str | None = None
    reduction: Reduction = field(default_factory=Reduction)
    inner: Any = None
    kv: RetentionPolicy | None = None
    kv_storage: Any = None
    kv_headroom: int = 0
    kv_optional: bool = False
    text_speculation: TextSpeculation | None = None

    @property
    def methods(self) -> list[Method]:
        """The token methods, before the language model and inside it."""
        return [method for method in (self.reduction.method, self.inner) if method is not None]

    @property
    def method_name(self) -> str:
        names = [methods.name_of(method) for method in self.methods]
        if self.kv is not None:
            names.append(policies.name_of(self.kv))
        if self.text_speculation is not None:
            names.append(f"{self.text_speculation.drafter.name} speculation")
        return " + ".join(names) or "none"


def make_plan(
    model: Any,
    preset: str | None,
    *,
    tokens: TokensArgument | None,
    kv: RetentionPolicy | str | Mapping[str, Any] | Literal[False] | None = None,
    unavailable: dict[str, object],
    overrides: dict[str, Any],
) -> tuple[Plan, Family | None]:
    """Resolve a preset and named techniques for ``model``.

    Args:
        unavailable: arguments of ``wrap`` for techniques that this version does not have; must be None.
        overrides: fields of the token method that replace those of the preset, and ``newline``, ``text_source``,
            ``min_visual_tokens``.
    Raises:
        ConfigError, UnknownNameError, UnsupportedModelError
    """
    for name, value in unavailable.items():
        if value is not None:
            raise ConfigError(f"wrap: {name}={value!r} is not available in this version of vlmeff; leave {name} out.")
    options = {name: overrides[name] for name in OPTIONS if name in overrides}
    storing = {name: options.pop(name) for name in ("kv_storage", "kv_headroom") if name in options}
    kv_storage, kv_headroom = storing.get("kv_storage"), storing.get("kv_headroom", 0)
    overrides = {name: value for name, value in overrides.items() if name not in OPTIONS}
    _check_options(options)
    asked = list(options)
    entry: str | None = None
    chosen: list[Method] = []
    policy: RetentionPolicy | None = None
    if preset is not None:
        resolved = zoo.resolve(model, preset)
        entry, preset = resolved.entry, resolved.preset
        chosen, policy = _of_steps(resolved.steps)
        if tokens is None:
            options.setdefault("min_visual_tokens", resolved.min_visual_tokens)
            if any(step.method == "fourier" for step in resolved.steps):
                _check_fourier_is_trained(model, preset, resolved.model)
        if resolved.status not in ("verified", "fixture"):
            known = f"has status {resolved.status!r}" if resolved.status else "has no entry in the model zoo"
            warnings.warn(
                f"vlmeff: preset {preset!r} {known} for {type(model).__name__}: measure what it costs on your data.",
                stacklevel=3,
            )
    record = zoo.find_model(model)
    if record is not None and record.positions is not None:
        options.setdefault("positions", record.positions)
    chosen, policy = _override(_named_methods(tokens, chosen, record), _named_policy(kv, policy), overrides)
    before, inside = _places(chosen)
    optional = kv is None and not storing and not any(name in _fields(type(policy)) for name in overrides)
    if policy is not None:
        try:
            check_retention(model, policy, storage=kv_storage, headroom=kv_headroom, token_pruning=described(chosen))
        except (UnsupportedModelError, UnsupportedCacheError) as error:
            if not optional:
                raise
            logger.info("vlmeff: the KV step of preset %r is skipped for %s: %s", preset, type(model).__name__, error)
            policy = None
    elif storing:
        name, value = next(iter(storing.items()))
        raise ConfigError(
            f"wrap: {name}={value!r} is about what KV retention keeps, and none is asked for; add "
            "kv=vlmeff.PrefixKV(keep_ratio=1.0) to keep everything."
        )
    if not chosen:
        if tokens is not None or asked:
            what = "tokens=[]" if tokens is not None else f"{asked[0]}=..."
            raise ConfigError(f"wrap: {what} names no token method; pass tokens='hiprune', for example.")
        return Plan(preset=preset, entry=entry, kv=policy, kv_optional=optional, **storing), None
    if not is_vlm(model):
        if tokens is not None:
            raise UnsupportedModelError(
                f"tokens: {type(model).__name__} takes no pictures, so it has no visual tokens."
            )
        if policy is not None:
            logger.info("vlmeff: %s takes no pictures: the preset's token step is skipped", type(model).__name__)
            return Plan(preset=preset, entry=entry, kv=policy, kv_optional=optional, **storing), None
        raise UnsupportedModelError(
            f"preset {preset!r} has nothing for {type(model).__name__}: it takes no pictures, and there is no KV step "
            "or none for its cache."
        )
    family = family_of(model)
    family.refuse_model(model)
    if family.positions == "keep" and options.get("positions") == "repack":
        raise ConfigError(
            f"wrap: positions='repack' does not fit {family.model_type}, whose positions follow the grid."
        )
    for method in before:
        if isinstance(method, Selector):  # raises on an illegal layer
            family.score_layers(model, method.needs, getattr(method, "object_layer", None))
    logger.info("vlmeff: %s on %s", ", ".join(map(str, chosen)), type(model).__name__)
    if inside:
        inside = [_inner_for(model, family, inside[0], before)]
    reduction = Reduction(method=before[0] if before else None, **options)  # type: ignore[arg-type]
    inner = inside[0] if inside else None
    plan = Plan(
        preset=preset,
        entry=entry,
        reduction=reduction,
        inner=inner,
        kv=policy,
        kv_optional=optional,
        **storing,
    )
    return plan, family


def _inner_for(model: Any, family: Family, method: Any, before: Sequence[Method]) -> Any:
    """The method inside the language model with the schedule that it will follow; raises when the model cannot."""
    text, config = family.text_model(model), model.config.get_text_config()
    method = method.for_model(
        model_type=model.config.model_type, layers=config.num_hidden_layers, hidden_size=config.hidden_size
    )
    check_model(model, text, method.schedule)
    if before:
        method.refuse_after(before[0])
    return method


def described(chosen: Sequence[Method]) -> str | None:
    """Token methods with their budgets, as recipes name them: "hiprune(keep=0.5)"; None when there is none."""

    def one(method: Method) -> str:
        budget = next((f"({n}={getattr(method, n)})" for n in ("keep", "ratio") if hasattr(method, n)), "")
        return methods.name_of(method) + budget

    return " + ".join(map(one, chosen)) or None


def make_method(name: str, arguments: dict[str, Any]) -> Method:
    """Build a registered token method; unknown arguments list the legal ones."""
    cls = methods.get(name)
    _check_fields(cls, name, arguments)
    return cls(**arguments)


def make_policy(name: str, arguments: dict[str, Any]) -> RetentionPolicy:
    """Build a registered retention policy; unknown arguments list the legal ones."""
    cls = policies.get(name)
    _check_fields(cls, name, arguments)
    return cls(**arguments)


def check_methods(
    steps: Sequence[zoo.Step],
    tokens: TokensArgument | None,
    overrides: dict[str, Any],
    kv: RetentionPolicy | str | Mapping[str, Any] | Literal[False] | None = None,
) -> None:
    """Raise what ``make_plan`` would raise of the methods alone, before a model is loaded."""
    chosen, policy = _of_steps(steps)
    named = {name: value for name, value in overrides.items() if name not in OPTIONS}
    _places(_override(_named_methods(tokens, chosen, None), _named_policy(kv, policy), named)[0])


def _of_steps(steps: Sequence[zoo.Step]) -> tuple[list[Method], RetentionPolicy | None]:
    """The token methods and the retention policy of a preset."""
    chosen = [make_method(s.method, {**s.budget(), **s.params}) for s in steps if not s.is_retention]
    kept = [make_policy(s.method, s.params) for s in steps if s.is_retention]
    return chosen, kept[0] if kept else None


def _named_policy(kv: object, of_preset: RetentionPolicy | None) -> RetentionPolicy | None:
    """What is asked for by name, at the preset's ratio where none is given; else the preset's policy.

    A mapping holds the name as "policy", and the policy's arguments. False takes the preset's away.
    """
    if kv is None:
        return of_preset
    if kv is False:
        return None
    ratio = {} if of_preset is None else {"keep_ratio": of_preset.keep_ratio}
    if isinstance(kv, str):
        return make_policy(kv, ratio)
    if isinstance(kv, Mapping):
        if not isinstance(kv.get("policy"), str):
            raise ConfigError(
                f"wrap: kv={dict(kv)!r} must name its policy, as {{'policy': 'snapkv', 'keep_ratio': 0.3}}; the names "
                f"are {', '.join(policies.names())}."
            )
        return make_policy(kv["policy"], ratio | {str(name): x for name, x in kv.items() if name != "policy"})
    if isinstance(kv, type) or not isinstance(kv, RetentionPolicy):
        raise ConfigError(
            f"wrap: kv={kv!r} must be a KV retention policy such as vlmeff.PrefixKV(keep_ratio=0.5), or one of the "
            f"names {', '.join(policies.names())}; False leaves the preset's out."
        )
    return kv


def _places(chosen: list[Method]) -> tuple[list[Selector | Resampler], list[InnerPruner]]:
    """The methods before the language model and inside it, one of each at most."""
    before = [method for method in chosen if not isinstance(method, InnerPruner)]
    inside = [method for method in chosen if isinstance(method, InnerPruner)]
    if len(before) > 1 or len(inside) > 1:
        names = " and ".join(methods.name_of(method) for method in (before if len(before) > 1 else inside))
        raise ConfigError(
            f"tokens: {names} cannot be combined; use one method before the language model and one inside it."
        )
    return before, inside


def _named_methods(tokens: TokensArgument | None, of_preset: list[Method], record: ModelRecord | None) -> list[Method]:
    """What is asked for by name, else the preset's methods.

    Where only the name is given, the budget is the preset's and parameters are those the zoo has for the model.
    """
    if tokens is None:
        return of_preset
    keep = next((method.keep for method in of_preset if isinstance(method, Selector)), None)
    named = [tokens] if isinstance(tokens, str) or not isinstance(tokens, Sequence) else list(tokens)
    return [_named_method(item, keep, record) for item in named]


def _named_method(item: object, keep: Any, record: ModelRecord | None) -> Method:
    if isinstance(item, str):
        cls = methods.get(item)
        arguments = {} if record is None else dict(record.method_params.get(item, {}))
        if keep is not None and "keep" in _fields(cls):
            arguments["keep"] = keep
        return make_method(item, arguments)
    if isinstance(item, type) or not isinstance(item, Selector | Resampler | InnerPruner):
        raise ConfigError(
            f"wrap: tokens={item!r} must be a token reduction method such as vlmeff.HiPrune(keep=0.5), or one of "
            f"the names {', '.join(methods.names())}."
        )
    return item


def _override(
    chosen: list[Method], policy: RetentionPolicy | None, overrides: dict[str, Any]
) -> tuple[list[Method], RetentionPolicy | None]:
    """Each override replaces the field of the methods (and the policy) that have it."""
    everything: list[Any] = [*chosen, *([] if policy is None else [policy])]
    if overrides and not everything:
        raise ConfigError(f"wrap: {next(iter(overrides))}=... changes a method, and none is asked for.")
    for name in overrides:
        if not any(name in _fields(type(method)) for method in everything):
            legal = sorted({field for method in everything for field in _fields(type(method))})
            owners = " and ".join(_name_of(method) for method in everything)
            raise UnknownArgumentError(f"argument of {owners}", name, legal)

    def replaced(method: Any) -> Any:
        own = {name: value for name, value in overrides.items() if name in _fields(type(method))}
        return dataclasses.replace(method, **own) if own else method

    return [replaced(method) for method in chosen], None if policy is None else replaced(policy)


def _name_of(method: Any) -> str:
    return policies.name_of(method) if isinstance(method, RetentionPolicy) else methods.name_of(method)


def _check_options(options: dict[str, Any]) -> None:
    newline = options.get("newline", "drop")
    if newline not in get_args(Newline):
        raise ConfigError(f"wrap: newline={newline!r} must be one of {', '.join(map(repr, get_args(Newline)))}.")
    positions = options.get("positions")
    if positions is not None and positions not in get_args(Positions):
        raise ConfigError(f"wrap: positions={positions!r} must be one of {', '.join(map(repr, get_args(Positions)))}.")
    threshold = options.get("min_visual_tokens", 0)
    if type(threshold) is not int or threshold < 0:
        raise ConfigError(f"wrap: min_visual_tokens={threshold!r} must be an int >= 0.")
    if "text_source" in options and (
        isinstance(options["text_source"], type) or not callable(getattr(options["text_source"], "relevance", None))
    ):
        raise ConfigError(
            f"wrap: text_source={options['text_source']!r} must be a text source such as vlmeff.EmbeddingText()."
        )


def _check_fourier_is_trained(model: Any, preset: str, record: str | None) -> None:
    """A preset must not resample the tokens of a checkpoint that was not trained for it."""
    if record is None or "fourier" not in zoo.load_zoo().models[record].trained_with:
        raise ConfigError(
            f"preset {preset!r} resamples tokens with the DCT, which {type(model).__name__} was not trained for "
            "according to the model zoo. Ask for it by name: wrap(model, None, tokens=vlmeff.Fourier(gain='preserve'))."
        )


def _fields(cls: type[Any]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _check_fields(cls: type[Any], name: str, arguments: dict[str, Any]) -> None:
    for argument in arguments:
        if argument not in _fields(cls):
            raise UnknownArgumentError(f"argument of {name}", argument, _fields(cls))


class UnknownArgumentError(UnknownNameError, TypeError):
    """A keyword argument of ``wrap`` belongs to no technique."""
