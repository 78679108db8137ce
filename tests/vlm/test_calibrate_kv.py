"""Calibrating PrefixKV: shares equal a slow count over attention maps, and a broken run goes on where it was."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from retaining import model_and_inputs
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny

import vlmeff
from kvcache import PrefixKV, read_recipe, write_recipe
from vlmeff.errors import BudgetTooSmallError, ConfigError, DataError, IncompatibleError
from vlmeff.vlm.calibrate_kv import calibrate_prefixkv

BUDGETS = (0.25, 0.5, 0.75)
POLICY = PrefixKV(sink=1, recent=2)
PROTECTED = 3


def counted(scores, budget):
    """Give out one place after the other, each to the layer whose best tokens hold the least of its attention."""
    shares = []
    for layer in scores:
        best = sorted(layer, reverse=True)
        shares.append([sum(best[: k + 1]) / sum(best) for k in range(len(best))])
    n = len(scores[0])
    prefix = [1] * len(scores)
    for _ in range(round(budget * n * len(scores)) - len(scores) * (1 + PROTECTED)):
        open_layers = [i for i, k in enumerate(prefix) if k + PROTECTED < n]
        prefix[min(open_layers, key=lambda i: shares[i][prefix[i] - 1])] += 1
    return [(k + PROTECTED) / n for k in prefix]


@torch.no_grad()
def brute_force(model, samples):
    """budget -> [prompts][layers], from the maps of eager attention."""
    out = {budget: [] for budget in BUDGETS}
    lengths = []
    for inputs in samples:
        maps = model(**inputs, output_attentions=True).attentions
        for row, real in enumerate(inputs["attention_mask"].bool()):
            scores = [a[row].double()[:, real][:, :, real].mean(0).sum(0).tolist() for a in maps]
            lengths.append(int(real.sum()))
            for budget in BUDGETS:
                out[budget].append(counted(scores, budget))
    return out, lengths


def several(name, backend):
    model, _ = model_and_inputs(name, backend=backend)
    if name == "llama":
        return model, [llama_inputs([61, 44], seed=1), llama_inputs([52], seed=2)]
    return model, [prompts(model, [1, 3], seed=seed) for seed in (1, 2)]


@pytest.mark.filterwarnings("ignore:calibrate prefixkv")  # three prompts do not agree
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_shares_are_those_counted_over_the_attention_maps(name, backend):
    expected, lengths = brute_force(*several(name, "eager"))
    model, samples = several(name, backend)
    recipe = calibrate_prefixkv(model, iter(samples), budgets=BUDGETS[::-1], policy=POLICY)
    assert tuple(recipe.keep_ratios) == BUDGETS
    assert recipe.calibration["samples"] == len(lengths) > 2
    assert recipe.calibration["mean_prompt_tokens"] == pytest.approx(sum(lengths) / len(lengths), abs=0.01)
    layers = model.config.get_text_config().num_hidden_layers
    assert recipe.layers == tuple(range(layers))
    for budget, shares in expected.items():
        columns = torch.tensor(shares, dtype=torch.float64)
        mean = columns.mean(0) * budget / columns.mean()
        # 1e-6 is the rounding in the recipe; another back end may rank one place of one prompt differently.
        slack = {"abs": 1e-6 if backend == "eager" else 1 / min(lengths) / len(lengths)}
        assert recipe.keep_ratios[budget] == pytest.approx(mean.tolist(), **slack)
        assert recipe.std[budget] == pytest.approx(columns.std(0, correction=0).tolist(), **slack)
        assert sum(recipe.keep_ratios[budget]) / layers == pytest.approx(budget, abs=1e-6)
    spread = [max(shares) - min(shares) for shares in recipe.keep_ratios.values()]
    assert max(spread) > 0.04  # or a uniform recipe would pass


def test_the_recipe_names_the_model_and_is_what_wrap_takes(tmp_path):
    model, samples = several("llava", "sdpa")
    about = {"model": "tiny", "revision": "abc", "source": "pictures"}
    recipe = calibrate_prefixkv(model, samples, budgets=BUDGETS, policy=POLICY, about=about)
    text = model.config.text_config
    assert recipe.model == {
        "id": "tiny",
        "revision": "abc",
        "model_type": "llava",
        "text_model_type": text.model_type,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.hidden_size // text.num_attention_heads,
    }
    assert (recipe.sink, recipe.recent, recipe.metric) == (1, 2, "full")
    assert recipe.calibration["dataset"] == "pictures"
    assert set(recipe.calibration["versions"]) == {"vlmeff", "transformers", "torch"}
    path = write_recipe(tmp_path / "recipe.json", recipe)
    assert read_recipe(path) == recipe
    inputs = prompts(model, [1])
    n = inputs["input_ids"].shape[1]
    vlmeff.wrap(model, None, kv=PrefixKV(keep_ratio=0.5, recipe=path))
    model.generate(**inputs, max_new_tokens=2)
    kept = [layer.kept[0] for layer in vlmeff.report(model).retention.layers]
    assert kept == recipe.budgets(keep_ratio=0.5, n=n)


def test_only_the_text_model_s_full_attention_layers_are_in_the_recipe():
    model = tiny("gemma3")
    types = model.config.text_config.layer_types
    recipe = calibrate_prefixkv(model, [prompts(model, [3])], budgets=[0.5], policy=POLICY)
    assert recipe.layers == tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    assert 0 < len(recipe.layers) < len(types)


def test_a_broken_calibration_goes_on_where_it_was(tmp_path):
    model = tiny_llama()
    samples = [llama_inputs([60 + seed], seed=seed) for seed in range(5)]
    whole = calibrate_prefixkv(model, samples, budgets=BUDGETS, policy=POLICY)
    partial = tmp_path / "recipe.partial.jsonl"

    def broken():
        yield from samples[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_prefixkv(model, broken(), budgets=BUDGETS, policy=POLICY, partial=partial)
    lines = partial.read_text().splitlines()
    assert len(lines) == 1 + 3
    assert json.loads(lines[2])["prompts"][0]["n"] == 61
    partial.write_text("\n".join(lines)[:-20])  # the third was being written
    passes, seen = [], []
    handle = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    resumed = calibrate_prefixkv(model, samples, budgets=BUDGETS, policy=POLICY, partial=partial, progress=seen.append)
    handle.remove()
    assert (len(passes), seen) == (3, [1, 2, 3, 4, 5])
    assert resumed == whole
    assert len(partial.read_text().splitlines()) == 1 + 5
    with pytest.raises(ConfigError, match="sink"):
        calibrate_prefixkv(model, samples, budgets=BUDGETS, policy=PrefixKV(sink=2, recent=2), partial=partial)
    with pytest.raises(ConfigError, match="budgets"):
        calibrate_prefixkv(model, samples, budgets=[0.5], policy=POLICY, partial=partial)
    with partial.open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="line 7"):
        calibrate_prefixkv(model, samples, budgets=BUDGETS, policy=POLICY, partial=partial)
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text('{"mine": 1}\n')
    with pytest.raises(DataError, match="not the file"):
        calibrate_prefixkv(model, samples, budgets=BUDGETS, policy=POLICY, partial=foreign)
    assert foreign.read_text() == '{"mine": 1}\n'


def test_samples_that_disagree_warn():
    model = tiny_llama()
    g = torch.Generator().manual_seed(0)
    ids = [torch.full((1, 60), 11), torch.randint(10, 100, (1, 60), generator=g)]
    with pytest.warns(UserWarning, match=r"differ by .* at the budget 0\.\d+ .*calibrate on more"):
        recipe = calibrate_prefixkv(model, [{"input_ids": x} for x in ids], budgets=BUDGETS, policy=POLICY)
    assert max(recipe.calibration["half_difference"].values()) > 0.03


def test_what_cannot_be_calibrated_is_refused_and_hooks_are_removed():
    model = tiny_llama()
    good = llama_inputs([40])
    with pytest.raises(DataError, match="no samples"):
        calibrate_prefixkv(model, [])
    with pytest.raises(DataError, match="input_ids"):
        calibrate_prefixkv(model, [{}])
    with pytest.raises(
        BudgetTooSmallError, match=r"^budgets: 0\.05 of a prompt of 40 tokens is 2\.0 entries in each of 4"
    ):
        calibrate_prefixkv(model, [good], budgets=[0.5, 0.05])
    for budgets in ([], [0.0], [1.0], [float("nan")], ["0.5"], [True]):
        with pytest.raises(ConfigError, match="budgets"):
            calibrate_prefixkv(model, [good], budgets=budgets)
    with pytest.raises(Exception):  # noqa: B017 - whatever the model says of it
        calibrate_prefixkv(model, [{"input_ids": torch.full((1, 40), 10**6)}], budgets=[0.5])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(IncompatibleError, match=r"model\.eval"):
        calibrate_prefixkv(model.train(), [good])
    with pytest.raises(IncompatibleError, match="unwrap"):
        calibrate_prefixkv(vlmeff.wrap(model.eval(), None, kv=POLICY), [good])


@pytest.mark.filterwarnings("ignore:calibrate prefixkv")
@torch.no_grad()
def test_prompts_are_shortened_first_as_they_are_where_the_recipe_is_used():
    tokens = vlmeff.HiPrune(keep=0.5)
    model = vlmeff.wrap(model_and_inputs("llava", backend="eager")[0], None, tokens=tokens)
    samples = [prompts(model, [1], seed=seed) for seed in (1, 2, 3)]
    columns = []
    for inputs in samples:
        maps = model(**inputs, output_attentions=True).attentions
        assert maps[0].shape[-1] < inputs["input_ids"].shape[1]
        columns.append(counted([a[0].double().mean(0).sum(0).tolist() for a in maps], 0.5))
    mean = torch.tensor(columns, dtype=torch.float64).mean(0)
    recipe = calibrate_prefixkv(model, samples, budgets=[0.5], policy=POLICY)
    assert recipe.keep_ratios[0.5] == pytest.approx((mean * 0.5 / mean.mean()).tolist(), abs=1e-6)
    assert recipe.calibration["token_pruning"] == "hiprune(keep=0.5)"
    assert vlmeff.report(model).method == "hiprune", "the plan is as it was"

    policy = PrefixKV(keep_ratio=0.5, recipe=recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlmeff.wrap(model, None, tokens=tokens, kv=policy)
    with pytest.warns(UserWarning, match=r"calibrated with token pruning 'hiprune\(keep=0.5\)', used with None"):
        vlmeff.wrap(model, None, kv=policy)
    with pytest.raises(IncompatibleError, match="retains its cache already"):
        calibrate_prefixkv(model, samples, budgets=[0.5])
