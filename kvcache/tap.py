"""Stand between an attention module and its kernel: hear the queries and keys, or answer in the kernel's place.

transformers' attention modules look their kernel up by name in ``ALL_ATTENTION_FUNCTIONS``. While anyone listens, the
entry of that name in the instance mapping is a pass-through that hands the call to the listener of this thread, if it
comes from the module that it waits for. "eager" is no entry of the mapping: modules bring their own function for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Kernel = Callable[..., Any]
Stand = Callable[..., Any]
"""Called with the kernel, its module left out, then as the kernel: (kernel, query, key, value, attention_mask, ...)."""

_listening: ContextVar[tuple[nn.Module, Stand] | None] = ContextVar("kvcache_listening", default=None)
_lock = threading.Lock()


@dataclass
class _Entry:
    wrapper: Any
    previous: Any  # what the instance mapping held; None when the name came from the class
    users: int = 1


_entries: dict[str, _Entry] = {}


def listen(module: nn.Module, stand: Stand) -> None:
    """Have ``stand`` make this thread's next kernel calls from ``module``; what it returns the module gets."""
    _listening.set((module, stand))


def stop_listening() -> None:
    _listening.set(None)


def install(names: Iterable[str]) -> list[str]:
    """Put pass-throughs over the kernels of these names; returns those that ``remove`` is to be given."""
    done = []
    with _lock:
        for name in names:
            if name == "eager":
                continue
            entry = _entries.get(name)
            if entry is not None:
                entry.users += 1
            else:
                previous = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
                wrapper = _pass_through(ALL_ATTENTION_FUNCTIONS[name])
                _entries[name] = _Entry(wrapper, previous)
                ALL_ATTENTION_FUNCTIONS[name] = wrapper
            done.append(name)
    return done


def remove(names: Iterable[str]) -> None:
    """Take back one ``install``; the last one restores the mapping."""
    with _lock:
        for name in names:
            entry = _entries[name]
            entry.users -= 1
            if entry.users:
                continue
            del _entries[name]
            # Someone who has put an entry of their own over ours keeps it: ours underneath just passes on.
            if ALL_ATTENTION_FUNCTIONS._local_mapping.get(name) is entry.wrapper:
                del ALL_ATTENTION_FUNCTIONS[name]
                if entry.previous is not None:
                    ALL_ATTENTION_FUNCTIONS[name] = entry.previous


def _pass_through(kernel: Any) -> Any:
    @functools.wraps(kernel)
    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        listener = _listening.get()
        if listener is None or listener[0] is not module:
            return kernel(module, *args, **kwargs)
        return listener[1](functools.partial(kernel, module), *args, **kwargs)

    return attend
