"""Scores of the prompt against eager attention maps, padding, heads, chunks and soft caps."""

from __future__ import annotations

import pytest
import torch
from retaining import Recorder, retained_generate, text_model_of
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny

from kvcache.policy import ScoreSpec
from kvcache.scores import (
    accumulate,
    full_scores,
    full_scores_of_weights,
    key_norms,
    stack_rows,
    window_rows,
    window_rows_of_weights,
)

RELATIVE = 1e-5  # float32, sums of some hundred probabilities


def attention(q, k, *, scale, valid=None, last_key=None, softcap=None):
    """Softmax rows [B, H, W, S] written out; rows and keys of padding 0."""
    (batch, heads, width, _), keys = q.shape, k.shape[2]
    p = torch.zeros(batch, heads, width, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(width):
                slot = keys - width + i
                if valid is not None and not valid[b, slot]:
                    continue
                end = slot if last_key is None else int(last_key[b, i])
                seen = [j for j in range(end + 1) if valid is None or valid[b, j]]
                z = k[b, h // (heads // k.shape[1]), seen].double() @ q[b, h, i].double() * scale
                z = z if softcap is None else softcap * (z / softcap).tanh()
                p[b, h, i, seen] = z.softmax(0)
    return p


def example(*, seed=0, width=9, keys=9, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, width, 8, generator=g).to(dtype)
    k = torch.randn(2, 2, keys, 8, generator=g).to(dtype)
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[1, :3] = False
    return q, k, valid


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_scores_and_rows_are_those_of_attention_written_out(padded, both_ways, softcap):
    q, k, valid = example(width=7)
    valid = valid if padded else None
    last_key = torch.tensor([[2, 4, 4, 6, 6, 7, 8], [4, 4, 4, 8, 8, 8, 8]]) if both_ways else None
    expected = attention(q, k, scale=0.4, valid=valid, last_key=last_key, softcap=softcap)
    arguments = {"scale": 0.4, "valid": valid, "last_key": last_key, "softcap": softcap}

    rows = window_rows(q, k, **arguments)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), expected, rtol=RELATIVE, atol=1e-7)

    shared = full_scores(q, k, reduce="mean", **arguments)
    torch.testing.assert_close(shared.double(), expected.mean(1).sum(1), rtol=RELATIVE, atol=1e-7)
    each = full_scores(q, k, reduce="none", **arguments)
    torch.testing.assert_close(each.double(), expected.sum(2), rtol=RELATIVE, atol=1e-7)
    heads = full_scores(q, k, reduce="group", **arguments)
    torch.testing.assert_close(heads.double(), expected.unflatten(1, (2, 2)).mean(2).sum(2), rtol=RELATIVE, atol=1e-7)
    torch.testing.assert_close(rows.mean(1).sum(1), shared, rtol=RELATIVE, atol=1e-7)


def test_scores_of_a_row_sum_to_its_tokens_and_padding_gets_exactly_nothing():
    q, k, valid = example()
    scores = full_scores(q, k, scale=1.0, reduce="mean", valid=valid)
    assert scores[1, :3].tolist() == [0, 0, 0]
    torch.testing.assert_close(scores.sum(1), torch.tensor([9.0, 6.0]), rtol=RELATIVE, atol=0)


def test_nan_in_padding_reaches_no_score():
    q, k, valid = example()
    expected = full_scores(q, k, scale=1.0, reduce="mean", valid=valid)
    rows = window_rows(q, k, scale=1.0, valid=valid)
    q[1, :, :3], k[1, :, :3] = torch.nan, torch.nan
    assert torch.equal(full_scores(q, k, scale=1.0, reduce="mean", valid=valid), expected)
    k[1, :, :3] = 0  # of the rows, only queries may be NaN: an attention kernel would not survive such keys either
    assert torch.equal(window_rows(q, k, scale=1.0, valid=valid), rows)


@pytest.mark.parametrize("reduce", ["none", "group", "mean"])
def test_weights_that_eager_attention_returns_give_the_same(reduce):
    q, k, valid = example(width=7)
    weights = attention(q, k, scale=0.3, valid=valid).float()
    weights[1, :, 0] = 1 / 9  # query 0 of row 1 is padding, and attends to everything alike
    arguments = {"reduce": reduce, "valid": valid}
    got = full_scores_of_weights(weights, kv_heads=2, **arguments)
    torch.testing.assert_close(got, full_scores(q, k, scale=0.3, **arguments), rtol=RELATIVE, atol=1e-6)
    rows = window_rows_of_weights(weights, valid=valid)
    torch.testing.assert_close(rows, window_rows(q, k, scale=0.3, valid=valid), rtol=RELATIVE, atol=1e-6)
    assert rows[1, :, 0].abs().sum() == 0


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 5], [2, 6, 1]])
def test_chunks_of_a_prompt_add_up(chunks):
    q, k, valid = example()
    whole, rows = full_scores(q, k, scale=1.0, reduce="group", valid=valid), window_rows(q, k, scale=1.0, valid=valid)
    total = stacked = None
    start = 0
    for chunk in chunks:
        end = start + chunk
        arguments = {"scale": 1.0, "valid": valid[:, :end]}
        total = accumulate(total, full_scores(q[:, :, start:end], k[:, :, :end], reduce="group", **arguments))
        stacked = stack_rows(stacked, window_rows(q[:, :, start:end], k[:, :, :end], **arguments))
        start = end
    torch.testing.assert_close(total, whole, rtol=RELATIVE, atol=1e-6)
    torch.testing.assert_close(stacked, rows, rtol=RELATIVE, atol=1e-6)


def test_half_precision_is_scored_in_float32():
    q, k, valid = example(dtype=torch.bfloat16)
    expected = full_scores(q.float(), k.float(), scale=1.0, reduce="mean", valid=valid)
    got = full_scores(q, k, scale=1.0, reduce="mean", valid=valid)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=RELATIVE, atol=1e-6)
    assert key_norms(k).dtype == torch.float32
    torch.testing.assert_close(key_norms(k), k.float().pow(2).sum(-1).sqrt(), rtol=RELATIVE, atol=0)


# What a policy is shown, against the attention maps of the model itself.


def maps(model, inputs):
    """Per retained layer [B, H, S, S], from eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**inputs, output_attentions=True, use_cache=False).attentions
    return found


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma"])
def test_a_policy_is_shown_the_model_s_own_attention(name, backend):
    """Gemma 3 and PaliGemma let the tokens of a picture see each other in both directions."""
    model = tiny_llama() if name == "llama" else tiny(name)
    inputs = llama_inputs([17, 9]) if name == "llama" else prompts(model, [1, 2])
    attended = maps(model, inputs)
    model.set_attn_implementation(backend)
    real = inputs["attention_mask"].bool()
    for kind, selection in (("full", "shared"), ("full", "per_head"), ("window", "shared")):
        # 0.999: measured, and the budgets are n, so that nothing has to be selected
        needs = ScoreSpec(kind=kind, window=5)
        policy = Recorder(needs=needs, selection=selection, keep_ratio=0.999, shown=[])
        _, cache = retained_generate(model, policy, inputs, max_new_tokens=1)
        assert len(policy.shown) == len(real)
        for row, layers in enumerate(policy.shown):
            assert [s.layer for s in layers] == list(range(len(cache.retained)))
            for stats, index in zip(layers, cache.retained, strict=True):
                a = attended[index][row][:, real[row]][:, :, real[row]]
                assert stats.n == real[row].sum()
                if kind == "window":
                    torch.testing.assert_close(stats.probs, a[:, -5:], rtol=1e-4, atol=1e-5)
                    continue
                expected = a.sum(1).mean(0) if selection == "shared" else a.sum(1).unflatten(0, (2, 2)).mean(1)
                torch.testing.assert_close(stats.scores, expected, rtol=1e-4, atol=1e-5)


def test_rows_behind_the_picture_and_the_window_where_there_are_none():
    model = tiny_llama()
    inputs = llama_inputs([16, 12])
    attended = maps(model, inputs)
    model.set_attn_implementation("sdpa")
    vision = torch.zeros(2, 16, dtype=torch.bool)
    vision[0, 4:13] = True  # 3 rows behind it
    vision[1, 10:] = True  # ends with the picture
    policy = Recorder(needs=ScoreSpec(kind="post_vision", window=6), shown=[])
    retained_generate(model, policy, inputs, max_new_tokens=1, vision=vision)
    for layer in range(4):
        (first,), (second,) = ([row[layer]] for row in policy.shown)
        torch.testing.assert_close(first.probs, attended[layer][0, :, -3:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second.probs, attended[layer][1, :, -6:, 4:], rtol=1e-4, atol=1e-5)
        assert first.vision.tolist() == vision[0].tolist()
        assert second.vision.tolist() == vision[1, 4:].tolist()


def test_norms_are_those_of_the_keys_of_the_cache():
    model = tiny_llama()
    inputs = llama_inputs([10, 7])
    policy = Recorder(needs=ScoreSpec(kind="keys"), shown=[])
    retained_generate(model, policy, inputs, max_new_tokens=1)
    with torch.no_grad():
        full = model(**inputs, use_cache=True).past_key_values
    for layer in range(4):
        for row, n in enumerate([10, 7]):
            expected = full.layers[layer].keys[row, :, -n:].norm(dim=-1)
            torch.testing.assert_close(policy.shown[row][layer].key_norms, expected)
    assert text_model_of(model).layers[0].self_attn._forward_hooks == {}
