"""``vlmeff serve`` seen by the openai client: the shipped model behind its gate on a free port of this machine."""

from __future__ import annotations

import asyncio
import base64
import http.client
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmeff
from vlmeff.errors import EnvironmentMismatchError
from vlmeff.integrations import server
from vlmeff.integrations.server_gate import RequestLimits
from vlmeff.integrations.server_images import PictureLimits

openai, uvicorn, _ = (
    pytest.importorskip(name, reason=f"the extra serve is not installed ({name} is missing)")
    for name in ("openai", "uvicorn", "fastapi")
)
try:
    server.check_environment()
except EnvironmentMismatchError as _error:
    pytest.skip(str(_error), allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "demos" / "pictures" / "four-shapes.png"
OTHER = ROOT / "demos" / "pictures" / "one-shape.png"
QUESTION = "how many shapes are there?"
LIMITS = RequestLimits(
    pictures=PictureLimits(max_images=3, max_image_mb=0.05, max_image_pixels=1_000_000),
    max_request_mb=0.3,
    max_text_chars=2_000,
    max_new_tokens=40,
)
EVENTS: list[tuple[str, str]] = []  # what this process opened or connected to


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "socket.connect", "socket.getaddrinfo"):
        EVENTS.append((event, repr(arguments)))


sys.addaudithook(_watch)  # for good: Python has no way to take one out


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return vlmeff.load("tiny-llava", "fast")


@pytest.fixture(scope="module")
def address(loaded: tuple[Any, Any]) -> Iterator[tuple[str, int]]:
    """Host and port of a running server, which has ended, its thread and its port with it, after the module."""
    app = server.build_app(*loaded, name="tiny-llava", limits=LIMITS, hosts=server.LOOPBACK)
    listening = server._bind("127.0.0.1", 0)
    where = listening.getsockname()
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[listening])))
    thread.start()
    try:
        for _ in range(600):
            if running.started:
                break
            time.sleep(0.05)
        assert running.started
        yield where
    finally:
        running.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive()
    with pytest.raises(OSError), socket.create_connection(where, 1):
        pass


@pytest.fixture(scope="module")
def client(address: tuple[str, int]) -> Iterator[openai.OpenAI]:
    url = f"http://{address[0]}:{address[1]}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as made:
        yield made


@pytest.fixture
def post(address: tuple[str, int]) -> Callable[..., tuple[int, Any]]:
    """Send bytes or JSON without a client that would tidy them; (status, what came back)."""

    def send(body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*address, timeout=120)
        try:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("POST", path, raw, {"Content-Type": "application/json", **names})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    return send


def data_url(picture: Path | bytes, kind: str = "png") -> str:
    raw = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def encoded(kind: str, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind, **options)
    return file.getvalue()


def chat(*urls: Any, question: str = QUESTION) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def expected(loaded: tuple[Any, Any], *pictures: Path, question: str = QUESTION) -> tuple[str, int]:
    """(answer, length of the prompt) of the same wrapped model's own generate."""
    model, processor = loaded
    content = [{"type": "image", "image": Image.open(p).convert("RGB")} for p in pictures]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=LIMITS.max_new_tokens, do_sample=False)
    return processor.decode(ids[0, length:], skip_special_tokens=True), length


@pytest.mark.parametrize("question", [QUESTION, "describe the picture."])
def test_the_answer_is_that_of_generate(client: openai.OpenAI, loaded: tuple[Any, Any], question: str) -> None:
    answer = client.chat.completions.create(model="tiny-llava", messages=chat(data_url(PICTURE), question=question))
    text, length = expected(loaded, PICTURE, question=question)
    assert text.strip()
    assert answer.choices[0].message.content == text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == length
    assert answer.model == "tiny-llava"


def test_a_streamed_answer_is_the_same(client: openai.OpenAI, loaded: tuple[Any, Any]) -> None:
    question = "describe the picture."
    chunks = list(
        client.chat.completions.create(
            model="tiny-llava", messages=chat(data_url(PICTURE), question=question), stream=True, max_tokens=40
        )
    )
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces).strip() == expected(loaded, PICTURE, question=question)[0].strip()
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_the_responses_route_answers_too_plain_and_streamed(client: openai.OpenAI, loaded: tuple[Any, Any]) -> None:
    parts = [{"type": "input_image", "image_url": data_url(PICTURE), "detail": "auto"}]
    items: Any = [{"role": "user", "content": [*parts, {"type": "input_text", "text": QUESTION}]}]
    text = expected(loaded, PICTURE)[0]
    assert client.responses.create(model="tiny-llava", input=items).output_text == text
    events = list(client.responses.create(model="tiny-llava", input=items, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas).strip() == text.strip()
    assert events[-1].type == "response.completed"


def test_several_pictures_reach_the_model(client: openai.OpenAI, loaded: tuple[Any, Any]) -> None:
    answer = client.chat.completions.create(
        model="tiny-llava", messages=chat(data_url(PICTURE), data_url(OTHER)), max_completion_tokens=40
    )
    text, length = expected(loaded, PICTURE, OTHER)
    assert length > 2 * 324
    assert answer.choices[0].message.content == text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == length


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_kind_of_picture_is_taken(client: openai.OpenAI, kind: str) -> None:
    url = data_url(encoded(kind), kind.lower())
    answer = client.chat.completions.create(model="tiny-llava", messages=chat(url), max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 324


def test_a_longer_conversation_and_the_options_of_a_client_are_taken(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": "be short."},
        *chat(data_url(PICTURE)),
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "are you sure?"},
    ]
    answer = client.chat.completions.create(
        model="tiny-llava", messages=messages, max_tokens=3, n=1, temperature=0.7, top_p=0.9, seed=1, user="me"
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 3


def test_fifty_requests_at_once_are_all_answered_and_not_mixed_up(
    address: tuple[str, int], loaded: tuple[Any, Any]
) -> None:
    cases = [(PICTURE, QUESTION), (OTHER, QUESTION), (OTHER, "what color is the shape?")]
    texts = [expected(loaded, picture, question=question)[0] for picture, question in cases]
    assert len(set(texts)) > 1

    async def ask_all() -> list[str | None]:
        url = f"http://{address[0]}:{address[1]}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:

            async def ask(i: int) -> str | None:
                picture, question = cases[i % 3]
                messages: Any = chat(data_url(picture), question=question)
                if i % 2:
                    answer = await client.chat.completions.create(model="tiny-llava", messages=messages)
                    return answer.choices[0].message.content
                stream = await client.chat.completions.create(model="tiny-llava", messages=messages, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

            return await asyncio.gather(*(ask(i) for i in range(50)))

    answers = asyncio.run(ask_all())
    assert [a and a.strip() for a in answers] == [texts[i % 3].strip() for i in range(50)]


def test_the_model_list_names_the_one_model_and_other_models_are_refused(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-llava"]
    with pytest.raises(openai.BadRequestError, match="tiny-llava"):
        client.chat.completions.create(model="other/model", messages=chat(data_url(PICTURE)))


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/completions", "/v1/audio/transcriptions", "/docs"])
def test_nothing_else_is_exposed(post: Any, path: str) -> None:
    assert post({"model": "tiny-llava"}, path)[0] == 404


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


_OK = chat(data_url(OTHER))
BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"messages": "\xff"}',
    "a list": b"[]",
    "NaN": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "a key twice": b'{"messages": [], "messages": [{"role": "user", "content": "a"}]}',
    "deep nesting": b"[" * 100_000,
    "deep nesting in tools": json.dumps({"messages": _OK, "tools": json.loads("[" * 60 + "]" * 60)}).encode(),
    "a huge number": b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
    "a large number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": ' + b"9" * 400 + b"}",
    "half a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "no messages": {},
    "messages of no type": {"messages": "hello"},
    "empty messages": {"messages": []},
    "a message of no type": {"messages": ["hello"]},
    "no role": {"messages": [{"content": "a"}]},
    "a role of no type": {"messages": [{"role": ["user"], "content": "a"}]},
    "an unknown role": {"messages": [{"role": "root", "content": "a"}]},
    "no content": {"messages": [{"role": "user"}]},
    "a number as content": {"messages": [{"role": "user", "content": 3}]},
    "the placeholder": {"messages": [{"role": "user", "content": "a <image> b"}]},
    "too long a text": {"messages": [{"role": "user", "content": "a" * 2001}]},
    "too many tokens": {"messages": _OK, "max_tokens": 41},
    "no tokens": {"messages": _OK, "max_tokens": 0},
    "tokens of no type": {"messages": _OK, "max_tokens": True},
    "a stream of no type": {"messages": _OK, "stream": "yes"},
    "a temperature of no type": {"messages": _OK, "temperature": "hot"},
    "two answers": {"messages": _OK, "n": 2},
    "an unknown option": {"messages": _OK, "frobnicate": 1},
    "stop": {"messages": _OK, "stop": ["a"]},
    "logit_bias": {"messages": _OK, "logit_bias": {"5": 100}},
    "a model of no type": {"messages": _OK, "model": {"a": 1}},
    "a call that is no JSON": {
        "messages": [*_OK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    },
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused(post: Any, name: str) -> None:
    status, answer = post(BAD_BODIES[name])
    assert status == 400, answer
    assert answer["error"]["code"] in ("E-SERVE-01", "E-SERVE-02")


def test_bad_input_of_the_responses_route_is_refused(post: Any) -> None:
    for body in (b"{", {}, {"input": 3}, {"input": []}, {"input": [3]}, {"input": [{"type": "item_reference"}]}):
        assert post(body, "/v1/responses")[0] == 400, body


def test_too_long_a_body_is_refused_with_and_without_a_length(address: tuple[str, int], post: Any) -> None:
    long = b" " * 400_000
    assert post(long)[0] == 413
    connection = http.client.HTTPConnection(*address, timeout=60)
    chunks = (b" " * 50_000 for _ in range(8))
    connection.request(
        "POST", "/v1/chat/completions", chunks, {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_posts_that_a_page_of_another_site_could_make_are_refused(post: Any) -> None:
    body = {"model": "tiny-llava", "messages": _OK}
    assert post(body, Content_Type="text/plain")[0] == 415
    assert post(body, Content_Encoding="gzip")[0] == 415
    assert post(body, Host="evil.example")[0] == 403


def test_no_cors_header_is_sent_unless_an_origin_is_allowed(loaded: tuple[Any, Any], address: tuple[str, int]) -> None:
    from starlette.testclient import TestClient

    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("GET", "/health", headers={"Origin": "https://a.example"})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.headers.get("Access-Control-Allow-Origin") is None
    connection.close()
    app = server.build_app(*loaded, name="tiny-llava", limits=LIMITS, cors_origins=["https://a.example"])
    asked = TestClient(app)  # not entered: the model that it shares outlives it
    allowed = [
        asked.get("/health", headers={"Origin": f"https://{host}"}).headers.get("access-control-allow-origin")
        for host in ("a.example", "b.example")
    ]
    assert allowed == ["https://a.example", None]


@pytest.mark.slow
def test_the_command_serves_and_ends_in_good_order() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import typer; from vlmeff.cli_serve import serve_command; typer.run(serve_command)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--model", "tiny-llava", "--preset", "fast", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            for _ in range(600):
                assert process.poll() is None
                try:
                    answer = client.chat.completions.create(model="tiny-llava", messages=chat(data_url(PICTURE)))
                    break
                except openai.APIConnectionError:
                    time.sleep(0.2)
            assert answer.choices[0].message.content
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, shown
    assert f"serving tiny-llava with preset fast at {url}" in shown
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 1):
        pass
