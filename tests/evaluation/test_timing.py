"""Times of an answer: their parts, their repetition, and answers of equal length."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import vlmeff
from vlmeff.demo.samples import EXAMPLES
from vlmeff.evaluation import answering
from vlmeff.evaluation.answering import Answerer
from vlmeff.evaluation.benchmarks import get
from vlmeff.evaluation.controls import make_runs
from vlmeff.evaluation.measuring import generate_measured
from vlmeff.evaluation.stages import StageClock
from vlmeff.reporting import Meter, shared_clock

SLEEP = 0.05


@pytest.fixture(scope="module")
def loaded():
    model, processor = vlmeff.load("tiny-llava", dtype="float32")
    return model, processor, get("easy_vqa").load(limit=3)


class Slow(nn.Module):
    """A model whose encoder sleeps once outside hooks and once in a hook."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Identity()
        self.base_model = self

    def get_image_features(self, pixel_values):
        time.sleep(SLEEP)
        return self.tower(pixel_values)


def test_what_a_method_computes_inside_the_encoder_is_not_the_encoders(monkeypatch):
    model = Slow()
    chosen = SimpleNamespace(inner=None)
    monkeypatch.setattr("vlmeff.evaluation.stages._hooked_modules", lambda model: [model.tower])
    with StageClock(model, torch.device("cpu")) as clock:
        handle = model.tower.register_forward_pre_hook(lambda *_: time.sleep(2 * SLEEP))
        time.sleep(SLEEP)  # between the block's beginning and the call's: nobody's
        meter = Meter(torch.device("cpu"))
        model.get_image_features(torch.zeros(1))
        handle.remove()
        assert clock.times(chosen)[1] is None, "nothing was chosen"
        time.sleep(SLEEP)  # choosing, after the encoder
        meter.clock.mark("encoded")
    vision, score = clock.times(chosen)
    assert vision >= 1000 * SLEEP
    assert score >= 1000 * 3 * SLEEP
    assert vision + score == pytest.approx(meter.clock.between("1", "encoded")), "from the encoder's beginning"
    assert clock.times(None) == (vision, None)
    assert clock.times(SimpleNamespace(inner=object())) == (vision, None), "it cannot be told apart"
    assert Meter(torch.device("cpu")).clock is not meter.clock, "the block's clock is given back"
    assert "get_image_features" not in model.__dict__
    assert "forward" not in model.tower.__dict__
    assert not model.tower._forward_pre_hooks


def test_nothing_is_left_behind_when_the_call_fails():
    model = Slow()
    with pytest.raises(RuntimeError, match="stop"), StageClock(model, torch.device("cpu")) as clock:
        raise RuntimeError("stop")
    assert "get_image_features" not in model.__dict__
    assert clock.times(None) == (None, None), "no encoder ran"
    assert shared_clock.get() is None


def test_calls_inside_and_after_the_one_that_is_followed_have_clocks_of_their_own():
    with StageClock(Slow(), torch.device("cpu")):
        outer = Meter(torch.device("cpu"))
        inner = Meter(torch.device("cpu"))  # of a wrapped assistant
        inner.clock.mark("encoded")
        inner.finish()
        assert outer.figures()["encode_ms"] is None
        assert outer.figures()["total_ms"] is None


def test_a_wrapped_assistant_does_not_disturb_the_times(loaded):
    model, processor, _ = loaded
    drafter, _ = vlmeff.load("tiny-llava", dtype="float32")
    question = [{"type": "image", "image": Image.open(EXAMPLES[0].path)}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    vlmeff.wrap(drafter, preset="fast")
    speculation = vlmeff.TextSpeculation(drafter=vlmeff.Assistant(drafter, confidence=0.0))
    vlmeff.wrap(model, preset="fast", text_speculation=speculation)
    try:
        found = generate_measured(model, inputs, max_new_tokens=12, fixed_output=True)
    finally:
        vlmeff.unwrap(model)
    assert found.report.speculation.drafted > 0
    assert 0 < found.report.encode_ms < found.report.prefill_ms < found.report.total_ms <= found.e2e_ms
    assert 0 < found.score_ms < found.ttft_ms - found.vision_ms


def test_an_answer_of_fixed_length_is_the_same_answer(loaded):
    model, processor, data = loaded
    runs = make_runs(model, ["fast"], ["blank"])
    ones = (1,) * len(runs)
    usual, fixed = Answerer(model, processor), Answerer(model, processor, fixed_output=11)
    for sample in data:
        free = usual.answer(data.benchmark, sample, runs, ones)
        forced = fixed.answer(data.benchmark, sample, runs, ones)
        for a, b in zip(free, forced, strict=True):
            assert a.output_tokens < 11
            assert b.output_tokens == 11
            assert (a.prediction, a.parsed, a.scores, a.hit_max) == (b.prediction, b.parsed, b.scores, b.hit_max)
            assert a.kv_bytes_prefill == b.kv_bytes_prefill
            assert a.kv_bytes_end < b.kv_bytes_end
    together = fixed.answer_together(data.benchmark, list(data), runs, [ones] * len(data))
    for sample, rows in zip(data, together, strict=True):
        alone = fixed.answer(data.benchmark, sample, runs, ones)
        assert [(r.prediction, r.output_tokens) for r in rows] == [(r.prediction, r.output_tokens) for r in alone]


def test_the_times_of_a_row_are_the_medians_of_its_repeats(loaded, monkeypatch):
    model, processor, data = loaded
    order = []
    times = iter([30.0, 5.0, 10.0, 7.0, 20.0, 6.0])
    original = answering.generate_measured

    def measured(model, inputs, **options):
        order.append(vlmeff.is_wrapped(model))
        value = next(times)
        found = original(model, inputs, **options)
        return dataclasses.replace(found, ttft_ms=value, e2e_ms=2 * value, score_ms=None, peak_bytes=int(value))

    monkeypatch.setattr(answering, "generate_measured", measured)
    runs = make_runs(model, ["fast"], [])
    rows = Answerer(model, processor, repeats=3).answer(data.benchmark, data[0], runs, (1, 1))
    assert order == [False, True] * 3, "the runs take turns"
    assert [row.ttft_ms for row in rows] == [20.0, 6.0]
    assert [row.e2e_ms for row in rows] == [40.0, 12.0]
    assert [row.peak_mem_bytes for row in rows] == [30, 7]
    assert [row.score_ms for row in rows] == [None, None]


def test_a_failure_among_the_repeats_is_a_failure(loaded, monkeypatch):
    model, processor, data = loaded
    calls = []
    original = answering.generate_measured

    def measured(model, inputs, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a kernel went wrong")
        return original(model, inputs, **options)

    monkeypatch.setattr(answering, "generate_measured", measured)
    (row,) = Answerer(model, processor, repeats=3).answer(data.benchmark, data[0], make_runs(model, [], []), (1,))
    assert row.error == "RuntimeError: a kernel went wrong"
