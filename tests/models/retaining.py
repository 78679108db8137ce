"""Simple retention policies, and calls of a model with them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny

from kvcache.cache import RetainedCache
from kvcache.policy import LayerStats, ScoreSpec
from kvcache.request import retained_call

FULL, NONE = ScoreSpec(kind="full"), ScoreSpec(kind="none")


@dataclass(frozen=True, kw_only=True)
class TopScores:
    """Keep the tokens with the highest "full" scores and the last one; layers share the budget unequally."""

    keep_ratio: float = 0.5
    selection: str = "shared"
    scope: str = "model"
    query_aware: bool = True
    decode: str = "grow"
    decode_window: int | None = None
    evict_distance: int = 0
    evict_interval: int = 16
    needs: ScoreSpec = FULL

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        # More for early layers, by one token of eight a layer.
        return [max(1, min(s.n, round(self.keep_ratio * s.n) + (s.layers // 2 - s.layer) * (s.n // 8))) for s in stats]

    def select(self, stats: LayerStats, k: int) -> torch.Tensor:
        scores = stats.scores.clone()
        scores[..., -1] = torch.inf
        return scores.topk(k, dim=-1).indices.sort(dim=-1).values


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Keep the first token and the last ones, looking at nothing."""

    keep_ratio: float = 0.5
    selection: str = "shared"
    scope: str = "layer"
    query_aware: bool = False
    decode: str = "grow"
    decode_window: int | None = None
    evict_distance: int = 0
    evict_interval: int = 16
    needs: ScoreSpec = NONE

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        return [max(1, round(self.keep_ratio * s.n)) for s in stats]

    def select(self, stats: LayerStats, k: int) -> torch.Tensor:
        return torch.cat([torch.arange(1), torch.arange(stats.n - k + 1, stats.n)])


@dataclass(frozen=True, kw_only=True)
class Recorder(Ends):
    """Keep what ``Ends`` keeps and note what it was shown."""

    needs: ScoreSpec = FULL
    scope: str = "model"
    shown: Any = None

    def budgets(self, stats: list[LayerStats]) -> list[int]:
        self.shown.append(stats)
        return super().budgets(stats)


def text_model_of(model: Any) -> Any:
    """The module that owns the decoder layers and the embedding."""
    return next(m for m in model.modules() if hasattr(m, "layers") and hasattr(m, "embed_tokens"))


def retained_generate(model: Any, policy: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, RetainedCache]:
    """Greedy ``generate`` of a model as if it were wrapped: (result with logits, cache)."""
    kwargs = {**inputs, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    vision, headroom = kwargs.pop("vision", None), kwargs.pop("headroom", 0)
    call = retained_call(model, text_model_of(model), policy, kwargs, generating=True, vision=vision, headroom=headroom)
    with call:
        result = model.generate(**kwargs)
    return result, call.cache


@torch.no_grad()
def retained_forward(model: Any, cache: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """``forward`` on a cache as if the model were wrapped."""
    kwargs = {**inputs, "past_key_values": cache, **options}
    with retained_call(model, text_model_of(model), None, kwargs, generating=False) or nullcontext():
        return model(**kwargs)


def plain_generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(
        **{**inputs, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    )


# float32 logits of size 10 or so of tiny models, sums in another order. What is wrong differs by 1e-2 at least.
CLOSE = {"rtol": 0, "atol": 1e-4}
STEPS = 6


def model_and_inputs(
    name: str, *, backend: str = "sdpa", pictures: tuple[int, ...] = (1, 2), lengths: tuple[int, ...] = (19, 11)
) -> tuple[Any, dict[str, Any]]:
    """A tiny model and a left-padded batch for it; "llama" has text alone."""
    if name == "llama":
        return tiny_llama(attention=backend), llama_inputs(list(lengths))
    model = tiny(name, attention=backend)
    return model, prompts(model, list(pictures))


def row_of(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a left-padded text batch, without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {name: x[row : row + 1, real] for name, x in inputs.items()}
