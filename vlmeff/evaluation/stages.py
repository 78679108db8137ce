"""How long the vision encoder and the choice of tokens took within one ``generate`` call.

Nothing is estimated: a stage that cannot be told apart from the others has no time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tokenpruning import Resampler, Selector
from vlmeff.errors import VlmeffError
from vlmeff.reporting import Clock, Report, shared_clock
from vlmeff.vlm.wrapped import STATE

MODALITIES = ("image", "video")


class StageClock:
    """Follows the calls of a model inside a ``with`` block; one thread, one request at a time.

    ``vision_ms``: the model's vision encoder with its projector, without what a method computes inside it.
    ``score_ms``: what a method computes to choose or resample tokens in front of the language model: its hooks inside
    the vision tower and everything between the encoder's end and the shortened request.

    The methods are replaced on the instance and put back afterwards, also when the block raises.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._clock = Clock(device)
        self._stack = ExitStack()
        self._spans: list[tuple[str, str]] = []  # hooks
        self._calls: list[tuple[str, str]] = []  # encoder
        self._marks = 0

    def __enter__(self) -> StageClock:
        with ExitStack() as stack:
            base = getattr(self._model, "base_model", None)
            for name in (f"get_{modality}_features" for modality in MODALITIES):
                method = getattr(base, name, None)
                if callable(method):
                    stack.enter_context(_Replaced(base, name, self._timed(method)))
            for module in _hooked_modules(self._model):
                self._follow(stack, module)
            token = shared_clock.set(self._clock)  # the call's own marks come to stand among those of this block
            stack.callback(shared_clock.reset, token)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def times(self, report: Report | None) -> tuple[float | None, float | None]:
        """(vision_ms, score_ms) of the call that was followed; waits for the device.

        Args: report: of the call; None where the model is not wrapped.
        """
        between = self._clock.between
        hooks = sum(between(*span) or 0.0 for span in self._spans)
        if not self._calls:
            return None, None
        vision = sum(between(*call) or 0.0 for call in self._calls) - hooks
        # The mark is there when tokens were chosen or resampled; between layers that cannot be told apart.
        choosing = between(self._calls[-1][1], "encoded")
        if report is None or choosing is None or report.inner is not None:
            return vision, None
        return vision, choosing + hooks

    def _mark(self) -> str:
        self._marks += 1
        name = str(self._marks)
        self._clock.mark(name)
        return name

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)  # ``generate`` looks at the signature
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = self._mark()
            out = method(*args, **kwargs)
            self._calls.append((begun, self._mark()))
            return out

        return timed

    def _follow(self, stack: ExitStack, module: nn.Module) -> None:
        """Time what runs in front of the module's ``forward``: hooks that a method adds come behind this one."""
        begun: list[str] = []
        forward = module.forward
        handle = module.register_forward_pre_hook(lambda *_: begun.append(self._mark()))
        stack.callback(handle.remove)

        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if begun:
                self._spans.append((begun.pop(), self._mark()))
            return forward(*args, **kwargs)

        stack.enter_context(_Replaced(module, "forward", timed))


def _hooked_modules(model: Any) -> list[nn.Module]:
    """The modules of the vision side that the plan of a wrapped model puts hooks on."""
    state = model.__dict__.get(STATE)
    if state is None or state.family is None:
        return []
    method = state.plan.reduction.method
    with suppress(VlmeffError, AttributeError):  # a family without such layers scores otherwise
        if isinstance(method, Selector):
            layers = state.family.score_layers(model, method.needs, getattr(method, "object_layer", None))
            return list(dict.fromkeys(layers.values()))
        if isinstance(method, Resampler):
            projector = state.family.projector(model)
            return [] if projector is None else [projector]
    return []


class _Replaced:
    """An attribute set on an instance inside the block."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value

    def __enter__(self) -> None:
        self._there = self._name in self._owner.__dict__
        self._before = self._owner.__dict__.get(self._name)
        object.__setattr__(self._owner, self._name, self._value)

    def __exit__(self, *error: object) -> None:
        if self._there:
            object.__setattr__(self._owner, self._name, self._before)
        else:
            object.__delattr__(self._owner, self._name)
