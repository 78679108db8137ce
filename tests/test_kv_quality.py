"""The KV quality benchmark: keeping everything is the unwrapped model, keeping little is not, token by token agrees."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmeff

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kv_quality.py"
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
