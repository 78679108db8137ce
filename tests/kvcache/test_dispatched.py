"""Wrapped models run the hot operations of their cache through ``vlmeff.ops``: no method keeps a copy of its own."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import llama_inputs, tiny_llama

import vlmeff
from vlmeff import ops

LAYERS, STEPS = 4, 3
POLICIES = {
    "snapkv": vlmeff.SnapKV(keep_ratio=0.7, window=8),
    "snapkv, max": vlmeff.SnapKV(keep_ratio=0.7, window=8, pool="max"),
    "pyramidkv": vlmeff.PyramidKV(keep_ratio=0.7, beta=1.3, window=8),
    "tova": vlmeff.TOVA(keep_ratio=0.7),
    "prefixkv": vlmeff.PrefixKV(keep_ratio=0.7),
    "prefixkv, window": vlmeff.PrefixKV(keep_ratio=0.7, metric="window", window=8),
    "h2o": vlmeff.H2O(keep_ratio=0.7),
}


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_every_layer_measures_compacts_and_decodes_with_the_ops(policy, storage):
    model = vlmeff.wrap(tiny_llama(), None, kv=POLICIES[policy], kv_storage=storage)
    with ops.counters() as ran:
        model.generate(**llama_inputs([300]), max_new_tokens=STEPS, do_sample=False)
    assert ran["attention_column_mass", "reference"] == LAYERS
    assert ran["gather_kv", "reference"] == LAYERS
    assert ran["quantized_decode_attention", "reference"] == (LAYERS * (STEPS - 1) if storage else 0)
