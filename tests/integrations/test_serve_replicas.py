"""``vlmeff serve --replicas 2``: two models behind Ray Serve, the same answers and refusals, one of them killed."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from served import OTHER, PICTURE, QUESTION, ROOT, chat, data_url, expected

from vlmeff.cli_serve import serve_command
from vlmeff.errors import ConfigError, EnvironmentMismatchError, MissingExtraError, VlmeffError
from vlmeff.integrations import server_replicas

openai = pytest.importorskip("openai")

CALL = "/ray.serve.ASGIService/HandleRequest"


def test_a_missing_ray_serve_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "grpc" else there(name))
    with pytest.raises(MissingExtraError, match=r'E-ENV-01: .*pip install "vlmeff\[replicas\]"'):
        server_replicas.check_ray()


def test_a_ray_whose_ports_ask_for_no_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.40.0")
    with pytest.raises(EnvironmentMismatchError, match=r"E-ENV-02: .*2\.40\.0 is installed"):
        server_replicas.check_ray()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:1"}, ConfigError, "use --device cuda"),
        ({"preset": "fsat"}, VlmeffError, "Did you mean 'fast'"),
        ({"host": "no such host"}, ConfigError, "--host"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(server_replicas, "check_ray", lambda: None)
    monkeypatch.setattr(server_replicas, "_ray", lambda replicas: pytest.fail("Ray was started"))
    with pytest.raises(error, match=message):
        server_replicas.serve_replicas(2, "tiny-llava", **{"port": 0, **options})


def test_one_replica_does_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("vlmeff.integrations.server.serve", lambda *a, **k: told.append("one"))
    monkeypatch.setattr(server_replicas, "serve_replicas", lambda n, *a, **k: told.append(n))
    serve_command(replicas=1)
    serve_command(replicas=3)
    assert told == ["one", 3]


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command with two replicas, and its port; ended in good order after the module."""
    pytest.importorskip("ray", reason="the extra replicas is not installed (ray is missing)")
    pytest.importorskip("grpc", reason="the extra replicas is not installed (grpc is missing)")
    program = "import typer; from vlmeff.cli_serve import serve_command; typer.run(serve_command)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    made = subprocess.Popen(
        [sys.executable, "-c", program, "--replicas", "2", "--port", "0", "--max-request-mb", "0.3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    started: list[psutil.Process] = []
    try:
        assert made.stderr is not None
        lines = []
        while (line := made.stderr.readline()) and not line.startswith("serving "):
            lines.append(line)
        found = re.search(r"in 2 replicas at http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, "".join([*lines, line])
        yield made, int(found[1])
        started = psutil.Process(made.pid).children(recursive=True)
        made.send_signal(signal.SIGTERM)
        shown = made.communicate(timeout=120)[1]
        assert made.returncode == 0, shown
        _, left = psutil.wait_procs(started, 30)
        assert left == []
    finally:
        made.kill()
        for child in started:
            if child.is_running():
                child.kill()


def replicas_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The replicas that run; one that was killed stays a zombie until its parent has noticed."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica" in " ".join(child.cmdline()):
                found.append(child)
    return found


def post(port: int, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, raw, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def ask_all(port: int, count: int) -> list[str]:
    """The answers to requests at once, every second one streamed."""
    cases = [(PICTURE, QUESTION), (OTHER, "what color is the shape?")]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:

            async def ask(i: int) -> str:
                picture, question = cases[i // 2 % 2]
                messages: Any = chat(data_url(picture), question=question)
                if i % 2:
                    answer = await client.chat.completions.create(model="tiny-llava", messages=messages)
                    return (answer.choices[0].message.content or "").strip()
                stream = await client.chat.completions.create(model="tiny-llava", messages=messages, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]).strip()

            return await asyncio.gather(*(ask(i) for i in range(count)))

    return asyncio.run(together())


@pytest.mark.slow
def test_two_replicas_share_fifty_requests_without_loss(process: Any, loaded: tuple[Any, Any]) -> None:
    made, port = process
    texts = [
        expected(loaded, picture, question=question)[0].strip()
        for picture, question in ((PICTURE, QUESTION), (OTHER, "what color is the shape?"))
    ]
    before = {p.pid: sum(p.cpu_times()[:2]) for p in replicas_of(made)}
    assert len(before) == 2
    assert ask_all(port, 50) == [texts[i // 2 % 2] for i in range(50)]
    worked = [sum(p.cpu_times()[:2]) - before[p.pid] for p in replicas_of(made)]
    assert min(worked) > 0.1 * max(worked)


@pytest.mark.slow
def test_a_stream_comes_in_pieces(process: Any, loaded: tuple[Any, Any]) -> None:
    question = "describe the picture."
    with openai.OpenAI(base_url=f"http://127.0.0.1:{process[1]}/v1", api_key="none", max_retries=0) as client:
        messages: Any = chat(data_url(PICTURE), question=question)
        stream = client.chat.completions.create(model="tiny-llava", messages=messages, stream=True, max_tokens=40)
        pieces = [c.choices[0].delta.content for c in stream if c.choices and c.choices[0].delta.content]
        assert len(pieces) > 3
        assert "".join(pieces).strip() == expected(loaded, PICTURE, question=question)[0].strip()
        assert [model.id for model in client.models.list()] == ["tiny-llava"]


@pytest.mark.slow
def test_the_gate_stands_before_every_replica(process: Any, tmp_path: Path) -> None:
    port = process[1]
    secret = tmp_path / "secret.png"
    secret.write_bytes(PICTURE.read_bytes())
    inside = f"http://127.0.0.1:{port}/health"
    for url in (str(secret), secret.as_uri(), inside, "http://169.254.169.254/a.png", "data:image/svg+xml;base64,PA=="):
        for _ in range(4):  # of both replicas
            status, answer = post(port, {"model": "tiny-llava", "messages": chat(url)})
            assert (status, answer["error"]["code"]) == (400, "E-SERVE-01"), (url, answer)
    good = {"model": "tiny-llava", "messages": chat(data_url(OTHER))}
    assert post(port, {**good, "frobnicate": 1})[1]["error"]["code"] == "E-SERVE-02"
    assert post(port, good, Host="evil.example")[0] == 403
    assert post(port, b" " * 400_000)[0] == 413
    for path in ("/load_model", "/reset", "/docs", "/v1/completions"):
        assert post(port, good, path)[0] == 404


@pytest.mark.slow
def test_nothing_is_unpickled_for_those_without_the_token(process: Any, tmp_path: Path) -> None:
    """The open port of every replica; with the token this payload would run a command."""
    import grpc

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was-here"),)

    pickled = pickle.dumps(Payload())
    # Field 1 of the message, as protobuf writes bytes: tag, length, content.
    message = b"\x0a" + bytes([len(pickled)]) + pickled
    assert len(pickled) < 128
    open_ports = []
    for replica in replicas_of(process[0]):
        for connection in replica.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip in ("::", "0.0.0.0"):
                open_ports.append(connection.laddr.port)
    assert len(open_ports) == 2
    for port in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(CALL, request_serializer=lambda m: m, response_deserializer=lambda m: m)
            with pytest.raises(grpc.RpcError) as refused:
                call(message, timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert not (tmp_path / "was-here").exists()


@pytest.mark.slow
def test_a_replica_that_dies_is_replaced(process: Any, loaded: tuple[Any, Any]) -> None:
    made, port = process
    first, second = replicas_of(made)
    first.kill()
    for _ in range(600):
        now = {p.pid for p in replicas_of(made)}
        if len(now) == 2 and first.pid not in now:
            break
        time.sleep(0.5)
    assert len(now - {first.pid}) == 2
    assert second.pid in now
    text = expected(loaded, PICTURE)[0].strip()
    assert ask_all(port, 2) == [text, text]
