"""A tiny text-only Llama whose attention is peaked, and padded prompts for it."""

from __future__ import annotations

import torch
from tiny_common import VOCABULARY, decoder, left_padded, ready, text
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(*, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, layers: int = 4):
    """Hidden size 64, 4 query heads on 2 key/value heads."""
    torch.manual_seed(seed)
    sizes = decoder(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, tie_word_embeddings=False)
    return ready(LlamaForCausalLM(LlamaConfig(**sizes)), dtype, attention)


def llama_inputs(lengths: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch of random rows."""
    g = torch.Generator().manual_seed(seed)
    return left_padded([text(g, length) for length in lengths])


__all__ = ["VOCABULARY", "llama_inputs", "tiny_llama"]
