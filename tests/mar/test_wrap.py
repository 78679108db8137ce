"""wrap, unwrap, load, presets and report on a MAR generator."""

import pytest
import torch
from tiny_video import wan_transformer

import vlmeff
from vlmeff.errors import ConfigError, UnknownNameError, UnsupportedModelError
from vlmeff.models.mar.loading import load_draft


@pytest.fixture(scope="module")
def model():
    return vlmeff.load("tiny-mar")[0]


@pytest.fixture(scope="module")
def plain(model):
    return model.sample(torch.tensor([7, 3]), seed=0).latents


@pytest.mark.parametrize(("preset", "most"), [("quality", 1e-3), ("balanced", 0.05), ("fast", 0.1)])
def test_presets_stay_near_plain_decoding_in_fewer_passes(model, plain, preset, most):
    kind = type(model)
    assert vlmeff.wrap(model, preset) is model
    try:
        out = model.sample(torch.tensor([7, 3]), seed=0)
        assert isinstance(model, kind)
        assert float((out.latents - plain).abs().max()) <= most
        assert out.stats.target_passes < 16
        assert vlmeff.report(model).stats.target_passes == out.stats.target_passes
        assert "the target's own" in str(vlmeff.report(model))
    finally:
        vlmeff.unwrap(model)
    assert type(model) is kind
    assert torch.equal(model.sample(torch.tensor([7, 3]), seed=0).latents, plain)


def test_a_draft_makes_the_guesses_and_exact_needs_one(model, plain):
    vlmeff.wrap(model, draft=load_draft())
    try:
        out = model.sample(torch.tensor([7, 3]), seed=0)
        assert out.stats.draft_passes > 0
        assert float((out.latents - plain).abs().max()) < 0.1
    finally:
        vlmeff.unwrap(model)
    with pytest.raises(ConfigError, match="draft"):
        vlmeff.wrap(model, None, mode="exact")
    assert not vlmeff.is_wrapped(model)


def test_presets_of_a_generator_are_its_own(model):
    rows = {row.preset: row for row in vlmeff.presets(model)}
    assert set(rows) == {"quality", "balanced", "fast"}
    assert all("continuous" in row.steps and row.status == "fixture" for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tokens": "hiprune"}, UnsupportedModelError, "tokens"),
        ({"quant": "auto"}, UnsupportedModelError, "quant"),
        ({"mode": "fastest"}, ConfigError, "coupled"),
        ({"windw": 4}, UnknownNameError, "window"),
        ({"continuous": "coupled"}, ConfigError, r"vlmeff\.Continuous"),
        ({}, ConfigError, "nothing is asked for"),
        ({"delta": -1.0}, ConfigError, "delta"),
    ],
)
def test_arguments_that_cannot_work_name_themselves(model, arguments, error, words):
    with pytest.raises(error, match=words):
        vlmeff.wrap(model, None, **arguments)
    assert not vlmeff.is_wrapped(model)


def test_a_draft_is_for_generators_alone():
    video, draft = wan_transformer(), load_draft()
    with pytest.raises(UnsupportedModelError, match="draft"):
        vlmeff.wrap(video, None, draft=draft)
