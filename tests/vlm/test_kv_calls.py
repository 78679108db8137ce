"""Calls and settings that KV retention refuses by name: continuous batching, and storage that a model cannot have."""

from __future__ import annotations

import pytest
import torch
from tiny_common import decoder, ready
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny
from transformers import LlamaConfig, LlamaForCausalLM

import vlmeff
from kvcache import StreamingLLM
from vlmeff.errors import ConfigError, UnsupportedCacheError, VlmeffError

POLICY = vlmeff.PrefixKV(keep_ratio=0.4)
ENTRIES = {
    "generate_batch": lambda model: model.generate_batch([[11, 12, 13]], max_new_tokens=2),
    "generate_batch  ": lambda model: model.generate_batch([]),  # refused before anything is looked at
    "init_continuous_batching": lambda model: model.init_continuous_batching(),
    "continuous_batching_context_manager": lambda model: model.continuous_batching_context_manager().__enter__(),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny("llava")], ids=["llama", "llava"])
def test_continuous_batching_is_refused_with_the_remedy_and_is_back_behind_unwrap(build, entry, monkeypatch):
    model = build()
    name, called = entry.strip(), []
    monkeypatch.setattr(type(model), name, lambda self, *args, **kwargs: called.append((self, args, kwargs)))
    vlmeff.wrap(model, None, kv=POLICY)
    with pytest.raises(UnsupportedCacheError, match=rf"{name}: .*model\.generate .*kv=False.*unwrap"):
        getattr(model, name)([[11]], max_new_tokens=2)
    assert not called
    vlmeff.unwrap(model)
    getattr(model, name)([[11]], max_new_tokens=2)
    assert called == [(model, ([[11]],), {"max_new_tokens": 2})]


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_real_entry_points_are_refused(entry):
    model = vlmeff.wrap(tiny_llama(), None, kv=POLICY)
    with pytest.raises(UnsupportedCacheError, match=entry.strip()):
        ENTRIES[entry](model)
    with pytest.raises(UnsupportedCacheError, match="cache_implementation='paged'"):
        model.generate(**llama_inputs([9]), max_new_tokens=2, cache_implementation="paged")
    assert type(model) is not LlamaForCausalLM
    assert type(vlmeff.unwrap(model)) is LlamaForCausalLM


def test_continuous_batching_without_retention_is_the_models_own(monkeypatch):
    model = tiny("llava")
    monkeypatch.setattr(type(model), "generate_batch", lambda self, inputs: inputs)
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.5))
    assert model.generate_batch([[1]]) == [[1]]


def llama_of(head_dim: int):
    torch.manual_seed(0)
    sizes = decoder(hidden_size=64, intermediate_size=128, num_hidden_layers=2, tie_word_embeddings=False)
    return ready(LlamaForCausalLM(LlamaConfig(**{**sizes, "head_dim": head_dim})), torch.float32, "sdpa")


@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
@torch.no_grad()
def test_a_head_dim_that_cannot_be_cut_into_groups_is_refused_by_wrap(storage):
    """74 = 2 x 37: no group of 8 to 32 channels divides it. 72 has groups of 24."""
    model = llama_of(74)
    with pytest.raises(ConfigError, match=rf"wrap: kv_storage='{storage}'.*head_dim 74"):
        vlmeff.wrap(model, None, kv=POLICY, kv_storage=storage)
    assert not vlmeff.is_wrapped(model)
    vlmeff.wrap(model, None, kv=POLICY).generate(**llama_inputs([9]), max_new_tokens=2)
    legal = vlmeff.wrap(llama_of(72), None, kv=StreamingLLM(keep_ratio=0.9), kv_storage=storage)
    legal.generate(**llama_inputs([200]), max_new_tokens=2)


@pytest.mark.parametrize("storage", ["int3", "INT8", 4, ["int8"], ""])
@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny("qwen2_5_vl")], ids=["llama", "qwen2_5_vl"])
def test_an_unknown_storage_is_refused_by_wrap(build, storage):
    model = build()
    with pytest.raises(VlmeffError, match=r"storage=.*int8.*int4.*int2") as caught:
        vlmeff.wrap(model, None, kv=POLICY, kv_storage=storage)
    assert isinstance(caught.value, ConfigError)
    assert repr(storage) in str(caught.value)
    assert not vlmeff.is_wrapped(model)


@torch.no_grad()
def test_a_refused_wrap_leaves_the_earlier_one_in_force():
    model = vlmeff.wrap(tiny("llava"), None, kv=POLICY)
    with pytest.raises(ConfigError, match="int3"):
        vlmeff.wrap(model, None, kv=POLICY, kv_storage="int3")
    model.generate(**prompts(model, [1]), max_new_tokens=2)
    assert vlmeff.report(model).method == "prefixkv"
