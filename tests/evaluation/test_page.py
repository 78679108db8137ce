"""regressions.html read by a parser: what it shows, that text stays text, and that it loads nothing."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finished_runs import row, write_run
from PIL import Image

from vlmeff.errors import DataError
from vlmeff.evaluation import page
from vlmeff.evaluation.results import build_report

EVIL = '</h3><script>alert("x")</script><img src=x onerror=alert(1)> & \x00\x1b'


class Read(HTMLParser):
    """Tags with their attributes, and the text of every article."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.articles: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "article":
            self.inside = True
            self.articles.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "article"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.articles[-1] += data

    def all(self, name: str) -> list[dict[str, Any]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def write(folder: Path, right: dict[str, tuple[float, float]], benchmark: str = "quiz", **fields: Any) -> None:
    """A baseline and the preset "fast" with these scores by document."""
    before = [
        row(i, b, question=f"What is {i}?", references=["yes", "yes", "ja"], **fields) for i, (b, _) in right.items()
    ]
    after = [row(i, a, visual_tokens_kept=21, prediction="answer now", **fields) for i, (_, a) in right.items()]
    write_run(folder, before, benchmark=benchmark)
    write_run(folder, after, benchmark=benchmark, kind="preset", preset="fast")


def built(folder: Path, **arguments: Any) -> Read:
    build_report(folder, **arguments)
    return Read((folder / "regressions.html").read_text("utf-8"))


def picture(color: str = "red", size: tuple[int, int] = (900, 300)) -> Image.Image:
    return Image.new("RGB", size, color)


def shown(source: str) -> Image.Image:
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(\S+)", source).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == kind.upper()
    return image


def test_only_documents_that_got_worse_are_shown_with_all_there_is_to_know(tmp_path: Path) -> None:
    write(tmp_path, {"lost": (1.0, 0.0), "won": (0.0, 1.0), "kept": (1.0, 1.0), "never": (0.0, 0.0)})
    read = built(tmp_path, pictures=lambda doc_id: picture())
    (article,) = read.articles
    for part in ("What is lost?", "yes", "2 times", "ja", "answer now", "21 kept of 64", "lost"):
        assert part in article
    (image,) = read.all("img")
    thumbnail = shown(image["src"])
    assert thumbnail.size == (320, 107)
    assert thumbnail.convert("RGB").getpixel((9, 9))[0] > 240
    assert "1 of 4 documents got worse" in (tmp_path / "regressions.html").read_text("utf-8")


def test_text_of_the_data_and_of_the_model_stays_text(tmp_path: Path) -> None:
    evil = {"question": EVIL, "references": [EVIL], "category": EVIL, "prediction": EVIL, "parsed": EVIL}
    write_run(tmp_path, [row(EVIL, 1.0, **evil)], benchmark="quiz")
    write_run(tmp_path, [row(EVIL, 0.0, **evil)], benchmark="quiz", kind="preset", preset='"><script>1</script>')
    read = built(tmp_path, pictures=lambda doc_id: picture())
    assert [len(read.all(tag)) for tag in ("script", "img", "style", "article")] == [1, 1, 1, 1]
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert read.articles[0].count('</h3><script>alert("x")</script><img src=x onerror=alert(1)> & ') == 6
    assert read.all("section")[0]["data-run"] == '"><script>1</script>'
    assert "\x00" not in (tmp_path / "regressions.html").read_text("utf-8")


def test_the_page_loads_nothing_and_its_policy_allows_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, {"lost": (1.0, 0.0)})
    read = built(tmp_path, pictures=lambda doc_id: picture())
    text = (tmp_path / "regressions.html").read_text("utf-8")
    for _, attrs in read.tags:
        assert "href" not in attrs
        assert "style" not in attrs  # the policy would ignore it
        assert attrs.get("src", "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", text)
    policy = next(m["content"] for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


def test_it_is_made_for_phones_and_for_both_colour_schemes(tmp_path: Path) -> None:
    write(tmp_path, {"lost": (1.0, 0.0)})
    metas = {m.get("name"): m.get("content") for m in built(tmp_path).all("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    assert "@media (prefers-color-scheme: dark)" in page.STYLE


def test_one_can_filter_by_benchmark_and_run(tmp_path: Path) -> None:
    write(tmp_path, {"lost": (1.0, 0.0)}, benchmark="one")
    write(tmp_path, {"lost": (1.0, 0.0)}, benchmark="two")
    read = built(tmp_path)
    assert [s["name"] for s in read.all("select")] == ["benchmark", "run"]
    assert [o["value"] for o in read.all("option")] == ["", "one", "two", "", "fast"]
    assert [(s["data-benchmark"], s["data-run"]) for s in read.all("section")] == [("one", "fast"), ("two", "fast")]


def test_the_worst_come_first_and_categories_take_turns(tmp_path: Path) -> None:
    scores = {"small": (1.0, 0.7), **{f"a{i}": (1.0, 0.0) for i in range(3)}, "b0": (1.0, 0.0), "half": (1.0, 0.5)}
    before = [row(i, b, category=i[0]) for i, (b, _) in scores.items()]
    after = [row(i, a, category=i[0]) for i, (_, a) in scores.items()]
    write_run(tmp_path, before)
    write_run(tmp_path, after, kind="preset", preset="fast")
    order = [re.search(r"(small|half|[ab]\d) ·", article)[1] for article in built(tmp_path).articles]
    assert order == ["a0", "b0", "a1", "a2", "half", "small"]


def test_many_regressions_are_cut_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {f"d{i}": (1.0, 0.0) for i in range(60)})
    read = built(tmp_path)
    assert len(read.articles) == page.SHOWN
    assert f"60 of 60 documents got worse, the worst {page.SHOWN} shown" in (
        (tmp_path / "regressions.html").read_text("utf-8")
    )


def test_pictures_that_are_not_there_leave_a_text(tmp_path: Path) -> None:
    def fails(doc_id: str) -> Image.Image:
        raise DataError(f"E-DATA-06: {doc_id}")

    write(tmp_path, {"lost": (1.0, 0.0)})
    for pictures, text in (
        (None, "picture not at hand"),
        (lambda doc_id: None, "picture not found"),
        (fails, "picture not readable (DataError)"),
        ({"other": fails}, "picture not at hand"),
    ):
        read = built(tmp_path, pictures=pictures)
        assert text in read.articles[0]
        assert read.all("img") == []
    assert len(built(tmp_path, pictures={"quiz": lambda doc_id: picture()}).all("img")) == 1


def test_questions_without_pictures_or_stored_text_say_so(tmp_path: Path) -> None:
    write_run(tmp_path, [row("d", 1.0, n_images=0)])
    write_run(tmp_path, [row("d", 0.0, error="out of memory")], kind="preset", preset="fast")
    (article,) = built(tmp_path, pictures=lambda doc_id: picture()).articles
    for part in ("no picture in this question", "the question was not stored", "not stored", "failed: out of memory"):
        assert part in article


def test_a_report_without_regressions_says_so(tmp_path: Path) -> None:
    write(tmp_path, {"kept": (1.0, 1.0)})
    read = built(tmp_path)
    text = (tmp_path / "regressions.html").read_text("utf-8")
    assert "No document got worse" in text
    assert read.all("form") == read.articles == []


def test_small_pictures_keep_their_pixels_and_none_keeps_its_metadata() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    for size in ((64, 48), (640, 480)):
        source = Image.new("RGBA", size, (0, 0, 255, 0))
        out = io.BytesIO()
        source.save(out, "PNG", exif=exif)
        with Image.open(io.BytesIO(out.getvalue())) as loaded:
            assert loaded.getexif()
            small = shown(page.thumbnail(loaded))
        assert not small.getexif()
        assert small.size == (size if size[0] <= 128 else (320, 240))
        assert min(small.convert("RGB").getpixel((5, 5))) > 250  # transparent becomes white


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16"])
def test_pictures_of_any_mode_can_be_shown(mode: str) -> None:
    assert shown(page.thumbnail(Image.new(mode, (200, 150)))).size == (200, 150)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    write_run(tmp_path, [row("d", 1.0, question="w" * 10**5)])
    write_run(tmp_path, [row("d", 0.0)], kind="preset", preset="fast")
    (article,) = built(tmp_path).articles
    assert article.count("w") < page.LONGEST_TEXT + 50
