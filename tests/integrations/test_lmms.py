"""lmms-eval's model ``vlmeff``: its arguments, its answers, and POPE from a local folder in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from scipy.stats import binomtest

import vlmeff
import vlmeff.asking
from vlmeff.errors import ConfigError, DataError, MissingExtraError, RunError, UnknownNameError, UnsupportedInputError
from vlmeff.integrations import lmms_command, lmms_manifest, lmms_pairs
from vlmeff.integrations.lmms_arguments import cut, generation_of, model_arguments, preset_arguments

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINT = {"vlmeff": "vlmeff.integrations.lmms_manifest:manifests"}
DOCUMENTS = 4
QUESTION = "does the image contain a circle?"
SUFFIX = "\nAnswer the question using a single word or phrase."


def test_the_entry_point_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == ENTRY_POINT
    assert any("lmms-eval" in line for line in project["optional-dependencies"]["lmms"])


def test_the_manifest_needs_nothing_and_never_raises(monkeypatch):
    code = (
        "import sys; sys.modules['lmms_eval'] = None\n"
        "from vlmeff.integrations.lmms_manifest import manifests\n"
        "assert manifests() == []; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())

    def other_version(**fields):
        raise TypeError("unexpected field")

    module = SimpleNamespace(ModelManifest=other_version)
    for name in ("lmms_eval", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", module)
    assert lmms_manifest.manifests() == []
    module.ModelManifest = dict
    (manifest,) = lmms_manifest.manifests()
    assert manifest["model_id"] == "vlmeff"
    for slot, mode in (("chat_class_path", "Chat"), ("simple_class_path", "Simple")):
        assert manifest[slot] == f"vlmeff.integrations.lmms_model.Vlmeff{mode}"


def test_without_lmms_eval_the_model_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "vlmeff.integrations.lmms_model", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(MissingExtraError, match=r'E-ENV-01: .*pip install "vlmeff\[lmms\]"'):
        __import__("vlmeff.integrations.lmms_model")


def test_model_arguments_are_checked():
    read = model_arguments(
        {"pretrained": "m", "preset": "fast", "preset_args": "keep:0.5;alpha:0.2", "vlmeff_rev": vlmeff.__version__}
    )
    assert (read.pretrained, read.preset, read.preset_args) == ("m", "fast", {"keep": 0.5, "alpha": 0.2})
    assert model_arguments({}).preset is None
    with pytest.raises(UnknownNameError, match=r"E-LM-01: .*'presets'.*'preset'.*max_pixels.*vlmeff_rev"):
        model_arguments({"presets": "fast"})
    with pytest.raises(ConfigError, match=r"vlmeff_rev=0\.0\.1"):
        model_arguments({"vlmeff_rev": "0.0.1"})
    with pytest.raises(ConfigError, match="revision=123456"):
        model_arguments({"revision": 123456})
    with pytest.raises(ConfigError, match="max_pixels"):
        model_arguments({"max_pixels": 0.5})
    with pytest.raises(ConfigError, match="dtype='half'"):
        model_arguments({"dtype": "half"})


def test_preset_arguments_are_plain_values():
    assert preset_arguments("a:1; b:2.5;c:true;d:none;e:grid;") == {"a": 1, "b": 2.5, "c": True, "d": None, "e": "grid"}
    for bad in ("keep=0.5", "keep:", ":1", "a:1;a:2", "a b:1"):
        with pytest.raises(ConfigError, match="preset_args"):
            preset_arguments(bad)


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({"temperature": 0.0, "do_sample": False, "top_p": 1.0}, {}),
        ({"temperature": 0, "do_sample": True}, {}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({}, {}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"num_beams": 3}, {"num_beams": 3}),
    ],
)
def test_only_sampling_and_beams_are_more_than_greedy(given, other):
    assert generation_of(given).other == other


def test_generation_settings_are_read():
    read = generation_of({"until": ["\n\n", ""], "max_new_tokens": 128, "image_aspect_ratio": "pad", "num_beams": 1})
    assert (read.max_new_tokens, read.until, read.ignored) == (128, ("\n\n",), ("image_aspect_ratio",))
    assert generation_of({"until": "ASSISTANT:"}).until == ("ASSISTANT:",)
    assert generation_of({"until": None}).max_new_tokens > 16


def test_text_is_cut_at_the_first_stop():
    assert cut("yes\n\nno ASSISTANT: x", ["ASSISTANT:", "\n\n"]) == "yes"
    assert cut("yes", ["\n\n"]) == "yes"
    assert cut("\n\nyes", ["\n\n"]) == ""
    assert cut("a.b", []) == "a.b"


def logged(scores, *, answers=None, **more):
    """Samples as lmms-eval logs those of POPE: one score under several names."""
    answers = answers or ["yes" if score else "no" for score in scores]
    return {
        str(i): {
            "doc_id": i,
            "input": f"question {i}",
            "target": "yes",
            "doc_hash": "same for all",
            "filtered_resps": answer,
            "pope_accuracy": {"score": score, "prediction": answer},
            "pope_recall": {"score": score},
            "input_media": ["x"],
            **more,
        }
        for i, (score, answer) in enumerate(zip(scores, answers, strict=True))
    }


def test_two_runs_are_compared_in_pairs():
    before, after = [1, 1, 1, 0, 1, 0, 1, 1, 1, 1], [1, 0, 0, 1, 0, 0, 1, 0, 1, 1]
    (row,) = lmms_pairs.compare("pope", "fast", logged(before), logged(after), margin=5)
    assert (row.metric, row.n, row.baseline, row.value) == ("pope_accuracy", 10, 0.8, 0.5)
    assert row.delta == pytest.approx(-0.3)
    assert row.p == pytest.approx(binomtest(1, 5, 0.5).pvalue)
    assert row.agreement == 0.5
    assert row.ci95[0] < -0.3 < row.ci95[1]
    assert lmms_pairs.adjust([row, row])[0].p_holm == pytest.approx(min(1, 2 * row.p))
    (same,) = lmms_pairs.compare("pope", "fast", logged(before), logged(before))
    assert (same.delta, same.ci95, same.verdict, same.p, same.agreement) == (0, (0, 0), "non-inferior", 1, 1)


def test_metrics_without_a_number_for_each_document_are_left_out():
    texts = {"0": {"doc_id": 0, "gpt": {"judge": "good"}, "anls": 0.5}, "1": {"doc_id": 1, "gpt": {}, "anls": 0.8}}
    (row,) = lmms_pairs.compare("docvqa", "fast", texts, texts)
    assert (row.metric, row.p, row.value) == ("anls", None, pytest.approx(0.65))
    assert lmms_pairs.compare("t", "fast", {"0": {"doc_id": 0, "x": "a"}}, {"0": {"doc_id": 0, "x": "b"}}) == []


def test_runs_over_other_documents_are_refused(tmp_path):
    rows = logged([1, 0, 1])
    for key in ("doc_hash", "input", "target"):
        with pytest.raises(DataError, match=rf"E-STAT-01: .*'0' has another {key}"):
            lmms_pairs.compare("pope", "fast", rows, logged([1, 0, 1], **{key: "another"}))
    with pytest.raises(DataError, match="E-STAT-01"):
        lmms_pairs.compare("pope", "fast", rows, logged([1, 0]))
    file = tmp_path / "samples.jsonl"
    file.write_text('{"doc_id": 1}\n{"doc_id": 1}\n')
    with pytest.raises(DataError, match="twice"):
        lmms_pairs.read_samples(file)
    file.write_text("[1]\n")
    with pytest.raises(DataError, match=r"E-DATA-03: .* line 1"):
        lmms_pairs.read_samples(file)


def request(output, **changes):
    return lmms_command.Request(**{"model": "tiny-llava", "tasks": ("pope",), "output": output, **changes})


def test_the_command_names_preset_and_version(tmp_path):
    plain = lmms_command.command(request(tmp_path), "baseline")
    arguments = plain[plain.index("--model_args") + 1].split(",")
    assert {"pretrained=tiny-llava", "preset=none", f"vlmeff_rev={vlmeff.__version__}"} <= set(arguments)
    assert model_arguments(dict(a.split("=") for a in arguments)).preset == "none"
    assert "--force_simple" not in plain
    assert "--limit" not in plain
    many = lmms_command.command(request(tmp_path, processes=2, force_simple=True, limit=4), "fast")
    assert many[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert many[many.index("--limit") + 1] == "4"
    assert many[-1] == "--force_simple"
    with pytest.raises(ConfigError, match="commas"):
        lmms_command.command(request(tmp_path, model="a,b"), "fast")


def test_a_run_without_new_samples_is_an_error(tmp_path, monkeypatch):
    old = tmp_path / "fast" / "m" / "1_samples_pope.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text('{"doc_id": 0}\n')
    monkeypatch.setattr(lmms_command, "command", lambda request, name: [sys.executable, "-c", "pass"])
    with pytest.raises(RunError, match="no samples of task 'pope' for fast"):
        lmms_command.run(request(tmp_path), "fast")


@pytest.fixture(scope="module")
def lmms_model():  # tests that ask for it need lmms-eval
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (extra lmms)")
    from vlmeff.integrations import lmms_model

    return lmms_model


def asked(doc_id, args, **metadata):
    return SimpleNamespace(args=args, metadata=metadata, task_name="pope", doc_id=doc_id)


@pytest.fixture(scope="module")
def pictures():
    easy_vqa = pytest.importorskip("easy_vqa")
    paths = easy_vqa.get_test_image_paths()
    return [Image.open(paths[i]).convert("RGB") for i in range(DOCUMENTS)]


def test_answers_come_in_the_order_of_the_requests_and_equal_those_of_generate(lmms_model, pictures):
    lm = lmms_model.VlmeffSimple(pretrained="tiny-llava", preset="fast", device="cpu")
    lm.task_dict = {"pope": {"test": pictures}}
    settings = {"until": ["\n\n"], "max_new_tokens": 8, "temperature": 0.0, "do_sample": False}
    order = [2, 0, 3, 1]
    found = lm.generate_until(
        [asked(i, (QUESTION + SUFFIX, settings, lambda doc: [doc], i, "pope", "test")) for i in order]
    )
    model, processor = vlmeff.load("tiny-llava", preset="fast")
    for i, answer in zip(order, found, strict=True):
        inputs = vlmeff.asking.prepare(processor, pictures[i], QUESTION + SUFFIX)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert answer.text == processor.decode(new, skip_special_tokens=True).strip()
        assert answer.token_counts.output_tokens == len(new)
        assert answer.token_counts.input_tokens == vlmeff.report(model).prompt_tokens_after
    # Chat mode, with a request that only pads, whose cost does not count.
    from lmms_eval.models.model_utils import gen_metrics

    chat = lmms_model.VlmeffChat(pretrained="tiny-llava/fast", device="cpu")
    chat.task_dict = lm.task_dict

    def messages(doc):
        return [
            {"role": "user", "content": [{"type": "image", "url": doc}, {"type": "text", "text": QUESTION + SUFFIX}]}
        ]

    gen_metrics.reset_logged_metrics()
    padded = [
        asked(0, ("", messages, settings, 0, "pope", "test"), **more) for more in ({}, {"__padding_only__": True})
    ]
    answers = chat.generate_until(padded)
    assert [a.text for a in answers] == [found[1].text] * 2
    summary = gen_metrics.summarize_logged_metrics()
    assert summary["avg_visual_tokens_kept"] == vlmeff.report(model).visual_tokens_after
    assert summary["total_gen_tokens"] == answers[0].token_counts.output_tokens
    assert summary["avg_kv_mib"] > 0
    assert summary["avg_ttft_ms"] > 0
    with pytest.raises(NotImplementedError, match="pope"):
        chat.loglikelihood(padded)


def test_what_cannot_be_answered_is_refused(lmms_model, pictures):
    with pytest.raises(UnknownNameError, match="E-LM-01"):
        lmms_model.VlmeffChat(pretrained="tiny-llava", pruning="fast")
    with pytest.raises(ConfigError, match="max_pixels"):
        lmms_model.VlmeffChat(pretrained="tiny-llava", max_pixels=10_000)
    lm = lmms_model.VlmeffSimple(pretrained="tiny-llava/fast", preset="none", device="cpu")
    assert not vlmeff.is_wrapped(lm._model)
    lm.task_dict = {"pope": {"test": pictures}}

    def one(context, settings, visuals):
        return lm.generate_until([asked(0, (context, settings, lambda doc: visuals, 0, "pope", "test"))])

    with pytest.raises(ConfigError, match="greedily"):
        one(QUESTION, {"do_sample": True, "temperature": 0.7}, pictures[:1])
    with pytest.raises(UnsupportedInputError, match="1 pictures and 2 marks"):
        one(f"<image> or <image>? {QUESTION}", {}, pictures[:1])
    with pytest.raises(UnsupportedInputError, match="hands over str"):
        one(QUESTION, {}, ["clip.mp4"])
    marked = one(f"<image>{QUESTION}{SUFFIX}", {"max_new_tokens": 2}, pictures[:1])
    assert marked[0].text == one(QUESTION + SUFFIX, {"max_new_tokens": 2}, pictures[:1])[0].text


def test_pixel_limits_reach_a_processor_of_dynamic_resolution(lmms_model, pictures):
    from transformers import Qwen2VLImageProcessor

    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessor())
    lmms_model._limit_pixels(processor, 4 * 28 * 28, 16 * 28 * 28)

    def tokens(side):
        (grid,) = processor.image_processor(pictures[0].resize((side, side)), return_tensors="pt")["image_grid_thw"]
        return int(grid.prod()) // 4

    assert (tokens(448), tokens(84), tokens(14)) == (16, 9, 4)
    with pytest.raises(ConfigError, match="exceeds max_pixels"):
        lmms_model._limit_pixels(processor, 20 * 28 * 28, None)


def _environment(*more):
    paths = [str(p) for p in (*more, ROOT, ROOT / "kernels")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def local(tmp_path_factory, lmms_model):
    """POPE's rows over pictures of easy-vqa in both layouts, and the entry point as installing vlmeff would make it."""
    datasets = pytest.importorskip("datasets")
    easy_vqa = pytest.importorskip("easy_vqa")
    questions, answers, ids = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    rows = [row for row in zip(questions, answers, ids, strict=True) if row[1] in ("yes", "no")][: DOCUMENTS + 1]
    folder = tmp_path_factory.mktemp("lmms")
    columns = {
        "question_id": [str(n) for n in range(len(rows))],
        "question": [q for q, *_ in rows],
        "answer": [a for _, a, _ in rows],
        "category": ["random"] * len(rows),
    }
    saved = datasets.Dataset.from_dict({**columns, "image": [str(paths[i]) for *_, i in rows]})
    saved = saved.cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": saved}).save_to_disk(folder / "saved" / "pope")
    split = folder / "pictures" / "pope" / "test"
    split.mkdir(parents=True)
    lines = []
    for n, (*_, i) in enumerate(rows):
        Image.open(paths[i]).save(split / f"{n}.png")
        lines.append(json.dumps({"file_name": f"{n}.png", **{name: values[n] for name, values in columns.items()}}))
    (split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    about = folder / "installed" / "vlmeff_entry_point-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vlmeff-entry-point\nVersion: 0\n")
    points = "".join(f"{name} = {value}\n" for name, value in ENTRY_POINT.items())
    (about / "entry_points.txt").write_text("[lmms_eval.models]\n" + points)
    return folder


@pytest.mark.slow
def test_pope_from_a_local_folder_on_two_processes_in_both_modes(local, tmp_path):
    program = "import typer; from vlmeff.integrations.lmms_command import lmms_command; typer.run(lmms_command)"
    environment = _environment(local / "installed")

    def evaluate(output, root, *options):
        command = [sys.executable, "-c", program, "--tasks", "pope", "--data-root", str(local / root)]
        command += ["--limit", str(DOCUMENTS), "--processes", "2", "--device", "cpu", "--offline", "--json"]
        ended = subprocess.run(
            [*command, "--output", str(tmp_path / output), *options], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        found = {}
        for run in ("baseline", "fast"):
            (file,) = (tmp_path / output / run).rglob("*_samples_pope_local.jsonl")
            found[run] = lmms_pairs.read_samples(file)
        return json.loads(ended.stdout), found, ended.stderr

    report, chat, messages = evaluate("chat", "saved")
    (row,) = report["rows"]
    assert (row["task"], row["candidate"], row["metric"], row["n"]) == (
        "pope_local",
        "fast",
        "pope_accuracy",
        DOCUMENTS,
    )
    assert "of rank 0 alone (2 ranks answered)" in messages
    kept = {name: found["avg_visual_tokens_kept"] for name, found in report["throughput_of_rank_0"].items()}
    assert kept["fast"] < kept["baseline"] == report["throughput_of_rank_0"]["fast"]["avg_visual_tokens_in"]
    assert report["throughput_of_rank_0"]["fast"]["total_gen_tokens"] > 0

    for run, wrapped in (("baseline", None), ("fast", "fast")):
        model, processor = vlmeff.load("tiny-llava", preset=wrapped)
        for i, line in enumerate((local / "pictures/pope/test/metadata.jsonl").read_text().splitlines()[:DOCUMENTS]):
            doc, sample = json.loads(line), chat[run][str(i)]
            picture = Image.open(local / "pictures/pope/test" / doc["file_name"]).convert("RGB")
            inputs = vlmeff.asking.prepare(processor, picture, doc["question"] + SUFFIX)
            ids = model.generate(**inputs, max_new_tokens=128, do_sample=False)
            text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            assert sample["filtered_resps"] == text
            assert sample["pope_accuracy"]["score"] == float(text.lower() == doc["answer"])
            assert sample["token_counts"][0]["output_tokens"] == ids.shape[1] - inputs["input_ids"].shape[1]

    _, simple, _ = evaluate("simple", "pictures", "--force-simple")
    for run in simple:
        assert {i: s["filtered_resps"] for i, s in simple[run].items()} == {
            i: s["filtered_resps"] for i, s in chat[run].items()
        }
    config = json.loads(next((tmp_path / "simple/fast").rglob("*_results.json")).read_text())["config"]
    assert config["model_backend"] == "vlmeff.integrations.lmms_model.VlmeffSimple (simple)"


def test_local_tasks_need_data_and_a_known_task(local, tmp_path):
    with pytest.raises(DataError, match=r"E-DATA-02: .*save_to_disk"):
        lmms_command.write_local_tasks(["mme"], local / "saved", tmp_path)
    (local / "saved" / "pop").symlink_to(local / "saved" / "pope")
    with pytest.raises(UnknownNameError, match=r"E-USE-01: .*pope_adv"):
        lmms_command.write_local_tasks(["pop"], local / "saved", tmp_path)
