"""The KV quality benchmark: keeping everything is the unwrapped model, keeping little is not, token by token agrees.

And the committed result: what is claimed of it holds, and its comparisons are those of its documents.
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmeff
from kvcache import LayerStats

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kv_quality.py"
RESULT = SCRIPT.parent / "results" / "kv_quality.json"
DOCUMENTS = 12


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("kv_quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kv_quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kv_quality"]


@pytest.fixture(scope="module")
def prepared(benchmark: Any) -> tuple[Any, Any, Any]:
    model, processor = vlmeff.load("tiny-llava")
    return model, processor, benchmark.make_batches(model, processor, benchmark.documents(DOCUMENTS), size=8)


def nll(benchmark: Any, prepared: tuple[Any, Any, Any], policy: Any = None) -> torch.Tensor:
    model, processor, batches = prepared
    if policy is not None:
        vlmeff.wrap(model, None, kv=policy)
    out = benchmark.score(model, processor, batches)
    if policy is not None:
        vlmeff.unwrap(model)
    return torch.tensor(out["nll"], dtype=torch.float64) / torch.tensor(out["tokens"])


def whole_nll(model: Any, processor: Any, item: Any) -> float:
    """Prompt and answer in one pass of the plain model, without cache, padding or embeddings made beforehand."""
    text = f"USER: <image>\n{item.question} ASSISTANT: {item.answer}"
    inputs = processor(images=Image.fromarray(item.pixels), text=text, return_tensors="pt")
    length = len(processor.tokenizer(item.answer, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0].double().log_softmax(-1)
    ids = inputs["input_ids"][0]
    places = range(len(ids) - length + 1, len(ids))  # the first answer token is not scored
    return float(-sum(logits[i - 1, ids[i]] for i in places) / len(places))


def test_the_score_is_that_of_one_plain_pass_and_keeping_everything_does_not_change_it(benchmark, prepared):
    model, processor, _ = prepared
    plain = nll(benchmark, prepared)
    expected = torch.tensor([whole_nll(model, processor, item) for item, _ in benchmark.documents(DOCUMENTS)])
    assert torch.allclose(plain, expected.double(), atol=1e-5, rtol=0)
    for name in ("prefixkv", "snapkv", "streaming_llm", "random"):
        kept = nll(benchmark, prepared, benchmark.policies.get(name)(keep_ratio=1.0))
        assert torch.allclose(kept, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["prefixkv", "snapkv", "streaming_llm", "random"])
def test_a_twentieth_is_worse_than_everything(benchmark, prepared, name):
    plain = nll(benchmark, prepared)
    little = nll(benchmark, prepared, benchmark.policies.get(name)(keep_ratio=0.05))
    assert little.mean() > plain.mean() + 0.1


@torch.no_grad()
def test_the_continuation_in_one_pass_is_that_of_one_token_at_a_time(benchmark, prepared):
    model, _, batches = prepared
    batch = batches[0]
    vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=0.2))
    try:
        caches = [model(**batch.inputs, use_cache=True).past_key_values for _ in range(2)]
        at_once = benchmark.go_on(model, batch, caches[0], batch.answers)
        row = max(range(len(batch.answers)), key=lambda i: len(batch.answers[i]))
        mask = batch.inputs["attention_mask"]
        for step, _ in enumerate(batch.answers[row]):
            ids = torch.tensor([[(answer + [0] * 99)[step]] for answer in batch.answers])
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            logits = model(input_ids=ids, attention_mask=mask, past_key_values=caches[1], use_cache=True).logits[:, 0]
            torch.testing.assert_close(logits, at_once[:, step], atol=1e-4, rtol=1e-4)
    finally:
        vlmeff.unwrap(model)


def test_what_is_unsaid_and_what_is_compared(benchmark):
    text = "a blue circle top left, a red triangle top right, a red circle bottom right."
    assert benchmark.without(text, "what shape is in the top right?") == (
        "a blue circle top left, a red circle bottom right."
    )
    a = [0.1 * i for i in range(50)]
    same = benchmark.interval(a, a)
    assert same == {"mean": 0.0, "interval_95": [0.0, 0.0]}
    shifted = benchmark.interval(a, [x + 0.5 + 0.01 * (i % 3) for i, x in enumerate(a)])
    low, high = shifted["interval_95"]
    assert -0.52 <= low < shifted["mean"] < high <= -0.5
    assert shifted == benchmark.interval(a, [x + 0.5 + 0.01 * (i % 3) for i, x in enumerate(a)])


def test_every_document_asks_for_an_object_of_its_own_picture(benchmark):
    for describe, question in benchmark.documents(DOCUMENTS):
        assert (describe.kind, question.kind) == ("describe", "position")
        assert (describe.pixels == question.pixels).all()
        left = benchmark.without(describe.answer, question.question)
        assert left.count("a ") == describe.answer.count("a ") - 1


def test_digits_of_documents_are_runs_that_are_right(benchmark):
    runs = [
        {"nll": [1.0, 3.0], "tokens": [2, 3], "second_turn": [True, False], "second_turn_unsaid": [True, True]},
        {"nll": [3.0, 6.0], "tokens": [2, 3], "second_turn": [True, False], "second_turn_unsaid": [False, True]},
    ]
    found = benchmark.merged(runs, keep_documents=True)
    assert found["mean_nll"] == pytest.approx((2 + 4.5) / 5)
    assert (found["second_turn"], found["second_turn_unsaid"]) == (0.5, 0.75)
    assert found["second_turn_unsaid_of_seeds"] == [1.0, 0.5]
    result = {**found, "runs": 2}
    assert benchmark.per_document(result, "nll") == [1.0, 1.5]
    assert benchmark.per_document(result, "second_turn") == [1.0, 0.0]
    assert benchmark.per_document(result, "second_turn_unsaid") == [0.5, 1.0]


def test_the_mean_metric_is_the_mean_attention_of_the_queries_that_see_a_token():
    n, rng = 40, random.Random(0)
    rows = [[rng.lognormvariate(0, 1) for _ in range(i + 1)] for i in range(n)]
    rows = [[x / sum(row) for x in row] for row in rows]  # causal attention, one head
    received = [sum(row[j] for row in rows if j < len(row)) for j in range(n)]
    stats = LayerStats(layer=0, layers=1, n=n, kv_heads=1, scores=torch.tensor(received))
    policy = vlmeff.PrefixKV(keep_ratio=0.5, metric="mean", sink=1, recent=2)
    assert policy.needs.kind == "full"
    expected = [statistics.mean(row[j] for row in rows if j < len(row)) for j in range(n)]
    assert policy.importance(stats).tolist() == pytest.approx(expected, rel=1e-5)
    best = sorted(range(1, n - 2), key=lambda j: -expected[j])[:17]
    assert policy.select(stats, 20).tolist() == sorted([0, n - 2, n - 1, *best])
    full = vlmeff.PrefixKV(keep_ratio=0.5, sink=1, recent=2)
    assert full.importance(stats) is stats.scores
    assert full.select(stats, 20).tolist() != policy.select(stats, 20).tolist()


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RESULT.read_text())
    return content


def test_the_committed_result_is_of_these_settings_and_its_comparisons_are_of_its_documents(benchmark, committed):
    assert committed["documents"] >= 200
    results = committed["settings"]
    assert set(results) == {"unwrapped"} | {benchmark.label(curve, r) for curve, r, _ in benchmark.settings()}
    for curve, keep_ratio, policies in benchmark.settings():
        result = results[benchmark.label(curve, keep_ratio)]
        assert (result["arguments"], result["runs"]) == (benchmark.CURVES[curve][1], len(policies))
        if keep_ratio == 1.0:
            measures = ("mean_nll", "second_turn", "second_turn_unsaid")
            assert [result[m] for m in measures] == pytest.approx([results["unwrapped"][m] for m in measures], abs=1e-5)
        else:
            assert len(benchmark.per_document(result, "nll")) == committed["documents"]
    for measure, pairs in committed["comparisons"].items():
        assert len(pairs) == len(benchmark.OURS) * len(benchmark.AGAINST) - 1  # not PrefixKV with itself
        for pair, found in pairs.items():
            for keep_ratio, figures in found.items():
                a, b = (benchmark.per_document(results[f"{x} {keep_ratio}"], measure) for x in pair.split(" - "))
                assert figures["mean"] == pytest.approx(statistics.mean(a) - statistics.mean(b), abs=2e-5)
                assert figures["interval_95"][0] <= figures["mean"] <= figures["interval_95"][1]


@pytest.mark.parametrize("curve", ["prefixkv", "prefixkv mean"])
def test_prefixkv_is_better_than_chance_and_the_ends_alone_but_not_than_chance_between_the_same_ends(committed, curve):
    """What the documentation says of it, for and against."""
    found = committed["comparisons"]["nll"]
    for keep_ratio in ("0.3", "0.5"):
        for other in ("random", "streaming_llm"):
            low, high = found[f"{curve} - {other}"][keep_ratio]["interval_95"]
            assert low <= high < 0, (other, keep_ratio)
        low, _ = found[f"{curve} - random with ends"][keep_ratio]["interval_95"]
        assert low > 0, keep_ratio
    assert found[f"{curve} - random with ends"]["0.05"]["interval_95"][1] < 0


def test_the_mean_metric_is_better_than_the_papers_and_snapkv_of_eight_queries_better_than_both(committed):
    found = committed["comparisons"]["nll"]
    for keep_ratio in ("0.05", "0.1", "0.3", "0.5"):
        assert found["prefixkv mean - prefixkv"][keep_ratio]["interval_95"][1] < 0
        assert found["prefixkv - snapkv window 8"][keep_ratio]["interval_95"][0] > 0
    for keep_ratio in ("0.1", "0.3", "0.5"):
        assert found["prefixkv mean - snapkv window 8"][keep_ratio]["interval_95"][0] > 0
