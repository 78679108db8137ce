"""Every figure of a report against what can be measured or counted by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import IMAGE, MODELS, prompts, tiny

import vlmeff
from vlmeff.vlm.cost import prefill_flops

every_model = pytest.mark.parametrize("name", MODELS)


def reported(name, pictures, **arguments):
    """A report, the inputs it is about and the cache that the call left."""
    model = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=0.25))
    inputs = prompts(model, pictures)
    out = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, **arguments)
    return vlmeff.report(model), inputs, out.past_key_values


def bytes_of(cache):
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


@pytest.mark.parametrize("pictures", [[1], [0, 1, 2]], ids=str)
@every_model
def test_token_counts_are_those_of_the_prompt_and_of_what_was_kept(name, pictures):
    report, inputs, _ = reported(name, pictures)
    sizes = [36] * sum(pictures) if name == "llava" else (inputs["image_grid_thw"].prod(1) // 4).tolist()
    kept = sum(round(n / 4) for n in sizes)
    assert report.visual_tokens_before == int((inputs["input_ids"] == IMAGE).sum())
    assert report.visual_tokens_after == kept
    assert report.prompt_tokens_before == int(inputs["attention_mask"].sum())
    assert report.prompt_tokens_before - report.prompt_tokens_after == sum(sizes) - kept
    assert (report.rows, report.new_tokens, report.method) == (len(pictures), 5, "hiprune")


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@every_model
def test_cache_bytes_are_those_of_the_cache_and_the_reference_is_that_of_the_unwrapped_model(name, arguments):
    report, inputs, cache = reported(name, [0, 1, 2], **arguments)
    plain = tiny(name).generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, **arguments)
    assert report.kv_bytes == bytes_of(cache)
    assert report.kv_bytes_full == bytes_of(plain.past_key_values)


def test_prefill_flops_equal_a_count_by_hand():
    config = tiny("llava").config.get_text_config()  # 3 layers, width 32, 4 heads and 2 key/value heads of 8, MLP 64
    n = 10
    projections = 2 * n * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    mlp = 2 * n * 3 * 32 * 64
    attention = 2 * (2 * n * n * 8) * 4
    assert prefill_flops(config, n) == 3 * (projections + mlp + attention)


@every_model
def test_a_report_of_a_text_prompt_says_that_nothing_was_reduced(name):
    model = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=0.25))
    inputs = prompts(model, [0, 0])
    model.generate(**inputs, max_new_tokens=3)
    report = vlmeff.report(model)
    assert report.visual_tokens_before == report.visual_tokens_after == 0
    assert report.prompt_tokens_before == report.prompt_tokens_after == int(inputs["attention_mask"].sum())
    assert report.kv_bytes == report.kv_bytes_full


@every_model
def test_the_times_of_a_call_follow_each_other(name):
    report, _, _ = reported(name, [1])
    assert 0 < report.encode_ms <= report.prefill_ms <= report.total_ms


@every_model
@torch.no_grad()
def test_a_forward_pass_is_reported_too(name):
    model = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=0.25))
    output = model(**prompts(model, [1]), use_cache=True)
    report = vlmeff.report(model)
    assert report.prompt_tokens_after == output.logits.shape[1]
    assert report.kv_bytes == bytes_of(output.past_key_values)
    assert report.new_tokens is None


@every_model
def test_a_report_is_text_and_json(name):
    report, _, _ = reported(name, [1])
    assert json.loads(json.dumps(report.to_dict()))["visual_tokens_after"] == report.visual_tokens_after
    assert f"{report.visual_tokens_before} -> {report.visual_tokens_after}" in str(report)
    assert all(how in str(report) for how in ("(measured)", "(counted)", "(reference)"))


@torch.no_grad()
def test_retention_is_in_the_text_and_the_json_with_what_all_of_it_saves():
    model = vlmeff.wrap(
        tiny("llava"),
        None,
        tokens=vlmeff.HiPrune(keep=0.5),
        kv=vlmeff.PrefixKV(keep_ratio=0.4, sink=1, recent=2),
        kv_storage="int8",
    )
    inputs = prompts(model, [1, 2])
    out = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
    cache, report = out.past_key_values, vlmeff.report(model)
    slots = [layer.kept_slots for layer in cache.layers]
    kept = [(rows >= 0).sum(1).tolist() for rows in slots]
    found = json.loads(json.dumps(report.to_dict()))
    assert found["kv_storage"] == "int8"
    retention = found["retention"]
    assert retention["layers"] == [0, 1, 2]
    assert retention["kept"] == kept
    assert [sum(rows) for rows in retention["prompt_tokens"]] == [report.prompt_tokens_after] * 3
    assert retention["keep_ratio"] == pytest.approx(sum(map(sum, kept)) / (3 * report.prompt_tokens_after))
    assert (retention["bytes"], retention["full_bytes"]) == (cache.nbytes(), cache.full_nbytes())
    assert retention["storage"] == "int8"
    assert len({sum(rows) for rows in kept}) > 1
    shares = sorted(sum(rows) / report.prompt_tokens_after for rows in kept)
    lines = {line.split("  ")[0]: line for line in str(report).splitlines()}
    line = lines["KV entries of the prompt kept"]
    assert f"{retention['keep_ratio']:.1%}, {shares[0]:.1%} to {shares[-1]:.1%} in a layer" in line
    assert "int8" in lines["KV storage"]
    plain = tiny("llava").generate(**inputs, max_new_tokens=5, return_dict_in_generate=True).past_key_values
    assert f"of which {cache.nbytes() / bytes_of(plain):.1%} is held" in lines["KV cache, unshortened prompt"]


@torch.no_grad()
def test_without_retention_nothing_is_said_of_it():
    model = vlmeff.wrap(tiny_llama(), None, kv="streaming_llm")
    inputs = llama_inputs([30])
    model.generate(**inputs, max_new_tokens=3)
    assert "KV storage" not in str(vlmeff.report(model))
    assert vlmeff.report(model).to_dict()["retention"]["storage"] is None
    vlmeff.wrap(model, None)
    model.generate(**inputs, max_new_tokens=3)
    assert "entries" not in str(vlmeff.report(model))
    assert vlmeff.report(model).to_dict()["retention"] is None
