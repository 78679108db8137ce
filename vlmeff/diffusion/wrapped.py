"""The wrapped pipeline or transformer: quantized layers, a feature cache, an attention back end, compiled blocks.

Order of application: quantize, set the attention back end, enable the cache, compile. What fails undoes what came
before. ``detach`` undoes all of it in reverse.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vlmeff.diffusion.acceleration import Acceleration, compile_blocks, enable_cache, set_attention_backend
from vlmeff.diffusion.checkpoint import has_quantized
from vlmeff.diffusion.convert import Progress, Quantized, convert, quantize_
from vlmeff.diffusion.cost import Forecast, forecast
from vlmeff.diffusion.counting import Work, count_work
from vlmeff.diffusion.families import find_family, text_encoder_rules
from vlmeff.diffusion.generating import call_defaults
from vlmeff.diffusion.plan import TEXT_ENCODERS, DiffusionPlan, Quant, transformers_of
from vlmeff.diffusion.report import DiffusionReport, TransformerReport, bytes_held
from vlmeff.diffusion.rules import KEEP
from vlmeff.diffusion.schemes import auto_scheme, get_scheme
from vlmeff.errors import (
    AlreadyQuantizedError,
    ConfigError,
    IncompatibleError,
    QuantConfigError,
    UnsupportedModelError,
)
from vlmeff.reporting import Clock

logger = logging.getLogger("vlmeff")

STATE = "_vlmeff"


@dataclass(eq=False)
class State:
    """What a wrapped pipeline or transformer carries in ``model._vlmeff``."""

    plan: DiffusionPlan
    original_class: Any
    quantized: dict[str, Quantized] = field(default_factory=dict)  # by component
    undo: list[Callable[[], Any]] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)  # what was chosen or left out, and why
    bytes_before: dict[str, int] = field(default_factory=dict)
    report: DiffusionReport | None = None


def attach(model: Any, plan: DiffusionPlan) -> None:
    """Apply a plan to a pipeline or transformer; one that is wrapped is unwrapped first, and stays so on failure.

    Raises:
        VlmeffError: something that was asked for by name cannot work; the model is then as it was.
    """
    if STATE in model.__dict__:
        detach(model)
    state = State(plan, type(model))
    modules = transformers_of(model)
    state.bytes_before = {name: bytes_held(module) for name, module in _components(model).items()}
    try:
        if plan.quant is not None:
            done, notes = quantize_model(model, plan.quant, optional=plan.quant_optional)
            state.quantized, state.notes = done, notes
            state.undo += [q.restore for q in done.values() if q.originals]
        for module in modules.values():
            _accelerate(model, module, state)
    except BaseException:
        _undo(state)
        raise
    for note in state.notes:
        logger.info("vlmeff: %s", note)
    object.__setattr__(model, STATE, state)
    model.__class__ = _wrapped_class(state.original_class)
    state.report = _report(model, state)


def detach(model: Any) -> None:
    """Undo ``attach``.

    Raises:
        QuantConfigError: the original weights were not kept; the model stays wrapped.
    """
    state: State = model.__dict__[STATE]
    if any(not q.originals for q in state.quantized.values()):
        raise QuantConfigError(
            "unwrap: the original weights were not kept (keep_original=False); load the model again."
        )
    model.__class__ = state.original_class
    object.__delattr__(model, STATE)
    _undo(state)


def _undo(state: State) -> None:
    while state.undo:
        state.undo.pop()()


def _components(model: Any) -> dict[str, nn.Module]:
    """Transformers and text encoders, by component."""
    encoders = {name: getattr(model, name, None) for name in TEXT_ENCODERS} if not isinstance(model, nn.Module) else {}
    return transformers_of(model) | {name: m for name, m in encoders.items() if isinstance(m, nn.Module)}


def quantize_model(
    model: Any, quant: Quant, *, optional: bool = False, progress: Progress | None = None
) -> tuple[dict[str, Quantized], list[str]]:
    """Quantize the transformers (and the text encoder, if asked for) of a pipeline or transformer in place.

    Args:
        optional: leave a component that is quantized already as it is, with a note, instead of raising.
    Returns:
        (what was done by component, notes on what was chosen or left out).
    Raises:
        VlmeffError: see ``quantize_``; the model is then as it was, if its weights are kept.
    """
    done: dict[str, Quantized] = {}
    notes: list[str] = []
    try:
        for name, module in transformers_of(model).items():
            if has_quantized(module):
                if not optional:
                    raise AlreadyQuantizedError(
                        f"wrap: {name or type(module).__name__} is quantized already; leave quant out, or load the "
                        "unquantized model."
                    )
                notes.append(f"{name or type(module).__name__} is quantized already")
                continue
            scheme, why = choose_scheme(module, quant)
            if why:
                notes.append(f"scheme {scheme}: {why}")
            done[name] = quantize_(
                module,
                scheme,
                rules=quant.rules,
                replace_rules=quant.replace_rules,
                group=quant.group,
                rank=quant.rank,
                calibrate=_calibration(model, quant) if get_scheme(scheme).smooth else None,
                alpha=quant.alpha,
                refine=quant.refine,
                keep_original=quant.keep_original,
                progress=progress,
            )
            if get_scheme(scheme).smooth and not done[name].calibrated:
                notes.append(f"{scheme} without calibration data: activations are not smoothed")
        if quant.text_encoder is not None:
            done |= _quantize_text(model, quant.text_encoder, keep_original=quant.keep_original)
    except BaseException:
        for q in done.values():
            if q.originals:
                q.restore()
        raise
    return done, notes


def _quantize_text(model: Any, scheme: str, *, keep_original: bool) -> dict[str, Quantized]:
    done = {}
    for name in TEXT_ENCODERS:
        encoder = None if isinstance(model, nn.Module) else getattr(model, name, None)
        if not isinstance(encoder, nn.Module):
            raise ConfigError(f"quant: text_encoder={scheme!r}, and {type(model).__name__} has none loaded.")
        rules = [replace(rule, scheme=scheme) if rule.scheme != KEEP else rule for rule in text_encoder_rules(encoder)]
        done[name] = convert(encoder, scheme, rules, keep_original=keep_original)
    return done


def choose_scheme(module: nn.Module, quant: Quant) -> tuple[str, str]:
    """(scheme, why) of a transformer; the reason is empty where the scheme was named."""
    if quant.scheme != "auto":
        return quant.scheme, ""
    weights = sum(p.numel() for p in module.parameters())
    small = quant.memory_gb is not None and weights > quant.memory_gb * 1e9
    device = next(module.parameters()).device
    return auto_scheme(device, calibrated=quant.calibrate is not None, small=small)


def _calibration(model: Any, quant: Quant) -> Callable[[], Any] | None:
    """The calibration calls of a plan, as a function without arguments."""
    given = quant.calibrate
    if given is None:
        return None
    if callable(given):
        return functools.partial(given, model)
    if isinstance(model, nn.Module):
        raise QuantConfigError(
            "quant: calibrate={...} calls a pipeline, and this is a transformer; pass a function that calls it."
        )
    return functools.partial(model, **{"output_type": "latent", **call_defaults(model), **given})


def _accelerate(model: Any, module: nn.Module, state: State) -> None:
    plan = state.plan
    if plan.attention_backend is not None:
        _on(set_attention_backend(module, plan.attention_backend), state)
    if plan.cache is not None:
        timestep = None if isinstance(model, nn.Module) else (lambda: model.current_timestep)
        try:
            handle = enable_cache(module, plan.cache, current_timestep=timestep, settings=plan.cache_params)
        except (UnsupportedModelError, IncompatibleError) as error:
            if not plan.cache_optional:
                raise
            state.notes.append(f"the cache of preset {plan.preset!r} is left out: {error}")
        else:
            _on(handle, state)
    if plan.compile:
        _on(compile_blocks(module), state)


def _on(handle: Acceleration, state: State) -> None:
    state.undo.append(handle.undo)
    state.notes.append(str(handle))


def _rebuild(original: Any) -> Any:
    cls = _wrapped_class(original)
    return cls.__new__(cls)


@functools.cache
def _wrapped_class(original: Any) -> Any:
    """A subclass under the same name whose calls are measured: of a pipeline ``__call__``, of a model ``forward``."""
    method = "forward" if issubclass(original, nn.Module) else "__call__"

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(getattr(original, method), self)
        if STATE not in self.__dict__ or torch.compiler.is_compiling():
            return run(*args, **kwargs)
        return _measured(self, run, args, kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        state: State | None = self.__dict__.get(STATE)
        if state is not None and (state.plan.cache or state.plan.attention_backend or state.plan.compile):
            raise IncompatibleError(
                "copy: caches, attention back ends and compiled blocks cannot be copied or pickled; call "
                "vlmeff.unwrap first, or wrap with cache=False."
            )
        return _rebuild, (original,), self.__dict__.copy()

    members = {
        "__reduce_ex__": reduce_ex,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        method: functools.wraps(getattr(original, method))(call),
    }
    return type(original.__name__, (original,), members)


def _measured(model: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: State = model.__dict__[STATE]
    modules = transformers_of(model)
    if not isinstance(model, nn.Module):
        for module in modules.values():  # diffusers does so at the end of a call, which an exception does not reach
            if getattr(module, "is_cache_enabled", False):
                module._reset_stateful_cache()  # type: ignore[operator]
    clock = Clock(next(next(iter(modules.values())).parameters()).device)
    with ExitStack() as counting:
        work = {
            name: counting.enter_context(count_work(module))
            for name, module in modules.items()
            if find_family(module) is not None and not state.plan.compile  # hooks would break compiled graphs
        }
        clock.mark("start")
        out = run(*args, **kwargs)
        clock.mark("end")
    if "" in work:
        work[""].calls = 1  # this is that call: hooks set inside it do not see it
    state.report = _report(
        model, state, work, total_ms=clock.between("start", "end"), estimate=_estimate(model, args, kwargs)
    )
    return out


def _estimate(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forecast | None:
    """What the linear layers are of the operations of this call of a pipeline; None where its size is not known."""
    if isinstance(model, nn.Module):
        return None
    state: State = model.__dict__[STATE]
    bound = inspect.signature(state.original_class.__call__).bind_partial(model, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    config = model.transformer.config
    # Pipelines whose default size is None take it from the transformer's configuration.
    spatial: Any = getattr(model, "vae_scale_factor_spatial", None) or getattr(
        model, "vae_spatial_compression_ratio", None
    )
    temporal: Any = getattr(model, "vae_scale_factor_temporal", None) or getattr(
        model, "vae_temporal_compression_ratio", 4
    )
    height, width, frames = (given.get(name) for name in ("height", "width", "num_frames"))
    if spatial is not None:
        height = height or (config.get("sample_height") or 0) * spatial
        width = width or (config.get("sample_width") or 0) * spatial
        frames = frames or ((config.get("sample_frames") or 1) - 1) // temporal * temporal + 1
    if not (height and width and frames):
        return None
    scale = None if spatial is None else (temporal, spatial, spatial)
    try:
        return forecast(
            model.transformer,
            frames,
            height,
            width,
            text_tokens=given.get("max_sequence_length"),
            vae_scale=scale,
        )
    except (ConfigError, UnsupportedModelError):  # a size the pipeline rounds, or a class with rules of the caller's
        return None


def _report(
    model: Any,
    state: State,
    work: Mapping[str, Work] = MappingProxyType({}),
    *,
    total_ms: float | None = None,
    estimate: Forecast | None = None,
) -> DiffusionReport:
    parts = []
    for name, module in _components(model).items():
        done, counted = state.quantized.get(name), work.get(name, Work())
        parts.append(
            TransformerReport(
                component=name or type(module).__name__,
                scheme=None if done is None else done.scheme,
                table=None if done is None else done.table,
                calibrated=done is not None and done.calibrated,
                bytes_before=state.bytes_before[name],
                bytes_after=bytes_held(module),
                calls=counted.calls,
                blocks_run=counted.blocks_computed,
                blocks_skipped=counted.blocks_called - counted.blocks_computed,
            )
        )
    return DiffusionReport(
        model=state.original_class.__name__,
        preset=state.plan.preset,
        parts=tuple(parts),
        notes=tuple(state.notes),
        total_ms=total_ms,
        estimate=estimate,
    )
