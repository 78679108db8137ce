"""On every family nothing changes until it is asked for, and everything goes back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import pytest
import torch
from tiny_models import ALL_MODELS, prompts, tiny

import vlmeff
from tokenpruning.plan import all_of
from vlmeff.vlm.families import FAMILIES

NAMES = [name for name in ALL_MODELS if name in FAMILIES]
BATCHES = [[1], [2], [0, 1, 2]]
# Left padding gives a row of forward other absolute positions than the short prompt has: rotations round differently.
TOLERANCE = {"atol": 5e-5, "rtol": 2e-5}

every_family = pytest.mark.parametrize("name", NAMES)
every_batch = pytest.mark.parametrize("pictures", BATCHES, ids=str)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class KeepAllTheLongWay:
    """Breaks the contract on purpose: asked for some of the tokens it answers all, so a request is taken apart and put
    together again with nothing lost."""

    keep: float = 0.5
    needs: ClassVar[tuple[str, ...]] = ("object", "deep")

    def select(self, segment, k):
        return all_of(segment)


def generated(model, inputs, **arguments):
    return model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **arguments)


@lru_cache
def unwrapped(name, pictures, dtype):
    """Inputs and what the model answers before it is wrapped."""
    model = tiny(name, dtype=dtype)
    inputs = prompts(model, list(pictures))
    return inputs, generated(model, inputs), model(**inputs).logits


def assert_bitwise(a, b):
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


@pytest.mark.parametrize(
    ("dtype", "pictures"),
    [*((torch.float32, pictures) for pictures in BATCHES), (torch.bfloat16, [0, 1, 2])],
    ids=["[1]", "[2]", "[0, 1, 2]", "bfloat16"],
)
@every_family
def test_a_full_budget_is_the_unwrapped_model_bit_for_bit(name, dtype, pictures):
    inputs, plain, plain_forward = unwrapped(name, tuple(pictures), dtype)
    model = tiny(name, dtype=dtype)
    for keep, newline in ((1.0, "keep"), (10**9, "drop")):
        vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=keep), newline=newline)
        assert_bitwise(generated(model, inputs), plain)
        assert torch.equal(model(**inputs).logits, plain_forward)


@every_batch
@every_family
def test_a_request_that_is_shortened_by_nothing_gives_the_answer_of_the_unwrapped_model(name, pictures):
    inputs, plain, plain_forward = unwrapped(name, tuple(pictures), torch.float32)
    model = vlmeff.wrap(tiny(name), None, tokens=KeepAllTheLongWay(), newline="keep")
    assert_bitwise(generated(model, inputs), plain)
    output = model(**inputs)
    assert bool(output.vlmeff_keep.all())
    assert vlmeff.report(model).visual_tokens_after == vlmeff.report(model).visual_tokens_before > 0
    for row, valid in enumerate(inputs["attention_mask"].bool()):
        n = int(valid.sum())
        torch.testing.assert_close(output.logits[row, -n:], plain_forward[row, valid], **TOLERANCE)


@every_family
def test_beams_over_a_request_that_is_shortened_by_nothing_are_those_of_the_unwrapped_model(name):
    model = tiny(name)
    inputs = prompts(model, [0, 1, 2])
    arguments = {"num_beams": 3, "num_return_sequences": 2}
    plain = model.generate(**inputs, max_new_tokens=4, **arguments)
    vlmeff.wrap(model, None, tokens=KeepAllTheLongWay(), newline="keep")
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, **arguments), plain)


def fingerprint(model):
    """Everything a wrapper could leave behind: classes, attribute names, hooks, settings, weights."""
    modules = {
        path: (type(module), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    }
    weights = {key: value.data_ptr() for key, value in model.state_dict().items()}
    return modules, weights, model.config.to_dict(), model.generation_config.to_dict()


@every_family
def test_the_same_inputs_twice_give_the_same_answer_and_unwrap_leaves_no_trace(name):
    model = tiny(name)
    inputs = prompts(model, [1, 2])
    given = copy.deepcopy(inputs)
    plain, before = generated(model, inputs), fingerprint(model)
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.5, alpha=0.5))
    first, first_forward = generated(model, inputs), model(**inputs).logits
    assert_bitwise(generated(model, inputs), first)
    assert torch.equal(model(**inputs).logits, first_forward)
    assert inputs.keys() == given.keys()
    assert all(torch.equal(inputs[key], given[key]) for key in given)
    vlmeff.unwrap(model)
    assert fingerprint(model) == before
    assert_bitwise(generated(model, inputs), plain)


@every_family
def test_a_prompt_without_pictures_passes_through_bit_for_bit(name):
    model = tiny(name)
    inputs = prompts(model, [0, 0])
    plain, plain_forward = generated(model, inputs), model(**inputs).logits
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.5))
    assert_bitwise(generated(model, inputs), plain)
    assert torch.equal(model(**inputs).logits, plain_forward)
