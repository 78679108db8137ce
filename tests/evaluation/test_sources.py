"""Saved data sets and the hub: rows of the published shape become samples; nothing is decoded too early."""

from __future__ import annotations

import io
import pickle

import pytest
from PIL import Image

from vlmeff.errors import BadImageError, DataError, MissingExtraError
from vlmeff.evaluation import benchmarks, hub_rows

datasets = pytest.importorskip("datasets", reason="needs the extra eval")
COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
TEN = [{"answer": "yes" if i < 4 else "no", "answer_id": i} for i in range(10)]

# name -> (row as the hub has it, what the sample must be)
ROWS = {
    "vqav2_val": (
        {"question_id": 7, "image_id": 3, "question": "q", "answers": TEN, "answer_type": "yes/no"},
        {"doc_id": "7", "group": "3", "category": "yes/no", "answers": ["yes"] * 4 + ["no"] * 6},
    ),
    "textvqa_val": (
        {"question_id": 7, "image_id": "i", "question": "q", "answers": ["x"] * 10, "ocr_tokens": ["A", "b"]},
        {"doc_id": "7", "group": "i", "answers": ["x"] * 10, "meta": {"ocr_tokens": ["A", "b"]}},
    ),
    "vizwiz_val": (
        {"question_id": "VizWiz_1.jpg", "question": "q", "answers": ["x"] * 10, "category": "other"},
        {"doc_id": "VizWiz_1.jpg", "group": None, "answers": ["x"] * 10},
    ),
    "pope": (
        {"question_id": "1", "question": "q", "answer": "No", "image_source": "COCO_1", "category": "popular"},
        {"doc_id": "popular/1", "group": "COCO_1", "split": "popular", "answers": ["no"], "category": None},
    ),
    "scienceqa_img": (
        {"question": "q", "choices": ["a", "b", "c"], "answer": 2, "hint": "h", "subject": "social science"},
        {"doc_id": "scienceqa/0", "choices": ["a", "b", "c"], "answers": ["C"], "meta": {"hint": "h"}},
    ),
    "docvqa_val": (
        {"questionId": "9", "docId": 4, "question": "q", "answers": ["x", "y"]},
        {"doc_id": "9", "group": "4", "answers": ["x", "y"]},
    ),
    "chartqa": (
        {"type": "human_test", "question": "q", "answer": "3"},
        {"doc_id": "chartqa/0", "answers": ["3"], "category": "human"},
    ),
}


def png(color):
    out = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def table(rows, *, columns=("image",)):
    out = datasets.Dataset.from_list(rows)
    for column in columns:
        out = out.cast_column(column, datasets.Image())
    return out


def save(root, name, splits):
    datasets.DatasetDict(splits).save_to_disk(root / name)


def pixel(image):
    return image().getpixel((0, 0))


@pytest.mark.parametrize("name", ROWS)
def test_a_saved_data_set_of_the_published_shape_is_read(tmp_path, name):
    row, expected = ROWS[name]
    benchmark = benchmarks.get(name)
    save(tmp_path, name, {benchmark.split: table([row | {"image": png("lime")}])})
    loaded = benchmark.load(data_root=tmp_path, offline=True)
    (sample,) = loaded
    assert {key: getattr(sample, key) for key in expected} == expected
    assert [pixel(image) for image in sample.images] == [COLORS["lime"]]
    assert "q" in benchmark.prompt(sample).lower()
    assert benchmark.metric.score(sample, "yes")["scores"]
    assert (loaded.data["source"], len(loaded.data["sha256"])) == ("hf-disk", 64)
    assert str(tmp_path) not in repr(loaded.data)


def test_pairs_of_mme_share_a_group(tmp_path):
    rows = [
        {"question_id": f"{c}/{p}.png" if c == "OCR" else f"{p}.png", "question": "q", "answer": a, "category": c}
        for c in ("OCR", "count")
        for p in (1, 2)
        for a in ("Yes", "No")
    ]
    save(tmp_path, "mme", {"test": table([row | {"image": png("red")} for row in rows])})
    loaded = benchmarks.get("mme").load(data_root=tmp_path)
    assert [sample.group for sample in loaded][::2] == ["OCR/1.png", "OCR/2.png", "count/1.png", "count/2.png"]
    assert len(set(loaded.doc_ids)) == 8
    assert benchmarks.get("mme").load(data_root=tmp_path, limit=3).doc_ids == loaded.doc_ids[:6]


def test_shifts_of_mmbench_belong_to_their_base_question(tmp_path):
    common = {"question": "q", "answer": "A", "A": "x", "B": "y", "C": "nan", "D": None, "hint": "nan"}
    common |= {"category": "fine", "L2-category": "coarse"}
    rows = [common | {"index": i, "image": png("red")} for i in (5, 1_000_005)]
    save(tmp_path, "mmbench_en_dev", {"dev": table(rows)})
    first, second = benchmarks.get("mmbench_en_dev").load(data_root=tmp_path)
    assert (first.choices, first.category, first.meta) == (["x", "y"], "coarse/fine", {"index": 5})
    assert (first.group, second.group, second.doc_id) == ("5", "5", "1000005")


def test_gqa_joins_questions_with_pictures_of_another_table(tmp_path):
    questions = [{"id": f"q{i}", "imageId": f"n{i % 3}", "question": "q", "answer": "x"} for i in range(4)]
    save(tmp_path, "gqa/testdev_balanced_instructions", {"testdev": datasets.Dataset.from_list(questions)})
    pictures = [{"id": "n1", "image": png("lime")}, {"id": "n0", "image": png("red")}]
    save(tmp_path, "gqa/testdev_balanced_images", {"testdev": table(pictures)})
    loaded = benchmarks.get("gqa").load(data_root=tmp_path)
    assert [sample.group for sample in loaded] == ["n0", "n1", "n2", "n0"]
    assert [pixel(loaded[i].images[0]) for i in (0, 1, 3)] == [COLORS["red"], COLORS["lime"], COLORS["red"]]
    with pytest.raises(BadImageError, match=r"^E-DATA-06: document 'q2'"):
        loaded[2].images[0]()


def test_mmmu_takes_the_pictures_it_refers_to(tmp_path):
    columns = [f"image_{i}" for i in range(1, 4)]
    images = dict(zip(columns, [png("red"), png("lime"), png("blue")], strict=True))
    rows = [
        {
            "id": "validation_Basic_Medical_Science_12",
            "question": "Compare <image 2> with",
            "options": "['<image 1>', \"it's <image 2>\"]",
            "answer": "B",
            "question_type": "multiple-choice",
        },
        {
            "id": "validation_Math_1",
            "question": "?",
            "options": "[]",
            "answer": "['4', '4.0']",
            "question_type": "open",
        },
    ]
    save(tmp_path, "mmmu_val", {"validation": table([row | images for row in rows], columns=columns)})
    choice, open_question = benchmarks.get("mmmu_val").load(data_root=tmp_path)
    assert choice.category == "Health and Medicine/Basic_Medical_Science"
    assert choice.choices == ["<image 1>", "it's <image 2>"]
    assert [pixel(image) for image in choice.images] == [COLORS["red"], COLORS["lime"]]
    assert (open_question.choices, open_question.answers) == (None, ["4", "4.0"])
    assert [pixel(image) for image in open_question.images] == [COLORS["red"]]


def test_thirty_subjects_of_mmmu_have_a_discipline():
    assert len(hub_rows.DISCIPLINE_OF) == 30
    assert len(hub_rows.DISCIPLINES) == 6


def chart(number=0, **fields):
    return {"type": "human_test", "question": f"q{number}", "answer": "3", "image": png("red"), **fields}


def test_a_limit_reads_only_what_it_leaves_and_samples_can_travel(tmp_path):
    save(tmp_path, "chartqa", {"test": table([chart(i) for i in range(20)])})
    loaded = benchmarks.get("chartqa").load(data_root=tmp_path, limit=3)
    assert (loaded.n_docs, loaded.partial, len(loaded._rows.doc_ids)) == (3, True, 3)
    assert pixel(pickle.loads(pickle.dumps(loaded[1])).images[0]) == COLORS["red"]
    whole = benchmarks.get("chartqa").load(data_root=tmp_path)
    assert whole.data == loaded.data


def test_a_missing_split_or_field_of_a_saved_data_set_is_named(tmp_path):
    save(tmp_path, "chartqa", {"val": table([chart()])})
    with pytest.raises(DataError, match=r"^E-DATA-02: chartqa .*'test'"):
        benchmarks.get("chartqa").load(data_root=tmp_path)
    row = chart()
    del row["answer"]
    save(tmp_path, "other/chartqa", {"test": table([row])})
    with pytest.raises(DataError, match=r"^E-DATA-03: chartqa lacks a field.*'answer'"):
        benchmarks.get("chartqa").load(data_root=tmp_path / "other")


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    rows = [ROWS["docvqa_val"][0] | {"image": png("red")}] * 2
    save(tmp_path, "docvqa_val", {"validation": table(rows)})
    with pytest.raises(DataError, match=r"^E-DATA-03: duplicate doc_id '9'"):
        benchmarks.get("docvqa_val").load(data_root=tmp_path)


def test_a_picture_that_is_only_a_path_is_not_followed(tmp_path, monkeypatch):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "secret.png")
    rows = table([chart(image={"bytes": None, "path": str(tmp_path / "secret.png")})])
    assert rows[0]["image"].size == (4, 3)  # the library itself would open any path of this machine
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    (sample,) = benchmarks.get("chartqa").load(source="hf")
    with pytest.raises(BadImageError, match=r"^E-DATA-06: document 'chartqa/0'.*empty or missing"):
        sample.images[0]()


def test_a_broken_picture_names_its_document_and_the_limit_on_pixels_holds(tmp_path):
    rows = [chart(image={"bytes": b"GIF89a", "path": None}), chart()]
    save(tmp_path, "chartqa", {"test": table(rows)})
    first, second = benchmarks.get("chartqa").load(data_root=tmp_path, max_image_pixels=11)
    for sample in (first, second):
        with pytest.raises(BadImageError, match=rf"^E-DATA-06: document '{sample.doc_id}'"):
            sample.images[0]()


def test_what_the_hub_client_downloaded_is_read_as_it_lies(tmp_path):
    root = tmp_path / "chartqa"
    (root / "data").mkdir(parents=True)
    table([chart(i) for i in range(3)]).to_parquet(root / "data" / "test-00000-of-00001.parquet")
    notes = root / ".cache" / "huggingface" / "download" / "data"
    notes.mkdir(parents=True)
    (notes / "test-00000-of-00001.parquet.metadata").write_text("ab" * 20 + "\netag\n0\n")
    loaded = benchmarks.get("chartqa").load(data_root=tmp_path, offline=True)
    assert [sample.question for sample in loaded] == ["q0", "q1", "q2"]
    assert pixel(loaded[2].images[0]) == COLORS["red"]
    assert (loaded.data["source"], loaded.data["revision"]) == ("hf-disk", "ab" * 20)


def test_a_folder_of_rows_wins_over_a_data_set_beside_it_unless_the_latter_is_asked_for(tmp_path):
    save(tmp_path, "chartqa", {"test": table([chart()])})
    line = '{"doc_id": "mine", "image": "x.png", "question": "q", "answer": "a"}'
    (tmp_path / "chartqa" / "test.jsonl").write_text(line)
    assert benchmarks.get("chartqa").load(data_root=tmp_path).doc_ids == ["mine"]
    assert benchmarks.get("chartqa").load(data_root=tmp_path, source="hf-disk").doc_ids == ["chartqa/0"]


def test_the_hub_is_asked_under_both_names_without_login_and_its_commit_is_recorded(monkeypatch):
    asked = []

    def load_dataset(repository, config=None, **options):
        asked.append((repository, config, options))
        if repository.startswith("lmms-lab-encoder/"):
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{repository}' doesn't exist")
        out = table([{**ROWS["docvqa_val"][0], "image": png("red")}])
        out.info.download_checksums = {f"hf://datasets/{repository}@{'c' * 40}/x.parquet": {}}
        return out

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = benchmarks.get("docvqa_val").load(source="hf")
    assert [(a, b) for a, b, _ in asked] == [("lmms-lab-encoder/DocVQA", "DocVQA"), ("lmms-lab/DocVQA", "DocVQA")]
    assert all(options == {"split": "validation", "revision": None} for _, _, options in asked)
    expected = {"source": "hf", "id": "lmms-lab/DocVQA", "revision": "c" * 40, "sha256": None}
    assert loaded.data == expected


def test_offline_the_hub_library_is_told_so_only_while_it_loads(monkeypatch):
    seen = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def load_dataset(*_, **__):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("out of reach")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^E-DATA-01: "):
        benchmarks.get("chartqa").load(offline=True)
    assert seen == [True, True]
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(("module", "name"), [("datasets", "chartqa"), ("easy_vqa", "easy_vqa")])
def test_a_missing_extra_says_what_to_install(monkeypatch, module, name):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=r'^E-ENV-01: .*pip install "vlmeff\[eval\]"'):
        benchmarks.get(name).load()


def test_a_missing_rapidfuzz_says_what_to_install(monkeypatch):
    from vlmeff.evaluation.metrics.anls import anls

    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz.distance", None)
    with pytest.raises(MissingExtraError, match=r'^E-ENV-01: .*pip install "vlmeff\[eval\]"'):
        anls("a", ["b"])
