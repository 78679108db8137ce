"""One contract for every registered policy, and each formula against loops in plain Python."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retaining import retained_generate, row_of
from tiny_common import decoder, ready
from tiny_llama import llama_inputs, tiny_llama
from transformers import Qwen3Config, Qwen3ForCausalLM

import vlmeff
from kvcache import H2O, TOVA, KNorm, LayerStats, PyramidKV, RandomKV, SnapKV, StreamingLLM, VLCache, policies
from kvcache.policy import RetentionPolicy
from vlmeff.errors import ConfigError, UnknownNameError

HEADS, KV_HEADS = 4, 2
# Small windows, so that short prompts are worth choosing from.
SMALL = {"snapkv": {"window": 4}, "pyramidkv": {"window": 4}, "prefixkv": {"sink": 1, "recent": 2}}
PROTECTED = {"streaming_llm": {"sink": 3}, "h2o": {"sink": 3}}
for _name in ("prefixkv", "vl_cache", "knorm", "random"):
    PROTECTED[_name] = {"sink": 3, "recent": 2}
TEXT_FIRST = ["snapkv", "pyramidkv", "vl_cache", "h2o", "tova", "knorm"]


def causal_rows(rows, n, seed, heads=HEADS):
    """[heads, rows, n] float32 attention of the last ``rows`` queries."""
    logits = 3 * torch.randn(heads, rows, n, generator=torch.Generator().manual_seed(seed))
    seen = torch.ones(rows, n, dtype=torch.bool).tril(n - rows)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)


def measured(policy, n, seed=0, layer=0, layers=1, vision=None, rows=None):
    """What a controller would hand to ``policy``: what it needs and nothing else."""
    kind, values = policy.needs.kind, {}
    if rows is None and kind in ("window", "post_vision"):
        rows = causal_rows(min(n, policy.needs.window), n, 1000 * seed + layer)
    seed = 1000 * seed + layer
    if kind == "full":
        received = causal_rows(n, n, seed).sum(1)
        per_head = received.view(KV_HEADS, -1, n).mean(1)
        values["scores"] = per_head if policy.selection == "per_head" else received.mean(0)
    elif kind in ("window", "post_vision"):
        if policy.needs.sums:
            values["scores"] = rows.sum(1) if policy.needs.query_heads else rows.sum(1).mean(0)
        else:
            values["probs"] = rows
    elif kind == "keys":
        values["key_norms"] = torch.rand(KV_HEADS, n, generator=torch.Generator().manual_seed(seed))
    return LayerStats(layer=layer, layers=layers, n=n, kv_heads=KV_HEADS, vision=vision, **values)


def make(name, **arguments):
    return policies.get(name)(**SMALL.get(name, {}) | arguments)


def budgets_of(policy, stats):
    if policy.scope == "model":
        return policy.budgets(stats)
    return [policy.budgets([layer])[0] for layer in stats]


def best(scores, k, protected=(), before=()):
    """The k slots that come first: protected, then ``before``, then by score; the later wins ties."""
    order = sorted(range(len(scores)), key=lambda i: (i not in protected, i not in before, -scores[i], -i))
    return sorted(order[:k])


def rows_of(chosen, policy):
    return chosen.tolist() if policy.selection == "per_head" else [chosen.tolist()]


def test_every_policy_of_the_specification_is_registered():
    assert set(policies.names()) >= {
        *("prefixkv", "streaming_llm", "snapkv", "pyramidkv", "vl_cache", "h2o", "tova", "knorm", "random")
    }
    with pytest.raises(UnknownNameError, match="snapkv"):
        policies.get("snapvk")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", policies.names())
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60),
    layers=st.integers(1, 6),
    keep_ratio=st.floats(0.01, 1),
    seed=st.integers(0, 99),
    protect=st.booleans(),
)
def test_kept_slots_ascend_are_distinct_and_as_many_as_the_budget(name, n, layers, keep_ratio, seed, protect):
    policy = make(name, keep_ratio=keep_ratio, **PROTECTED.get(name, {}) if protect else {})
    assert isinstance(policy, RetentionPolicy)
    stats = [measured(policy, n, seed, layer, layers) for layer in range(layers)]
    budgets = budgets_of(policy, stats)
    assert len(budgets) == layers
    for layer, k in zip(stats, budgets, strict=True):
        assert type(k) is int
        assert 1 <= k <= n
        chosen = policy.select(layer, k)
        assert chosen.dtype == torch.int64
        assert chosen.shape == ((KV_HEADS, k) if policy.selection == "per_head" else (k,))
        for row in rows_of(chosen, policy):
            assert row == sorted(set(row))
            assert 0 <= row[0] <= row[-1] < n
            sink, recent = getattr(policy, "sink", 0), getattr(policy, "recent", 0)
            assert set(row) >= {*range(min(sink, n)), *range(max(0, n - recent), n)}


@pytest.mark.parametrize("name", policies.names())
@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.filterwarnings("ignore")
def test_keep_ratio_one_keeps_every_slot(name, n):
    policy = make(name, keep_ratio=1.0)
    stats = [measured(policy, n, 0, layer, 3) for layer in range(3)]
    assert budgets_of(policy, stats) == [n] * 3
    for row in rows_of(policy.select(stats[0], n), policy):
        assert row == list(range(n))


@pytest.mark.parametrize("name", [n for n in policies.names() if n != "snapkv"])
@pytest.mark.parametrize("keep_ratio", [0.3, 0.5, 0.7])
def test_the_layers_hold_the_budget_within_one_token_each(name, keep_ratio):
    policy = make(name, keep_ratio=keep_ratio)
    stats = [measured(policy, 61, 0, layer, 5) for layer in range(5)]
    budgets = budgets_of(policy, stats)
    if name in ("prefixkv", "vl_cache", "pyramidkv"):
        assert sum(budgets) == round(keep_ratio * 5 * 61)
    else:
        assert budgets == [round(keep_ratio * 61)] * 5


@pytest.mark.parametrize("name", policies.names())
@pytest.mark.parametrize("value", [0, -0.1, 1.01, math.nan, "half", True, None])
def test_a_share_outside_zero_to_one_is_refused(name, value):
    with pytest.raises(ConfigError, match="keep_ratio="):
        make(name, keep_ratio=value)


ILLEGAL = [(name, field, value) for name in PROTECTED for field in PROTECTED[name] for value in (-1, 1.5, True)]
ILLEGAL += [(name, "text_first", 1) for name in TEXT_FIRST]
ILLEGAL += [(name, "window", 0) for name in ("snapkv", "pyramidkv", "vl_cache", "prefixkv")]
ILLEGAL += [("snapkv", "kernel", 4), ("snapkv", "kernel", 0), ("pyramidkv", "kernel", 2), ("snapkv", "pool", "min")]
ILLEGAL += [("pyramidkv", "beta", 0.5), ("pyramidkv", "beta", math.nan), ("random", "seed", -1)]
ILLEGAL += [("streaming_llm", "decode", "fixed_point"), ("streaming_llm", "decode_window", 0)]


@pytest.mark.parametrize(("name", "field", "value"), ILLEGAL)
def test_an_illegal_argument_is_named(name, field, value):
    with pytest.raises(ConfigError, match=f"{field}="):
        make(name, **{field: value})


def test_only_what_never_saw_the_question_says_so():
    blind = {name for name in policies.names() if not make(name).query_aware}
    assert blind == {"streaming_llm", "knorm", "random"}


def test_a_budget_raised_to_the_protected_tokens_warns_once_whatever_the_prompts(caplog):
    caplog.set_level(logging.INFO, "vlmeff")
    for name, arguments in PROTECTED.items():
        policy = make(name, keep_ratio=0.02, **arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            warnings.simplefilter("default")  # what Python does with no filter: once for each text and place
            for n in (40, 41, 60):
                budgets_of(policy, [measured(policy, n, 0, layer, 3) for layer in range(3)])
        assert ["keep_ratio=0.02" in str(warning.message) for warning in caught] == [True], name
    for n in (40, 41, 60):  # the figures are in the log
        assert f"of {3 * n} entries is {round(0.06 * n)}, less than the 18 that have to stay" in caplog.text
        assert f"KNorm: keep_ratio=0.02 of {n} tokens is 1, less than the 5" in caplog.text


def test_text_first_changes_nothing_of_a_text_prompt_and_refuses_what_has_no_ids():
    model, inputs = tiny_llama(), llama_inputs([30, 19])
    out = []
    for text_first in (False, True):
        vlmeff.wrap(model, None, kv=H2O(keep_ratio=0.4, text_first=text_first))
        out.append(model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_logits=True))
    assert all(torch.equal(a, b) for a, b in zip(out[0].logits, out[1].logits, strict=True))
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ConfigError, match="pass input_ids"):
        model.generate(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], max_new_tokens=3)


@pytest.mark.parametrize("k", [5, 8, 20])
def test_streaming_llm_keeps_both_ends(k):
    policy = StreamingLLM()
    kept = policy.select(measured(policy, 20), k).tolist()
    assert kept == [*range(4), *range(20 - (k - 4), 20)]


def snapkv_scores(probs, window, kernel, pool):
    """[Hkv][n - window], entry by entry."""
    heads, w, n = probs.shape
    group, past, out = heads // KV_HEADS, n - window, []
    for h in range(KV_HEADS):
        row = []
        for j in range(past):
            total = 0.0
            for q in range(h * group, (h + 1) * group):
                votes = [
                    sum(probs[q, w - window + i, c].item() for i in range(window)) / window
                    for c in range(j - kernel // 2, j + kernel // 2 + 1)
                    if 0 <= c < past
                ]
                total += sum(votes) / kernel if pool == "avg" else max(votes)
            row.append(total / group)
        out.append(row)
    return out


@pytest.mark.parametrize("policy_class", [SnapKV, PyramidKV])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(("window", "kernel", "k"), [(4, 5, 9), (1, 3, 6), (3, 1, 17), (4, 7, 5)])
def test_snapkv_keeps_the_window_and_the_best_pooled_votes_of_each_head(policy_class, pool, window, kernel, k):
    policy = policy_class(window=window, kernel=kernel, pool=pool)
    rows = causal_rows(window, 24, k)
    kept = policy.select(measured(policy, 24, rows=rows), k).tolist()
    for head, scores in enumerate(snapkv_scores(rows, window, kernel, pool)):
        protected = range(24 - window, 24)
        spread = sorted(scores, reverse=True)
        tie = pool == "max" and math.isclose(spread[k - window - 1], spread[k - window], rel_tol=1e-5)
        if not tie:  # float32 and float64 may order equal maxima differently
            assert kept[head] == best(scores + [0.0] * window, k, protected)
        assert set(kept[head]) >= set(protected)


def test_snapkv_rounds_down_and_keeps_one_at_least():
    policy = SnapKV(keep_ratio=0.29, window=4)
    assert policy.budgets([measured(policy, 20)]) == [5]
    assert SnapKV(keep_ratio=0.01, window=4).budgets([measured(policy, 20)]) == [1]
    assert policy.select(measured(policy, 20), 2).tolist() == [[18, 19]] * KV_HEADS


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_a_prompt_no_longer_than_the_window_is_kept_whole_with_one_warning(name):
    policy = make(name, keep_ratio=0.5, window=8)
    stats = [measured(policy, 8, 0, layer, 3) for layer in range(3)]
    with pytest.warns(UserWarning, match="window=8") as caught:
        assert budgets_of(policy, stats) == [8, 8, 8]
    assert len(caught) == 1


@pytest.mark.parametrize("layers", [1, 2, 5, 32])
@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("n", [60, 333, 700])
def test_pyramid_budgets_fall_linearly_and_add_up(layers, keep_ratio, n):
    policy = PyramidKV(keep_ratio=keep_ratio, window=4)
    found = budgets_of(policy, [measured(policy, n, 0, layer, layers) for layer in range(layers)])
    mean = n * keep_ratio
    low, high = mean / 20, 2 * mean - mean / 20
    if high >= n - 4:
        low, high = 2 * mean - (n - 4), n - 4
    if layers == 1 or not n >= high >= low >= 4:
        low = high = mean
    step = (high - low) / max(1, layers - 1)
    assert sum(found) == round(keep_ratio * layers * n)
    assert all(abs(k - (high - i * step)) < 1 for i, k in enumerate(found))


def test_vl_cache_shares_the_budget_by_density_and_sums_the_rows():
    policy = VLCache(keep_ratio=0.4, window=6, sink=1, recent=2)
    n, layers = 30, 4
    stats = []
    for layer in range(layers):  # sharper from layer to layer
        rows = (causal_rows(6, n, layer).clamp_min(1e-30).log() * (1 + layer)).softmax(-1)
        stats.append(LayerStats(layer=layer, layers=layers, n=n, kv_heads=KV_HEADS, probs=rows))
    densities = []
    for layer in stats:
        sparse = seen = 0
        for h in range(HEADS):
            for i in range(6):
                row = layer.probs[h, i, : n - 6 + i + 1].tolist()
                sparse += sum(x < 0.01 * max(row) for x in row)
                seen += len(row)
        densities.append(1 - sparse / seen)
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) == layers
    ideal = [d * 0.4 * layers * n / sum(densities) for d in densities]
    assert all(4 < x < n for x in ideal)  # no bound binds
    budgets = policy.budgets(stats)
    assert sum(budgets) == round(0.4 * layers * n)
    assert all(abs(k - x) < 1 for k, x in zip(budgets, ideal, strict=True))
    for layer, k in zip(stats, budgets, strict=True):
        scores = [sum(layer.probs[h, i, j].item() for h in range(HEADS) for i in range(6)) for j in range(n)]
        assert policy.select(layer, k).tolist() == best(scores, k, {0, n - 2, n - 1})


def test_h2o_keeps_the_recent_half_and_the_heavy_hitters_before_it():
    policy = H2O(keep_ratio=0.5, sink=1)
    stats = measured(policy, 21)
    (k,) = policy.budgets([stats])
    assert k == 10  # 10.5, half to even
    for head, row in enumerate(policy.select(stats, k).tolist()):
        assert row == best(stats.scores[head].tolist(), 10, {0, *range(16, 21)})


def test_tova_keeps_the_last_token_and_what_it_looks_at():
    policy = TOVA(keep_ratio=0.3)
    rows = causal_rows(1, 20, 3)
    scores = [sum(rows[h, 0, j].item() for h in range(HEADS)) for j in range(20)]
    assert policy.needs.window == 1
    assert policy.select(measured(policy, 20, rows=rows), 6).tolist() == best(scores, 6, {19})


def test_knorm_keeps_the_smallest_keys():
    policy = KNorm(sink=2, recent=1)
    stats = measured(policy, 20, seed=3)
    for head, row in enumerate(policy.select(stats, 9).tolist()):
        assert row == best([-x for x in stats.key_norms[head].tolist()], 9, {0, 1, 19})


def test_knorm_takes_the_later_of_keys_that_differ_by_rounding_alone():
    g = torch.Generator().manual_seed(0)
    for scale, noise in ((4.0, 1e-6), (0.37, 1e-6), (4.0, 2e-4)):  # float32's and bfloat16's
        norms = scale * (1 + noise * torch.randn(KV_HEADS, 30, generator=g))
        norms[:, 5] = scale / 2  # really shorter
        norms[:, 29] = 2 * scale
        stats = LayerStats(layer=0, layers=1, n=30, kv_heads=KV_HEADS, key_norms=norms)
        assert KNorm(sink=1).select(stats, 9).tolist() == [[0, 5, *range(22, 29)]] * KV_HEADS
        stats = dataclasses.replace(stats, vision=torch.arange(30) >= 20)  # the tie is decided among text
        assert KNorm(text_first=True).select(stats, 4).tolist() == [[5, 17, 18, 19]] * KV_HEADS


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), data=st.data(), spread=st.sampled_from([1e-4, 2e-3, 0.3]))
def test_knorm_never_passes_over_a_key_that_is_shorter_by_more_than_its_tolerance(seed, n, data, spread):
    k = data.draw(st.integers(1, n - 1))
    norms = 3 + spread * torch.randn(1, n, generator=torch.Generator().manual_seed(seed)).double()
    stats = LayerStats(layer=0, layers=1, n=n, kv_heads=1, key_norms=norms)
    kept, norm = set(KNorm().select(stats, k)[0].tolist()), norms[0].tolist()
    edge = sorted(norm)[k - 1]
    for slot in set(range(n)) - kept:
        assert norm[slot] >= max(norm[i] for i in kept) * (1 - 2e-3) - 1e-12
        # An earlier token stays before a later one only if it is really shorter.
        assert norm[slot] > edge * (1 + 1e-3) or all(norm[i] < edge * (1 - 1e-3) for i in kept if i < slot)


@pytest.mark.parametrize("lengths", [(31, 17), (40, 23)])
@torch.no_grad()
def test_a_row_of_a_model_that_normalises_its_keys_keeps_what_it_keeps_alone(lengths):
    """All key norms of a fresh Qwen3 are equal but for rounding, which differs between a row and a batch."""
    torch.manual_seed(0)
    model = ready(Qwen3ForCausalLM(Qwen3Config(**decoder(head_dim=8))), torch.float32, "sdpa")
    inputs = llama_inputs(list(lengths))
    _, cache = retained_generate(model, KNorm(), inputs, max_new_tokens=1)
    for row, n in enumerate(lengths):
        _, own = retained_generate(model, KNorm(), row_of(inputs, row), max_new_tokens=1)
        k, pads = round(0.5 * n), max(lengths) - n
        for layer, single in zip(cache.layers, own.layers, strict=True):
            assert torch.equal(layer.kept_slots[row][:, -k:], single.kept_slots[0] + pads)


def test_random_places_depend_on_the_seed_the_layer_and_the_length_alone():
    first = RandomKV(seed=1)

    def kept(policy, layer):
        return policy.select(LayerStats(layer=layer, layers=9, n=200, kv_heads=1), 50).tolist()

    assert kept(first, 0) == kept(RandomKV(seed=1, keep_ratio=0.9), 0)
    assert len({tuple(kept(RandomKV(seed=seed), layer)) for seed in range(4) for layer in range(4)}) == 16
    counts = [sum(slot in kept(RandomKV(seed=seed), 0) for seed in range(200)) for slot in (0, 99, 199)]
    assert all(25 < count < 80 for count in counts)  # a quarter of 200


@pytest.mark.parametrize("name", TEXT_FIRST)
@pytest.mark.parametrize("k", [5, 12, 25])
def test_text_first_keeps_text_before_any_visual_token_and_the_order_within_each(name, k):
    n, rng = 30, random.Random(k)
    vision = torch.tensor([3 <= slot < 22 and rng.random() < 0.9 for slot in range(n)])
    plain, policy = make(name), make(name, text_first=True)
    stats = measured(policy, n, seed=k, vision=vision)
    free = set(range(n - 4)) if name in ("snapkv", "pyramidkv") else set(range(n))
    free -= {29} if name == "tova" else set(range(n - k // 2, n)) if name == "h2o" else set()
    for h, row in enumerate(rows_of(policy.select(stats, k), policy)):
        # Whether the plain policy takes a slot before another, for every budget: its ranking.
        taken = [set(rows_of(plain.select(stats, size), plain)[h]) for size in range(1, n + 1)]
        rank = {slot: next(i for i, kept in enumerate(taken) if slot in kept) for slot in range(n)}
        if name == "h2o":  # its recent half grows with k, so rank by its scores
            rank = {slot: -stats.scores[h][slot].item() for slot in range(n)}
        text, visual = (
            sorted((s for s in free if bool(vision[s]) == kind), key=rank.__getitem__) for kind in (False, True)
        )
        protected = sorted(set(range(n)) - free, reverse=True)
        assert row == sorted([*protected, *text, *visual][:k])


@pytest.mark.parametrize("name", TEXT_FIRST)
def test_text_first_has_to_know_the_picture(name):
    policy = make(name, text_first=True)
    with pytest.raises(ConfigError, match="text_first"):
        policy.select(measured(policy, 20), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing_visual = measured(policy, 20, vision=torch.zeros(20, dtype=torch.bool))
        assert torch.equal(policy.select(nothing_visual, 8), make(name).select(nothing_visual, 8))
