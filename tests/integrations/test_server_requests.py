"""What else a request may be: bodies, lengths, headers and routes that are refused."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest
from served import LIMITS, OTHER, chat, data_url

from vlmeff.integrations import server

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


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/completions", "/v1/audio/transcriptions", "/docs"])
def test_nothing_else_is_exposed(post: Any, path: str) -> None:
    assert post({"model": "tiny-llava"}, path)[0] == 404
