"""Text speculation together with token reduction, retention and copies: the text of the same model without it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from speculating import scripted
from tiny_models import ALL_MODELS, prompts, tiny

import vlmeff
from vlmeff.errors import ConfigError

NEW = 12
LONG = 36  # crosses two evictions of a decode policy (every 16 tokens)
SAME_CACHE = 1e-4
HALF = vlmeff.HiPrune(keep=0.5)
INNER = vlmeff.AdaptInfer(schedule=vlmeff.Schedule(layers=(0,), ratios=(0.5,)))
PREFIX = vlmeff.PrefixKV(keep_ratio=0.4)


def generated(model: Any, inputs: dict[str, Any], new: int) -> Any:
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)


def same_as_without(model: Any, inputs: dict[str, Any], *, tree: bool, new: int = NEW, **features: Any) -> Any:
    """Wrap with ``features`` alone and with half right drafts too; returns the second report."""
    vlmeff.wrap(model, None, **features)
    expected = generated(model, inputs, new)
    truth = expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    vlmeff.wrap(model, None, **features, text_speculation=scripted(truth, wrong=3, tree=tree))
    out = generated(model, inputs, new)
    report = vlmeff.report(model)
    vlmeff.unwrap(model)
    assert torch.equal(out.sequences, expected.sequences)
    for ours, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.allclose(ours.keys, theirs.keys, atol=SAME_CACHE)
        assert torch.allclose(ours.values, theirs.values, atol=SAME_CACHE)
    assert report.speculation.target_passes < report.speculation.tokens == new
    return report


@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_family_with_reduced_pictures(name: str) -> None:
    model = tiny(name)
    report = same_as_without(model, prompts(model, [2]), tree=True, tokens=HALF)
    assert report.visual_tokens_after < report.visual_tokens_before
    assert report.speculation.shape == ("chain" if name == "gemma3" else "tree")  # sliding windows


@pytest.mark.parametrize(
    "features",
    [
        {"kv": PREFIX},
        {"kv": PREFIX, "kv_headroom": 8},
        {"kv": vlmeff.SnapKV(keep_ratio=0.4), "tokens": HALF},
        {"tokens": INNER},
        {"tokens": [HALF, INNER], "kv": PREFIX},
        {"kv": vlmeff.PrefixKV(keep_ratio=0.4, decode="fixed_point"), "new": LONG},
        {"kv": vlmeff.PrefixKV(keep_ratio=0.4, decode="window", decode_window=6), "new": LONG},
    ],
    ids=["retention", "headroom", "retention and tokens", "inside", "all", "fixed point", "window"],
)
@pytest.mark.parametrize(("name", "tree"), [("llava", True), ("qwen2_5_vl", True), ("llava", False)])
def test_with_retention_and_pruning_between_layers(name: str, tree: bool, features: dict[str, Any]) -> None:
    model = tiny(name)
    same_as_without(model, prompts(model, [2]), tree=tree, **features)


@pytest.mark.parametrize("features", [{}, {"kv": PREFIX, "tokens": HALF}], ids=["alone", "all"])
def test_eager_attention_takes_an_additive_mask(features: dict[str, Any]) -> None:
    model = tiny("llava", attention="eager")
    same_as_without(model, prompts(model, [1]), tree=True, **features)


def test_kept_positions_are_not_renumbered() -> None:
    model = tiny("llava")
    same_as_without(model, prompts(model, [2]), tree=True, tokens=HALF, positions="keep")


def test_an_assistant_may_have_its_pictures_reduced() -> None:
    model = tiny("qwen2_5_vl")
    inputs = prompts(model, [1])
    expected = generated(model, inputs, NEW).sequences
    for features in ({"tokens": vlmeff.HiPrune(keep=0.9)}, {"kv": PREFIX}, {"tokens": INNER}):
        assistant = vlmeff.wrap(copy.deepcopy(model), None, **features)
        drafter = vlmeff.Assistant(assistant, confidence=0.0)
        vlmeff.wrap(model, None, text_speculation=vlmeff.TextSpeculation(drafter=drafter, warmup=0))
        assert torch.equal(generated(model, inputs, NEW).sequences, expected)
        assert vlmeff.report(model).speculation.drafted > 0
        assert vlmeff.report(assistant).prompt_tokens_before == inputs["input_ids"].shape[1]


def test_quantized_storage_is_refused_by_name() -> None:
    model = tiny("llava")
    with pytest.raises(ConfigError, match="text_speculation and kv_storage='int8'"):
        vlmeff.wrap(model, None, kv=PREFIX, kv_storage="int8", text_speculation="lookup")


def test_unwrap_copies_and_pickles() -> None:
    model = tiny("llava")
    inputs = prompts(model, [1])
    expected = generated(model, inputs, NEW).sequences
    fresh = vlmeff.wrap(tiny("llava"), None, text_speculation="recycle")  # has no hooks of transformers on it yet
    vlmeff.wrap(model, None, text_speculation="recycle")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(fresh))):
        assert torch.equal(generated(other, inputs, NEW).sequences, expected)
        assert vlmeff.report(other).speculation.drafter == "recycle"
    vlmeff.unwrap(model)
    assert torch.equal(generated(model, inputs, NEW).sequences, expected)


def test_the_report_says_what_was_saved() -> None:
    model = tiny("llava")
    inputs = prompts(model, [1])
    vlmeff.wrap(model, None, tokens=HALF, text_speculation=vlmeff.TextSpeculation(drafter="recycle", warmup=0))
    generated(model, inputs, NEW)
    report = vlmeff.report(model)
    counts = report.to_dict()["speculation"]
    assert report.method == "hiprune + recycle speculation"
    assert counts["tokens"] == report.new_tokens == NEW
    assert counts["tokens_per_pass"] == pytest.approx(NEW / counts["target_passes"])
    assert 0 < counts["rounds"] < counts["target_passes"]
    assert 0 < counts["draft_time_s"] < counts["wall_s"]
    text = str(report)
    assert "recycle, tree" in text
    assert f"{counts['target_passes']} for {NEW} tokens" in text
    vlmeff.wrap(model, None, tokens=HALF)
    generated(model, inputs, NEW)
    assert vlmeff.report(model).speculation is None
