"""Counted work of a language model's prefill."""

from __future__ import annotations

from typing import Any


def prefill_flops(config: Any, tokens: int) -> int:
    """Floating-point operations of one prompt of ``tokens`` through the decoder layers of a gated-MLP transformer.

    2 n (q, k, v, o and MLP weights) + 4 n^2 heads head_dim per layer: a multiply-add counts twice, both attention
    products in full, the embedding and the output head left out. ``config`` is a transformers text config.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * config.intermediate_size
    per_layer = 2 * tokens * (attention + mlp) + 4 * tokens**2 * heads * head_dim
    return config.num_hidden_layers * per_layer
