"""The KV step of a preset: it joins the token step, and is left out, not refused, where it cannot take part."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_llama import tiny_llama
from tiny_models import prompts, tiny
from transformers import DynamicCache, StaticCache

import vlmeff
from kvcache.cache import RetainedCache
from vlmeff import zoo
from vlmeff.errors import ConfigError, RetentionStateError, UnsupportedCacheError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:vlmeff. preset:UserWarning")


def generated(model, inputs, **arguments):
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, **arguments}
    return model.generate(**inputs, **options)


def same(a, b):
    return torch.equal(a.sequences, b.sequences) and all(
        torch.allclose(x, y, atol=1e-5) for x, y in zip(a.logits, b.logits, strict=True)
    )


@pytest.mark.parametrize(("preset", "ratio"), [("balanced", 0.8), ("fast", 0.7), ("smallest", 0.5)])
@torch.no_grad()
def test_a_preset_is_its_two_steps_together(preset, ratio):
    model = tiny("llava")
    inputs = prompts(model, [1, 1])
    out = generated(vlmeff.wrap(model, preset), inputs)
    report = vlmeff.report(model)
    assert report.method == "hiprune + prefixkv"
    kept = sum(sum(layer.kept) for layer in report.retention.layers)
    total = sum(sum(layer.prompt_tokens) for layer in report.retention.layers)
    floors = 13 * 2 * len(report.retention.layers)
    assert total < inputs["attention_mask"].sum() * len(report.retention.layers), "a share of what the token step left"
    assert abs(kept - max(ratio * total, floors)) <= 2
    keep = zoo.resolve(model, preset).steps[0].keep
    steps = {"tokens": vlmeff.HiPrune(keep=keep, alpha=0.1), "kv": vlmeff.PrefixKV(keep_ratio=ratio, metric="mean")}
    named = vlmeff.wrap(tiny("llava"), None, **steps)
    assert same(out, generated(named, inputs))


@torch.no_grad()
def test_false_takes_the_step_away_and_a_field_changes_it():
    model, inputs = tiny("llava"), prompts(tiny("llava"), [1])
    generated(vlmeff.wrap(model, "fast", kv=False), inputs)
    assert vlmeff.report(model).method == "hiprune"
    assert vlmeff.report(model).retention is None
    generated(vlmeff.wrap(model, "fast", keep_ratio=1.0), inputs)
    assert vlmeff.report(model).retention.keep_ratio == 1
    with pytest.raises(ConfigError, match="False"):
        vlmeff.wrap(model, "fast", kv=True)


@torch.no_grad()
def test_calls_that_it_cannot_take_part_in_go_without_it(caplog):
    model, plain = tiny("llava"), tiny("llava")
    inputs = prompts(model, [1])
    vlmeff.wrap(model, "fast")
    vlmeff.wrap(plain, "fast", kv=False)
    caplog.set_level(logging.INFO, "vlmeff")
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert same(generated(model, inputs, **options), generated(plain, inputs, **options)), options
        assert vlmeff.report(model).retention is None
    assert "without the preset's KV retention" in caplog.text
    cache = DynamicCache(config=model.config)
    generated(model, inputs, past_key_values=cache)
    assert cache.get_seq_length() > 0
    assert vlmeff.report(model).retention is None
    model.train()
    with torch.enable_grad():
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 10, -100)
        model(**inputs, labels=labels).loss.backward()
    model.eval()
    with torch.enable_grad():  # and in evaluation mode
        model(**inputs).logits.sum().backward()
        with pytest.raises(RetentionStateError, match="no_grad"):
            vlmeff.wrap(tiny("llava"), "fast", kv="prefixkv")(**inputs)
    # A forward pass with padding on the right.
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=0)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=0)
    text = {"input_ids": ids[:, -8:].clamp(min=20), "attention_mask": mask[:, -8:]}
    assert torch.equal(model(**text).logits, plain(**text).logits)
    # Asked for by name it says so.
    vlmeff.wrap(model, "fast", kv="prefixkv")
    with pytest.raises(UnsupportedCacheError, match="static"):
        generated(model, inputs, cache_implementation="static")


@torch.no_grad()
def test_a_request_below_the_threshold_is_left_alone_whole():
    model, inputs = tiny("llava"), prompts(tiny("llava"), [1])
    vlmeff.wrap(model, "fast", min_visual_tokens=10_000)
    assert same(generated(model, inputs), generated(tiny("llava"), inputs))
    assert vlmeff.report(model).skipped
    assert vlmeff.report(model).retention is None
    vlmeff.wrap(model, "fast", min_visual_tokens=10_000, kv="prefixkv")
    generated(model, inputs)
    assert vlmeff.report(model).retention is not None, "asked for by name"


def test_continuous_batching_is_not_refused_for_the_sake_of_a_preset(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model), "generate_batch", lambda self, *a, **k: "batched", raising=False)
    assert vlmeff.wrap(model, "fast").generate_batch([[1, 2]]) == "batched"
    with pytest.raises(UnsupportedCacheError, match="kv=False"):
        vlmeff.wrap(model, "fast", kv="prefixkv").generate_batch([[1, 2]])


@torch.no_grad()
def test_a_retained_cache_is_never_gone_on_from_without_it():
    model = vlmeff.wrap(tiny("llava"), "fast")
    out = generated(model, prompts(model, [1]))
    assert isinstance(out.past_key_values, RetainedCache)
    ids = torch.cat([out.sequences, torch.tensor([[21, 22]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": out.past_key_values}
    model.model.language_model.compile(backend="eager")
    with pytest.raises(UnsupportedCacheError, match="compile"):
        generated(model, turn)


@torch.no_grad()
def test_a_language_model_takes_the_kv_step_alone_and_a_model_without_either_is_refused():
    model = vlmeff.wrap(tiny_llama(), "fast")
    ids = torch.arange(10, 70)[None] % 100
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert vlmeff.report(model).method == "prefixkv"
    with pytest.raises(UnsupportedModelError, match="nothing for"):
        vlmeff.wrap(tiny_llama(), "quality")


@torch.no_grad()
def test_torch_compile_of_a_forward_pass_is_left_alone():
    model, plain = vlmeff.wrap(tiny_llama(), "fast"), tiny_llama()
    ids = torch.arange(10, 40)[None]
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    out = compiled(input_ids=ids, use_cache=True)
    torch.testing.assert_close(out.logits, plain(input_ids=ids).logits)
    assert type(out.past_key_values) is DynamicCache
    assert not isinstance(out.past_key_values, StaticCache)
