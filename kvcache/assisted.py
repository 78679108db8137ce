"""Let assisted decoding run the prompt alone first, without candidates behind it.

transformers checks the first candidates in the pass that runs the prompt. They would see the whole prompt, where the
same tokens decoded one by one see what is left of it: the result would depend on what was drafted. So while a retained
call is on, a candidate generator for a fresh ``RetainedCache`` offers nothing the first time.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from kvcache.cache import RetainedCache

METHOD = "_get_candidate_generator"

_lock = threading.Lock()
_installed: dict[int, tuple[Any, int]] = {}  # by id: the model, which stays alive as long as it is in use, and users


def install(model: Any) -> bool:
    """Put the change on this instance, for as many ``remove`` calls; False when it has no assisted decoding."""
    if not hasattr(model, METHOD):
        return False
    with _lock:
        users = _installed.get(id(model), (model, 0))[1]
        if not users:
            if METHOD in model.__dict__:
                return False  # someone else's: not ours to replace
            object.__setattr__(model, METHOD, functools.partial(_candidate_generator, model))
        _installed[id(model)] = (model, users + 1)
    return True


def remove(model: Any) -> None:
    with _lock:
        users = _installed[id(model)][1] - 1
        if users:
            _installed[id(model)] = (model, users)
        else:
            del _installed[id(model)]
            object.__delattr__(model, METHOD)


def _candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
    generator = getattr(type(model), METHOD)(model, *args, **kwargs)
    cache = kwargs.get("model_kwargs", {}).get("past_key_values")
    fresh = isinstance(cache, RetainedCache) and not cache.get_seq_length() and cache.changes_anything
    # Those that want the model's outputs have none before the first pass, and offer nothing then.
    if fresh and not getattr(generator, "requires_model_outputs", False):
        generator.get_candidates = functools.partial(_nothing_once, generator)
    return generator


def _nothing_once(generator: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
    del generator.get_candidates
    generator.get_candidates(input_ids, *args, **kwargs)  # a draft model has its own prompt to go through
    return input_ids, None
