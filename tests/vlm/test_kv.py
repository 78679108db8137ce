"""KV retention through ``wrap``: alone, with token reduction, and in the report. ``tests/kvcache`` has the rest."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import tiny_llama
from tiny_models import prompts, tiny

import vlmeff
from kvcache.cache import RetainedCache
from kvcache.request import retained_call
from vlmeff.errors import ConfigError, UnknownNameError
from vlmeff.vlm.retention import decoder_of

POLICY = vlmeff.PrefixKV(keep_ratio=0.4, sink=1, recent=2)
FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3"]
every_family = pytest.mark.parametrize("name", FAMILIES)


def generated(model, inputs, **arguments):
    return model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **arguments)


def text_inputs():
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 100, (2, 30), generator=g)
    mask = torch.ones_like(ids)
    mask[1, :7], ids[1, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@every_family
@torch.no_grad()
def test_keeping_everything_changes_no_bit(name):
    model = tiny(name)
    inputs = prompts(model, [1, 2])
    plain = generated(model, inputs)
    wrapped = generated(vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=1.0)), inputs)
    assert torch.equal(plain.sequences, wrapped.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, wrapped.logits, strict=True))
    assert isinstance(wrapped.past_key_values, RetainedCache)


@every_family
@torch.no_grad()
def test_wrap_is_the_hooks_of_one_call_and_the_report_says_what_they_kept(name):
    model = tiny(name)
    inputs = prompts(model, [1, 2])
    kwargs = {**inputs, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    visual = inputs["input_ids"] == model.config.image_token_id
    call = retained_call(model, decoder_of(model), POLICY, kwargs, generating=True, vision=visual)
    with call:
        expected = model.generate(**kwargs)
    out = generated(vlmeff.wrap(model, None, kv=POLICY), inputs)
    assert torch.equal(out.sequences, expected.sequences)
    for a, b in zip(out.logits, expected.logits, strict=True):
        assert torch.equal(a, b)
    report = vlmeff.report(model)
    assert report.method == "prefixkv"
    assert report.kv_bytes == call.cache.nbytes() < report.kv_bytes_full
    assert report.retention.keep_ratio == pytest.approx(0.4, abs=0.05)
    assert "KV" in str(report)


@torch.no_grad()
def test_a_language_model_without_pictures():
    model = tiny_llama()
    inputs = text_inputs()
    plain = model.generate(**inputs, max_new_tokens=5)
    vlmeff.wrap(model, None, kv="prefixkv", keep_ratio=0.3)
    out = generated(model, inputs)
    assert torch.equal(out.sequences[:, :30], inputs["input_ids"])
    report = vlmeff.report(model)
    assert report.kv_bytes < 0.7 * report.kv_bytes_full
    for layer in report.retention.layers:
        assert layer.prompt_tokens == (30, 23)
    vlmeff.unwrap(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "llava_next"])
@torch.no_grad()
def test_token_reduction_goes_first_and_the_share_is_of_what_it_leaves(name):
    reduced = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=0.5))
    inputs = prompts(reduced, [1, 2])
    both = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=0.5), kv=vlmeff.PrefixKV(keep_ratio=1.0))
    a, b = generated(reduced, inputs), generated(both, inputs)
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))

    vlmeff.wrap(both, None, tokens=vlmeff.HiPrune(keep=0.5), kv=POLICY)
    generated(both, inputs)
    report = vlmeff.report(both)
    assert report.method == "hiprune + prefixkv"
    rows = [layer.prompt_tokens for layer in report.retention.layers]
    assert all(sum(row) == report.prompt_tokens_after < report.prompt_tokens_before for row in rows)
    assert report.kv_bytes < vlmeff.report(reduced).kv_bytes < report.kv_bytes_full


@pytest.mark.parametrize("tokens", [None, vlmeff.HiPrune(keep=0.5)], ids=["whole", "reduced"])
@torch.no_grad()
def test_a_second_turn_on_the_retained_cache(tokens):
    model = vlmeff.wrap(tiny("llava"), None, tokens=tokens, kv=POLICY)
    inputs = prompts(model, [1])
    first = generated(model, inputs)
    ids = torch.cat([first.sequences, torch.tensor([[31, 32, 33]])], 1)
    second = generated(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=first.past_key_values
    )
    assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
    # As many columns as were fed in, whatever was dropped: logical lengths.
    assert second.past_key_values.get_seq_length() == ids.shape[1] + 4 - (
        0 if tokens is None else int((~first_keep(model, inputs)).sum())
    )


def first_keep(model, inputs):
    return model(**inputs).vlmeff_keep


@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
@torch.no_grad()
def test_what_is_kept_can_be_stored_in_few_bits(storage):
    model = tiny_llama()
    g = torch.Generator().manual_seed(5)
    inputs = {"input_ids": torch.randint(10, 100, (1, 600), generator=g)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=0.8))
    generated(model, inputs)
    plain = vlmeff.report(model).kv_bytes
    vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=0.8), kv_storage=storage)
    generated(model, inputs)
    # 128 tokens stay as they are; the others take 8, 4 or 2 bits and 2 x 16 in 32 for scale and zero.
    assert vlmeff.report(model).kv_bytes < {"int8": 0.6, "int4": 0.52, "int2": 0.48}[storage] * plain


def test_what_cannot_work_says_so():
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"kv=3 must be.*PrefixKV.*snapkv"):
        vlmeff.wrap(model, None, kv=3)
    with pytest.raises(UnknownNameError, match="prefixkv"):
        vlmeff.wrap(model, None, kv="prefikv")
    with pytest.raises(UnknownNameError, match="keep_ratio"):
        vlmeff.wrap(model, None, kv="prefixkv", keep_rate=0.3)
    with pytest.raises(ConfigError, match=r"kv_storage='int4'.*keep_ratio=1.0"):
        vlmeff.wrap(model, None, kv_storage="int4")
    with pytest.raises(ConfigError, match="int3"):
        vlmeff.wrap(model, None, kv=POLICY, kv_storage="int3")
    assert not vlmeff.is_wrapped(model)


@torch.no_grad()
def test_a_preset_may_be_retention_alone_and_its_ratio_goes_to_a_policy_named_instead():
    model = tiny_llama()
    with pytest.warns(UserWarning, match="no entry"):
        vlmeff.wrap(model, "paper-prefixkv")
    generated(model, text_inputs())
    report = vlmeff.report(model)
    assert (report.preset, report.method) == ("paper-prefixkv", "prefixkv")
    assert report.retention.keep_ratio == pytest.approx(0.5, abs=0.05)
    with pytest.warns(UserWarning, match="no entry"):
        vlmeff.wrap(model, "paper-prefixkv", kv="streaming_llm")
    generated(model, text_inputs())
    assert vlmeff.report(model).method == "streaming_llm"
    assert vlmeff.report(model).retention.keep_ratio == pytest.approx(0.5, abs=0.1)
