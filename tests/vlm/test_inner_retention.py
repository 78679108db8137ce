"""Dropping tokens between layers and evicting from what each layer got, against masks of both on the whole sequence."""

from __future__ import annotations

import pytest
import torch
from inner_oracle import RATIOS, TOLERANCE, Oracle, batch, deep

import vlmeff
from kvcache import policies
from kvcache.cache import RetainedCache
from vlmeff.errors import IncompatibleError

STEPS = 5
INNER = vlmeff.AdaptInfer(schedule=RATIOS)
POLICY = vlmeff.PrefixKV(keep_ratio=0.5, sink=1, recent=2)
MODELS = ["llava", "qwen2_5_vl", "qwen3_vl"]
every_model = pytest.mark.parametrize("name", MODELS)


def generated(model, inputs, **arguments):
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **arguments}
    return model.generate(**inputs, **options)


def retained(cache, width):
    """Per layer [B, width] bool, from the slots that the layer says it keeps."""
    out = []
    for layer in cache.layers:
        slots = layer.kept_slots.long()
        stays = torch.zeros(len(slots), width + 1, dtype=torch.bool)
        out.append(stays.scatter(1, slots.masked_fill(slots < 0, width), True)[:, :width])
    return out


def oracle_of(name, inputs, cache):
    """The prompt's pass finds what the schedule drops; what comes behind sees what was retained of the rest."""
    oracle = Oracle(name, inputs, RATIOS)
    oracle.run()
    oracle.retained = retained(cache, oracle.width)
    return oracle


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_model
@torch.no_grad()
def test_tokens_and_logits_equal_the_oracle(name, attention, rows):
    model = deep(name, attention)
    inputs = batch(model, rows, padded=rows > 1)
    width = inputs["input_ids"].shape[1]
    out = generated(vlmeff.wrap(model, None, tokens=INNER, kv=POLICY), inputs)
    cache, inner = out.past_key_values, vlmeff.report(model).inner
    assert isinstance(cache, RetainedCache)
    oracle = oracle_of(name, inputs, cache)
    assert [kept.tolist() for kept in inner.kept] == oracle.kept
    tokens, logits = oracle.greedy(STEPS)
    for a, b in zip(out.logits, logits, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    assert torch.equal(out.sequences[:, width:], tokens)
    # What a layer keeps it has got, and every layer counts every slot.
    for stays, columns, layer in zip(oracle.retained, inner.columns, cache.layers, strict=True):
        assert layer.get_seq_length() == width + STEPS - 1
        if columns is not None:
            came = torch.zeros_like(stays).scatter(1, columns, True)
            assert not bool((stays & ~came).any())


@every_model
@torch.no_grad()
def test_the_budget_is_a_share_of_what_came_to_the_layers(name):
    model = deep(name)
    inputs = batch(model, 1)
    generated(vlmeff.wrap(model, None, tokens=INNER, kv=POLICY), inputs)
    report = vlmeff.report(model)
    came = [columns for columns, _ in report.inner.processed]
    layers = report.retention.layers
    assert [sum(layer.prompt_tokens) for layer in layers] == came
    assert len(set(came)) == 3
    assert sum(sum(layer.kept) for layer in layers) == round(0.5 * sum(came))
    assert report.kv_bytes < 0.5 * report.kv_bytes_full, "the saving of both, over the whole prompt"


@pytest.mark.parametrize("policy", [n for n in policies.names() if n != "prefixkv"])
@torch.no_grad()
def test_every_policy_gets_scores_of_the_columns_that_came(policy):
    model = deep("llava")
    inputs = batch(model, 3)
    window = {"window": 4} if "window" in getattr(policies.get(policy), "__dataclass_fields__", {}) else {}
    chosen = policies.get(policy)(keep_ratio=0.5, **window)
    out = generated(vlmeff.wrap(model, None, tokens=INNER, kv=chosen), inputs)
    oracle_cache = out.past_key_values
    if chosen.selection == "shared":
        _, logits = (oracle := oracle_of("llava", inputs, oracle_cache)).greedy(STEPS)
        assert oracle.retained[0].sum() < inputs["attention_mask"].sum()
        for a, b in zip(out.logits, logits, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
    kept = [sum(layer.kept) for layer in oracle_cache.report().layers]
    came = [sum(layer.prompt_tokens) for layer in oracle_cache.report().layers]
    if policy == "pyramidkv":  # compacts each layer before the next is known: the pyramid is of the layer's own n
        counts = zip(oracle_cache.report().layers, range(len(kept)), strict=True)
        assert all(layer.kept[0] == chosen._pyramid(layer.prompt_tokens[0], len(kept))[i] for layer, i in counts)
    else:
        assert abs(sum(kept) / sum(came) - 0.5) < 0.03


@every_model
@torch.no_grad()
def test_keeping_everything_is_pruning_alone(name):
    inputs = batch(deep(name), 3)
    alone = generated(vlmeff.wrap(deep(name), None, tokens=INNER), inputs)
    both = generated(vlmeff.wrap(deep(name), None, tokens=INNER, kv=vlmeff.PrefixKV(keep_ratio=1.0)), inputs)
    assert torch.equal(alone.sequences, both.sequences)
    for a, b in zip(alone.logits, both.logits, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@every_model
@torch.no_grad()
def test_a_second_turn_and_a_loop_by_hand_equal_the_oracle(name):
    model = vlmeff.wrap(deep(name), None, tokens=INNER, kv=POLICY)
    inputs = batch(model, 1)
    first = generated(model, inputs)
    oracle = oracle_of(name, inputs, first.past_key_values)
    turn = torch.tensor([[21, 34, 55]])
    ids = torch.cat([first.sequences, turn], 1)
    oracle.append(ids[:, oracle.width :])
    expected = oracle.run()[:, -1]
    second = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=first.past_key_values,
        max_new_tokens=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(second.logits[0], expected, **TOLERANCE)

    out = model(**inputs, use_cache=True)
    oracle = oracle_of(name, inputs, out.past_key_values)
    token = torch.tensor([[17]])
    mask = torch.ones(1, oracle.width + 1, dtype=torch.long)
    kwargs = {"input_ids": token, "attention_mask": mask, "past_key_values": out.past_key_values, "use_cache": True}
    if name != "llava":  # Qwen takes the mask for new tokens when it is not told
        kwargs["position_ids"] = (mask.sum(1, keepdim=True) - 1 + model.model.rope_deltas).expand(3, -1, -1)
    step = model(**kwargs)
    oracle.append(token)
    torch.testing.assert_close(step.logits[:, -1], oracle.run()[:, -1], **TOLERANCE)


@torch.no_grad()
def test_beams_storage_and_decode_rules_go_on_with_it():
    inputs = batch(deep("llava"), 2)
    beams = generated(vlmeff.wrap(deep("llava"), None, tokens=INNER, kv=POLICY), inputs, num_beams=3, do_sample=False)
    assert beams.sequences.shape[0] == 2
    exact = generated(vlmeff.wrap(deep("llava"), None, tokens=INNER, kv=POLICY), inputs, max_new_tokens=30)
    rule = vlmeff.PrefixKV(keep_ratio=0.5, sink=1, recent=2, decode="fixed_point")
    model = vlmeff.wrap(deep("llava"), None, tokens=INNER, kv=rule)
    out = generated(model, inputs, max_new_tokens=30)
    lengths = [layer.columns for layer in out.past_key_values.report().layers]
    grown = [layer.columns for layer in exact.past_key_values.report().layers]
    assert all(a < b for a, b in zip(lengths, grown, strict=True))
    model = vlmeff.wrap(deep("llava"), None, tokens=INNER, kv=POLICY, kv_storage="int8")
    stored = generated(model, inputs, max_new_tokens=30)
    torch.testing.assert_close(stored.logits[0], exact.logits[0], **TOLERANCE)


@torch.no_grad()
def test_a_prompt_in_parts_is_refused():
    model = vlmeff.wrap(deep("llava"), None, tokens=INNER, kv=POLICY)
    inputs = batch(model, 1)
    cache = RetainedCache(model.config, POLICY, prompt_length=inputs["input_ids"].shape[1] + 4)
    with pytest.raises(IncompatibleError, match="whole"):
        model(**inputs, past_key_values=cache, use_cache=True)
