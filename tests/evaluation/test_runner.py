"""``vlmeff eval`` on the shipped model: what is counted, how it goes on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vlmeff
from vlmeff.errors import DataError, RunError, UnknownNameError
from vlmeff.evaluation import answering, identity, runner
from vlmeff.evaluation.benchmarks import get
from vlmeff.evaluation.controls import RunSpec, blank, make_runs, smaller_picture
from vlmeff.evaluation.runner import Interrupted, Progress, Settings, Shard, evaluate
from vlmeff.evaluation.samples import SampleRow

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 6
TIMES = ("preprocess_ms", "vision_ms", "score_ms", "ttft_ms", "e2e_ms", "peak_mem_bytes", "rank", "attempt")
RUNS = ["baseline", "fast", "fast-random", "fast-downsample", "blank"]


def settings(output, **changes):
    return Settings(**{"model": "tiny-llava", "output": output, "limit": LIMIT, "warmup": 0, **changes})


def untimed(store):
    """The lines of the merged file without what differs from one execution to the next."""
    lines = (store / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def folders(output):
    return {p.name.rsplit("-", 1)[0]: p for p in (output / "tiny-llava" / "easy_vqa").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    stores = evaluate(settings(output), shard=Shard())
    assert [s.path.name.rsplit("-", 1)[0] for s in stores] == RUNS
    return output


def test_answers_are_those_of_generate_and_tokens_and_bytes_are_counted_exactly(whole):
    model, processor = vlmeff.load("tiny-llava")
    data = get("easy_vqa").load(limit=LIMIT)
    config = model.config.text_config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for name, wrap in {"baseline": None, "fast": {"preset": "fast"}}.items():
        rows = [SampleRow.from_json(row) for row in untimed(folders(whole)[name])]
        assert [row.doc_id for row in rows] == data.doc_ids
        for row, sample in zip(rows, data, strict=True):
            prompt = sample.question + "\nAnswer the question using a single word."
            content = [{"type": "image", "image": sample.images[0]()}, {"type": "text", "text": prompt}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            width = inputs["input_ids"].shape[1]
            if wrap is not None:
                vlmeff.wrap(model, **wrap)
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            assert row.prediction == processor.decode(out[0, width:], skip_special_tokens=True).strip()
            assert row.scores["right"] == (row.prediction == sample.answers[0])
            assert row.output_tokens == out.shape[1] - width
            assert row.prompt_tokens == width
            assert row.visual_tokens_in == 324
            if wrap is None:
                assert (row.visual_tokens_kept, row.prefill_tokens) == (324, width)
                assert row.kv_bytes_prefill == width * token_bytes
                assert row.kv_bytes_end == (width + row.output_tokens - 1) * token_bytes
            else:
                assert (row.visual_tokens_kept, row.prefill_tokens) == (108, width - 216)
                assert row.kv_bytes_end < 0.3 * (width + row.output_tokens) * token_bytes
            if wrap is not None:
                vlmeff.unwrap(model)


def test_controls_keep_as_many_tokens_and_blank_sees_nothing(whole):
    found = {name: untimed(folder) for name, folder in folders(whole).items()}
    for name in ("fast", "fast-random", "fast-downsample"):
        assert {row["visual_tokens_kept"] for row in found[name]} == {108}
    assert {row["visual_tokens_kept"] for row in found["blank"]} == {324}
    by_question = {}
    for row, sample in zip(found["blank"], get("easy_vqa").load(limit=LIMIT), strict=True):
        assert by_question.setdefault(sample.question, row["prediction"]) == row["prediction"]


def test_times_are_there_and_in_order(whole):
    for name, folder in folders(whole).items():
        for line in (folder / "samples.jsonl").read_text().splitlines():
            row = json.loads(line)
            if name == "blank":  # its answers may be used again, and then times mean nothing
                assert not row["timing_valid"]
                assert {row[t] for t in ("preprocess_ms", "vision_ms", "ttft_ms", "e2e_ms")} == {None}
                continue
            assert row["timing_valid"]
            assert 0 < row["vision_ms"] < row["ttft_ms"] <= row["e2e_ms"]
            assert row["preprocess_ms"] > 0
            if name == "baseline":
                assert row["score_ms"] is None, "nothing is chosen"
            else:
                assert 0 < row["score_ms"] < row["ttft_ms"] - row["vision_ms"]


def test_what_is_finished_is_not_run_again(whole, monkeypatch):
    def never(*args):
        raise AssertionError("answered again")

    before = {p: p.read_bytes() for p in whole.rglob("*.jsonl")}
    monkeypatch.setattr(answering.Answerer, "answer", never)
    evaluate(settings(whole), shard=Shard())
    assert before == {p: p.read_bytes() for p in whole.rglob("*.jsonl")}


def test_killed_and_gone_on_from_is_as_never_killed(whole, tmp_path):
    command = [sys.executable, "-m", "vlmeff.cli", "eval", "--limit", str(LIMIT), "--warmup", "0", "--json"]
    command = ["nice", *command, "--output", str(tmp_path)]  # so that who is to kill it comes in time
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        while time.monotonic() < end:
            parts = list(tmp_path.rglob("blank*/samples.rank0.jsonl"))
            if parts and parts[0].read_bytes().count(b"\n") >= 2:
                break
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.rglob("done.json"))
    part = next(tmp_path.rglob("fast-????????/samples.rank0.jsonl"))
    part.write_bytes(part.read_bytes() + b'{"schema": "vlmeff.evalsam')
    with pytest.warns(UserWarning, match="last line"):
        evaluate(settings(tmp_path), shard=Shard())
    for name, folder in folders(tmp_path).items():
        assert untimed(folder) == untimed(folders(whole)[name])


def test_any_number_of_processes_gives_the_same_files(whole, tmp_path):
    three = tmp_path / "three"
    for rank in (1, 2):
        assert evaluate(settings(three), shard=Shard(rank, 3)) == []
    with pytest.raises(RunError, match=r"E-RUN-02.*other processes"):
        evaluate(settings(three / "alone", rank_timeout=0.1), shard=Shard(0, 3))
    evaluate(settings(three), shard=Shard(0, 3))
    other = tmp_path / "other"
    evaluate(settings(other), shard=Shard(1, 2))
    evaluate(settings(other), shard=Shard(0, 1))
    for output in (three, other):
        for name, folder in folders(output).items():
            assert untimed(folder) == untimed(folders(whole)[name])
    ranks = {json.loads(line)["rank"] for f in folders(three).values() for line in (f / "samples.jsonl").open()}
    assert ranks == {0, 1, 2}


def test_ctrl_c_keeps_what_is_finished(whole, tmp_path):
    steps = []

    def step(benchmark, rows):
        steps.append(rows)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="after 2 of 6"):
        evaluate(settings(tmp_path), shard=Shard(), progress=Progress(step=step))
    assert Interrupted.exit_code == 130
    assert not list(tmp_path.rglob("lock*"))
    begun = []
    progress = Progress(begin=lambda benchmark, done, total: begun.append((done, total)))
    evaluate(settings(tmp_path), shard=Shard(), progress=progress)
    assert begun == [(2, 6)]
    assert untimed(folders(tmp_path)["fast"]) == untimed(folders(whole)["fast"])


def test_times_of_another_machine_are_kept_apart(tmp_path, monkeypatch):
    only = settings(tmp_path, presets=(), controls=())
    evaluate(only, shard=Shard(1, 2))
    original = identity.environment
    monkeypatch.setattr(identity, "environment", lambda model: {**original(model), "device_name": "another"})
    evaluate(only, shard=Shard(0, 1))
    valid = [row["timing_valid"] for row in untimed(folders(tmp_path)["baseline"])]
    assert valid == [False, True] * (LIMIT // 2)


def fail_at(monkeypatch, doc_ids):
    original = answering.Answerer._measured

    def measured(self, benchmark, sample, run):
        if sample.doc_id in doc_ids:
            raise RuntimeError("a kernel went wrong")
        return original(self, benchmark, sample, run)

    monkeypatch.setattr(answering.Answerer, "_measured", measured)


def test_a_document_that_fails_is_wrong_is_tried_once_more_and_then_left(tmp_path, monkeypatch):
    only = settings(tmp_path, presets=(), controls=(), max_error_rate=0.5)
    fail_at(monkeypatch, {"easy_vqa/test/1"})
    evaluate(only, shard=Shard())
    row = untimed(folders(tmp_path)["baseline"])[1]
    assert row["error"] == "RuntimeError: a kernel went wrong"
    assert row["scores"]["right"] == 0
    assert not row["timing_valid"]
    begun = []
    progress = Progress(begin=lambda benchmark, done, total: begun.append(done))
    evaluate(only, shard=Shard(), progress=progress)
    evaluate(only, shard=Shard(), progress=progress)
    assert begun == [5, 6]
    monkeypatch.undo()


def test_a_document_that_failed_once_counts_when_it_succeeds(whole, tmp_path, monkeypatch):
    only = settings(tmp_path, presets=(), controls=(), max_error_rate=0.5)
    fail_at(monkeypatch, {"easy_vqa/test/1"})
    evaluate(only, shard=Shard())
    monkeypatch.undo()
    evaluate(only, shard=Shard())
    assert untimed(folders(tmp_path)["baseline"]) == untimed(folders(whole)["baseline"])


def test_a_share_of_failures_above_what_is_allowed_is_an_error_at_the_end(tmp_path, monkeypatch):
    fail_at(monkeypatch, {"easy_vqa/test/1"})
    with pytest.raises(RunError, match=r"E-RUN-03: 1 of 6 documents failed in baseline \(allowed: 1.0%\)"):
        evaluate(settings(tmp_path, presets=(), controls=()), shard=Shard())
    assert len(untimed(folders(tmp_path)["baseline"])) == LIMIT, "the rows are kept"
    monkeypatch.undo()
    evaluate(settings(tmp_path, presets=(), controls=()), shard=Shard())


def test_too_many_failures_end_the_run(tmp_path, monkeypatch):
    fail_at(monkeypatch, {f"easy_vqa/test/{i}" for i in range(100)})
    with pytest.raises(RunError, match=r"E-RUN-03: 3 of 3 documents failed in baseline"):
        evaluate(settings(tmp_path, presets=(), controls=()), shard=Shard())


def test_memory_that_runs_out_gives_advice(tmp_path, monkeypatch):
    def measured(self, benchmark, sample, run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(answering.Answerer, "_measured", measured)
    with pytest.raises(RunError, match="E-RUN-03"):
        evaluate(settings(tmp_path, presets=(), controls=()), shard=Shard())
    row = json.loads(next(tmp_path.rglob("samples.rank0.jsonl")).read_text().splitlines()[0])
    assert "E-MODEL-04" in row["error"]
    assert "max_pixels" in row["error"]


def test_a_preset_that_changes_nothing_is_an_error(tmp_path, monkeypatch):
    def runs(model, presets, controls, *, baseline, seed):
        return [RunSpec("baseline"), RunSpec("preset", preset="idle", reduces=True)]

    monkeypatch.setattr("vlmeff.evaluation.controls.make_runs", runs)
    with pytest.raises(RunError, match=r"E-MODEL-03: idle had no effect: none of 3"):
        evaluate(settings(tmp_path), shard=Shard())


def test_a_preset_that_only_retains_the_cache_has_an_effect():
    spec = RunSpec("preset", preset="kv", reduces=True)
    full = SampleRow(doc_id="a", visual_tokens_in=9, visual_tokens_kept=9, prompt_tokens=20, kv_bytes_prefill=100)
    less = dataclasses.replace(full, kv_bytes_prefill=60)
    answering.check_effect(spec, [less], [full])
    with pytest.raises(RunError, match="E-MODEL-03"):
        answering.check_effect(spec, [full], [full])


def test_where_only_the_cache_can_shrink_and_its_size_is_unknown_nothing_is_concluded():
    spec = RunSpec("preset", preset="kv", reduces=True)
    full = SampleRow(doc_id="a", visual_tokens_in=9, visual_tokens_kept=9, prompt_tokens=20, kv_bytes_prefill=100)
    answering.check_effect(spec, [dataclasses.replace(full, kv_bytes_prefill=None)], [full])
    answering.check_effect(spec, [full], None)
    cuts = dataclasses.replace(spec, parameters={"tokens": ["HiPrune()"]})
    with pytest.raises(RunError, match="E-MODEL-03"):
        answering.check_effect(cuts, [dataclasses.replace(full, kv_bytes_prefill=None)], [full])


def test_the_blank_control_is_asked_once_for_each_question(tmp_path, monkeypatch):
    asked = []
    original = answering.generate_measured

    def counted(model, inputs, **options):
        asked.append(inputs["input_ids"].tolist())
        return original(model, inputs, **options)

    monkeypatch.setattr(answering, "generate_measured", counted)
    (_, store) = evaluate(settings(tmp_path, presets=(), controls=("blank",), limit=30), shard=Shard())
    questions = {json.loads(line)["question"] for line in (store.path / "samples.jsonl").open()}
    assert len(questions) < 30
    assert len(asked) == 30 + len(questions)


def test_the_score_so_far_is_the_mean_over_the_rows_there_and_new(tmp_path):
    told = []
    progress = Progress(scored=lambda benchmark, so_far: told.append(dict(so_far)))
    only = settings(tmp_path, controls=("blank",), perf="accuracy")
    evaluate(only, shard=Shard(1, 2))
    evaluate(only, shard=Shard(), progress=progress)
    for name in ("baseline", "fast"):
        rows = untimed(folders(tmp_path)[name])
        scores = [row["scores"]["open"] for row in rows if "open" in row["scores"]]
        assert told[-1][name] == pytest.approx(sum(scores) / len(scores))
    assert set(told[-1]) == {"baseline", "fast"}
    assert len(told) == LIMIT // 2


def test_a_document_that_failed_once_is_not_merged_before_its_process_tried_it_again(tmp_path, monkeypatch):
    only = settings(tmp_path, presets=(), controls=(), max_error_rate=0.5, rank_timeout=0.3)
    bad = get("easy_vqa").load(limit=LIMIT).doc_ids[1]  # of rank 1
    fail_at(monkeypatch, {bad})
    evaluate(only, shard=Shard(1, 2))
    evaluate(only, shard=Shard(0, 2))  # the first attempt of this launch has ended: merged with the failure
    assert untimed(folders(tmp_path)["baseline"])[1]["error"]
    monkeypatch.undo()
    with pytest.raises(RunError, match=f"E-RUN-02: .*1 documents.*{bad}"):
        evaluate(only, shard=Shard(0, 2))  # the next launch: rank 1 has not been there yet
    evaluate(only, shard=Shard(1, 2))
    evaluate(only, shard=Shard(0, 2))
    assert untimed(folders(tmp_path)["baseline"])[1]["error"] is None
    assert not list(tmp_path.rglob("ended.*"))


def test_what_is_unknown_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmeff.loading.load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UnknownNameError, match=r"E-USE-01.*easy_vqa"):
        evaluate(settings(tmp_path, benchmarks=("easy_vqs",)))
    with pytest.raises(DataError, match="E-DATA-01"):
        evaluate(settings(tmp_path, benchmarks=("pope",), offline=True))


def test_controls_of_each_kind_of_preset():
    model, _ = vlmeff.load("tiny-llava")
    runs = make_runs(model, ["smallest", "paper-prefixkv"], ["random", "downsample", "blank"], seed=3)
    assert [run.name for run in runs] == [
        "baseline",
        "smallest",
        "smallest-random",
        "smallest-downsample",
        "paper-prefixkv",
        "paper-prefixkv-random",
        "blank",
    ]
    by_name = {run.name: run for run in runs}
    assert by_name["smallest-random"].plan.kv == by_name["smallest"].plan.kv
    assert by_name["paper-prefixkv-random"].plan.kv.keep_ratio == 0.5
    assert not vlmeff.is_wrapped(model)
    with pytest.raises(UnknownNameError, match=r"E-USE-01.*randon.*random"):
        make_runs(model, ["fast"], ["randon"])
    from PIL import Image

    picture = Image.new("RGB", (120, 60), (255, 0, 0))
    assert smaller_picture(0.25)(picture).size == (60, 30)
    assert blank(picture).getcolors() == [(7200, (128, 128, 128))]
    assert runner.Shard.of_environment() == Shard(0, 1)
