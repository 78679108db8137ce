"""Folders of questions: what is read, and what is refused with which code."""

from __future__ import annotations

import json
import logging
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from question_folders import row, write_folder

from vlmeff.errors import BadImageError, DataError
from vlmeff.evaluation import folder as folder_module
from vlmeff.evaluation.folder import FolderRows, Manifest


def test_a_good_folder_is_read_as_written(tmp_path):
    full = {
        "doc_id": "a",
        "images": ["images/0.png", "images/1.png"],
        "question": "wo ist die Größe?",
        "answers": ["x", "x", "y"],
        "choices": ["left", "right"],
        "group": "g",
        "category": {"l2": "and/or", "fine": "z"},
        "split": "random",
        "meta": {"hint": "h"},
    }
    rows = FolderRows(write_folder(tmp_path / "b", [row(1), "", json.dumps(full), "   "]), "test")
    assert (rows.total, rows.doc_ids, rows.groups) == (2, ["doc/1", "a"], [None, "g"])
    first, second = rows[0], rows[1]
    assert (first.question, first.answers, first.choices, first.meta) == ("q 1?", ["yes"], None, {})
    assert first.images[0]().getpixel((0, 0)) == (0, 255, 0)
    assert [second.question, second.answers, second.choices] == [full["question"], full["answers"], full["choices"]]
    assert (second.group, second.category, second.split, second.meta) == ("g", "and-or/z", "random", {"hint": "h"})
    assert [image().getpixel((0, 0)) for image in second.images] == [(255, 0, 0), (0, 255, 0)]


def test_a_byte_order_mark_and_a_missing_last_line_feed_do_no_harm(tmp_path):
    folder = write_folder(tmp_path / "b", [row(0), row(1)])
    path = folder / "test.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))
    rows = FolderRows(folder, "test")
    assert [rows[i].doc_id for i in range(2)] == ["doc/0", "doc/1"]


BROKEN = {
    "not JSON": "{",
    "an object": "[1]",
    "key doc_id": row(doc_id=None),
    "doc_id must be a string": row(doc_id=7),
    "doc_id is empty": row(doc_id=""),
    "key question": row(question=None),
    "one of answer and answers": row(answer=None, answers=["x"]) | {"answer": "y"},
    "answers is empty": row(answers=[]),
    "answers must be a string": row(answers=["a", 2]),
    "answers must be a list": row(answers="a"),
    "image or images": row(image=None),
    "images is empty": row(image=None, images=[]),
    "both there": row(images=["images/0.png"]),
    "choices must be a list": row(choices="AB"),
    "more than there are letters": row(choices=["x"] * 27),
    "group must be a string": row(group=3),
    "category must be": row(category={"l2": 3}),
    "meta must be an object": row(meta=[]),
    "not Unicode": row(question="\ud800"),
    "that of line 1": row(0),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_row_is_refused_with_its_line(tmp_path, reason):
    folder = write_folder(tmp_path / "b", [row(0), "", BROKEN[reason]])
    with pytest.raises(DataError, match=rf"^E-DATA-03: b/test\.jsonl, line 3: .*{reason}"):
        FolderRows(folder, "test")


@pytest.fixture
def warned(monkeypatch, caplog):
    """Texts of the warnings; what was told before is forgotten."""
    monkeypatch.setattr(folder_module, "_told", set())
    caplog.set_level(logging.WARNING, logger="vlmeff")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_unknown_keys_of_rows_are_named_once_with_what_may_be_meant(tmp_path, warned):
    rows = [row(0, answr="yes"), row(1, answr="no", colour="red"), row(2, meta={"anything": 1})]
    folder = write_folder(tmp_path / "b", rows)
    loaded = FolderRows(folder, "test")
    (text,) = warned()
    assert "b/test.jsonl has unknown keys" in text
    assert "'answr' in 2 rows (is 'answer' meant?)" in text
    assert "'colour'" in text
    assert "anything" not in text
    assert [loaded[i].doc_id for i in range(3)] == ["doc/0", "doc/1", "doc/2"]
    FolderRows(folder, "test")  # opened once more, told once
    assert len(warned()) == 1


def test_unknown_keys_of_a_manifest_are_named(tmp_path, warned):
    folder = write_folder(tmp_path / "b", [row()], manifest={"licence": "MIT", "metrics": "exact"})
    Manifest.read(folder)
    (text,) = warned()
    assert "b/manifest.json has unknown keys" in text
    assert "'licence' (is 'license' meant?), 'metrics' (is 'metric' meant?)" in text


def test_known_keys_are_no_reason_to_warn(tmp_path, warned):
    full = {"choices": ["a"], "group": "g", "category": "c", "split": "s", "meta": {}}
    manifest = {"metric": "exact", "prompt_suffix": "", "max_new_tokens": 3, "text_only": False, "license": "",
                "source": "", "created": ""}  # fmt: skip
    folder = write_folder(
        tmp_path / "b", [row(0, **full), row(1, image=None, images=["images/0.png"])], manifest=manifest
    )
    Manifest.read(folder)
    FolderRows(folder, "test")
    assert warned() == []


def test_what_is_wrong_comes_with_what_to_do(tmp_path):
    for name, lines in (("line", ["{"]), ("row", [row(0, question=None)])):
        with pytest.raises(DataError, match=r"Correct the line, or make the file again\.$"):
            FolderRows(write_folder(tmp_path / name, lines), "test")
    folder = write_folder(tmp_path / "hash", [row()], manifest={"sha256": {"test.jsonl": "0" * 64}})
    with pytest.raises(DataError, match=r"get the data again, or correct the manifest"):
        FolderRows(folder, "test").verify(Manifest.read(folder))


def test_bytes_that_are_no_utf8_are_refused_with_their_line(tmp_path):
    folder = write_folder(tmp_path / "b", [row(0)])
    with (folder / "test.jsonl").open("ab") as file:
        file.write(b'{"doc_id": "\xff"}\n')
    with pytest.raises(DataError, match=r"^E-DATA-03: .*line 2: not JSON in UTF-8"):
        FolderRows(folder, "test")


def test_text_alone_is_allowed_where_the_benchmark_says_so(tmp_path):
    folder = write_folder(tmp_path / "b", [row(image=None, images=[])])
    assert list(FolderRows(folder, "test", text_only=True)[0].images) == []


def test_a_missing_split_lists_what_is_there(tmp_path):
    with pytest.raises(DataError, match=r"^E-DATA-02: b/val\.jsonl does not exist.*images, test\.jsonl"):
        FolderRows(write_folder(tmp_path / "b", [row()]), "val")


def test_a_right_manifest_passes(tmp_path):
    folder = write_folder(tmp_path / "b", [row(0), "", row(1)], manifest={})
    FolderRows(folder, "test").verify(Manifest.read(folder))


@pytest.mark.parametrize(
    "change", [{"count": 3}, {"sha256": {"test.jsonl": "0" * 64}}], ids=["another count", "another hash"]
)
def test_a_manifest_that_does_not_fit_is_an_error(tmp_path, change):
    folder = write_folder(tmp_path / "b", [row(0), row(1)], manifest=change)
    with pytest.raises(DataError, match=r"^E-DATA-04: b/test\.jsonl has"):
        FolderRows(folder, "test").verify(Manifest.read(folder))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"schema": "vlmeff.data/1", "text_only": 1}',
        '{"schema": "vlmeff.data/1", "count": true}',
        '{"schema": "vlmeff.data/2"}',
    ],
)
def test_a_broken_manifest_is_an_error(tmp_path, content):
    folder = write_folder(tmp_path / "b", [row()])
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"^E-DATA-04: b/manifest\.json"):
        Manifest.read(folder)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret.png", "images/../../secret.png", "C:/x.png", "images\\0.png", "", "a\0b"]
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, path):
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"^E-DATA-05: line 1: "):
        FolderRows(write_folder(tmp_path / "b", [row(image=path)]), "test")


def test_a_symbolic_link_out_of_the_folder_is_refused_and_one_inside_is_followed(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    folder = write_folder(tmp_path / "b", [row(image="images/link.png")])
    (folder / "images" / "link.png").symlink_to("0.png")
    rows = FolderRows(folder, "test")
    assert rows[0].images[0]().size == (4, 3)
    open_later = rows[0].images[0]
    (folder / "images" / "link.png").unlink()
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"^E-DATA-05: "):
        FolderRows(folder, "test")
    with pytest.raises(DataError, match=r"^E-DATA-05: document 'doc/0'"):
        open_later()
    (folder / "images" / "link.png").unlink()
    (folder / "images" / "up").symlink_to(tmp_path)
    write_folder(folder, [row(image="images/up/secret.png")])
    with pytest.raises(DataError, match=r"^E-DATA-05: "):
        FolderRows(folder, "test")


def test_the_folder_itself_may_be_a_link(tmp_path):
    write_folder(tmp_path / "real", [row()])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert FolderRows(tmp_path / "link", "test")[0].images[0]().size == (4, 3)


def test_a_broken_picture_is_an_error_only_when_it_is_decoded(tmp_path):
    folder = write_folder(tmp_path / "b", [row(0, image="images/none.png"), row(1), row(2), row(3)])
    (folder / "images" / "1.png").write_bytes(b"")
    (folder / "images" / "2.png").write_bytes((folder / "images" / "3.png").read_bytes()[:40])
    rows = FolderRows(folder, "test")
    for i, reason in enumerate(["does not exist", "no known format", "cannot be decoded"]):
        with pytest.raises(BadImageError, match=rf"^E-DATA-06: document 'doc/{i}'.*{reason}") as caught:
            rows[i].images[0]()
        assert str(tmp_path) not in str(caught.value)
    assert rows[3].images[0]().mode == "RGB"


def test_a_picture_is_turned_flattened_on_white_and_limited_before_it_is_decoded(tmp_path):
    folder = write_folder(tmp_path / "b", [row(i) for i in range(3)])
    turned = Image.new("RGB", (4, 2), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(folder / "images" / "0.png", exif=exif)
    Image.new("RGBA", (4, 3), (0, 0, 0, 0)).save(folder / "images" / "1.png")
    data = bytearray((folder / "images" / "2.png").read_bytes())
    data[16:24] = (8000).to_bytes(4, "big") * 2  # a header that promises 64 million pixels; the data are not there
    (folder / "images" / "2.png").write_bytes(data)
    rows = FolderRows(folder, "test")
    assert rows[0].images[0]().size == (2, 4)
    assert rows[1].images[0]().getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(BadImageError, match=r"^E-DATA-06: .*"):
        rows[2].images[0]()
    with pytest.raises(BadImageError, match=r"4 x 3 pixels, more than 11"):
        FolderRows(write_folder(tmp_path / "c", [row(4)]), "test", max_pixels=11)[0].images[0]()


def test_a_picture_of_a_kind_that_pillow_only_half_knows_is_a_broken_one(tmp_path):
    folder = write_folder(tmp_path / "b", [row(0)])
    path = folder / "images" / "0.png"
    Image.new("RGB", (4, 4)).save(path, format="DDS")
    data = bytearray(path.read_bytes())
    data[80] = 129  # pixel format flags that no version of the format has
    path.write_bytes(data)
    with pytest.raises(BadImageError, match=r"^E-DATA-06: document 'doc/0'"):
        FolderRows(folder, "test")[0].images[0]()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_to_a_picture_raises_anything_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    write_folder(folder, [row(0)])
    name = data.draw(st.sampled_from(["png", "gif", "jpeg", "webp", "tiff", "bmp"]))
    path = folder / "images" / "0.png"
    Image.linear_gradient("L").resize((20, 20)).convert("RGB").save(path, format=name)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        picture = FolderRows(folder, "test", max_pixels=10_000)[0].images[0]()
    except BadImageError:  # any other error fails the test
        return
    assert picture.mode == "RGB"


def test_a_long_file_is_streamed(tmp_path):
    long = "x" * 2000
    folder = write_folder(tmp_path / "b", [row(i, meta={"long": long}) for i in range(10_001)], manifest={})
    size = (folder / "test.jsonl").stat().st_size
    tracemalloc.start()
    rows = FolderRows(folder, "test")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (rows.total, rows[10_000].doc_id, rows[5_000].meta) == (10_001, "doc/10000", {"long": long})
    assert peak < size / 4
