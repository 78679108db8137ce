"""What the caller's own objects see of a shortened prompt: the prompt as the caller gave it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


def reduce_total_lengths(model: Any, kwargs: dict[str, Any], dropped: int) -> None:
    """``max_length`` and ``min_length`` count the prompt: take what it lost off them."""
    config = kwargs.get("generation_config") or model.generation_config
    changed = {}
    for name in ("max_length", "min_length"):
        places = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
        value = next((v for v in places if v is not None), None)
        if value:
            changed[name] = max(value - dropped, 0)
    if not changed:
        return
    if kwargs.get("generation_config") is not None and not changed.keys() & kwargs.keys():
        config = copy.deepcopy(config)
        for name, value in changed.items():
            setattr(config, name, value)
        kwargs["generation_config"] = config
    else:
        kwargs.update(changed)


@dataclass(frozen=True, eq=False)
class CallersPrompt:
    """Turns the shortened prompt at the head of ``input_ids`` back into the caller's, for the caller's own objects."""

    prompt_ids: Tensor
    short_width: int

    def restore(self, input_ids: Tensor) -> Tensor:
        prompt = self.prompt_ids.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.prompt_ids), 0)
        return torch.cat([prompt, input_ids[:, self.short_width :]], 1)

    def restoring_prefix_fn(self, allowed: Callable[[int, Tensor], list[int]]) -> Callable[[int, Tensor], list[int]]:
        def restored(row: int, ids: Tensor) -> list[int]:
            return allowed(row, torch.cat([self.prompt_ids[row].to(ids.device), ids[self.short_width :]]))

        return restored


class RestoringCriterion(StoppingCriteria):
    def __init__(self, criterion: Any, prompt: CallersPrompt) -> None:
        self._criterion, self._prompt = criterion, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._criterion(self._prompt.restore(input_ids), scores, **kwargs)


class RestoringProcessor(LogitsProcessor):
    def __init__(self, processor: Any, prompt: CallersPrompt) -> None:
        self._processor, self._prompt = processor, prompt

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self._processor(self._prompt.restore(input_ids), scores)


class PromptRestoringStreamer:
    """Hands a streamer the caller's prompt instead of the shortened one."""

    def __init__(self, streamer: Any, prompt_ids: Tensor) -> None:
        self._streamer, self._prompt = streamer, prompt_ids.cpu()
        self._started = False

    def put(self, value: Tensor) -> None:
        self._streamer.put(value if self._started else self._prompt)
        self._started = True

    def end(self) -> None:
        self._streamer.end()
