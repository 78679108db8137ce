"""VLMEvalKit's TSV files become folders that load as benchmarks."""

from __future__ import annotations

import base64
import csv
import io
import json

import pytest
from PIL import Image

from vlmeff.errors import BadImageError, ConfigError, DataError
from vlmeff.evaluation import benchmarks
from vlmeff.evaluation.import_tsv import import_tsv


def picture(color, size=(30, 20)):
    out = io.BytesIO()
    Image.effect_mandelbrot((size[0], size[1]), (-2, -1, 1, 1), 9).convert("RGB").save(out, "PNG")
    image = Image.open(out).copy()
    image.putpixel((0, 0), color)
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


RED, LIME = picture((255, 0, 0)), picture((0, 255, 0))


def write_tsv(path, rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, dialect="excel-tab", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(index, image=RED, **fields):
    return {"index": index, "image": image, "question": "Is it?", "answer": "Yes", **fields}


def test_mmbench_with_shifts_that_refer_to_the_picture_of_another_row(tmp_path):
    options = {
        "A": "a cat",
        "B": 'a "dog"\tor\nwolf',
        "C": "",
        "hint": "nan",
        "category": "fine",
        "l2-category": "co/arse",
    }
    rows = [
        row(1_000_003, "3", answer="B", **options),
        row(3, RED, answer="A", **options),
        row(4, LIME, answer="B", **options | {"hint": "Look."}),
    ]
    done = import_tsv(write_tsv(tmp_path / "x.tsv", rows), "mmbench_en_dev", tmp_path / "data")
    assert (done.split, done.questions, done.images) == ("dev", 3, 2)
    shifted, base, other = benchmarks.get("mmbench_en_dev").load(data_root=tmp_path / "data")
    assert (base.doc_id, base.group, shifted.group, shifted.meta) == ("3", "3", "3", {"index": 1_000_003})
    assert base.choices == ["a cat", 'a "dog"\tor\nwolf']
    assert (base.category, other.meta) == ("co-arse/fine", {"hint": "Look.", "index": 4})
    assert shifted.images[0]().getpixel((0, 0)) == (255, 0, 0)
    assert other.images[0]().getpixel((0, 0)) == (0, 255, 0)


def test_mme_pairs_are_found_by_picture_and_category(tmp_path):
    question = "Is it? Please answer yes or no."
    rows = [row(i, RED, question=question, category=c) for i, c in enumerate(["OCR", "OCR", "count", "count"])]
    import_tsv(write_tsv(tmp_path / "x.tsv", rows), "mme", tmp_path / "data")
    loaded = benchmarks.get("mme").load(data_root=tmp_path / "data")
    assert (loaded.n_docs, loaded.n_groups, loaded[0].answers) == (4, 2, ["yes"])
    assert benchmarks.get("mme").prompt(loaded[0]).startswith("Is it?\nAnswer")
    assert benchmarks.get("mme").load(data_root=tmp_path / "data", limit=1).doc_ids == ["0", "1"]


def test_answers_in_a_list_several_pictures_and_splits(tmp_path):
    rows = [row(1, f"['{RED}', '{LIME}']", answer="['a', \"it's\"]"), row(2, LIME, answer="[1")]
    done = import_tsv(write_tsv(tmp_path / "x.tsv", rows), "docvqa_val", tmp_path / "data")
    assert (done.questions, done.images) == (2, 2)
    first, second = benchmarks.get("docvqa_val").load(data_root=tmp_path / "data")
    assert (first.answers, second.answers) == (["a", "it's"], ["[1"])
    assert [image().getpixel((0, 0)) for image in first.images] == [(255, 0, 0), (0, 255, 0)]

    rows = [row(1, category="popular", answer="No"), row(2, category="random")]
    import_tsv(write_tsv(tmp_path / "y.tsv", rows), "pope", tmp_path / "data")
    first, _ = benchmarks.get("pope").load(data_root=tmp_path / "data")
    assert (first.split, first.category, first.answers) == ("popular", None, ["no"])

    rows = [row(i, split=split, answer="A", A="x", B="y") for i, split in enumerate(["dev", "validation"])]
    done = import_tsv(write_tsv(tmp_path / "z.tsv", rows), "mmmu_val", tmp_path / "data")
    assert done.questions == 1


def test_the_manifest_holds_count_and_hash_and_is_verified(tmp_path):
    done = import_tsv(write_tsv(tmp_path / "x.tsv", [row(1)]), "gqa", tmp_path / "data")
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert (manifest["count"], manifest["source"], manifest["split"]) == (1, "x.tsv", "testdev")
    with (done.folder / "testdev.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"^E-DATA-04: "):
        benchmarks.get("gqa").load(data_root=tmp_path / "data")


BAD = {
    "E-DATA-03: line 3: index '1' is empty or occurs twice": [row(1), row(1)],
    "E-DATA-03: line 2: image '7' is the index of no row": [row(1, "7")],
    "E-DATA-03: line 2: question or answer is empty": [row(1, answer="")],
    "E-DATA-03: x.tsv has no column 'answer'": [{"index": 1, "image": RED, "question": "q"}],
    "E-DATA-06: row with index '1': the picture is no base64": [row(1, "?" * 80)],
    "E-DATA-06: document '1': picture .* cannot be decoded": [row(1, base64.b64encode(b"x" * 90).decode())],
}


@pytest.mark.parametrize("message", BAD)
def test_a_broken_file_is_refused_and_leaves_nothing_behind(tmp_path, message):
    file = write_tsv(tmp_path / "x.tsv", BAD[message])
    limit = csv.field_size_limit()
    with pytest.raises((DataError, BadImageError), match=f"^{message}"):
        import_tsv(file, "gqa", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    assert csv.field_size_limit() == limit


def test_nothing_is_overwritten_and_a_missing_file_is_named(tmp_path):
    file = write_tsv(tmp_path / "x.tsv", [row(1)])
    import_tsv(file, "gqa", tmp_path / "data")
    with pytest.raises(ConfigError, match="holds 'gqa' already"):
        import_tsv(file, "gqa", tmp_path / "data")
    with pytest.raises(DataError, match=r"^E-DATA-02: 'none\.tsv'"):
        import_tsv(tmp_path / "none.tsv", "gqa", tmp_path / "data2")


def test_a_field_longer_than_csv_allows_by_default_is_read(tmp_path):
    big = io.BytesIO()
    Image.effect_noise((500, 500), 99).convert("RGB").save(big, "PNG")
    text = base64.b64encode(big.getvalue()).decode()
    assert len(text) > csv.field_size_limit()
    done = import_tsv(write_tsv(tmp_path / "x.tsv", [row(1, text)]), "gqa", tmp_path / "data")
    assert done.images == 1


OWN = {
    "choice": [row(1, A="x", B="y", answer="B"), row(2, A="x", B="y", answer="A")],
    "yesno": [row(1, answer="Yes"), row(2, answer="no")],
    "exact": [row(1, answer="Yes"), row(2, answer="red")],
    "exact ": [row(1, A="x", B="y", answer="B"), row(2, answer="red")],
    "exact  ": [row(1, answer="['yes', 'no']"), row(2, answer="yes")],
}


@pytest.mark.parametrize("name", OWN)
def test_a_benchmark_of_ones_own_gets_the_metric_that_its_answers_are_for(tmp_path, name):
    done = import_tsv(write_tsv(tmp_path / "x.tsv", OWN[name]), "mine", tmp_path / "data")
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert (manifest["metric"], done.metric, done.guessed) == (name.strip(), name.strip(), True)
    made = benchmarks.get("mine", tmp_path / "data")  # which was refused for want of a metric
    assert made.metric_name == name.strip()
    assert len(made.load(data_root=tmp_path / "data")) == 2
    assert str(done).startswith(
        f"{tmp_path / 'data' / 'mine' / 'test'}.jsonl: 2 questions, 1 different pictures\nscored"
    )
    assert repr(name.strip()) in str(done).splitlines()[1]
    assert "Imported(" not in str(done)


def test_the_metric_can_be_named_and_is_checked(tmp_path):
    file = write_tsv(tmp_path / "x.tsv", OWN["exact"])
    done = import_tsv(file, "mine", tmp_path / "data", metric="anls")
    assert json.loads((done.folder / "manifest.json").read_text())["metric"] == "anls"
    assert str(done).endswith("mine/test.jsonl: 2 questions, 1 different pictures, scored by 'anls'")
    with pytest.raises(DataError, match=r"^E-DATA-08: unknown metric 'exakt'\. Did you mean 'exact'"):
        import_tsv(file, "other", tmp_path / "data", metric="exakt")
    with pytest.raises(ConfigError, match="gqa is scored by 'exact_nopunct'"):
        import_tsv(file, "gqa", tmp_path / "data", metric="exact")
    done = import_tsv(file, "gqa", tmp_path / "data")
    assert "metric" not in json.loads((done.folder / "manifest.json").read_text())
    assert str(done).endswith("gqa/testdev.jsonl: 2 questions, 1 different pictures")
