"""A wrapped model is copied, saved, cast, placed and shared between threads like any other."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings

import pytest
import torch
from tiny_models import MODELS, prompts, tiny
from transformers import AutoModelForImageTextToText

import vlmeff

PRUNE = vlmeff.HiPrune(keep=0.4, alpha=0.5)
every_model = pytest.mark.parametrize("name", MODELS)


def wrapped_tiny(name, tokens=PRUNE, **options):
    return vlmeff.wrap(tiny(name, **options), None, tokens=tokens)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@every_model
def test_a_copy_is_a_wrapped_model_of_its_own(name, duplicate):
    wrapped = wrapped_tiny(name)
    second = duplicate(wrapped)  # before the first call, after which transformers' own hooks cannot be pickled
    inputs = prompts(wrapped, [1])
    expected = wrapped.generate(**inputs, max_new_tokens=4)
    assert torch.equal(second.generate(**inputs, max_new_tokens=4), expected)
    vlmeff.unwrap(second)
    assert vlmeff.is_wrapped(wrapped)
    assert torch.equal(second.generate(**inputs, max_new_tokens=4), tiny(name).generate(**inputs, max_new_tokens=4))
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=4), expected)


@every_model
def test_a_wrapped_model_is_saved_as_the_model_it_was(name, tmp_path):
    model = tiny(name)
    inputs = prompts(model, [1])
    expected = model.generate(**inputs, max_new_tokens=4)
    vlmeff.wrap(model, None, tokens=PRUNE).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.architectures == [type(tiny(name)).__name__]
    assert not vlmeff.is_wrapped(loaded)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4), expected)


@every_model
def test_a_wrapped_model_can_be_cast(name):
    wrapped = wrapped_tiny(name).to(torch.bfloat16)
    inputs = prompts(wrapped, [0, 1, 2])
    expected = wrapped_tiny(name, dtype=torch.bfloat16).generate(**inputs, max_new_tokens=4)
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=4), expected)


@pytest.mark.parametrize("order", ["before wrap", "after wrap"])
@every_model
def test_accelerate_hooks_put_on_before_or_after_wrap_go_on_working(name, order):
    from accelerate import dispatch_model

    inputs = prompts(tiny(name), [1])
    expected = wrapped_tiny(name).generate(**inputs, max_new_tokens=4)
    model, placement = tiny(name), {"device_map": {"": "cpu"}, "main_device": "cpu", "force_hooks": True}
    if order == "before wrap":
        model = vlmeff.wrap(dispatch_model(model, **placement), None, tokens=PRUNE)
    else:
        model = dispatch_model(vlmeff.wrap(model, None, tokens=PRUNE), **placement)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), expected)
    assert vlmeff.report(model).visual_tokens_after < vlmeff.report(model).visual_tokens_before
    vlmeff.unwrap(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), tiny(name).generate(**inputs, max_new_tokens=4))


@every_model
def test_a_model_with_a_device_map_is_wrapped_and_unwrapped(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="cpu")
    inputs = prompts(model, [1])
    plain = model.generate(**inputs, max_new_tokens=4)
    vlmeff.wrap(model, None, tokens=PRUNE)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=4), wrapped_tiny(name).generate(**inputs, max_new_tokens=4)
    )
    assert torch.equal(vlmeff.unwrap(model).generate(**inputs, max_new_tokens=4), plain)


@every_model
def test_two_threads_on_one_wrapped_model_get_the_answers_they_get_in_turn(name):
    wrapped = wrapped_tiny(name)
    jobs = [prompts(wrapped, pictures, seed=i) for i, pictures in enumerate([[1], [0, 2]])]
    expected = [wrapped.generate(**inputs, max_new_tokens=8) for inputs in jobs]
    answers = [[], []]
    start = threading.Barrier(2)

    def work(number):
        start.wait()
        answers[number] += [wrapped.generate(**jobs[number], max_new_tokens=8) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, right in zip(answers, expected, strict=True):
        assert len(got) == 4
        assert all(torch.equal(answer, right) for answer in got)


@every_model
def test_inference_mode_leaves_nothing_that_a_later_call_trips_over(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    with torch.inference_mode():
        first = wrapped.generate(**inputs, max_new_tokens=4)
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=4), first)
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()


@every_model
def test_an_ordinary_call_gives_no_warning(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped.generate(**inputs, max_new_tokens=2)
        wrapped(**inputs)


@pytest.mark.parametrize("method", ["forward", "generate"])
@every_model
def test_the_methods_keep_their_signatures(name, method):
    # Trainer and pipelines look at them to find out which arguments a model takes.
    plain, wrapped = tiny(name), wrapped_tiny(name)
    assert inspect.signature(getattr(wrapped, method)) == inspect.signature(getattr(plain, method))
