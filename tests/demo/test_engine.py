"""The engine behind the page: its answers are the model's, it stops when told, and users do not see each other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

import vlmeff
from vlmeff.demo.engine import Choice, Done, Engine, Text, user_turn
from vlmeff.demo.samples import EXAMPLES
from vlmeff.demo.work import WAITING, Note, Stop, alone
from vlmeff.errors import ConfigError, DataError, ModelLoadError, UnknownNameError, UnsupportedModelError

LONG = 400  # tokens; runs that are stopped end far before
FEW = 8  # tokens between the flag and the end: the one in progress, and those said before the flag was looked at


def picture() -> Image.Image:
    return Image.open(EXAMPLES[0].path).convert("RGB")


def asked(question: str = "describe the picture.") -> list[dict[str, Any]]:
    return [user_turn(question, [picture()])]


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine("tiny-llava", device="cpu")
    engine.load()
    return engine


@pytest.fixture
def endless(engine: Engine) -> Iterator[Engine]:
    """The engine with a model that never ends an answer by itself."""
    config = engine.model.generation_config
    ends, config.eos_token_id = config.eos_token_id, None
    yield engine
    config.eos_token_id = ends


def last(news: Iterator[Any]) -> Done:
    *_, done = news
    assert isinstance(done, Done)
    return done


def reference(name: str, choice: Choice, question: str) -> str:
    """The answer by the public interface, with a model of its own."""
    model, processor = vlmeff.load(name, device="cpu")
    if not choice.plain:
        model = vlmeff.wrap(model, choice.preset)
    inputs = processor.apply_chat_template(
        asked(question), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("choice", [Choice(), Choice(preset="fast")], ids=["baseline", "fast"])
def test_the_streamed_answer_is_the_models(engine: Engine, choice: Choice) -> None:
    news = list(engine.answer(asked(), choice))
    done = last(iter(news))
    assert done.text == reference("tiny-llava", choice, "describe the picture.")
    texts = [item.text for item in news if isinstance(item, Text)]
    assert len(texts) > 1
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert texts[-1] == done.text
    assert not vlmeff.is_wrapped(engine.model)


def test_figures_come_with_the_answer(engine: Engine) -> None:
    plain, fast = last(engine.answer(asked(), Choice())), last(engine.answer(asked(), Choice(preset="fast")))
    assert (plain.report.visual_tokens_after, fast.report.visual_tokens_after) == (324, 108)
    assert plain.report.kv_bytes > fast.report.kv_bytes > 0
    assert plain.peak_bytes is None  # of a CPU
    assert plain.maps == []
    (one,) = fast.maps
    assert (one.kept, one.total, one.before.size) == (108, 324, one.after.size)


def test_the_first_run_of_a_choice_follows_a_warm_up_that_is_not_measured() -> None:
    engine = Engine("tiny-llava", device="cpu")
    first = [item.text for item in engine.answer(asked(), Choice()) if isinstance(item, Note)]
    again = [item.text for item in engine.answer(asked(), Choice()) if isinstance(item, Note)]
    other = [item.text for item in engine.answer(asked(), Choice(preset="fast")) if isinstance(item, Note)]
    assert first == ["loading tiny-llava", "warm-up run, not measured"]
    assert again == []
    assert other == ["warm-up run, not measured"]


def test_stop_ends_generation_within_a_few_tokens_and_frees_the_model(endless: Engine) -> None:
    before = threading.active_count()
    forwards: list[int] = []
    handle = endless.model.register_forward_hook(lambda *args: forwards.append(1))
    stop, at = Stop(), 0
    done: Done | None = None
    for news in endless.answer(asked(), Choice(), max_new_tokens=LONG, stop=stop):
        if isinstance(news, Text) and not stop.asked:
            stop.set()
            at = len(forwards)
        if isinstance(news, Done):
            done = news
    handle.remove()
    assert done is not None
    assert done.stopped
    assert len(forwards) <= at + FEW
    assert threading.active_count() == before
    assert not alone.locked()
    assert last(endless.answer(asked(), Choice(), max_new_tokens=4)).report.new_tokens == 4


def test_leaving_the_answer_early_ends_the_generation(endless: Engine) -> None:
    forwards: list[int] = []
    handle = endless.model.register_forward_hook(lambda *args: forwards.append(1))
    news = endless.answer(asked(), Choice(preset="fast"), max_new_tokens=LONG)
    while not isinstance(next(news), Text):
        pass
    at = len(forwards)
    news.close()
    with alone:  # free again at the end of the run
        assert len(forwards) <= at + FEW
    handle.remove()
    assert not vlmeff.is_wrapped(endless.model)


def test_a_stop_before_the_start_runs_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.model, "generate", lambda **options: pytest.fail("it ran"))
    stop = Stop()
    stop.set()
    done = last(engine.answer(asked(), Choice(preset="fast"), stop=stop))
    assert (done.text, done.stopped, done.report.total_ms) == ("", True, None)


def test_who_waits_for_another_user_can_stop_waiting(endless: Engine) -> None:
    other = endless.answer(asked(), Choice(), max_new_tokens=LONG)
    while not isinstance(next(other), Text):
        pass
    stop = Stop()
    waiting = endless.answer(asked(), Choice(), stop=stop)
    assert next(waiting) == Note(WAITING)
    stop.set()
    assert last(waiting).stopped
    other.close()


def test_two_users_at_once_with_other_models_and_presets_get_what_each_gets_alone() -> None:
    engine = Engine("tiny-llava", device="cpu")
    wishes = [("tiny-llava", Choice(preset="fast")), ("tiny-qwen", Choice()), ("tiny-llava", Choice())]
    found: dict[int, str] = {}

    def use(number: int) -> None:
        name, choice = wishes[number]
        found[number] = last(engine.answer(asked(), choice, model=name)).text

    users = [threading.Thread(target=use, args=(number,)) for number in range(len(wishes))]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert [found[n] for n in range(3)] == [reference(*wish, "describe the picture.") for wish in wishes]


def test_an_error_inside_generate_is_raised_and_leaves_the_engine_usable(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**options: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(engine.answer(asked(), Choice(preset="fast")))
    assert not vlmeff.is_wrapped(engine.model)
    assert last(engine.answer(asked(), Choice())).text


def test_a_model_that_cannot_be_loaded_leaves_the_present_one(engine: Engine) -> None:
    model = engine.model
    for name in ("tiny-lava", "no/such-folder", "tiny-wan"):  # a wrong name, a missing folder, no model for pictures
        with pytest.raises((UnknownNameError, ModelLoadError, UnsupportedModelError)):
            list(engine.answer(asked(), Choice(), model=name))
    assert (engine.name, engine.model) == ("tiny-llava", model)


def test_an_unknown_preset_or_method_is_named(engine: Engine) -> None:
    with pytest.raises(UnknownNameError, match="fastest"):
        list(engine.answer(asked(), Choice(preset="fastest")))
    with pytest.raises(UnknownNameError, match="hiprun"):
        list(engine.answer(asked(), Choice(tokens="hiprun", keep=0.5)))


@pytest.mark.parametrize(("model", "word"), [("tiny-llava", "<image>"), ("tiny-qwen", "<|im_start|>")])
def test_a_word_that_the_model_takes_for_more_than_text_is_refused(model: str, word: str) -> None:
    engine = Engine(model, device="cpu")
    for question in (word, f"what{word}is it?"):
        with pytest.raises(DataError, match="has a meaning of its own") as caught:
            list(engine.answer(asked(question), Choice(preset="fast")))
        assert word in str(caught.value)
    assert last(engine.answer(asked("a < b | c > d?"), Choice())).text


def test_a_conversation_must_end_with_a_question(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="must end with a question"):
        list(engine.answer([], Choice()))
