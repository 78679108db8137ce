"""A running server of the shipped model, for all test files that ask it."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vlmeff


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The wrapped model and its processor."""
    return vlmeff.load("tiny-llava", "fast")


@pytest.fixture(scope="module")
def address(loaded: tuple[Any, Any]) -> Iterator[tuple[str, int]]:
    """Host and port of a running server, which has ended, its thread and its port with it, after the module."""
    import uvicorn  # here and below: other tests of this folder do without the extra
    from served import LIMITS

    from vlmeff.integrations import server

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
def client(address: tuple[str, int]) -> Iterator[Any]:
    """The client of OpenAI, pointed at the server."""
    import openai

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
