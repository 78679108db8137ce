"""``vlmeff serve`` seen by the openai client: answers, plain and streamed, one and fifty at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from served import OTHER, PICTURE, QUESTION, chat, data_url, encoded, expected

openai = pytest.importorskip("openai")


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
