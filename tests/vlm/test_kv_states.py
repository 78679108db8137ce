"""What a retained cache is after assisted decoding, in passes of one call each, after deletions, and with headroom."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny

import vlmeff
from kvcache.cache import RetainedCache
from vlmeff.errors import ConfigError, UnsupportedCacheError

POLICY = vlmeff.PrefixKV(keep_ratio=0.4, sink=1, recent=2)


def generated(model, inputs, **arguments):
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**options, **arguments})


def step_on(model, cache, steps):
    for _ in range(steps):
        model(input_ids=torch.tensor([[17]]), past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_behind_assisted_decoding_the_cache_goes_on_as_behind_any_other():
    rule = vlmeff.PrefixKV(keep_ratio=0.4, sink=1, recent=2, decode="window", decode_window=6)
    columns, stored = [], []
    for assisted in ({}, {"prompt_lookup_num_tokens": 3}):
        model = vlmeff.wrap(tiny_llama(), None, kv=rule)
        cache = generated(model, llama_inputs([40]), **assisted).past_key_values
        step_on(model, cache, 40)
        columns.append([layer.columns for layer in cache.report().layers])
        model = vlmeff.wrap(tiny_llama(), None, kv=vlmeff.PrefixKV(keep_ratio=1.0), kv_storage="int4")
        cache = generated(model, llama_inputs([200]), **assisted).past_key_values
        step_on(model, cache, 3)
        stored.append(cache.nbytes())
    assert columns[0] == columns[1]
    assert stored[1] < 1.1 * stored[0]
    cache.reset()
    assert not any(layer.record_past for layer in cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["prefixkv", "snapkv", "vl_cache", "streaming_llm"])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_prompt_in_passes_of_one_call_each_is_as_in_one(name, policy):
    make = (lambda: tiny_llama()) if name == "llama" else (lambda: tiny(name))
    inputs = llama_inputs([40]) if name == "llama" else prompts(make(), [1])
    ids = inputs["input_ids"]
    width, first = ids.shape[1], ids.shape[1] - 7
    model = vlmeff.wrap(make(), None, kv=policy, keep_ratio=0.4)
    pictures = {k: v for k, v in inputs.items() if k.startswith("pixel")}

    def cache():
        return RetainedCache(model.config, model.__dict__["_vlmeff"].plan.kv, prompt_length=width)

    one, parts = cache(), cache()
    model(input_ids=ids, **pictures, past_key_values=one, use_cache=True)
    model(input_ids=ids[:, :first], **pictures, past_key_values=parts, use_cache=True)
    for i in range(first, width, 3):
        model(input_ids=ids[:, i : i + 3], past_key_values=parts, use_cache=True)
    assert [layer.slots().tolist() for layer in parts.layers] == [layer.slots().tolist() for layer in one.layers]
    part = cache()
    model(input_ids=ids[:, :first], **pictures, past_key_values=part, use_cache=True)
    part = RetainedCache(model.config, part.policy)
    model(input_ids=ids[:, :first], **pictures, past_key_values=part, use_cache=True)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=part, max_new_tokens=2)


@torch.no_grad()
def test_the_report_counts_prompt_entries_that_decoding_took_out():
    rule = vlmeff.PrefixKV(keep_ratio=0.4, sink=1, recent=1, decode="fixed_point", evict_distance=10)
    model = vlmeff.wrap(tiny_llama(), None, kv=rule)
    out = generated(model, llama_inputs([60, 40]), max_new_tokens=50)
    assert any(layer.decode_evicted for layer in out.past_key_values.layers)
    for layer, kept in zip(out.past_key_values.layers, vlmeff.report(model).retention.layers, strict=True):
        assert list(kept.kept) == (layer.kept_slots >= 0).sum(-1).tolist()


@torch.no_grad()
def test_headroom_changes_no_bit_and_is_checked():
    inputs = llama_inputs([40])
    plain = generated(vlmeff.wrap(tiny_llama(), None, kv=POLICY), inputs, max_new_tokens=20)
    model = vlmeff.wrap(tiny_llama(), None, kv=POLICY, kv_headroom=8)
    ahead = generated(model, inputs, max_new_tokens=20)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ahead.logits, strict=True))
    assert ahead.past_key_values.layers[0].headroom == 8
    for wrong in (-1, 2.5, True):
        with pytest.raises(ConfigError, match="kv_headroom"):
            vlmeff.wrap(tiny_llama(), None, kv=POLICY, kv_headroom=wrong)
    with pytest.raises(ConfigError, match=r"headroom=8.*int8"):
        vlmeff.wrap(tiny_llama(), None, kv=POLICY, kv_headroom=8, kv_storage="int8")
    with pytest.raises(ConfigError, match="kv_headroom=8"):
        vlmeff.wrap(tiny_llama(), None, kv_headroom=8)


@torch.no_grad()
def test_an_assistant_is_not_retained():
    inputs = llama_inputs([40])
    expected = generated(tiny_llama(), inputs).sequences
    with pytest.raises(UnsupportedCacheError, match=r"assistant_model.*kv=False"):
        generated(tiny_llama(), inputs, assistant_model=vlmeff.wrap(tiny_llama(), None, kv=POLICY))
    with pytest.warns(UserWarning, match="has no entry"):
        assistant = vlmeff.wrap(tiny_llama(), "fast")
    assert torch.equal(generated(tiny_llama(), inputs, assistant_model=assistant).sequences, expected)
    model = vlmeff.wrap(tiny_llama(), None, kv=POLICY)
    alone = generated(model, inputs).sequences
    assert torch.equal(generated(model, inputs, assistant_model=tiny_llama(seed=1)).sequences, alone)


@torch.no_grad()
def test_a_cache_of_another_models_size_is_refused():
    small = RetainedCache(tiny_llama(layers=2).config, POLICY)
    large = RetainedCache(tiny_llama(layers=6).config, POLICY)
    model = vlmeff.wrap(tiny_llama(), None, kv=POLICY)
    for cache in (small, large):
        with pytest.raises(UnsupportedCacheError, match=r"layers, this one has 4"):
            model(**llama_inputs([12]), past_key_values=cache, use_cache=True)


def test_a_model_with_a_cache_of_its_own_is_refused(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", lambda self: False)
    with pytest.raises(TypeError, match=r"cache of its own.*kv=False"):
        vlmeff.wrap(model, None, kv=POLICY)
