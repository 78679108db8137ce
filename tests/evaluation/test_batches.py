"""``--batch-size``: a document has the answer and the figures that it has alone; only times it has none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import vlmeff
from vlmeff.errors import BadImageError, ConfigError
from vlmeff.evaluation import answering
from vlmeff.evaluation.answering import Answerer
from vlmeff.evaluation.batching import end_ids, until_end
from vlmeff.evaluation.benchmarks import get
from vlmeff.evaluation.controls import make_runs
from vlmeff.evaluation.loaded import Task, batches
from vlmeff.evaluation.runner import Progress, Settings, Shard, evaluate

TIMES = ("preprocess_ms", "vision_ms", "score_ms", "ttft_ms", "e2e_ms", "peak_mem_bytes")
NO_TIMES = {**dict.fromkeys(TIMES), "timing_valid": False}


def plain(row):
    """A row as JSON without times."""
    return {**row.to_json(), **NO_TIMES}


@pytest.mark.parametrize(
    ("name", "presets"),
    [
        ("tiny-llava", ["fast", "smallest", "paper-adaptinfer", "paper-prefixkv"]),
        ("tiny-qwen", ["fast"]),
    ],
)
def test_every_figure_of_a_row_is_that_of_the_document_alone(name, presets):
    model, processor = vlmeff.load(name, dtype="float32")
    data = get("easy_vqa").load(limit=6)
    samples = [data[i] for i in range(6)]
    assert len({len(sample.question) for sample in samples}) > 1, "nothing to pad"
    runs = make_runs(model, presets, ["random", "downsample", "blank"])
    answerer = Answerer(model, processor)
    together = answerer.answer_together(data.benchmark, samples, runs, [[1] * len(runs)] * len(samples))
    for sample, rows in zip(samples, together, strict=True):
        alone = answerer.answer(data.benchmark, sample, runs, [1] * len(runs), repeats=1)
        for run, ours, theirs in zip(runs, rows, alone, strict=True):
            assert ours.error is None
            assert ours.kv_bytes_prefill is not None
            assert plain(ours) == plain(theirs), run.name
            assert {t: getattr(ours, t) for t in TIMES} == dict.fromkeys(TIMES)
            assert not ours.timing_valid


def test_tasks_of_the_same_runs_are_together_and_what_is_timed_or_tried_again_is_alone():
    def task(index, runs=(0, 1), attempts=(1, 1)):
        return Task(index, runs, attempts)

    tasks = [task(0), task(31), task(32), task(33, (1, 0)), task(34, (1,), (1,)), task(35, attempts=(2, 1)), task(36)]

    def indices(**changes):
        settings = Settings(model="m", output=Path("out"), **changes)
        return [[t.index for t in batch] for batch in batches(tasks, settings)]

    assert indices() == [[0], [31], [32], [33], [34], [35], [36]]
    assert indices(batch_size=2) == [[0], [31], [32, 33], [35], [34], [36]]
    assert indices(batch_size=2, perf="accuracy") == [[0, 31], [32, 33], [35], [34], [36]]
    assert indices(batch_size=9, perf="accuracy") == [[35], [0, 31, 32, 33, 36], [34]]


def test_the_first_documents_are_timed_and_the_others_are_as_if_answered_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmeff.evaluation.loaded.TIMED", 2)
    common = {"model": "tiny-llava", "limit": 7, "presets": ("fast",), "controls": ("blank",), "warmup": 0}
    called = []
    original = answering.generate_together

    def counted(model, inputs, pictures, **options):
        called.append(len(pictures))
        return original(model, inputs, pictures, **options)

    monkeypatch.setattr(answering, "generate_together", counted)
    one = evaluate(Settings(output=tmp_path / "1", perf="accuracy", **common), shard=Shard())
    assert not called
    four = evaluate(Settings(output=tmp_path / "4", batch_size=4, **common), shard=Shard())
    assert called[:2] == [4, 4]
    assert sum(called) <= 5 + 5 + 5
    for a, b in zip(one, four, strict=True):
        assert a.path.name != b.path.name, "the batch size is part of the fingerprint"
        rows = [[json.loads(line) for line in (s.path / "samples.jsonl").open()] for s in (a, b)]
        assert [{**r, **NO_TIMES} for r in rows[0]] == [{**r, **NO_TIMES} for r in rows[1]]
        timed = [r["ttft_ms"] is not None for r in rows[1]]
        assert timed == ([False] * 7 if a.path.name.startswith("blank") else [True, True] + [False] * 5)
        assert timed == [r["timing_valid"] for r in rows[1]]


def test_what_fails_in_a_batch_is_asked_one_by_one_and_the_error_is_of_its_document(tmp_path, monkeypatch):
    original = answering.generate_together

    def too_large(model, inputs, pictures, **options):
        if len(pictures) > 2:
            raise MemoryError("a batch of four is too large")
        return original(model, inputs, pictures, **options)

    monkeypatch.setattr(answering, "generate_together", too_large)
    said = []
    settings = Settings(
        model="tiny-llava", output=tmp_path, limit=5, presets=(), controls=(), perf="accuracy", batch_size=4
    )
    (store,) = evaluate(settings, shard=Shard(), progress=Progress(say=said.append))
    rows = [json.loads(line) for line in (store.path / "samples.jsonl").open()]
    assert [row["error"] for row in rows] == [None] * 5
    assert any("4 documents is answered one by one: MemoryError" in text for text in said)


def test_a_broken_picture_in_a_batch_is_a_failure_of_its_document_alone(tmp_path, monkeypatch):
    data = get("easy_vqa").load(limit=3)
    bad = data.doc_ids[1]

    def broken():
        raise BadImageError("E-DATA-06: document 'x': too large.")

    original = type(data).__getitem__

    def item(self, index):
        sample = original(self, index)
        return dataclasses.replace(sample, images=[broken]) if sample.doc_id == bad else sample

    monkeypatch.setattr(type(data), "__getitem__", item)
    common = {"model": "tiny-llava", "limit": 3, "presets": (), "controls": (), "perf": "accuracy", "batch_size": 3}
    with pytest.raises(BadImageError, match=r"E-DATA-06.*--skip-bad-images.*--max-image-pixels"):
        evaluate(Settings(output=tmp_path / "a", **common), shard=Shard())
    settings = Settings(output=tmp_path / "b", skip_bad_images=True, max_error_rate=0.5, **common)
    (store,) = evaluate(settings, shard=Shard())
    rows = [json.loads(line) for line in (store.path / "samples.jsonl").open()]
    assert [row["error"] is not None for row in rows] == [False, True, False]


def test_an_answer_ends_with_its_end_token():
    assert until_end([5, 7, 2, 0, 0], {2}) == [5, 7, 2]
    assert until_end([5, 7], {2}) == [5, 7]
    assert until_end([2, 2], {2, 3}) == [2]
    model, _ = vlmeff.load("tiny-llava")
    assert end_ids(model)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"perf": "latency", "batch_size": 2}, "E-USE-03"),
        ({"batch_size": 0}, "E-USE-02"),
        ({"repeats": 0}, "E-USE-02"),
        ({"fixed_output": 1}, "E-USE-02"),
        ({"perf": "accuracy", "repeats": 2}, "E-USE-02"),
        ({"perf": "accuracy", "fixed_output": 8}, "E-USE-02"),
        ({"max_image_pixels": 0}, "E-USE-02"),
        ({"max_image_pixels": 100_000_000}, "E-USE-02"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, code, tmp_path):
    with pytest.raises(ConfigError, match=code):
        Settings(model="tiny-llava", output=tmp_path, **changes)
