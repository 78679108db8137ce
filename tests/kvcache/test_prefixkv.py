"""PrefixKV's selection against the official rule in plain Python; its budgets with and without a recipe."""

from __future__ import annotations

import dataclasses
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import llama_inputs, tiny_llama

import vlmeff
from kvcache import LayerStats, PrefixKV, Recipe, recipe_budgets, solve_budgets, write_recipe
from vlmeff.errors import BudgetTooSmallError, ConfigError, RecipeMismatchError, UnknownNameError

RECIPE = Recipe(keep_ratios={0.3: (0.6, 0.2, 0.1), 0.6: (0.9, 0.5, 0.4)}, sink=2, recent=3)


def layer_stats(scores, layer=0, layers=1, **measured):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    return LayerStats(layer=layer, layers=layers, n=len(scores), kv_heads=2, scores=scores, **measured)


def random_layers(n, layers=3, seed=0):
    rng = random.Random(seed)
    return [layer_stats([rng.lognormvariate(0, 0.5 + i / 10) for _ in range(n)], i, layers) for i in range(layers)]


def official_slots(scores, k, sink, recent):
    """The official rule: sink and recent tokens, and the best of the rest; in temporal order, the later wins ties."""
    n = len(scores)
    kept = {*range(min(sink, n)), *range(max(0, n - recent), n)}
    for slot in sorted(set(range(n)) - kept, key=lambda i: (-scores[i], -i)):
        if len(kept) < k:
            kept.add(slot)
    return sorted(kept)


@pytest.mark.parametrize("keep_ratio", [0.8, 0.5, 0.2])
def test_the_kept_slots_are_the_official_ones_with_one_sink_and_one_recent_token(keep_ratio):
    policy = PrefixKV(keep_ratio=keep_ratio, sink=1, recent=1)
    stats = random_layers(400, layers=32)
    budgets = policy.budgets(stats)
    assert sum(budgets) == round(keep_ratio * 32 * 400)
    for layer, k in zip(stats, budgets, strict=True):
        assert policy.select(layer, k).tolist() == official_slots(layer.scores.tolist(), k, 1, 1)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_equal_scores_go_to_the_later_token(data):
    n = data.draw(st.integers(1, 12))
    scores = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    sink, recent = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    k = data.draw(st.integers(min(n, sink + recent + 1), n))
    chosen = PrefixKV(sink=sink, recent=recent).select(layer_stats(scores), k)
    assert chosen.tolist() == official_slots(scores, k, sink, recent)
    assert chosen.dtype == torch.int64


def test_the_defaults_and_what_they_need():
    policy = PrefixKV()
    assert (policy.keep_ratio, policy.sink, policy.recent, policy.metric, policy.decode) == (0.5, 4, 8, "full", "grow")
    assert (policy.needs.kind, policy.scope, policy.selection, policy.query_aware) == ("full", "model", "shared", True)
    assert (policy.evict_distance, policy.on_small_budget) == (0, "clamp")
    spec = PrefixKV(metric="window", window=7).needs
    assert (spec.kind, spec.window, spec.sums) == ("window", 7, True)


def test_the_window_metric_sums_the_attention_rows():
    probs = torch.rand(4, 3, 20, generator=torch.Generator().manual_seed(0))
    received = [sum(probs[h, w, j].item() / 4 for h in range(4) for w in range(3)) for j in range(20)]
    stats = LayerStats(layer=0, layers=1, n=20, kv_heads=2, scores=torch.tensor(received))
    policy = PrefixKV(metric="window", window=3, sink=1, recent=1)
    assert policy.select(stats, 8).tolist() == official_slots(received, 8, 1, 1)
    assert policy.budgets([stats]) == [10]


def test_allocate_gives_the_threshold_with_the_budgets():
    policy, stats = PrefixKV(keep_ratio=0.6, sink=1, recent=2), random_layers(50)
    expected = solve_budgets([s.scores for s in stats], keep_ratio=0.6, protected=3)
    assert policy.allocate(stats) == expected
    assert policy.budgets(stats) == expected.kept


def test_recipe_budgets_come_layer_by_layer_at_this_length_without_scores(tmp_path):
    path = write_recipe(tmp_path / "recipe.json", RECIPE)
    for recipe in (RECIPE, path, str(path)):
        policy = PrefixKV(keep_ratio=0.45, recipe=recipe)
        assert policy.scope == "layer"
        bare = [LayerStats(layer=i, layers=3, n=101, kv_heads=2) for i in range(3)]
        found = [policy.budgets([layer])[0] for layer in bare]
        assert found == recipe_budgets((0.75, 0.35, 0.25), keep_ratio=0.45, n=101, protected=5)
        assert sum(found) == round(0.45 * 3 * 101)


def test_sink_recent_and_metric_are_the_recipes_unless_they_are_given():
    recipe = dataclasses.replace(RECIPE, metric="window", metric_args={"window": 16})
    taken = PrefixKV(recipe=recipe)
    assert (taken.sink, taken.recent, taken.metric, taken.window) == (2, 3, "window", 16)
    with pytest.warns(UserWarning, match="calibrated with"):
        given_ = PrefixKV(recipe=recipe, sink=0, recent=9, metric="full", window=5)
    assert (given_.sink, given_.recent, given_.metric, given_.window) == (0, 9, "full", 5)


def test_a_recipe_used_with_other_settings_than_it_was_calibrated_with_says_both():
    windowed = dataclasses.replace(RECIPE, metric="window", metric_args={"window": 16})

    def said(build):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build()
        return [str(warning.message) for warning in caught]

    assert said(lambda: PrefixKV(recipe=RECIPE)) == []
    assert said(lambda: PrefixKV(recipe=RECIPE, sink=2, recent=3, metric="full", window=5)) == []  # no window is used
    assert said(lambda: PrefixKV(recipe=windowed, window=16)) == []
    (text,) = said(lambda: PrefixKV(recipe=RECIPE, metric="mean", recent=8))
    assert "calibrated with metric='full', recent=3, and is used with metric='mean', recent=8" in text
    (text,) = said(lambda: PrefixKV(recipe=windowed, window=32))
    assert "calibrated with window=16, and is used with window=32" in text
    preset = PrefixKV(keep_ratio=0.4, metric="mean", sink=2, recent=3)
    (text,) = said(lambda: dataclasses.replace(preset, recipe=RECIPE))  # as ``wrap`` puts an override into a preset
    assert "metric='mean'" in text
    assert said(lambda: dataclasses.replace(PrefixKV(recipe=RECIPE), keep_ratio=0.3)) == []


def test_a_recipe_of_another_number_of_layers_is_refused():
    with pytest.raises(RecipeMismatchError, match=r"3 layers.*retains 4"):
        PrefixKV(recipe=RECIPE).budgets([LayerStats(layer=0, layers=4, n=10, kv_heads=2)])


@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_a_budget_below_the_floors_warns_once_per_prompt_or_is_refused(recipe):
    if recipe is not None:
        recipe = dataclasses.replace(recipe, sink=4, recent=4)
    arguments = {"keep_ratio": 0.05, "recipe": recipe, "sink": 4, "recent": 4}
    stats = random_layers(30)
    calls = [stats] if recipe is None else [[layer] for layer in stats]
    with pytest.warns(UserWarning, match="keep_ratio") as caught:
        kept = [k for call in calls for k in PrefixKV(**arguments).budgets(call)]
    assert kept == [9, 9, 9]
    assert len(caught) == 1
    with pytest.raises(BudgetTooSmallError):
        PrefixKV(**arguments, on_small_budget="raise").budgets(calls[0])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("window", 0),
        ("metric", "sum"),
        ("decode", "shrink"),
        ("decode_window", 0),
        ("evict_distance", -1),
        ("on_small_budget", "ignore"),
        ("recipe", 3),
    ],
)
def test_an_illegal_argument_is_named(argument, value):
    with pytest.raises(ConfigError, match=f"PrefixKV: {argument}="):
        PrefixKV(**{argument: value})


def test_a_decode_window_has_to_be_given():
    with pytest.raises(ConfigError, match="decode_window"):
        PrefixKV(decode="window")
    assert PrefixKV(decode="window", decode_window=5).decode_window == 5


@pytest.mark.filterwarnings("ignore:vlmeff. preset:UserWarning")
def test_wrap_takes_a_policy_as_a_mapping():
    model = tiny_llama()
    given_ = {"policy": "snapkv", "keep_ratio": 0.3, "window": 8}
    vlmeff.wrap(model, None, kv=given_)
    model.generate(**llama_inputs([60]), max_new_tokens=2)
    report = vlmeff.report(model)
    assert report.method == "snapkv"
    assert report.retention.layers[0].kept == (18,)
    assert set(given_) == {"policy", "keep_ratio", "window"}
    vlmeff.wrap(model, "fast", kv={"policy": "streaming_llm", "sink": 2})  # at the preset's ratio
    model.generate(**llama_inputs([60]), max_new_tokens=2)
    assert vlmeff.report(model).retention.layers[0].kept == (42,)
    with pytest.raises(UnknownNameError, match="keep_ratio, kernel, pool, text_first, window"):
        vlmeff.wrap(model, None, kv={"policy": "snapkv", "ratio": 0.3})
    for unnamed in ({"keep_ratio": 0.3}, {"policy": 3}):
        with pytest.raises(ConfigError, match=r"must name its policy.*streaming_llm"):
            vlmeff.wrap(model, None, kv=unnamed)


@pytest.mark.filterwarnings("ignore:vlmeff. preset:UserWarning")
def test_a_preset_given_a_recipe_of_another_metric_says_so():
    recipe = Recipe(keep_ratios={0.5: (0.8, 0.5, 0.4, 0.3)}, sink=4, recent=8)
    with pytest.warns(UserWarning, match="calibrated with metric='full', and is used with metric='mean'") as caught:
        vlmeff.wrap(tiny_llama(), "fast", recipe=recipe)
    assert sum("calibrated with metric" in str(warning.message) for warning in caught) == 1
