"""``plan`` says beforehand what a call then does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import ALL_MODELS, VIDEO_MODELS, prompts, tiny, video_prompts

import vlmeff
from kvcache import policies
from kvcache.cache import RetainedCache
from vlmeff.errors import ConfigError, UnsupportedInputError, UnsupportedModelError

METHODS = {
    "hiprune": vlmeff.HiPrune(keep=0.4),
    "downsample": vlmeff.Downsample(keep=5),
    "fourier": vlmeff.Fourier(ratio=0.5),
    "adaptinfer": vlmeff.AdaptInfer(schedule=vlmeff.Schedule(layers=(1,), ratios=(0.5,))),
}


def compare(model, inputs, tokens, **options):
    forecast = vlmeff.plan(model, inputs, None, tokens=tokens, **options)
    with torch.no_grad():
        vlmeff.wrap(model, None, tokens=tokens, **options)(**inputs)
    report = vlmeff.report(model)
    assert forecast.visual_tokens_before == report.visual_tokens_before
    assert forecast.visual_tokens_after == report.visual_tokens_after
    assert forecast.prompt_tokens_before == report.prompt_tokens_before
    assert forecast.prompt_tokens_after == report.prompt_tokens_after
    return forecast, report


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_tokens_are_as_planned(name, method):
    if method == "adaptinfer" and name in ("gemma3", "paligemma"):
        with pytest.raises(UnsupportedModelError, match="Attention"):
            vlmeff.plan(tiny(name), (24, 24), None, tokens=METHODS[method])
        return
    model = tiny(name)
    pictures = [1] if method == "adaptinfer" else [1, 2]
    for newline in ("drop", "keep") if name.startswith("llava_") and method == "hiprune" else ("drop",):
        forecast, report = compare(model, prompts(model, pictures), METHODS[method], newline=newline)
        if method == "adaptinfer":
            assert forecast.visual_tokens_processed == pytest.approx(report.visual_tokens_processed)
        # The report counts rows as equally long, as the plan does.
        assert forecast.prefill_gflops_before == pytest.approx(report.prefill_gflops_before)
        assert forecast.prefill_gflops_after == pytest.approx(report.prefill_gflops_after, rel=0.02)


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_tokens_of_videos_are_as_planned(name):
    model = tiny(name)
    inputs = video_prompts(model, [4])
    for tokens in (vlmeff.Downsample(keep=0.5), vlmeff.Downsample(keep=vlmeff.PerFrame(2)), vlmeff.Fourier(ratio=0.5)):
        compare(tiny(name), inputs, tokens)


def test_the_cache_is_as_large_as_planned_and_the_work_is_as_counted_by_hand():
    model = tiny("llava")
    inputs = prompts(model, [1])
    forecast, report = compare(model, inputs, vlmeff.Downsample(keep=9))
    n = int(inputs["attention_mask"].sum()) - 36 + 9
    # 3 layers, hidden 32, 4 heads and 2 key heads of 8, MLP 64; float32.
    assert forecast.kv_bytes_after == report.kv_bytes == 3 * n * 2 * (2 * 8) * 4
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert forecast.prefill_gflops_after == pytest.approx(3 * (2 * n * weights + 4 * n * n * 4 * 8) / 1e9)
    assert forecast.scoring_gflops == 0
    scored = vlmeff.plan(tiny("llava"), inputs, None, tokens=vlmeff.HiPrune(keep=9))
    # Two vision layers of width 32: q and k of 36 tokens, twice the product of all pairs.
    assert scored.scoring_gflops == pytest.approx(2 * (4 * 36 * 32**2 + 4 * 36**2 * 32) / 1e9)


def test_sizes_are_planned_without_inputs():
    sizes = [(70, 30), (24, 24)]
    for name in ("llava", "llava_next", "llava_onevision", "gemma3"):
        vlmeff.plan(tiny(name), sizes, None, tokens="downsample", keep=0.5)
    model = tiny("qwen2_5_vl")
    # 2 px patches merged 2 x 2: one token for 4 x 4 px.
    forecast = vlmeff.plan(model, (32, 48), None, tokens=vlmeff.Downsample(keep=0.25), text_tokens=10)
    assert (forecast.visual_tokens_before, forecast.visual_tokens_after) == (96, 24)
    assert (forecast.prompt_tokens_before, forecast.prompt_tokens_after) == (106, 34)
    assert "96 -> 24" in str(forecast)
    assert forecast.to_dict()["visual_tokens_after"] == 24
    for bad in ((0, 5), (3.5, 4), [(1, 2, 3)]):
        with pytest.raises(ConfigError, match="height, width"):
            vlmeff.plan(model, bad, None, tokens="downsample")
    with pytest.raises(ConfigError, match="nothing to plan"):
        vlmeff.plan(model, (32, 48), None)


ZOO = """
schema: vlmeff.zoo/1
models:
  small:
    hub_id: us/small
    revision: null
    license: MIT
    license_url: https://opensource.org/license/mit
    commercial_use: "yes"
    family: llava
    task: image-text-to-text
    visual_tokens: {kind: fixed, per_image: 36, grid: [6, 6], patch: 4, image_size: 24}
    vision: {tower: tiny, layers: 4, hidden: 32, select_layer: -2, has_cls: true}
    llm: {layers: 3, hidden: 32, heads: 4, kv_heads: 2, head_dim: 8}
entries:
  - name: small/fast
    model: small
    preset: fast
    status: experimental
    min_visual_tokens: 40
    tokens: {in: 36, kept: 12}
"""


@torch.no_grad()
def test_a_preset_leaves_small_requests_alone_and_a_named_method_never_does(tmp_path: Path, monkeypatch, caplog):
    file = tmp_path / "zoo.yaml"
    file.write_text(ZOO)
    monkeypatch.setenv("VLMEFF_ZOO", str(file))
    model = tiny("llava")
    one, two = prompts(model, [1]), prompts(model, [2])
    plain = model(**one).logits

    forecast = vlmeff.plan(model, one, "fast")
    assert not forecast.pays_off
    assert forecast.visual_tokens_after == 36
    assert "fewer than 40" in forecast.why
    assert vlmeff.plan(model, two, "fast").visual_tokens_after == 24

    with pytest.warns(UserWarning, match="experimental"):
        vlmeff.wrap(model, "fast")
    with caplog.at_level(logging.INFO, "vlmeff"):
        assert torch.equal(model(**one).logits, plain)
    (line,) = [record.message for record in caplog.records if "min_visual_tokens=40" in record.message]
    assert line.startswith("vlmeff: 36 visual tokens")
    report = vlmeff.report(model)
    assert report.skipped
    assert report.visual_tokens_after == 36
    assert "skipped" in str(report)
    model(**two)
    assert not vlmeff.report(model).skipped
    assert vlmeff.report(model).visual_tokens_after == 24

    with pytest.warns(UserWarning, match="experimental"):
        vlmeff.wrap(model, "fast", tokens="hiprune")
    model(**one)
    assert vlmeff.report(model).visual_tokens_after == 12


@pytest.mark.parametrize("keep", [(10, 4), None], ids=["counts", "ratios"])
def test_rows_are_planned_one_by_one_where_tokens_go_between_layers(keep):
    amounts = {"keep": keep} if keep else {"ratios": (0.3, 0.4)}
    tokens = vlmeff.AdaptInfer(schedule=vlmeff.Schedule(layers=(0, 1), **amounts))
    model = tiny("llava")
    forecast, report = compare(model, prompts(model, [1, 1]), tokens)
    assert forecast.visual_tokens_processed == pytest.approx(report.visual_tokens_processed)
    assert forecast.kv_bytes_after == pytest.approx(report.kv_bytes, rel=0.05)
    # q of T text rows and k of all n rows of width 32 and 16, and the text's rows of attention, at both layers.
    assert forecast.scoring_gflops > 0


def test_a_picture_within_its_budget_is_left_alone_beside_one_that_is_reduced():
    model = tiny("llava_next")
    tokens = vlmeff.HiPrune(keep=90)
    compare(model, prompts(model, [1, 1]), tokens)
    plans = vlmeff.report(model).plan.items
    whole = [item for item in plans if item.layout.n_tokens <= 90]
    assert whole
    assert len(whole) < len(plans)
    assert all(item.n_after == item.n_before for item in whole)


def test_what_is_no_picture_is_refused():
    model = tiny("llava_next")
    for bad in (None, [], 5):
        with pytest.raises(ConfigError, match="neither"):
            vlmeff.plan(model, bad, None, tokens="downsample")
    with pytest.raises(UnsupportedInputError, match="narrow"):
        vlmeff.plan(model, (1, 1000), None, tokens="downsample")
    with pytest.raises(ConfigError, match="cannot be prepared"):
        vlmeff.plan(tiny("qwen2_5_vl"), (1, 1000), None, tokens="downsample")


# KV retention

PREFIXKV = vlmeff.PrefixKV(keep_ratio=0.6, sink=1, recent=2)
STORAGES = [None, "int8", "int4", "int2"]


def retained(model, inputs, kv, **options):
    """The forecast, and what a forward pass then measured."""
    forecast = vlmeff.plan(model, inputs, None, kv=kv, **options)
    with torch.no_grad():
        vlmeff.wrap(model, None, kv=kv, **options)(**inputs)
    report = vlmeff.report(model)
    assert forecast.method == report.method
    assert forecast.prompt_tokens_after == report.prompt_tokens_after
    assert forecast.visual_tokens_before == report.visual_tokens_before
    return forecast, report


@pytest.mark.parametrize("name", policies.names())
def test_the_cache_of_one_row_is_to_the_byte_what_the_plan_says(name):
    for model, inputs in (
        (tiny_llama(), llama_inputs([61])),
        (tiny("qwen2_5_vl"), prompts(tiny("qwen2_5_vl"), [2])),
        (tiny("gemma3"), prompts(tiny("gemma3"), [1])),  # sliding layers are not retained
    ):
        plain = vlmeff.wrap(model, None, kv="knorm", keep_ratio=1.0)
        window = {"window": 8} if name in ("snapkv", "pyramidkv") else {}  # shorter than the prompts
        forecast, report = retained(model, inputs, name, keep_ratio=0.6, **window)
        assert forecast.kv_bytes_after == report.kv_bytes < forecast.kv_bytes_unretained
        assert forecast.kv_bytes_unretained == forecast.kv_bytes_before == report.kv_bytes_full
        assert plain is model


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("length", [5, 129, 300, 600])
def test_few_bits_are_planned_with_their_scales(storage, length):
    """Of a policy whose budgets are alike in all layers, to the byte; and by hand."""
    kv, inputs = vlmeff.StreamingLLM(keep_ratio=0.9), llama_inputs([length])
    forecast, report = retained(tiny_llama(), inputs, kv, kv_storage=storage)
    assert forecast.kv_bytes_after == report.kv_bytes
    # 4 layers of 2 heads of 16 channels, float32; a slot number of 4 bytes for each column.
    columns = int(0.9 * length + 0.5)
    keys, values = columns // 128 * 128, max(columns - 128, 0)
    bits = {None: 32, "int8": 8, "int4": 4, "int2": 2}[storage]
    if storage is None:
        keys = values = 0
    packed = keys * (bits + 32 / 32) / 8 + values * (bits + 32 / 16) / 8
    entries = 16 * (packed + 4 * (2 * columns - keys - values))
    assert forecast.kv_bytes_after == 4 * (2 * entries + 4 * columns)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kv", [PREFIXKV, vlmeff.VLCache(keep_ratio=0.6)], ids=["prefixkv", "vl_cache"])
def test_budgets_that_follow_attention_are_planned_within_what_is_documented(kv, storage):
    forecast, report = retained(tiny_llama(), llama_inputs([900]), kv, kv_storage=storage)
    # 4 layers, 2 heads of 16 channels, float32, keys and values.
    off = 0 if storage is None else 4 * 128 * 2 * 16 * 4 * 2
    assert abs(forecast.kv_bytes_after - report.kv_bytes) <= off < forecast.kv_bytes_before / 4
    sizes = {len(set(layer.kept)) for layer in report.retention.layers}
    assert sizes == {1}
    assert len({layer.columns for layer in report.retention.layers}) > 1  # the layers do differ
    forecast, report = retained(tiny_llama(), llama_inputs([300] * 3), kv)
    assert forecast.kv_bytes_after <= report.kv_bytes <= 1.2 * forecast.kv_bytes_after


@pytest.mark.parametrize(
    "kv",
    [
        vlmeff.KNorm(keep_ratio=0.7),
        vlmeff.SnapKV(keep_ratio=0.7, window=4),
        vlmeff.PrefixKV(keep_ratio=0.7),
        vlmeff.PrefixKV(keep_ratio=0.7, metric="window", window=6),
    ],
    ids=["knorm", "snapkv", "prefixkv", "prefixkv window"],
)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "internvl"])
def test_token_reduction_comes_first_in_the_plan_too(name, kv):
    model = tiny(name)
    forecast, report = retained(model, prompts(model, [1]), kv, tokens=vlmeff.Downsample(keep=0.5))
    assert forecast.kv_bytes_after == report.kv_bytes
    assert forecast.kv_bytes_after < forecast.kv_bytes_unretained < forecast.kv_bytes_before
    assert "KV retention leaves" in forecast.why
    assert "->" in str(forecast)


def test_retention_alone_is_planned_from_sizes_and_without_weights():
    model = tiny("llava")
    sized = vlmeff.plan(model, (24, 24), None, kv=PREFIXKV, text_tokens=20)
    assert (sized.visual_tokens_before, sized.visual_tokens_after, sized.prompt_tokens_after) == (36, 36, 56)
    assert sized.pays_off
    # round(0.6 * 3 layers * 56) columns of 2 heads of 8 channels, keys and values in float32, and a slot number.
    assert sized.kv_bytes_after == round(0.6 * 3 * 56) * (2 * 2 * 8 * 4 + 4)
    assert vlmeff.plan(model.to("meta"), (24, 24), None, kv=PREFIXKV, text_tokens=20) == sized
    everything = vlmeff.plan(model, (24, 24), None, kv=vlmeff.PrefixKV(keep_ratio=1.0), text_tokens=20)
    assert not everything.pays_off
    with pytest.raises(ConfigError, match="takes no pictures"):
        vlmeff.plan(tiny_llama(), (24, 24), None, kv=PREFIXKV)
    with pytest.raises(ConfigError, match="int3"):
        vlmeff.plan(model, (24, 24), None, kv=PREFIXKV, kv_storage="int3")


def test_a_plan_runs_nothing_and_makes_no_cache(monkeypatch):
    model, updates = tiny_llama(), []
    monkeypatch.setattr(RetainedCache, "update", lambda *args, **kwargs: updates.append(args))
    model.register_forward_pre_hook(lambda *args: updates.append(args))
    forecast = vlmeff.plan(model, llama_inputs([40, 40]), None, kv=PREFIXKV, kv_storage="int4")
    assert not updates
    assert not vlmeff.is_wrapped(model)
    assert forecast.kv_bytes_before == 2 * 40 * 4 * 2 * 2 * 16 * 4


def test_tokens_dropped_between_layers_and_retention_are_planned_together():
    tokens = vlmeff.AdaptInfer(schedule=vlmeff.Schedule(layers=(1,), ratios=(0.5,)))
    model = tiny("llava")
    inputs = prompts(model, [1])
    forecast, report = retained(model, inputs, vlmeff.StreamingLLM(keep_ratio=0.7), tokens=tokens)
    assert forecast.kv_bytes_after == pytest.approx(report.kv_bytes, rel=0.02)
    assert forecast.kv_bytes_after < forecast.kv_bytes_unretained < forecast.kv_bytes_before
