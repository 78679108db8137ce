"""Every endpoint of the tabs Compare, Sweep and About over HTTP, as clients good and bad use them."""

from __future__ import annotations

import base64
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

gradio = pytest.importorskip("gradio", reason="needs the extra demo")
client_of = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")

import vlmeff  # noqa: E402
from vlmeff.demo.engine import Choice, Done, Engine, Text  # noqa: E402
from vlmeff.demo.limits import Limits  # noqa: E402
from vlmeff.demo.page import build_demo, launch_options  # noqa: E402
from vlmeff.demo.samples import EXAMPLES  # noqa: E402
from vlmeff.demo.site import AS_PRESET, Site  # noqa: E402
from vlmeff.demo.work import Note, Stop  # noqa: E402
from vlmeff.reporting import Report  # noqa: E402

PICTURE = EXAMPLES[0].path
PATIENCE_SECONDS = 60.0  # other tests share the cores
LONGEST_TALK_SECONDS = 5 * PATIENCE_SECONDS
STATUS, BASELINE, PRESET, CONTROL, FIGURES = range(5)  # outputs of /compare
EVIL = "<img src=x onerror=alert(1)> **bold** ${1+1}"


class Scripted:
    """An engine that does what the question says."""

    def __init__(self) -> None:
        self.begun: list[Choice] = []
        self.ended = threading.Event()
        self.talking = threading.Event()

    def presets(self, name: str) -> list[str]:
        return ["fast"]

    def answer(
        self, turns: Sequence[Any], choice: Choice, *, model: str | None = None, max_new_tokens: int = 64,
        stop: Stop | None = None,
    ) -> Iterator[Text | Note | Done]:  # fmt: skip
        assert stop is not None
        question = turns[-1]["content"][-1]["text"]
        self.begun.append(choice)
        self.ended.clear()
        report = Report(visual_tokens_before=100, visual_tokens_after=100 if choice.plain else 30, total_ms=9.0)
        try:
            if question == "fail":
                yield Text("half an")
                raise RuntimeError("secret detail of the server")
            if question == "talk for ever":
                end = time.monotonic() + LONGEST_TALK_SECONDS
                while not stop.asked:
                    assert time.monotonic() < end, "nobody stopped it"
                    yield Text("word")
                    self.talking.set()
                    time.sleep(0.01)
                yield Done("word", report, stopped=True)
                return
            yield Done(EVIL if question == "evil" else f"{model} {choice.preset}", report)
        finally:
            self.ended.set()


class Page:
    """A served page and what tests ask of it."""

    def __init__(self, site: Site) -> None:
        self.site, self.demo = site, build_demo(site)
        self.demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options(site))
        self.address = self.demo.local_url

    def client(self) -> Any:
        return client_of.Client(self.address, verbose=False)

    def raw(self, endpoint: str, *data: Any) -> tuple[int, str]:
        """(HTTP status, body) of a request that no client library has touched: the stream of events where it runs."""
        with httpx.Client(base_url=self.address, timeout=PATIENCE_SECONDS) as client:
            begun = client.post(f"/gradio_api/call/{endpoint}", json={"data": list(data)})
            if begun.status_code != 200:
                return begun.status_code, begun.text
            done = client.get(f"/gradio_api/call/{endpoint}/{begun.json()['event_id']}")
            return done.status_code, done.text


def compare_of(
    question: str, picture: Any = None, *, model: str = "tiny-llava", preset: str = "fast", method: str = AS_PRESET,
    control: str = "none", tokens: int = 64,
) -> list[Any]:  # fmt: skip
    """Inputs of /compare."""
    picture = client_of.handle_file(PICTURE) if picture is None else picture
    return [model, picture, question, preset, method, 33, control, tokens, 0]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def page(uploads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Answers of a scripted engine."""
    limits = Limits(max_file_mb=0.2, max_question_chars=100)
    page = Page(Site(Scripted(), ["tiny-llava", "tiny-qwen"], limits, tmp_path_factory.mktemp("log")))
    yield page
    page.demo.close()


@pytest.fixture(scope="module")
def real(uploads: Path) -> Iterator[Page]:
    """Answers of the shipped models."""
    page = Page(Site(Engine("tiny-llava", device="cpu"), ["tiny-llava", "tiny-qwen"]))
    yield page
    page.demo.close()


@pytest.fixture
def engine(page: Page) -> Scripted:
    page.site.engine = engine = Scripted()
    return engine


def text_of(html: Any) -> str:
    """What a browser shows of an HTML output; Gradio wraps updated values."""
    value = html["value"] if isinstance(html, dict) else html
    return re.sub(r"<[^>]*>", " ", str(value))


# -- good clients


def test_a_comparison_of_the_shipped_model(real: Page) -> None:
    job = real.client().submit(*compare_of("describe the picture."), api_name="/compare")
    result = job.result(timeout=PATIENCE_SECONDS)
    model, processor = vlmeff.load("tiny-llava", device="cpu")
    assert result[BASELINE] == ask(model, processor, "describe the picture.")
    assert result[PRESET] == ask(vlmeff.wrap(model, "fast"), processor, "describe the picture.")
    figures = text_of(result[FIGURES])
    assert re.search(r"visual tokens\s+324\s+108", figures)
    assert len(job.outputs()) > 4


def test_two_users_at_once_get_what_each_gets_alone(real: Page) -> None:
    wishes = [("tiny-llava", "fast"), ("tiny-qwen", "quality")]
    jobs = [
        real.client().submit(*compare_of("describe the picture.", model=name, preset=preset), api_name="/compare")
        for name, preset in wishes
    ]
    results = [job.result(timeout=3 * PATIENCE_SECONDS) for job in jobs]
    for (name, preset), result in zip(wishes, results, strict=True):
        model, processor = vlmeff.load(name, device="cpu")
        assert result[BASELINE] == ask(model, processor, "describe the picture.")
        assert result[PRESET] == ask(vlmeff.wrap(model, preset), processor, "describe the picture.")


def ask(model: Any, processor: Any, question: str) -> str:
    picture = {"type": "image", "image": Image.open(PICTURE).convert("RGB")}
    turns = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_a_control_keeps_as_many_tokens_as_the_preset(real: Page) -> None:
    result = real.client().predict(*compare_of("what?", control="random", tokens=4), api_name="/compare")
    assert re.search(r"visual tokens\s+324\s+108\s+108", text_of(result[FIGURES]))


def test_the_runs_take_turns_at_going_first(page: Page, engine: Scripted) -> None:
    client = page.client()
    for _ in range(3):
        client.predict(*compare_of("what?"), api_name="/compare")
    assert [choice.plain for choice in engine.begun] == [True, False, False, True, True, False]


def test_a_sweep_and_what_the_page_is_about(page: Page, engine: Scripted) -> None:
    client = page.client()
    picture = client_of.handle_file(PICTURE)
    status, _, table = client.predict("tiny-llava", picture, "what?", "four", "hiprune", api_name="/sweep")
    assert text_of(status).strip() == "done"
    assert "0 of 8 answers right" in text_of(table)
    assert len(engine.begun) == 8
    about = text_of(client.predict("tiny-qwen", api_name="/about"))
    assert "tiny-qwen" in about
    assert vlmeff.__version__ in about


def test_a_comparison_is_saved_once_and_says_where(page: Page, engine: Scripted) -> None:
    client = page.client()
    assert "no finished comparison" in text_of(client.predict(api_name="/save"))
    client.predict(*compare_of("what?"), api_name="/compare")
    said = text_of(client.predict(api_name="/save"))
    (folder,) = page.site.log_dir.iterdir()
    assert folder.name in said
    assert json.loads((folder / "comparison.json").read_text())["question"] == "what?"
    assert "no finished comparison" in text_of(client.predict(api_name="/save"))


def test_what_is_saved_is_what_is_shown(page: Page, engine: Scripted) -> None:
    client = page.client()
    client.predict(*compare_of("what?"), api_name="/compare")
    job = client.submit(*compare_of("talk for ever"), api_name="/compare")
    assert engine.talking.wait(PATIENCE_SECONDS)
    client.predict(api_name="/stop")
    job.result(timeout=PATIENCE_SECONDS)
    assert "no finished comparison" in text_of(client.predict(api_name="/save"))


def test_a_save_that_fails_can_be_tried_again(page: Page, engine: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    client = page.client()
    client.predict(*compare_of("what?"), api_name="/compare")
    with monkeypatch.context() as full:
        full.setattr("vlmeff.demo.saving.MOST_SAVED", 0)
        assert "saved already" in text_of(client.predict(api_name="/save"))
    assert "Saved as" in text_of(client.predict(api_name="/save"))


def test_without_a_log_folder_nothing_can_be_saved(page: Page, real: Page) -> None:
    assert "/save" in endpoints(page)
    assert "/save" not in endpoints(real)


def endpoints(page: Page) -> set[str]:
    return set(page.client().view_api(return_format="dict")["named_endpoints"])


# -- stop


def test_stop_ends_the_run_and_the_next_one_works(page: Page, engine: Scripted) -> None:
    client = page.client()
    job = client.submit(*compare_of("talk for ever"), api_name="/compare")
    assert engine.talking.wait(PATIENCE_SECONDS)
    client.predict(api_name="/stop")
    assert text_of(job.result(timeout=PATIENCE_SECONDS)[STATUS]).strip() == "stopped"
    assert engine.ended.is_set()
    assert len(engine.begun) == 1, "the preset's run began after the stop"
    assert page.client().predict(*compare_of("what?"), api_name="/compare")[PRESET] == "tiny-llava fast"


def test_stop_of_one_user_does_not_stop_another(page: Page, engine: Scripted) -> None:
    client, other = page.client(), page.client()
    job = client.submit(*compare_of("talk for ever"), api_name="/compare")
    assert engine.talking.wait(PATIENCE_SECONDS)
    other.predict(api_name="/stop")
    engine.talking.clear()
    assert engine.talking.wait(PATIENCE_SECONDS), "it was stopped"
    client.predict(api_name="/stop")
    job.result(timeout=PATIENCE_SECONDS)


def test_who_waits_and_cancels_never_runs(page: Page, engine: Scripted) -> None:
    client, waiting = page.client(), page.client()
    job = client.submit(*compare_of("talk for ever"), api_name="/compare")
    assert engine.talking.wait(PATIENCE_SECONDS)
    queued = waiting.submit(*compare_of("what?"), api_name="/compare")
    until(lambda: len(page.demo._queue) == 1)
    until(lambda: queued.communicator.event_id is not None)  # else the client has no name for what it wants cancelled
    queued.cancel()
    until(lambda: len(page.demo._queue) == 0)
    client.predict(api_name="/stop")
    job.result(timeout=PATIENCE_SECONDS)
    page.client().predict(*compare_of("evil"), api_name="/compare")  # by now the cancelled one would have had its turn
    assert len(engine.begun) == 3


def test_a_closed_tab_ends_its_run(page: Page, engine: Scripted) -> None:
    with httpx.Client(base_url=page.address, timeout=PATIENCE_SECONDS) as browser:
        config = browser.get("/config").json()
        number = next(each["id"] for each in config["dependencies"] if each["api_name"] == "compare")
        sent = browser.post("/gradio_api/upload", files={"files": ("p.png", Path(PICTURE).read_bytes())}).json()[0]
        data = compare_of("talk for ever", {"path": sent, "meta": {"_type": "gradio.FileData"}})
        body = {"data": [*data, None], "fn_index": number, "session_hash": "tab", "event_data": None}
        assert browser.post("/gradio_api/queue/join", json=body).status_code == 200
        with browser.stream("GET", "/gradio_api/queue/data", params={"session_hash": "tab"}) as stream:
            lines = stream.iter_lines()  # heartbeats too, so it does not block
            until(lambda: next(lines) is not None and engine.talking.is_set())
    assert engine.ended.wait(PATIENCE_SECONDS), "the answer goes on though nobody listens"
    assert page.client().predict(*compare_of("what?"), api_name="/compare")[PRESET] == "tiny-llava fast"


def until(holds: Any) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def test_the_stop_button_cancels_whatever_starts_a_run(page: Page) -> None:
    """Of a click and of Enter in a field: all go through one event, which the button names in ``cancels``."""
    dependencies = page.demo.config["dependencies"]
    for run, stop in (("compare", "stop"), ("sweep", "stop_sweep")):
        (start,) = [each for each in dependencies if each["api_name"] == run]
        assert {event for _, event in start["targets"]} == {"click", "submit"}
        (button,) = [each for each in dependencies if each["api_name"] == stop]
        by_button = [each for each in dependencies if each["targets"] == button["targets"]]
        assert any(start["id"] in each["cancels"] for each in by_button)


# -- bad clients


def test_an_error_of_the_engine_shows_no_detail_and_the_next_run_works(page: Page, engine: Scripted) -> None:
    client = page.client()
    with pytest.raises(client_of.exceptions.AppError) as caught:
        client.predict(*compare_of("fail"), api_name="/compare")
    assert str(caught.value) == "Something went wrong in the demo; its log says what."
    assert client.predict(*compare_of("what?"), api_name="/compare")[PRESET] == "tiny-llava fast"


@pytest.mark.parametrize("question", ["", "   ", "x" * 101])
def test_a_question_that_is_none_is_refused_before_the_queue(page: Page, engine: Scripted, question: str) -> None:
    message = "no question yet" if not question.strip() else "101 characters, more than 100"
    for endpoint, data in (
        ("compare", compare_of(question, uploaded(page))),
        ("sweep", ["tiny-llava", uploaded(page), question, "", "hiprune"]),
    ):
        status, body = page.raw(endpoint, *data)
        assert status == 422
        assert message in body
    assert engine.begun == []


def uploaded(page: Page, content: bytes | None = None, name: str = "p.png") -> dict[str, Any]:
    """What a browser sends about a file after its upload."""
    content = Path(PICTURE).read_bytes() if content is None else content
    sent = httpx.post(f"{page.address}gradio_api/upload", files={"files": (name, content)}, timeout=PATIENCE_SECONDS)
    assert sent.status_code == 200, sent.text
    return {"path": sent.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def test_no_picture_is_refused_before_the_queue(page: Page, engine: Scripted) -> None:
    data = compare_of("what?")
    data[1] = None
    status, body = page.raw("compare", *data)
    assert (status, engine.begun) == (422, [])
    assert "no picture yet" in body


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, "tiny-mar"), (3, "fastest"), (4, "no-method"), (5, 1000), (6, "no-control"), (7, 100_000), (8, -1)],
)
def test_values_that_no_control_has_are_refused(page: Page, engine: Scripted, index: int, value: Any) -> None:
    data = compare_of("what?", uploaded(page))
    data[index] = value
    status, body = page.raw("compare", *data)
    assert status == 400 or "event: error" in body
    assert engine.begun == []


def png_of(width: int, height: int) -> bytes:
    """A PNG file that declares a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        pytest.param(b"just text", "p.png", "no known format", id="a text file named .png"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "p.svg", "no known format", id="an SVG"),
        pytest.param(png_of(50_000, 20_000), "p.png", "more than 20000000 pixels", id="a gigapixel"),
        pytest.param(
            png_of(6000, 6000), "p.png", "6000 x 6000 pixels, more than 20000000", id="more pixels than allowed"
        ),
    ],
)
def test_what_is_no_fit_picture_is_refused_and_never_decoded(
    page: Page, engine: Scripted, content: bytes, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda picture: decoded.append(picture.size))
    for endpoint, rest in (("compare", compare_of("what?")[2:]), ("sweep", ["what?", "", "hiprune"])):
        status, body = page.raw(endpoint, "tiny-llava", uploaded(page, content, name), *rest)
        assert status == 200
        assert "event: error" in body
        assert message in body
        assert str(page.site.log_dir.parent) not in body, "it names a path of the server"
    assert (engine.begun, decoded) == ([], [])


def test_a_file_over_the_limit_is_refused_at_the_upload_and_inside_a_request(page: Page, engine: Scripted) -> None:
    large = bytes(300_000)
    sent = httpx.post(f"{page.address}gradio_api/upload", files={"files": ("p.png", large)}, timeout=PATIENCE_SECONDS)
    assert sent.status_code == 413
    noise = Image.effect_noise((600, 600), 90)  # does not compress
    noise.save(page.site.log_dir / "noise.png")
    content = (page.site.log_dir / "noise.png").read_bytes()
    (page.site.log_dir / "noise.png").unlink()
    assert len(content) > 200_000
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    file = {"path": "p.png", "url": url, "orig_name": "p.png", "meta": {"_type": "gradio.FileData"}}
    status, body = page.raw("compare", *compare_of("what?", file))
    assert status in (400, 422) or "event: error" in body
    assert engine.begun == []


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["without meta", "with meta"])
@pytest.mark.parametrize("where", ["file of the system", "file of the project", "climbs out of the uploads"])
def test_only_files_that_were_uploaded_are_read(
    page: Page, engine: Scripted, uploads: Path, where: str, meta: dict[str, Any]
) -> None:
    path = {
        "file of the system": "/etc/hostname",
        "file of the project": PICTURE,
        "climbs out of the uploads": str(uploads / ".." / ".." / "p.png"),
    }[where]
    status, body = page.raw("compare", *compare_of("what?", {"path": path, **meta}))
    assert status in (400, 422) or "event: error" in body
    assert engine.begun == []


@pytest.mark.parametrize("endpoint", ["compare", "sweep", "chat", "video"])
@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["without meta", "with meta"])
def test_no_address_is_fetched(
    page: Page, engine: Scripted, endpoint: str, meta: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    async def fetch(url: str, **options: Any) -> str:
        fetched.append(url)
        raise OSError("no network here")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    file = {"path": "https://pictures.example.org/p.png", "orig_name": "p.png", **meta}
    data = {
        "compare": compare_of("what?", file),
        "sweep": ["tiny-llava", file, "what?", "", "hiprune"],
        "chat": ["tiny-llava", {"text": "what?", "files": [file]}, "fast", 8],
        "video": ["tiny-llava", file, "what?", "fast", False],
    }[endpoint]
    status, body = page.raw(endpoint, *data)
    assert status in (400, 422) or "event: error" in body
    assert (fetched, engine.begun) == ([], [])


def test_nothing_but_uploads_is_served(page: Page) -> None:
    own = uploaded(page)["path"]
    with httpx.Client(base_url=page.address, timeout=PATIENCE_SECONDS) as client:
        assert client.get(f"/gradio_api/file={own}").status_code == 200
        for path in ("/etc/hostname", PICTURE, str(Path(__file__)), f"{own}/../../../etc/hostname"):
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path
        for name in ("/monitoring", "/monitoring/summary", "/gradio_api/mcp/sse"):
            assert client.get(name).status_code in (403, 404), name


def test_what_a_model_says_is_shown_as_text(page: Page, engine: Scripted) -> None:
    client = page.client()
    result = client.predict(*compare_of("evil"), api_name="/compare")
    assert result[PRESET] == EVIL  # a text box shows it as it is
    _, _, table = client.predict(
        "tiny-llava", client_of.handle_file(PICTURE), "evil", EVIL, "hiprune", api_name="/sweep"
    )
    html = table["value"] if isinstance(table, dict) else table
    assert "<img" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
