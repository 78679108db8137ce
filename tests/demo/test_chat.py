"""The Chat tab through its API, against the engine and against transformers' own generate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio")

import httpx
from gradio_client import Client, handle_file

from vlmeff.demo.chat import MOST_MESSAGES, Message, check_length, turns_of
from vlmeff.demo.engine import Choice, Done, Engine, Text, assistant_turn, user_turn
from vlmeff.demo.limits import Limits
from vlmeff.demo.page import build_demo, launch_options
from vlmeff.demo.samples import EXAMPLES
from vlmeff.demo.site import Site
from vlmeff.errors import DataError
from vlmeff.reporting import Report

PICTURE = EXAMPLES[0].path
ASKED = ("what shape is in the top left?", "how many shapes are there?")
PATIENCE_SECONDS = 60.0  # other tests share the cores
NASTY = "<b>bold</b> **stars** <img src=https://example.org/x.png>"


class Endless:
    """Says a word every few milliseconds until it is stopped, or one nasty text; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.ended = 0

    def presets(self, name: str) -> list[str]:
        return ["fast"]

    def answer(self, turns: Any, choice: Choice, *, stop: Any = None, **options: Any) -> Iterator[Any]:
        self.asked.append(list(turns))
        question = turns[-1]["content"][-1]["text"]
        if question == "fail":
            raise DataError("a failure of the model")
        if question != "go on":
            yield Done(NASTY, Report())
            return
        text = ""
        try:
            end = time.monotonic() + PATIENCE_SECONDS
            while not stop.asked:
                assert time.monotonic() < end, "nobody stopped it"
                text += "word "
                yield Text(text)
                time.sleep(0.02)
            yield Done(text, Report(), stopped=True)
        finally:
            self.ended += 1


def serve(engine: Any, limits: Limits | None = None) -> Any:
    demo = build_demo(Site(engine, ["tiny-llava"], limits or Limits()))
    demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(Site(engine, ["tiny-llava"])))
    return demo


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Engine, str]]:
    engine = Engine("tiny-llava")
    engine.load()
    demo = serve(engine)
    yield engine, demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Endless, str]]:
    engine = Endless()
    demo = serve(engine, Limits(max_question_chars=100, max_pictures=2))
    yield engine, demo.local_url
    demo.close()


@pytest.fixture
def endless(served: tuple[Endless, str]) -> tuple[Endless, Client]:
    """The engine, with nothing asked, and a new visitor."""
    engine, url = served
    engine.asked, engine.ended = [], 0
    return engine, Client(url, verbose=False)


def ask(client: Client, text: str, *files: str, preset: str = "baseline", longest: int = 24) -> list[dict[str, Any]]:
    """The conversation after the answer."""
    message = {"text": text, "files": [handle_file(file) for file in files]}
    log: list[dict[str, Any]] = client.predict("tiny-llava", message, preset, longest, api_name="/chat")[0]
    return log


def text_of(message: dict[str, Any]) -> str:
    (part,) = message["content"]
    return part["text"]


@pytest.mark.parametrize("preset", ["baseline", "fast"])
def test_a_conversation_of_two_turns_is_answered_as_by_the_engine(real, preset):
    engine, url = real
    client = Client(url, verbose=False)
    ask(client, ASKED[0], PICTURE, preset=preset)
    log = ask(client, ASKED[1], preset=preset)
    assert [message["role"] for message in log] == ["user", "user", "assistant", "user", "assistant"]
    choice = Choice() if preset == "baseline" else Choice(preset=preset)
    turns: list[Any] = []
    for question, pictures, said in zip(ASKED, ([Image.open(PICTURE)], []), (log[2], log[4]), strict=True):
        turns.append(user_turn(question, pictures))
        done = list(engine.answer(turns, choice, max_new_tokens=24))[-1]
        assert text_of(said) == done.text != ""
        turns.append(assistant_turn(done.text))


def test_the_last_answer_is_what_transformers_generates_from_the_chat_template(real):
    engine, url = real
    client = Client(url, verbose=False)
    first = text_of(ask(client, ASKED[0], PICTURE)[-1])
    second = text_of(ask(client, ASKED[1])[-1])
    picture = {"type": "image"}
    chat = [
        {"role": "user", "content": [picture, {"type": "text", "text": ASKED[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": first}]},
        {"role": "user", "content": [{"type": "text", "text": ASKED[1]}]},
    ]
    prompt = engine.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = engine.processor(text=prompt, images=Image.open(PICTURE).convert("RGB"), return_tensors="pt")
    ids = engine.model.generate(**inputs, do_sample=False, max_new_tokens=24)
    expected = engine.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert second == expected.strip()


def test_two_visitors_do_not_see_each_others_conversation(endless):
    engine, first = endless
    second = Client(first.src, verbose=False)
    ask(first, "one")
    log = ask(second, "two")
    assert [text_of(message) for message in log][:1] == ["two"]
    assert len(engine.asked[-1]) == 1


def test_a_client_cannot_hand_in_a_past(endless):
    _, client = endless
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/chat"]["parameters"]
    assert [p["label"] for p in parameters] == ["Model", "Message", "Preset", "Longest answer, tokens"]


def test_a_path_that_was_not_uploaded_is_refused(endless, tmp_path):
    engine, client = endless
    here = tmp_path / "private.png"
    Image.new("RGB", (8, 8), "red").save(here)
    for path in ("/etc/hostname", str(here)):
        for file in ({"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}):
            body = {"data": ["tiny-llava", {"text": "what is it?", "files": [file]}, "baseline", 8]}
            start = httpx.post(f"{client.src}gradio_api/call/chat", json=body, timeout=PATIENCE_SECONDS)
            if start.status_code == 200:
                event = start.json()["event_id"]
                ended = httpx.get(f"{client.src}gradio_api/call/chat/{event}", timeout=60).text
                assert "event: error" in ended
                assert "event: complete" not in ended
    assert engine.asked == []


def test_limits_of_question_and_pictures_hold_over_the_conversation(endless):
    engine, client = endless
    with pytest.raises(Exception, match="more than 100"):
        ask(client, "x" * 101)
    with pytest.raises(Exception, match="no question yet"):
        ask(client, "   ")
    ask(client, "first", PICTURE)
    ask(client, "second", PICTURE)
    with pytest.raises(Exception, match="3 pictures are too many"):
        ask(client, "third", PICTURE)
    assert len(engine.asked) == 2


def test_a_file_that_is_no_picture_is_named_in_plain_words(endless, tmp_path):
    _, client = endless
    fake = tmp_path / "fake.png"
    fake.write_text("no picture")
    with pytest.raises(Exception, match="cannot be decoded"):
        ask(client, "what is it?", str(fake))


def test_texts_are_escaped(endless):
    _, client = endless
    log = ask(client, NASTY)
    escaped = NASTY.replace("<", "&lt;").replace(">", "&gt;")
    assert [text_of(message) for message in log] == [escaped, escaped]


def test_escapes_do_not_reach_the_model(endless):
    engine, client = endless
    ask(client, NASTY)
    ask(client, "and now?")
    said = [turn["content"][-1]["text"] for turn in engine.asked[-1]]
    assert said == [NASTY, NASTY, "and now?"]


def test_stop_ends_the_generation_and_the_conversation_goes_on(endless):
    engine, client = endless
    message = {"text": "go on", "files": []}
    job = client.submit("tiny-llava", message, "baseline", 8, api_name="/chat")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any("word" in str(output) for output in job.outputs()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert engine.ended == 0
    box, status = client.predict(api_name="/stop_chat")
    assert box["interactive"] is True
    assert "stopped" in status
    while engine.ended == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    log = ask(client, "and now?")
    assert text_of(log[-2]) == "and now?"
    assert text_of(log[1]).startswith("word ")


def test_a_question_that_failed_is_no_part_of_the_conversation(endless):
    engine, client = endless
    ask(client, "first", PICTURE)
    with pytest.raises(Exception, match="a failure of the model"):
        ask(client, "fail", PICTURE)
    log = ask(client, "again")
    texts = [part["text"] for turn in engine.asked[-1] for part in turn["content"] if part["type"] == "text"]
    assert texts == ["first", NASTY, "again"]
    assert [text_of(message) for message in log[1:] if message["role"] == "user"] == ["first", "again"]


def test_a_new_conversation_forgets_the_old_one(endless):
    engine, client = endless
    ask(client, "first", PICTURE)
    client.predict(api_name="/new_chat")
    ask(client, "second")
    (turn,) = engine.asked[-1]
    assert [part["type"] for part in turn["content"]] == ["text"]


def test_a_question_without_an_answer_joins_the_next():
    messages = [Message("user", "one", ("a",)), Message("user", "two", ("b",)), Message("assistant", "three")]
    turns = turns_of(messages, lambda path: Image.new("RGB", (1, 1)))
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert [part["type"] for part in turns[0]["content"]] == ["image", "text", "image", "text"]


def test_a_conversation_has_a_longest_length():
    check_length([Message("user", "x")] * MOST_MESSAGES, Limits())
    with pytest.raises(DataError, match="start a new one"):
        check_length([Message("user", "x")] * (MOST_MESSAGES + 1), Limits())
