"""``generate`` with a retained cache: identity, an independent reference, memory, padded batches."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from retaining import (
    CLOSE,
    STEPS,
    Ends,
    TopScores,
    model_and_inputs,
    plain_generate,
    retained_forward,
    retained_generate,
    row_of,
    text_model_of,
)
from torch.nn.attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

from kvcache.cache import RetainedCache
from kvcache.policy import ScoreSpec

NAMES = ["llama", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"]

NAMES = ["llama", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"]


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """Flex attention as plain PyTorch: CI may have no C++ tool chain."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(WrappedFlexAttention, "_is_flex_compiled", False)
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)


# Keeping everything.


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_no_bit(name, backend):
    model, inputs = model_and_inputs(name, backend=backend)
    for policy in (TopScores(keep_ratio=1.0), Ends(keep_ratio=1.0), TopScores(keep_ratio=1.0, selection="per_head")):
        for options in ({}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 3}):
            torch.manual_seed(0)
            expected = plain_generate(model, inputs, max_new_tokens=STEPS, **options)
            torch.manual_seed(0)
            got, cache = retained_generate(model, policy, inputs, max_new_tokens=STEPS, headroom=2, **options)
            assert torch.equal(got.sequences, expected.sequences)
            assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
            assert cache.report().keep_ratio == 1


def test_keeping_everything_by_budgets_changes_no_bit():
    """The policy is asked, and answers n for each row."""
    model, inputs = model_and_inputs("llama")
    expected = plain_generate(model, inputs, max_new_tokens=STEPS)
    got, cache = retained_generate(model, Ends(keep_ratio=0.999), inputs, max_new_tokens=STEPS)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    assert cache.report().layers[0].kept == (19, 11)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_keeping_everything_changes_no_bit_of_flex_attention(name, uncompiled_flex):
    model, inputs = model_and_inputs(name, backend="flex_attention")
    expected = plain_generate(model, inputs, max_new_tokens=3)
    got, _ = retained_generate(model, TopScores(keep_ratio=1.0), inputs, max_new_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


# Keeping a part, against one pass without a cache in which every layer has a mask of its own.


def reference_logits(model, inputs, sequences, cache):
    """Logits of the generated steps, from a full-length pass: behind the prompt S, the queries of a retained layer see
    of the prompt only what that layer keeps."""
    width, total = inputs["input_ids"].shape[1], sequences.shape[1] - 1
    whole = {}
    for name, x in inputs.items():
        if x.ndim == 2 and x.shape[1] == width:
            filler = (
                sequences[:, width:total]
                if name == "input_ids"
                else x.new_full((len(x), total - width), name == "attention_mask")
            )
            x = torch.cat([x, filler], 1)
        whole[name] = x

    def masked(index):
        kept = cache.layers[index].kept_slots
        kept = kept[:, None] if kept.ndim == 2 else kept.repeat_interleave(2, 1)  # two query heads a key head
        stays = torch.zeros(*kept.shape[:2], width + 1, dtype=torch.bool)
        stays = stays.scatter(2, kept.long().masked_fill(kept < 0, width), True)[:, :, None, :width]

        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"]
            mask = torch.ones(total, total).bool().tril()[None, None] if mask is None else mask
            mask = mask.expand(len(stays), stays.shape[1], -1, -1).clone()
            mask[:, :, width:, :width] &= stays
            return args, {**kwargs, "attention_mask": mask}

        return hook

    text = text_model_of(model)
    handles = [text.layers[i].self_attn.register_forward_pre_hook(masked(i), with_kwargs=True) for i in cache.retained]
    with torch.no_grad():
        logits = model(**whole, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits[:, width - 1 :]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("selection", ["shared", "per_head"])
@pytest.mark.parametrize("name", NAMES)
def test_generation_is_that_of_masks_of_each_layer(name, selection, backend):
    model, inputs = model_and_inputs(name, backend=backend)
    policy = TopScores(keep_ratio=0.4, selection=selection)
    got, cache = retained_generate(model, policy, inputs, max_new_tokens=STEPS, headroom=3)
    report = cache.report()
    if len(report.layers) > 1:
        assert len({layer.columns for layer in report.layers}) > 1, "layers of one length would show less"
    assert all(kept < n for r in report.layers for kept, n in zip(r.kept, r.prompt_tokens, strict=True))
    model.set_attn_implementation("sdpa")
    expected = reference_logits(model, inputs, got.sequences, cache)
    torch.testing.assert_close(torch.stack(got.logits, 1), expected, **CLOSE)
    plain = plain_generate(model, inputs, max_new_tokens=STEPS)
    assert not torch.allclose(torch.stack(plain.logits, 1)[:, 1:], torch.stack(got.logits, 1)[:, 1:], atol=1e-2)
    assert torch.allclose(plain.logits[0], got.logits[0], atol=1e-4), "the first token sees the full cache"


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_flex_attention_generates_the_same(scope, uncompiled_flex):
    model, inputs = model_and_inputs("llama")
    policy = TopScores(keep_ratio=0.4, scope=scope)
    expected, _ = retained_generate(model, policy, inputs, max_new_tokens=3)
    model.set_attn_implementation("flex_attention")
    got, _ = retained_generate(model, policy, inputs, max_new_tokens=3)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)


# Memory.


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_memory_is_what_is_kept(scope):
    model, inputs = model_and_inputs("llama", lengths=(60, 41))
    prefill = []

    def remember(module, args, kwargs):
        cache = kwargs["past_key_values"]
        prefill.extend(
            t.untyped_storage().data_ptr()
            for layer in cache.layers
            if layer.physical_length == 60
            for t in (layer.keys, layer.values)
        )

    handle = text_model_of(model).layers[3].self_attn.register_forward_pre_hook(remember, with_kwargs=True)
    _, cache = retained_generate(model, TopScores(keep_ratio=0.3, scope=scope), inputs, max_new_tokens=4)
    handle.remove()
    assert len(prefill) == (6 if scope == "model" else 0), "by layer, none is left full when the last begins"
    report = cache.report()
    per_column = 2 * 2 * 16 * 2 * 4  # rows, heads, head dim, keys and values, bytes
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in cache.layers for t in (x.keys, x.values)
    }
    assert sum(storages.values()) == sum(layer.columns for layer in report.layers) * per_column
    bookkeeping = sum(t.nbytes for x in cache.layers for t in (x.valid, x.kept_slots) if t is not None)
    assert report.bytes == cache.nbytes() == sum(storages.values()) + bookkeeping
    assert report.full_bytes == 4 * 63 * per_column
    gc.collect()
    full = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.ndim == 4 and t.shape[-2:] == (60, 16)]
    assert not full
    assert not any(t.untyped_storage().nbytes() >= 60 * per_column // 2 for x in cache.layers for t in x.tensors())


# Batches.


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("selection", ["shared", "per_head"])
def test_rows_of_a_padded_batch_are_as_if_alone(selection, backend):
    model, inputs = model_and_inputs("llama", backend=backend, lengths=(23, 9, 16))
    policy = TopScores(keep_ratio=0.4, selection=selection)
    got, cache = retained_generate(model, policy, inputs, max_new_tokens=STEPS)
    for row in range(3):
        alone, own = retained_generate(model, policy, row_of(inputs, row), max_new_tokens=STEPS)
        assert torch.equal(got.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])
        logits = torch.stack([step[row] for step in got.logits])
        torch.testing.assert_close(logits, torch.stack([step[0] for step in alone.logits]), **CLOSE)
        pads = int((inputs["attention_mask"][row] == 0).sum())
        for layer, single in zip(cache.layers, own.layers, strict=True):
            slots, expected = layer.kept_slots[row], single.kept_slots[0]
            missing = slots.shape[-1] - expected.shape[-1]
            assert (slots[..., :missing] == -1).all()
            assert torch.equal(slots[..., missing:], expected + pads)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_fillers_are_never_looked_at(backend, uncompiled_flex):
    model, inputs = model_and_inputs("llama", lengths=(20, 8))
    _, cache = retained_generate(model, TopScores(keep_ratio=0.4), inputs, max_new_tokens=1)
    model.set_attn_implementation(backend)
    poisoned = copy.deepcopy(cache)
    for layer in poisoned.layers:
        fillers = ~layer.valid[:, None, :, None]
        assert fillers.any()
        layer.keys = layer.keys.masked_fill(fillers, 1e4)
        layer.values = layer.values.masked_fill(fillers, 1e4)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2).long()], 1)
    for step in (torch.tensor([[11, 12], [13, 14]]), torch.tensor([[15], [16]])):
        positions = (mask.cumsum(1) - 1)[:, -step.shape[1] :]
        arguments = {"input_ids": step, "attention_mask": mask, "position_ids": positions}
        clean = retained_forward(model, cache, arguments).logits
        assert torch.equal(retained_forward(model, poisoned, arguments).logits, clean)
        mask = torch.cat([mask, torch.ones(2, 1).long()], 1)


def test_a_row_of_padding_only_is_kept_out():
    model, inputs = model_and_inputs("llama", lengths=(12, 7))
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        cache = RetainedCache(model.config, TopScores(keep_ratio=0.5), prompt_length=12)
        retained_forward(model, cache, inputs)
    alone, _ = retained_generate(model, TopScores(keep_ratio=0.5), row_of(inputs, 0), max_new_tokens=1)
    assert cache.report().layers[0].kept[1] == 0
    assert alone.sequences.shape == (1, 13)


def test_a_layer_sees_its_visual_tokens_in_window_policies():
    """A policy of scope "layer" that looks at attention rows is served layer by layer."""
    model, inputs = model_and_inputs("llama")
    shown = []

    class Rows(TopScores):
        def budgets(self, stats):
            shown.append([s.layer for s in stats])
            return [max(1, s.n // 2) for s in stats]

        def select(self, stats, k):
            return stats.probs.sum((0, 1)).topk(k).indices.sort().values

    policy = Rows(scope="layer", needs=ScoreSpec(kind="window", window=4))
    got, cache = retained_generate(model, policy, inputs, max_new_tokens=STEPS)
    assert shown == [[layer] for layer in range(4) for _ in range(2)]
    expected = reference_logits(model, inputs, got.sequences, cache)
    torch.testing.assert_close(torch.stack(got.logits, 1), expected, **CLOSE)
