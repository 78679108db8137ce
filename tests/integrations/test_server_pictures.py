"""Which pictures a request may name: paths, addresses and broken ones are refused and not read."""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import OTHER, PICTURE, QUESTION, chat, data_url, encoded

EVENTS: list[tuple[str, str]] = []  # what this process opened or connected to


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "socket.connect", "socket.getaddrinfo"):
        EVENTS.append((event, repr(arguments)))


sys.addaudithook(_watch)  # for good: Python has no way to take one out


class _Counting(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(PICTURE.read_bytes())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def inner_site() -> Iterator[str]:
    """A server on this machine that nobody should be able to have asked."""
    _Counting.asked = []
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Counting)
    thread = threading.Thread(target=site.serve_forever)
    thread.start()
    yield f"127.0.0.1:{site.server_port}"
    site.shutdown()
    thread.join()
    site.server_close()


def _secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret-of-the-server.png"
    path.write_bytes(PICTURE.read_bytes())
    return path


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, loaded: tuple[Any, Any]) -> list[tuple[str, str]]:
    """Everything that this process looks for, opens or connects to, and every prompt that is made."""
    is_file, make_prompt = os.path.isfile, loaded[1].apply_chat_template

    def note_file(path: Any) -> bool:
        EVENTS.append(("isfile", repr(path)))
        return is_file(path)

    def note_prompt(messages: Any, **options: Any) -> Any:
        EVENTS.append(("prompt", ""))
        return make_prompt(messages, **options)

    # torchvision opens files where no audit hook sees it; transformers asks before whether there is one.
    monkeypatch.setattr(os.path, "isfile", note_file)
    monkeypatch.setattr(loaded[1], "apply_chat_template", note_prompt, raising=False)
    return EVENTS


def _traces(events: list[tuple[str, str]], path: Path, site: str) -> list[tuple[str, str]]:
    host, port = site.split(":")
    marks = (path.name, path.name.replace("s", "%73", 1), f"('{host}', {port})", "169.254")
    return [(event, shown) for event, shown in events if event == "prompt" or any(mark in shown for mark in marks)]


def test_the_stock_way_reads_a_path_and_an_inner_address(
    loaded: tuple[Any, Any], tmp_path: Path, inner_site: str, watched: list[tuple[str, str]]
) -> None:
    """What the next test shows not to happen does happen without the gate, and our watch sees it."""
    path = _secret(tmp_path)
    for url, event in ((str(path), "isfile"), (f"http://{inner_site}/a.png", "socket.connect")):
        watched.clear()
        message = {"role": "user", "content": [{"type": "image", "url": url}, {"type": "text", "text": QUESTION}]}
        loaded[1].apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
        assert {"prompt", event} <= {seen for seen, _ in _traces(watched, path, inner_site)}
    assert _Counting.asked == ["/a.png"]


def test_paths_and_addresses_are_refused_and_not_read(
    post: Any, tmp_path: Path, inner_site: str, watched: list[tuple[str, str]]
) -> None:
    path = _secret(tmp_path)
    good = data_url(OTHER)
    urls = [
        str(path),
        path.as_uri(),
        f"FILE://{path}",
        os.path.relpath(path),
        str(path).replace("secret", "%73ecret"),
        f"data:image/png;base64,{path}",
        f"data:{path}",
        f"http://{inner_site}/a.png",
        f"HTTP://{inner_site}/a.png",
        f"https://{inner_site}/a.png",
        f" http://{inner_site}/a.png",
        f"http://user@{inner_site}/a.png",
        f"http%3A//{inner_site}/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/a.png",
        "ftp://example.com/a.png",
        "",
    ]
    shapes: list[Callable[[str], dict[str, Any]]] = [
        lambda u: {"messages": chat(u)},
        lambda u: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": u}]}]},
        lambda u: {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": u}]}]},
        lambda u: {"messages": [{"role": "system", "content": chat(u)[0]["content"]}, *chat(good)]},
        lambda u: {"messages": [*chat(good), {"role": "assistant", "content": "four"}, *chat(u)]},
    ]
    smuggled = [
        lambda u: {"messages": [{"role": "user", "content": [{"type": "image", "url": u}]}]},
        lambda u: {"messages": [{"role": "user", "content": [{"type": "image", "path": u}]}]},
        lambda u: {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": u}}]}]},
        lambda u: {"messages": [{"role": "user", "content": [{"type": "input_file", "file_id": u}]}]},
        lambda u: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": [u]}]}]},
        lambda u: {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": {"url": u}}}]}]
        },
        lambda u: {"messages": [{"role": "user", "content": [{"type": ["image_url"], "image_url": {"url": u}}]}]},
        lambda u: {"messages": [{"role": "user", "content": [{"type": "text", "text": {"url": u}}]}]},
        lambda u: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "url": u}]}]},
        lambda u: {"messages": [{"role": "user", "content": [chat(u)]}]},
        lambda u: {"messages": [{"role": "user", "content": {"type": "image", "url": u}}]},
        lambda u: {"messages": [chat(u)]},
        lambda u: {"messages": chat(good), "chat_template_kwargs": {"processor_kwargs": {"images": [u]}}},
        lambda u: {"messages": chat(good), "chat_template_kwargs": {"chat_template": "x", "images": u}},
        lambda u: {"messages": chat(good), "images": [u]},
        lambda u: {"messages": [{**chat(good)[0], "images": [u]}]},
        lambda u: {"messages": chat(good), "generation_config": json.dumps({"cache_implementation": u})},
    ]
    watched.clear()
    for url in urls:
        for shape in shapes:
            status, answer = post({"model": "tiny-llava", **shape(url)})
            assert (status, answer["error"]["code"]) == (400, "E-SERVE-01"), (url, answer)
            assert answer["error"]["message"].startswith("E-SERVE-01: ")
        parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": QUESTION}]
        for given in (
            parts,
            [{"role": "user", "content": parts}],
            [{"type": "message", "role": "user", "content": parts}],
        ):
            status, answer = post({"model": "tiny-llava", "input": given}, "/v1/responses")
            assert (status, answer["error"]["code"]) == (400, "E-SERVE-01"), (url, answer)
    for url in (str(path), f"http://{inner_site}/a.png"):
        for smuggle in smuggled:
            status, answer = post({"model": "tiny-llava", **smuggle(url)})
            assert status == 400, (smuggle(url), answer)
            assert answer["error"]["code"] in ("E-SERVE-01", "E-SERVE-02")
        output = {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": url}]}
        asked = {"role": "user", "content": "hello"}
        assert post({"model": "tiny-llava", "input": [asked, output]}, "/v1/responses")[0] == 400
    assert _Counting.asked == []
    assert _traces(watched, path, inner_site) == []


BAD_PICTURES = {
    "not base64": "data:image/png;base64,@@@@",
    "not base64 in length": "data:image/png;base64,abcde",
    "base64 with line breaks": data_url(OTHER)[:60] + "\n" + data_url(OTHER)[60:],
    "url-safe base64": "data:image/png;base64,ab-_",
    "percent-encoded": data_url(OTHER).replace("+", "%2B").replace("base64,", "base64%2C"),
    "no base64": "data:image/png,abcd",
    "svg": "data:image/svg+xml;base64,PHN2Zy8+",
    "upper case": data_url(OTHER).replace("data:", "DATA:"),
    "upper case kind": data_url(OTHER).replace("image/png", "image/PNG"),
    "parameters": data_url(OTHER).replace("image/png;", "image/png;name=a;"),
    "two commas": data_url(OTHER).replace("base64,", "base64,,"),
    "empty": "data:image/png;base64,",
    "no picture": data_url(b"hello world!"),
    "another kind than said": data_url(encoded("JPEG"), "png"),
    "a format that is not taken": data_url(encoded("BMP"), "png"),
    "a truncated picture": data_url(PICTURE.read_bytes()[:300]),
    "too many bytes": data_url(os.urandom(60_000)),
    "too many pixels": data_url(encoded("PNG", (1001, 1000))),
    "a bomb": data_url(encoded("GIF", (20_000, 1)).replace(b"\x20\x4e\x01\x00", b"\xff\xff\xff\xff"), "gif"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused(post: Any, name: str) -> None:
    status, answer = post({"model": "tiny-llava", "messages": chat(data_url(OTHER), BAD_PICTURES[name])})
    assert (status, answer["error"]["code"]) == (400, "E-SERVE-01"), answer
    assert len(answer["error"]["message"]) < 500


def test_the_number_of_pictures_is_limited(post: Any) -> None:
    status, answer = post({"model": "tiny-llava", "messages": chat(*[data_url(OTHER)] * 4)})
    assert (status, answer["error"]["code"]) == (400, "E-SERVE-01")
    assert "--max-images" in answer["error"]["message"]
