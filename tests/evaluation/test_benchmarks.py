"""Benchmarks: prompts to the letter, order of the sources, limits by group, a user's own folders."""

from __future__ import annotations

import math
import pickle
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_rows import document
from question_folders import row, write_folder

from vlmeff.errors import ConfigError, DataError, UnknownNameError
from vlmeff.evaluation import benchmarks
from vlmeff.evaluation.metrics import Metric
from vlmeff.evaluation.mosaics import easy_vqa_questions
from vlmeff.evaluation.prompts import LETTER, PHRASE
from vlmeff.evaluation.questions import blind_answers, blind_prior, easy_vqa_items
from vlmeff.evaluation.sources import Generated

NAMES = ["vqav2_val", "gqa", "textvqa_val", "textvqa_val_ocr", "pope", "mme", "mmbench_en_dev", "scienceqa_img"]
NAMES += ["vizwiz_val", "docvqa_val", "chartqa", "mmmu_val", "easy_vqa"]
LENGTHS = {"vqav2_val": 16, "gqa": 16, "mme": 16, "scienceqa_img": 16, "chartqa": 16, "mmbench_en_dev": 16}
LENGTHS |= {"docvqa_val": 32, "textvqa_val": 32, "textvqa_val_ocr": 32, "vizwiz_val": 32, "pope": 128, "mmmu_val": 128}
LENGTHS |= {"easy_vqa": 8}
TWO = ["cat", "dog"]


@pytest.mark.parametrize("name", NAMES)
def test_every_published_benchmark_has_its_length_and_a_metric(name):
    benchmark = benchmarks.get(name)
    assert (benchmark.name, benchmark.max_new_tokens) == (name, LENGTHS[name])
    assert isinstance(benchmark.metric, Metric)
    assert name in benchmarks.names()


@pytest.mark.parametrize(
    ("name", "fields", "prompt"),
    [
        ("vqav2_val", {"question": "Is it?"}, "Is it?\nAnswer the question using a single word or phrase."),
        ("docvqa_val", {"question": "Is it?"}, "Is it?\nAnswer the question using a single word or phrase."),
        ("mme", {"question": "Is it? Please answer yes or no."}, "Is it?" + PHRASE),
        ("textvqa_val", {"question": "what does NASA say?"}, "What does nasa say?" + PHRASE),
        (
            "textvqa_val_ocr",
            {"question": "what?", "meta": {"ocr_tokens": ["a", "b", "c"]}},
            "What?\nReference OCR token: a, b, c\nAnswer the question using a single word or phrase.",
        ),
        ("chartqa", {"question": "How much?"}, "How much?\nAnswer the question with a single word."),
        (
            "vizwiz_val",
            {"question": "what IS this"},
            "What is this\nWhen the provided information is insufficient, respond with 'Unanswerable'."
            "\nAnswer the question using a single word or phrase.",
        ),
        ("scienceqa_img", {"question": "Which?", "choices": TWO}, "Which?\nA. cat\nB. dog" + LETTER),
        (
            "scienceqa_img",
            {"question": "Which?", "choices": TWO, "meta": {"hint": "Look."}},
            "Context: Look.\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            "mmbench_en_dev",
            {"question": "Which?", "choices": TWO, "meta": {"hint": "Look."}},
            "Look. Which? There are several options:\nA. cat\nB. dog\n"
            "\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            "mmbench_en_dev",
            {"question": "Which?", "choices": TWO, "meta": {"hint": "nan"}},
            "Which? There are several options:\nA. cat\nB. dog\n" + LETTER,
        ),
        (
            "mmmu_val",
            {"question": "<image 1> Which?", "choices": TWO},
            "<image 1> Which?\nA. cat\nB. dog\n\nAnswer with the option's letter from the given choices directly.",
        ),
        ("mmmu_val", {"question": "How much?"}, "How much?\n\nAnswer the question using a single word or phrase."),
        ("easy_vqa", {"question": "what?"}, "what?\nAnswer the question using a single word."),
    ],
)
def test_prompts(name, fields, prompt):
    assert benchmarks.get(name).prompt(document(["x"], **fields)) == prompt


def test_an_unknown_benchmark_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"^E-USE-01: unknown benchmark 'poppe'\. Did you mean 'pope'"):
        benchmarks.get("poppe")


def test_easy_vqa_comes_from_its_package():
    loaded = benchmarks.get("easy_vqa").load()
    assert (loaded.n_docs, loaded.n_groups, loaded.partial, loaded.data["source"]) == (9_673, 1_000, False, "package")
    assert (loaded.data["revision"], len(loaded.data["sha256"])) == ("1.0", 64)
    counts = Counter(sample.category for sample in loaded)
    assert counts == {"shape": 1_257, "color": 1_280, "yesno": 7_136}
    assert loaded[17].images[0]().size == (64, 64)
    assert len(set(loaded.doc_ids)) == 9_673
    assert pickle.loads(pickle.dumps(loaded[17])).images[0]().size == (64, 64)


def test_the_blind_prior_in_the_caption_is_that_of_the_data():
    (note,) = benchmarks.get("easy_vqa").caption_notes
    seen = defaultdict(Counter)
    for sample in benchmarks.get("easy_vqa").load(split="train"):
        seen[sample.question][sample.answers[0]] += 1
    right = defaultdict(list)
    for sample in benchmarks.get("easy_vqa").load():
        # most_common keeps the order of first sight among equals; two questions have such answers.
        hit = seen[sample.question].most_common(1)[0][0] == sample.answers[0]
        kind = {"yesno": "yes/no"}.get(sample.category, sample.category)
        for name in (kind, "all", *(["open"] if kind != "yes/no" else [])):
            right[name].append(hit)
    assert set(right) == {"open", "shape", "color", "yes/no", "all"}
    for name, hits in right.items():
        assert f"{name} {100 * sum(hits) / len(hits):.1f} %" in note


def test_the_blind_prior_of_scripts_and_of_the_caption_is_one_number():
    (note,) = benchmarks.get("easy_vqa").caption_notes
    for name, kinds in {
        "open": ("color", "shape"),
        "shape": ("shape",),
        "color": ("color",),
        "yes/no": ("yesno",),
    }.items():
        assert f"{name} {100 * blind_prior(easy_vqa_items(kinds=kinds)):.1f} %" in note
    everything = easy_vqa_items(kinds=("color", "shape", "yesno"))
    assert f"all {100 * blind_prior(everything):.1f} %" in note
    # Of equally frequent answers the first one: there are such questions, and it is not the alphabet that decides.
    _, questions, answers = zip(*easy_vqa_questions("train"), strict=True)
    ties = 0
    for question, best in blind_answers().items():
        given = [a for q, a in zip(questions, answers, strict=True) if q == question]
        most = max(given.count(a) for a in set(given))
        equal = {a for a in given if given.count(a) == most}
        ties += len(equal) > 1
        assert best == next(a for a in given if a in equal)
    assert ties == 2


def test_a_folder_wins_over_the_package(tmp_path):
    write_folder(tmp_path / "easy_vqa", [row(0), row(1)], manifest={"source": "made here"})
    loaded = benchmarks.get("easy_vqa").load(data_root=tmp_path)
    assert [sample.doc_id for sample in loaded] == ["doc/0", "doc/1"]
    assert (loaded.data["source"], loaded.data["id"]) == ("folder", "made here")
    assert any("9673" in note for note in loaded.notes)
    fixed = benchmarks.get("easy_vqa").load(data_root=tmp_path, source="package", limit=3)
    assert fixed.data["source"] == "package"


def test_a_folder_of_another_benchmark_is_refused(tmp_path):
    write_folder(tmp_path / "pope", [row(0)], manifest={"benchmark": "mme"})
    with pytest.raises(DataError, match=r"^E-DATA-04: .*'mme', not 'pope'"):
        benchmarks.get("pope").load(data_root=tmp_path)


def test_textvqa_with_ocr_reads_the_folder_of_textvqa_and_needs_tokens(tmp_path):
    good = row(0, answers=["x"] * 10, meta={"ocr_tokens": ["a"]})
    folder = write_folder(tmp_path / "textvqa_val", [good], split="validation", manifest={})
    assert benchmarks.get("textvqa_val_ocr").load(data_root=tmp_path).n_docs == 1
    write_folder(folder, [row(0, answers=["x"] * 10)], split="validation", manifest={})
    assert benchmarks.get("textvqa_val").load(data_root=tmp_path).n_docs == 1
    with pytest.raises(DataError, match=r"^E-DATA-03: .*ocr_tokens"):
        benchmarks.get("textvqa_val_ocr").load(data_root=tmp_path)


def test_offline_without_data_shows_the_layout_and_the_download(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the extra eval")
    for offline, variable in ((True, ""), (False, "1")):
        monkeypatch.setenv("HF_HUB_OFFLINE", variable)
        with pytest.raises(DataError) as caught:
            benchmarks.get("pope").load(data_root=tmp_path, offline=offline)
        message = str(caught.value)
        assert message.startswith("E-DATA-01: benchmark 'pope'")
        assert "test.jsonl" in message
        assert "hf download --repo-type dataset lmms-lab-encoder/POPE" in message


def test_a_source_that_has_nothing_or_is_unknown_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^E-DATA-01: "):
        benchmarks.get("pope").load(data_root=tmp_path, source="folder")
    with pytest.raises(UnknownNameError, match=r"^E-USE-01: unknown data source 'hub'"):
        benchmarks.get("pope").load(source="hub")


# Limits


@pytest.mark.parametrize("limit", [0, -1, 0.0, 1.0, 1.5, -0.5, math.nan, True])
def test_limits_that_mean_nothing_are_refused(limit):
    with pytest.raises(ConfigError, match=r"^E-USE-02: limit="):
        benchmarks.get("easy_vqa").load(limit=limit)


@pytest.mark.parametrize(("text", "limit"), [("1", 1), ("24", 24), ("0.5", 0.5), ("1e-2", 0.01)])
def test_limits_as_typed(text, limit):
    parsed = benchmarks.parse_limit(text)
    assert (parsed, type(parsed)) == (limit, type(limit))


@pytest.mark.parametrize("text", ["1.0", "0", "-3", "x", "", "nan", "inf"])
def test_limits_that_cannot_be_typed(text):
    with pytest.raises(ConfigError, match=r"^E-USE-02: "):
        benchmarks.parse_limit(text)


@given(st.integers(1, 99), st.integers(0, 5_000))
def test_a_share_is_rounded_up_without_errors_of_floats(percent, total):
    assert benchmarks.share_of(percent / 100, total) == -(-percent * total // 100)


def test_a_limit_counts_questions_and_keeps_their_order():
    benchmark = benchmarks.get("easy_vqa")
    whole = benchmark.load()
    part = benchmark.load(limit=24)
    assert (part.n_docs, part.partial, part.doc_ids) == (24, True, whole.doc_ids[:24])
    assert part.n_groups == len({sample.group for sample in whole[:24]})
    assert part.data == whole.data
    assert benchmark.load(limit=0.01).n_docs == 97


def mme_rows(pictures):
    return [row(i, group=f"OCR/{g}", category="OCR", answer="no") for i, g in enumerate(pictures)]


def test_a_limit_counts_pictures_of_mme(tmp_path):
    write_folder(tmp_path / "mme", mme_rows("abacbc"), manifest={})
    load = benchmarks.get("mme").load
    assert load(data_root=tmp_path, limit=1).doc_ids == ["doc/0", "doc/2"]
    assert load(data_root=tmp_path, limit=2).doc_ids == ["doc/0", "doc/1", "doc/2", "doc/4"]
    assert load(data_root=tmp_path, limit=0.34).n_groups == 2
    whole = load(data_root=tmp_path, limit=3)
    assert (whole.n_docs, whole.n_groups, whole.partial) == (6, 3, False)


@pytest.mark.parametrize("pictures", ["aab", "aaabb"])
def test_an_incomplete_pair_of_mme_is_refused(tmp_path, pictures):
    write_folder(tmp_path / "mme", mme_rows(pictures))
    with pytest.raises(DataError, match=r"^E-DATA-07: "):
        benchmarks.get("mme").load(data_root=tmp_path)


def mmbench_row(index, group):
    return row(index, group=group, choices=["x", "y"], answer="A", meta={"index": index})


def test_a_circular_set_of_mmbench_stays_together(tmp_path):
    rows = [mmbench_row(i, g) for i, g in ((1, "1"), (2, "2"), (1_000_001, "1"), (1_000_002, "2"), (2_000_001, "1"))]
    write_folder(tmp_path / "mmbench_en_dev", rows, split="dev")
    load = benchmarks.get("mmbench_en_dev").load
    assert load(data_root=tmp_path, limit=1).doc_ids == ["doc/1", "doc/1000001", "doc/2000001"]
    write_folder(tmp_path / "mmbench_en_dev", [rows[0], rows[4]], split="dev")
    with pytest.raises(DataError, match=r"^E-DATA-07: .*\[0, 2\]"):
        load(data_root=tmp_path)
    write_folder(tmp_path / "mmbench_en_dev", [rows[0] | {"meta": {}}], split="dev")
    with pytest.raises(DataError, match=r"^E-DATA-03: .*meta\.index"):
        load(data_root=tmp_path)
    write_folder(tmp_path / "mmbench_en_dev", [mmbench_row(1, None)], split="dev")
    with pytest.raises(DataError, match=r"^E-DATA-03: .*no group"):
        load(data_root=tmp_path)


@pytest.mark.parametrize(("name", "fields"), [("pope", {"answer": "maybe"}), ("scienceqa_img", {"choices": ["x"]})])
def test_references_that_cannot_be_scored_are_refused_when_loading(tmp_path, name, fields):
    write_folder(tmp_path / name, [row(0, **fields)])
    with pytest.raises(DataError, match=r"^E-DATA-03: document 'doc/0'"):
        benchmarks.get(name).load(data_root=tmp_path)


# A user's own folder


def test_a_folder_of_the_user_is_a_benchmark(tmp_path):
    rows = [row(0, answer="Red"), row(1, choices=["x", "y"], answer="B")]
    write_folder(tmp_path / "mine", rows, manifest={"metric": "exact", "prompt_suffix": "\nBe brief."})
    benchmark = benchmarks.get("mine", tmp_path)
    loaded = benchmark.load(data_root=tmp_path)
    assert benchmark.prompt(loaded[0]) == "q 0?\nBe brief."
    assert benchmark.prompt(loaded[1]) == "q 1?\nA. x\nB. y" + LETTER
    assert benchmark.metric.score(loaded[0], "red.")["scores"] == {"right": 1}
    assert (benchmark.metric_name, benchmark.max_new_tokens) == ("exact", 32)
    assert "mine" in benchmarks.names(tmp_path)
    assert "mine" not in benchmarks.names()


@pytest.mark.parametrize("metric", ["pope", "exakt", None])
def test_a_folder_of_the_user_names_a_metric_it_may_name(tmp_path, metric):
    manifest = {"metric": metric} if metric else {}
    write_folder(tmp_path / "mine", [row(0)], manifest=manifest)
    with pytest.raises(DataError, match=r"^E-DATA-08: mine/manifest\.json: .*anls, relaxed, choice"):
        benchmarks.get("mine", tmp_path)


def test_a_consensus_needs_enough_references(tmp_path):
    write_folder(tmp_path / "mine", [row(0)], manifest={"metric": "vqa"})
    with pytest.raises(DataError, match=r"^E-DATA-03: document 'doc/0' has 1 reference"):
        benchmarks.get("mine", tmp_path).load(data_root=tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ""])
def test_names_are_no_paths(tmp_path, name):
    with pytest.raises(ConfigError, match=r"^E-USE-01: "):
        benchmarks.get(name, tmp_path)
    write_folder(tmp_path / "pope", [row(0)])
    with pytest.raises((ConfigError, DataError)):
        benchmarks.get("pope").load(data_root=tmp_path, split=name or "..")


# Generated benchmarks


def test_a_generated_benchmark_is_computed_when_indexed(monkeypatch):
    made = []

    class Endless:
        def __len__(self):
            return 1_000

        def __getitem__(self, index):
            made.append(index)
            return document(["yes"], doc_id=f"made/{index}", group=str(index // 4))

    monkeypatch.setattr(benchmarks, "_registered", dict(benchmarks._registered))
    source = Generated(make=lambda split: Endless(), id="made", revision="1/seed 0")
    made_by_us = benchmarks.Benchmark(
        name="made",
        template=benchmarks.get("gqa").template,
        metric_name="exact",
        max_new_tokens=4,
        answer_kind="word",
        split="test",
        sources=(source,),
    )
    benchmarks.register(made_by_us)
    loaded = benchmarks.get("made").load(limit=8, source="generated")
    assert (loaded.n_docs, loaded.n_groups, loaded.partial) == (8, 2, True)
    assert max(made) == 7
    assert (loaded.data["source"], loaded.data["revision"]) == ("generated", "1/seed 0")
    assert loaded[3].doc_id == "made/3"
    with pytest.raises(ValueError, match="registered already"):
        benchmarks.register(made_by_us)
