"""Counted work and memory of a language model's prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def layer_flops(config: Any, tokens: int) -> int:
    """Floating-point operations of ``tokens`` through one decoder layer of a gated-MLP transformer.

    2 n (q, k, v, o and MLP weights) + 4 n^2 heads head_dim: a multiply-add counts twice, both attention products in
    full, the embedding and the output head left out. ``config`` is a transformers text config.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    attention = hidden * head_dim(config) * (2 * heads + 2 * kv_heads(config))
    mlp = 3 * hidden * config.intermediate_size
    return 2 * tokens * (attention + mlp) + 4 * tokens**2 * heads * head_dim(config)


def prefill_flops(config: Any, tokens: int | Sequence[int]) -> int:
    """All layers; ``tokens`` of the prompt, or per layer where tokens are dropped between layers."""
    per_layer = [tokens] * config.num_hidden_layers if isinstance(tokens, int) else tokens
    return sum(layer_flops(config, n) for n in per_layer)


def kv_bytes(config: Any, tokens: int | Sequence[int], bytes_per_value: int) -> int:
    """Keys and values of full-attention layers that hold ``tokens`` (or per layer as many)."""
    per_layer = [tokens] * config.num_hidden_layers if isinstance(tokens, int) else tokens
    return 2 * kv_heads(config) * head_dim(config) * bytes_per_value * sum(per_layer)


def column_mean_flops(width: int, tokens: int) -> int:
    """Scoring one vision layer of ``width`` channels: q and k again, then two passes over q k^T."""
    return 4 * tokens * width**2 + 2 * 2 * tokens**2 * width


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
