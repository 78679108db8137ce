"""How an op chooses its back end. Nothing is decided at import time.

First match wins:

1. An explicit choice: ``with backend(...)``, else the variable ``VLMEFF_BACKEND`` (``"auto"``, ``"reference"``,
   ``"triton,gather_tokens=reference"``). One that cannot be honoured raises; it never falls back.
   ``"accelerated"`` chooses as below, kernels without a measurement included.
2. Grad mode is on and an input requires grad: the reference, because the accelerated ops have no backward.
3. A tensor is not on CUDA: the reference.
4. The first of ``cuda``, ``triton``, ``torch`` in ``vlmeff_kernels.OPS[op]`` whose ``supports`` does not refuse, and
   of which a committed measurement says that it is the fastest for such sizes on this GPU (``unproven``).
5. The reference.

A launch is never wrapped in try/except: a kernel that fails must be seen to fail.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from vlmeff.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from vlmeff_kernels import BackEnd

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "VLMEFF_BACKEND"
AUTO, REFERENCE, EVERY_KERNEL = "auto", "reference", "accelerated"
ACCELERATED = ("cuda", "triton", "torch")  # in order of preference
UNSUPPORTED = "no accelerated back end supports the call"
# Of an op that composes others, or that no kernel would make faster: a choice for all ops does not mean it.
NO_KERNELS = "vlmeff_kernels has no such implementation of this op, nor any other"
EVERY_OP = "*"  # key of a choice that holds for all ops without one of their own

Operator = TypeVar("Operator", bound=Callable[..., Any])
Result = TypeVar("Result")
_operators: dict[str, Callable[..., Any]] = {}  # filled by the definitions in this package
_said: set[tuple[str, str]] = set()  # what has been logged: one line for each op and back end, and process

_asked: ContextVar[Mapping[str, str]] = ContextVar("vlmeff_ops_asked", default=MappingProxyType({}))
_explaining: ContextVar[bool] = ContextVar("vlmeff_ops_explaining", default=False)
_open_counters: ContextVar[tuple[Counter[tuple[str, str]], ...]] = ContextVar("vlmeff_ops_counters", default=())


@dataclass(frozen=True)
class Explanation:
    """Why an op would run where it would run."""

    op: str
    backend: str
    """The back end that a call with these arguments uses."""
    why: str
    refused: Mapping[str, str]
    """The accelerated back ends that were considered first, each with the reason it was passed over."""


def operator(function: Operator) -> Operator:
    """Register a public op under its own name. It must end in ``return dispatch(...)``: `explain` relies on it."""
    if function.__name__ in _operators:
        raise ConfigError(f"vlmeff.ops already has an op named {function.__name__!r}")
    _operators[function.__name__] = function
    return function


def dispatch(op: str, reference: Callable[..., Result], **arguments: Any) -> Result:
    """Run op on the back end that the rules choose. The arguments have been checked by the public function."""
    explanation, implementation = _choose(op, arguments)
    if _explaining.get():
        return cast("Result", explanation)  # to explain(), which called the op and knows
    if not torch.compiler.is_compiling():  # a traced graph is not a run, and logging would break the graph
        unsupported = explanation.why == UNSUPPORTED
        _log_first_use(op, explanation.backend, explanation.refused if unsupported else {})
        for counter in _open_counters.get():
            counter[op, explanation.backend] += 1
    if implementation is None:
        return reference(**arguments)
    result: Result = implementation.run(**{name: _unit_stride(op, name, value) for name, value in arguments.items()})
    return result


def backend(name: str | None = None, /, **per_op: str) -> AbstractContextManager[None]:
    """Choose the back end of all ops, or of the named ones, inside a ``with`` block.

    ``backend("triton")``, ``backend(attention_column_mass="reference")``, ``backend("triton", gather_tokens="auto")``.
    Back ends: auto (the rules decide, whatever ``VLMEFF_BACKEND`` says), accelerated (the rules, with the kernels that
    were not measured on this GPU), reference, cuda, triton, torch. Blocks nest: a name for all ops replaces what the
    outer block chose, a name for one op replaces only that op's. The choice belongs to the current context (thread or
    asyncio task).

    Raises:
        ConfigError: a back end or op of that name does not exist, or none is named.
        BackendUnavailableError: from the op, inside the block, when the choice cannot serve the call.
    """
    if name is None and not per_op:
        raise ConfigError("vlmeff.ops.backend: name a back end for all ops, or op=back end for some")
    choices = per_op if name is None else {EVERY_OP: name, **per_op}
    _check_choices(choices, "vlmeff.ops.backend")
    return _asking_for(choices, keep_outer=name is None)


@contextmanager
def _asking_for(choices: Mapping[str, str], *, keep_outer: bool) -> Iterator[None]:
    token = _asked.set({**_asked.get(), **choices} if keep_outer else choices)
    try:
        yield
    finally:
        _asked.reset(token)


def explain(op: str, /, *args: Any, **kwargs: Any) -> Explanation:
    """Say where ``vlmeff.ops.<op>(*args, **kwargs)`` would run, and why, without running it.

    Raises what the call itself would raise before it computes: errors in the arguments (ValueError, TypeError) and
    BackendUnavailableError; ConfigError if there is no such op.
    """
    if op not in _operators:
        raise ConfigError(f"vlmeff.ops.explain: unknown op {op!r}; ops: {_listed(_operators)}")
    token = _explaining.set(True)  # the op checks and normalises as ever, and dispatch answers instead of computing
    try:
        answer = _operators[op](*args, **kwargs)
    finally:
        _explaining.reset(token)
    assert isinstance(answer, Explanation), f"{op} must end in dispatch()"
    return answer


@contextmanager
def counters() -> Iterator[Counter[tuple[str, str]]]:
    """Count which op ran on which back end: ``with counters() as ran: ...; ran["row_logsumexp", "reference"]``.

    Counts calls of the current context (thread or asyncio task) inside the block; blocks nest, and each counts all that
    happens inside it. Calls that run inside a graph made by torch.compile are not seen.
    """
    counter: Counter[tuple[str, str]] = Counter()
    token = _open_counters.set((*_open_counters.get(), counter))
    try:
        yield counter
    finally:
        _open_counters.reset(token)


def _choose(op: str, arguments: Mapping[str, Any]) -> tuple[Explanation, BackEnd | None]:
    """Apply the rules. The implementation is None for the reference."""
    asked, asked_in, for_this_op = _asked_for(op)
    if asked in ACCELERATED and not for_this_op and _accelerated(op)[1] == NO_KERNELS:
        why = "no accelerated back end exists for it, and the choice was made for all ops"
        return Explanation(op, REFERENCE, why, {}), None
    if asked == REFERENCE:
        return Explanation(op, REFERENCE, f"asked for in {asked_in}", {}), None
    if asked not in (AUTO, EVERY_KERNEL):
        return Explanation(op, asked, f"asked for in {asked_in}", {}), _explicit(op, asked, arguments)

    tensors = _tensors(arguments)
    if _wants_grad(tensors):
        why = "an input requires grad, and only the reference has a backward"
        return Explanation(op, REFERENCE, why, dict.fromkeys(ACCELERATED, why)), None
    if not all(tensor.is_cuda for tensor in tensors):
        elsewhere = sorted({tensor.device.type for tensor in tensors} - {"cuda"})
        why = f"the tensors are on {', '.join(elsewhere)}"
        return Explanation(op, REFERENCE, why, dict.fromkeys(ACCELERATED, why)), None
    _check_one_device(op, tensors)

    refused: dict[str, str] = {}
    implementations, missing = _accelerated(op)
    for name in ACCELERATED:
        implementation = implementations.get(name)
        reason = missing if implementation is None else implementation.supports(**arguments)
        if reason is None and implementation is not None and asked == AUTO:
            reason = implementation.unproven(**arguments)
        if reason is None:
            return Explanation(op, name, "the first that supports the call", refused), implementation
        refused[name] = reason
    return Explanation(op, REFERENCE, UNSUPPORTED, refused), None


def _explicit(op: str, name: str, arguments: Mapping[str, Any]) -> BackEnd:
    """Return the implementation asked for by name, or raise. Devices are left to its ``supports``: an interpreter may
    take CPU tensors."""
    implementations, missing = _accelerated(op)
    if name not in implementations:
        raise BackendUnavailableError(op, name, missing)
    tensors = _tensors(arguments)
    _check_one_device(op, tensors)
    if _wants_grad(tensors):
        raise BackendUnavailableError(
            op, name, 'it has no backward and an input requires grad; use torch.no_grad() or backend("reference")'
        )
    reason = implementations[name].supports(**arguments)
    if reason is not None:
        raise BackendUnavailableError(op, name, reason)
    return implementations[name]


def _accelerated(op: str) -> tuple[Mapping[str, BackEnd], str]:
    """Return the accelerated implementations of op, and what to say of those that are not among them."""
    try:
        import vlmeff_kernels  # here and not above: it loads Triton, which a CPU user does not need
    except ModuleNotFoundError as error:
        if error.name != "vlmeff_kernels":  # it is there and broken
            raise
        return {}, "the package vlmeff_kernels is not installed"
    found = vlmeff_kernels.OPS.get(op)
    if found is None:
        return {}, NO_KERNELS
    return found, "vlmeff_kernels has no such implementation of this op"


def may_read(value: Tensor, *, debug: bool = False) -> bool:
    """Whether the values may be looked at: at no cost on CPU, never while a graph is traced, and elsewhere, where it
    waits for the device, only for a check (``debug``) that ``VLMEFF_DEBUG=1`` asks for."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if value.device.type != "cpu":
        return debug and os.environ.get("VLMEFF_DEBUG") == "1"
    # Neither a fake tensor, nor one that stands for many (vmap) or for a node of a graph (make_fx).
    real = type(value) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    return real and not torch._C._len_torch_dispatch_stack()


def is_chosen(*ops: str) -> bool:
    """Whether someone has named an accelerated back end for one of these ops."""
    return any(_asked_for(op)[0] in ACCELERATED for op in ops)


def _asked_for(op: str) -> tuple[str, str, bool]:
    """Return the back end asked for, or "auto"; where it was asked for; and whether for this op and not for all."""
    chosen, text = _asked.get(), os.environ.get(ENVIRONMENT_VARIABLE)
    if not chosen and not text:
        return AUTO, "the default", False
    environment = _parse_environment(text) if text else {}
    for choices, where in ((chosen, "vlmeff.ops.backend"), (environment, ENVIRONMENT_VARIABLE)):
        for key in (op, EVERY_OP):
            if key in choices:
                return choices[key], where, key == op
    return AUTO, "the default", False


@functools.lru_cache(maxsize=8)
def _parse_environment(text: str) -> Mapping[str, str]:
    """Parse "triton,gather_tokens=reference"."""
    choices: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, name = (part.strip() for part in item.rpartition("="))
        key = op if equals else EVERY_OP
        if key in choices:
            raise ConfigError(f"{ENVIRONMENT_VARIABLE}={text!r} chooses twice for {op or 'all ops'}")
        choices[key] = name
    _check_choices(choices, f"{ENVIRONMENT_VARIABLE}={text!r}")
    return choices


def _check_choices(choices: Mapping[str, str], where: str) -> None:
    names = (AUTO, EVERY_KERNEL, REFERENCE, *ACCELERATED)
    for op, name in choices.items():
        if op != EVERY_OP and op not in _operators:
            raise ConfigError(f"{where}: unknown op {op!r}; ops: {_listed(_operators)}")
        if name not in names:
            raise ConfigError(f"{where}: unknown back end {name!r}; back ends: {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _check_one_device(op: str, tensors: Sequence[Tensor]) -> None:
    """PyTorch itself refuses a mixture; a kernel would read a pointer of another device."""
    if any(tensor.device != tensors[0].device for tensor in tensors[1:]):
        found = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise ValueError(f"{op}: all tensors must be on one device, got {found}")


def _wants_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments, those in lists included."""
    found = []
    for value in arguments.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _unit_stride(op: str, name: str, value: Any) -> Any:
    """Copy a tensor whose last dim is strided: the kernels address rows of adjacent elements."""
    if isinstance(value, list | tuple):
        return [_unit_stride(op, name, item) for item in value]
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[-1] <= 1 or value.stride(-1) == 1:
        return value
    if not torch.compiler.is_compiling():  # it would break the graph
        logger.debug("vlmeff.ops.%s: copying %s, its last dimension has stride %d", op, name, value.stride(-1))
    return value.contiguous()


def _log_first_use(op: str, name: str, refused: Mapping[str, str]) -> None:
    if (op, name) in _said:
        return
    _said.add((op, name))
    reasons = "; ".join(f"{other}: {reason}" for other, reason in refused.items())
    logger.info("vlmeff.ops.%s runs on the back end %r%s", op, name, f" ({reasons})" if reasons else "")
