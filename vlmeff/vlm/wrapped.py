"""The wrapped model: its own class with ``generate`` and ``forward`` of this instance going through the reduction.

``attach`` swaps the instance's class for a subclass of the same name; nothing else of the model is touched and no other
instance is concerned. ``detach`` swaps it back.
"""

from __future__ import annotations

import functools
import inspect
import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from kvcache.cache import RetainedCache
from vlmeff.config import Plan
from vlmeff.errors import UnsupportedCacheError, UnsupportedInputError
from vlmeff.reporting import Meter, Report, columns, text_flops, visual_tokens
from vlmeff.speculative.text import TextDecoding
from vlmeff.vlm.families import Family
from vlmeff.vlm.families.base import present
from vlmeff.vlm.inner import INNER_RECORD
from vlmeff.vlm.inside import Inside, inside_call, kept_columns
from vlmeff.vlm.padding import move_padding, moved_forward, remember
from vlmeff.vlm.record import RECORD, ShortRequest, attach_record
from vlmeff.vlm.reduce import Untouched, shorten_request
from vlmeff.vlm.restoring import (
    CallersPrompt,
    PromptRestoringStreamer,
    RestoringCriterion,
    RestoringProcessor,
    reduce_total_lengths,
)
from vlmeff.vlm.speculating import speculate

STATE = "_vlmeff"
# Entry points of transformers' continuous batching, which keeps a paged cache of its own.
CONTINUOUS = ("generate_batch", "continuous_batching_context_manager", "init_continuous_batching")


@dataclass(eq=False)
class State:
    """What a wrapped model carries in ``model._vlmeff``."""

    original_class: Any
    plan: Plan
    family: Family | None
    # forward or generate set on the instance itself (accelerate's hooks do): they go on working underneath.
    instance_methods: dict[str, Any] = field(default_factory=dict)
    report: Report | None = None
    lock: Any = field(default_factory=threading.RLock, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}  # a lock can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())


@dataclass(eq=False)
class _Call:
    """The ``generate`` call that runs in this thread: its forward passes are measured and not shortened again.

    ``jump``: see ``ShortRequest``; added to the positions behind the first ``width`` columns.
    """

    state: State
    meter: Meter
    width: int = 0
    jump: Tensor | None = None

    def numbered(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one forward pass with the positions of new tokens counted on from the caller's prompt.

        ``generate`` gives them counted on from the last token that it knows.
        """
        positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        if self.jump is None or positions is None:
            return kwargs
        past = 0 if cache is None else cache.get_seq_length()
        new = past + torch.arange(positions.shape[-1], device=positions.device) >= self.width
        jump = self.jump.to(positions).repeat_interleave(positions.shape[-2] // self.jump.shape[1], 1)[..., None]
        jump = jump[0] if positions.ndim == 2 else jump[-len(positions) :]
        return {**kwargs, "position_ids": positions + jump * new}


_running: ContextVar[_Call | None] = ContextVar("vlmeff_running", default=None)


def attach(model: Any, plan: Plan, family: Family | None) -> None:
    """Make ``model`` a wrapped model, or update the plan of one that is wrapped."""
    state: State | None = model.__dict__.get(STATE)
    if state is not None:
        state.plan, state.family, state.report = plan, family, None
        return
    methods = {name: model.__dict__[name] for name in ("forward", "generate") if name in model.__dict__}
    for name in methods:
        object.__delattr__(model, name)
    original: Any = type(model)
    object.__setattr__(model, STATE, State(original, plan, family, methods))
    model.__class__ = _wrapped_class(original)


def detach(model: Any) -> None:
    """Undo ``attach``."""
    state: State = model.__dict__[STATE]
    model.__class__ = state.original_class
    object.__delattr__(model, STATE)
    for name, method in state.instance_methods.items():
        object.__setattr__(model, name, method)


def _rebuild(original: Any) -> Any:
    cls = _wrapped_class(original)
    return cls.__new__(cls)


@functools.cache
def _wrapped_class(original: Any) -> Any:
    """A subclass of ``original`` under the same name, so that whatever looks at names (config.architectures, pipelines,
    warnings) sees the model it knows."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if STATE not in self.__dict__:  # made by this class, or called through a reference kept from before unwrap
            return original.forward(self, *args, **kwargs)
        return _forward(self, args, kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if STATE not in self.__dict__:
            return original.generate(self, *args, **kwargs)
        return _generate(self, args, kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _rebuild, (original,), self.__dict__.copy()

    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce_ex,
        "forward": functools.wraps(original.forward)(forward),
    }
    if hasattr(original, "generate"):
        members["generate"] = functools.wraps(original.generate)(generate)
    for name in CONTINUOUS:
        if hasattr(original, name):
            members[name] = _unless_retained(name, original)
    return type(original.__name__, (original,), members)


def _unless_retained(name: str, original: Any) -> Any:
    def refuse_retention(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: State | None = self.__dict__.get(STATE)
        if state is not None and state.plan.kv is not None and not state.plan.kv_optional:
            raise UnsupportedCacheError(
                f"{name}: continuous batching has a paged cache of its own, which KV retention cannot work in. Use "
                "model.generate with a padded batch, or wrap with kv=False, or vlmeff.unwrap(model) first."
            )
        return getattr(original, name)(self, *args, **kwargs)

    return functools.wraps(getattr(original, name))(refuse_retention)


def _original(model: Any, name: str) -> Any:
    """The method as it would run without the wrapper."""
    state: State = model.__dict__[STATE]
    if name in state.instance_methods:
        return state.instance_methods[name]
    # Not a bound method: torch.compile would look its name up on the instance again and find the wrapper.
    return functools.partial(getattr(state.original_class, name), model)


def _bind(name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    names = [n for n, p in inspect.signature(method).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(f"{name}() takes {len(names)} positional arguments but {len(args)} were given")
    named = dict(zip(names, args, strict=False))
    twice = named.keys() & kwargs.keys()
    if twice:
        raise TypeError(f"{name}() got multiple values for argument {sorted(twice)[0]!r}")
    return {**named, **kwargs}


def _forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: State = model.__dict__[STATE]
    original = _original(model, "forward")
    call = _running.get()
    if call is not None and call.state is state:
        output = original(*args, **call.numbered(kwargs))
        if not torch.compiler.is_compiling():
            call.meter.after_forward(columns(args, kwargs), output)
        return output
    named = _bind("forward", original, args, kwargs)
    if not _concerns(named, state.plan):
        return original(*args, **kwargs)
    named = moved_forward(named)
    meter = Meter(_device(model, named))
    request = shorten_request(
        model, state.family, state.plan.reduction, named, generating=False, lock=state.lock, clock=meter.clock
    )
    short = dict(named) if isinstance(request, Untouched) else dict(request.kwargs)
    inside = _inside(model, state, short, request, generating=False)
    if isinstance(request, ShortRequest) and request.keep is not None:
        _check_logits_to_keep(named)
        short["return_dict"] = True
    with inside:
        output = original(**short)
    if isinstance(request, ShortRequest):
        if request.keep is None:
            return output  # a step of a hand-written loop; the report stays that of the prompt
        output.vlmeff_keep = kept_columns(request.keep, named.get("attention_mask"), inside.inner)
        attach_record(getattr(output, "past_key_values", None), request.record)
    elif inside.is_step:
        return output
    elif inside.inner is not None and inside.inner.record is not None:
        everything = torch.ones_like(named["input_ids"], dtype=torch.bool)
        output.vlmeff_keep = kept_columns(everything, named.get("attention_mask"), inside.inner)
    meter.after_forward(columns((), named), output)
    meter.finish()
    state.report = _make_report(model, state, request, named, meter, new_tokens=None, inside=inside)
    if isinstance(request, ShortRequest) and named.get("return_dict", model.config.return_dict) is False:
        return output.to_tuple()
    return output


@torch.no_grad()
def _generate(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: State = model.__dict__[STATE]
    original = _original(model, "generate")
    named = _bind("generate", original, args, kwargs)
    if "inputs" in named:
        if named.get("input_ids") is not None and named["inputs"] is not None:
            raise TypeError("generate() got both inputs and input_ids")
        inputs = named.pop("inputs")
        if inputs is not None:
            named["input_ids"] = inputs
    assistant_inputs = named.pop("assistant_inputs", None) if state.plan.text_speculation is not None else None
    meter = Meter(_device(model, named))
    callers_ids = named.get("input_ids")
    named, moved = move_padding(model, named, retains=_retains(named, state.plan))
    request: ShortRequest | Untouched = Untouched()
    if _concerns(named, state.plan):
        request = shorten_request(
            model, state.family, state.plan.reduction, named, generating=True, lock=state.lock, clock=meter.clock
        )
    short = dict(named) if isinstance(request, Untouched) else dict(request.kwargs)
    inside = _inside(model, state, short, request, generating=True)
    input_ids = short.get("input_ids")
    prompt: CallersPrompt | None = None
    if isinstance(request, ShortRequest):
        reduce_total_lengths(model, short, request.dropped)
    if callers_ids is not None and (isinstance(request, ShortRequest) or moved is not None):
        prompt = CallersPrompt(callers_ids, short["input_ids"].shape[1])
        _show_prompt(prompt, short)
    decoding = speculate(model, state.plan, named, short, assistant_inputs=assistant_inputs)
    if input_ids is not None:
        cache = short.get("past_key_values")
        meter.expect(input_ids.shape[1] - (int(cache.get_seq_length()) if cache is not None else 0))
    call = _Call(state, meter)
    if isinstance(request, ShortRequest) and request.jump is not None:
        call.width, call.jump = short["input_ids"].shape[1], request.jump
    token = _running.set(call)
    try:
        with inside:
            result = original(**short)
    finally:
        _running.reset(token)
    cache = meter.cache
    meter.finish()
    if moved is not None:
        remember(cache, moved)
    if input_ids is None:
        return result
    sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
    new_tokens = sequences.shape[1] - input_ids.shape[1]
    if isinstance(request, ShortRequest):
        attach_record(cache, request.record.repeated(cache))
    if prompt is not None:
        sequences = prompt.restore(sequences)
        if isinstance(result, Tensor):
            result = sequences
        else:
            result.sequences = sequences
    state.report = _make_report(
        model, state, request, named, meter, new_tokens=new_tokens, inside=inside, decoding=decoding
    )
    return result


def _show_prompt(prompt: CallersPrompt, kwargs: dict[str, Any]) -> None:
    """Let what the caller hangs into ``generate`` see the prompt as the caller gave it."""
    if kwargs.get("stopping_criteria"):
        given = kwargs["stopping_criteria"]
        given = given if isinstance(given, list) else [given]
        kwargs["stopping_criteria"] = StoppingCriteriaList(RestoringCriterion(c, prompt) for c in given)
    if kwargs.get("logits_processor"):
        given = kwargs["logits_processor"]
        kwargs["logits_processor"] = LogitsProcessorList(RestoringProcessor(p, prompt) for p in given)
    if kwargs.get("prefix_allowed_tokens_fn") is not None:
        kwargs["prefix_allowed_tokens_fn"] = prompt.restoring_prefix_fn(kwargs["prefix_allowed_tokens_fn"])
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = PromptRestoringStreamer(kwargs["streamer"], prompt.prompt_ids)


def _retains(named: dict[str, Any], plan: Plan) -> bool:
    """Whether a call of ``generate`` fills a cache that keeps a part of the prompt."""
    cache = named.get("past_key_values")
    return isinstance(cache, RetainedCache) or (cache is None and plan.kv is not None)


def _concerns(named: dict[str, Any], plan: Plan) -> bool:
    """Whether a request may be shortened: decode steps and text prompts take the short way.

    A cache of a shortened prompt stays one, whatever the plan has become since.
    """
    cache = named.get("past_key_values")
    if hasattr(cache, RECORD) or hasattr(cache, INNER_RECORD) or isinstance(cache, RetainedCache):
        return True
    if plan.kv is not None and not (plan.kv_optional and torch.compiler.is_compiling()):
        return True
    return bool(plan.methods) and bool(present(named))


def _inside(
    model: Any, state: State, kwargs: dict[str, Any], request: ShortRequest | Untouched, *, generating: bool
) -> Inside:
    skipped = isinstance(request, Untouched) and request.skipped
    return inside_call(model, state.plan, state.family, kwargs, generating=generating, skipped=skipped)


def _device(model: Any, named: dict[str, Any]) -> torch.device:
    ids = named.get("input_ids")
    return ids.device if isinstance(ids, Tensor) else next(model.parameters()).device


def _check_logits_to_keep(named: dict[str, Any]) -> None:
    if isinstance(named.get("logits_to_keep"), Tensor):
        raise UnsupportedInputError(
            "logits_to_keep as a tensor names columns of the unshortened prompt: pass an int (the last columns), or "
            "select from the logits with outputs.vlmeff_keep."
        )


def _make_report(
    model: Any,
    state: State,
    request: ShortRequest | Untouched,
    named: dict[str, Any],
    meter: Meter,
    *,
    new_tokens: int | None,
    inside: Inside,
    decoding: TextDecoding | None = None,
) -> Report:
    plan = request.plan
    record = None if inside.inner is None else inside.inner.record
    ids = named.get("input_ids")
    if isinstance(request, ShortRequest):
        before, after, dropped = request.tokens_before, request.tokens_after, request.dropped
    else:
        mask = named.get("attention_mask")
        before = 0 if ids is None else (ids.numel() if mask is None or mask.ndim != 2 else int(mask.sum()))
        after, dropped = before, 0
    figures = meter.figures()
    full = meter.kv_bytes_full
    if full and meter.cache_length:
        full = round(full * (meter.cache_length + dropped) / meter.cache_length)
    visual = 0 if ids is None else visual_tokens(model, ids)
    return Report(
        method=state.plan.method_name,
        preset=state.plan.preset,
        rows=0 if ids is None else len(ids),
        visual_tokens_before=plan.n_before if plan else visual,
        visual_tokens_after=plan.n_after if plan else visual,
        prompt_tokens_before=before,
        prompt_tokens_after=after,
        new_tokens=new_tokens,
        kv_bytes_full=full,
        prefill_gflops_before=None if ids is None else text_flops(model, ids, before),
        visual_tokens_processed=None if record is None or ids is None else record.mean_visual * len(ids),
        visual_tokens_label=None if record is None or ids is None else record.label_visual * len(ids),
        prefill_gflops_after=None if ids is None else text_flops(model, ids, after, record),
        plan=plan,
        skipped=isinstance(request, Untouched) and request.skipped,
        inner=record,
        retention=inside.retention_report(),
        speculation=None if decoding is None else decoding.statistics,
        **figures,
    )
