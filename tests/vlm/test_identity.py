"""Nothing changes until it is asked for, and everything goes back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import MODELS, prompts, tiny

import vlmeff
from tokenpruning.plan import all_of

HALF = vlmeff.HiPrune(keep=0.5, alpha=0.5)
every_model = pytest.mark.parametrize("name", MODELS)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@dataclass(frozen=True)
class KeepAllTheLongWay:
    """Breaks the contract on purpose: asked for some of the tokens it answers all, so a request is taken apart and put
    together again with nothing lost."""

    keep: float = 0.9
    needs: ClassVar[tuple[str, ...]] = ("object", "deep")

    def select(self, segment, k):
        return all_of(segment)


def generated(model, inputs, **arguments):
    return model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **arguments)


def assert_bitwise(a, b):
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.mark.parametrize("keep", [1.0, 10_000])
@every_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_model
def test_a_full_budget_is_the_unwrapped_model_bit_for_bit(name, dtype, attention, keep):
    model = tiny(name, dtype=dtype, attention=attention)
    inputs = prompts(model, [1, 2])
    plain, plain_forward = generated(model, inputs), model(**inputs).logits
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=keep))
    assert_bitwise(generated(model, inputs), plain)
    assert torch.equal(model(**inputs).logits, plain_forward)


@every_attention
@pytest.mark.parametrize("pictures", [[1], [1, 2], [0, 1, 2]], ids=str)
@every_model
def test_a_request_that_is_shortened_by_nothing_gives_the_tokens_of_the_unwrapped_model(name, pictures, attention):
    model = tiny(name, attention=attention)
    inputs = prompts(model, pictures)
    plain = model.generate(**inputs, max_new_tokens=8)
    vlmeff.wrap(model, None, tokens=KeepAllTheLongWay())
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), plain)
    assert vlmeff.report(model).method == "KeepAllTheLongWay"


@pytest.mark.parametrize("pictures", [[0], [0, 0]], ids=str)
@every_model
def test_a_prompt_without_pictures_passes_through_bit_for_bit(name, pictures):
    model = tiny(name)
    inputs = prompts(model, pictures)
    plain, plain_forward = generated(model, inputs), model(**inputs).logits
    vlmeff.wrap(model, None, tokens=HALF)
    assert_bitwise(generated(model, inputs), plain)
    assert torch.equal(model(**inputs).logits, plain_forward)


def fingerprint(model):
    """Everything a wrapper could leave behind: classes, attribute names, hooks, settings, weights."""
    modules = {
        path: (type(module), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    }
    weights = {key: (value.data_ptr(), value.shape, value.dtype) for key, value in model.state_dict().items()}
    generation = getattr(model, "generation_config", None)
    return modules, weights, model.config.to_dict(), generation and generation.to_dict()


@every_model
def test_unwrap_leaves_no_trace(name):
    model = tiny(name)
    inputs = prompts(model, [1, 2])
    plain, before = generated(model, inputs), fingerprint(model)
    assert vlmeff.wrap(model, None, tokens=HALF) is model
    model.generate(**inputs, max_new_tokens=2)
    model(**inputs)
    assert vlmeff.unwrap(model) is model
    assert not vlmeff.is_wrapped(model)
    assert fingerprint(model) == before
    assert_bitwise(generated(model, inputs), plain)


@every_model
def test_a_wrapped_model_is_still_an_instance_of_its_class_under_the_same_name(name):
    model = tiny(name)
    original = type(model)
    vlmeff.wrap(model, None, tokens=HALF)
    assert isinstance(model, original)
    assert (type(model).__name__, type(model).__module__) == (original.__name__, original.__module__)
    assert vlmeff.is_wrapped(model)


@every_model
def test_a_wrapped_model_carries_no_hooks_and_the_same_weights(name):
    model = tiny(name)
    inputs = prompts(model, [1])
    model.generate(**inputs, max_new_tokens=2)  # transformers sets up hooks of its own in the first call
    inside, keys = fingerprint(model.model), list(model.state_dict())
    vlmeff.wrap(model, None, tokens=HALF)
    model.generate(**inputs, max_new_tokens=2)
    assert fingerprint(model.model) == inside
    assert list(model.state_dict()) == keys


@every_model
def test_the_same_inputs_twice_give_the_same_answer_and_are_not_changed(name):
    model = vlmeff.wrap(tiny(name), None, tokens=HALF)
    inputs = prompts(model, [1, 2])
    before = copy.deepcopy(inputs)
    first, first_forward = generated(model, inputs), model(**inputs).logits
    assert_bitwise(generated(model, inputs), first)
    assert torch.equal(model(**inputs).logits, first_forward)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[key], before[key]) for key in before)


@every_model
def test_two_models_in_one_process_do_not_influence_each_other(name):
    wrapped, other, plain = tiny(name), tiny(name), tiny(name)
    inputs = prompts(plain, [1, 2])
    alone = generated(plain, inputs)
    vlmeff.wrap(wrapped, None, tokens=HALF)
    half_alone = generated(wrapped, inputs)
    vlmeff.wrap(other, None, tokens=vlmeff.Downsample(keep=3))
    few_alone = generated(other, inputs)
    assert_bitwise(generated(plain, inputs), alone)
    assert_bitwise(generated(wrapped, inputs), half_alone)
    assert_bitwise(generated(other, inputs), few_alone)
    assert not vlmeff.is_wrapped(plain)
    assert vlmeff.report(wrapped).method == "hiprune"
    assert vlmeff.report(other).visual_tokens_after == 9


@every_model
def test_wrapping_again_replaces_the_configuration_and_one_unwrap_undoes_it(name):
    model = tiny(name)
    inputs = prompts(model, [1])
    plain = generated(model, inputs)
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=5))
    model.generate(**inputs, max_new_tokens=1)
    assert vlmeff.report(model).visual_tokens_after == 5
    vlmeff.wrap(model, None, tokens=vlmeff.Random(keep=7))
    model.generate(**inputs, max_new_tokens=1)
    assert vlmeff.report(model).visual_tokens_after == 7
    vlmeff.unwrap(model)
    assert not vlmeff.is_wrapped(model)
    assert_bitwise(generated(model, inputs), plain)


@every_model
def test_the_class_of_a_wrapped_model_makes_ordinary_models(name):
    model = vlmeff.wrap(tiny(name), None, tokens=HALF)
    inputs = prompts(model, [1])
    new = type(model)(model.config).eval()
    new.load_state_dict(model.state_dict())
    new.generation_config = model.generation_config
    assert not vlmeff.is_wrapped(new)
    assert torch.equal(new.generate(**inputs, max_new_tokens=3), tiny(name).generate(**inputs, max_new_tokens=3))
