"""The vLLM plug-in's pure part: token counts known before the encoder runs. vLLM is not needed, and never imported."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft

import vlmeff
from vlmeff.asking import prepare
from vlmeff.errors import ConfigError, UnknownNameError, UnsupportedModelError

PLUGIN = Path(__file__).resolve().parents[2] / "integrations" / "vllm_plugin"
SETTINGS = [
    {"method": "hiprune", "keep": 20},
    {"method": "hiprune", "keep": 0.3333, "alpha": 0.2},
    {"method": "hiprune", "keep": 10_000},
    {"method": "fourier", "side": 5},
    {"method": "dct", "ratio": 0.5},
]


@pytest.fixture(scope="module")
def contract():
    sys.path.insert(0, str(PLUGIN))
    try:
        yield importlib.import_module("vlmeff_vllm.contract")
    finally:
        sys.path.remove(str(PLUGIN))


@pytest.fixture(scope="module")
def tiny():
    return vlmeff.load("tiny-llava")


def method_of(settings):
    fields = {name: value for name, value in settings.items() if name != "method"}
    return vlmeff.HiPrune(**fields) if settings["method"] == "hiprune" else vlmeff.Fourier(**fields)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_processor_plan_and_a_wrapped_model_agree_on_the_count(contract, tiny, settings):
    model, processor = tiny
    made = contract.read_contract(settings)
    grid = contract.grid_of(model.config)
    count = made.tokens(grid)
    size = (model.config.vision_config.image_size,) * 2
    assert vlmeff.plan(model, size, None, tokens=method_of(settings)).visual_tokens_after == count

    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    vlmeff.wrap(model, None, tokens=method_of(settings), min_visual_tokens=0)
    try:
        model.generate(**prepare(processor, picture, "what color is the shape?"), max_new_tokens=1, do_sample=False)
        assert vlmeff.report(model).visual_tokens_after == count
    finally:
        vlmeff.unwrap(model)

    before = processor.num_additional_image_tokens
    try:
        strategy = model.config.vision_feature_select_strategy
        processor.num_additional_image_tokens = made.additional_tokens(grid, strategy)
        ids = prepare(processor, picture, "what color is the shape?")["input_ids"]
        assert int((ids == model.config.image_token_id).sum()) == count
    finally:
        processor.num_additional_image_tokens = before


def test_dct_is_a_truncated_spectrum_with_the_mean_kept(contract):
    features = torch.randn(2, 6 * 6, 3, generator=torch.Generator().manual_seed(0))
    small = contract.read_contract({"method": "fourier", "side": 4}).reduce(features, (6, 6))
    spectrum = fft.dctn(features.double().numpy().reshape(2, 6, 6, 3), axes=(1, 2), norm="ortho")[:, :4, :4]
    expected = fft.idctn(spectrum, axes=(1, 2), norm="ortho") * 4 / 6
    np.testing.assert_allclose(small.numpy(), expected.reshape(2, 16, 3), atol=1e-5)
    np.testing.assert_allclose(small.mean(1), features.mean(1), atol=1e-5)


def test_hiprune_keeps_rows_of_the_features_in_order(contract):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 12, 3, generator=generator)
    scores = {name: torch.rand(2, 12, generator=generator) for name in ("object", "deep")}
    made = contract.read_contract({"method": "hiprune", "keep": 5, "alpha": 0})
    kept = made.reduce(features, (3, 4), scores)
    for row in range(2):  # alpha = 0: registers alone, the top of the deep score
        top = sorted(sorted(range(12), key=lambda i: -float(scores["deep"][row, i]))[:5])
        assert torch.equal(kept[row], features[row, top])
    with pytest.raises(ConfigError, match="object, deep"):
        made.reduce(features, (3, 4))
    with pytest.raises(ConfigError, match="3 \\* 5"):
        made.reduce(features, (3, 5), scores)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (None, ConfigError, "not of the form"),
        ("hiprune", ConfigError, "not of the form"),
        ({"keep": 192}, ConfigError, "not of the form"),
        ({"method": "divprune", "keep": 192}, UnknownNameError, "divprune"),
        ({"method": "adaptinfer"}, UnknownNameError, "known before the encoder runs"),
        ({"method": "hiprune"}, ConfigError, "fixed keep"),
        ({"method": "hiprune", "keep": True}, ConfigError, "fixed keep"),
        ({"method": "hiprune", "keep": 1.5}, ConfigError, "keep=1.5"),
        ({"method": "hiprune", "keep": 192, "alhpa": 0.1}, UnknownNameError, "alpha"),
        ({"method": "fourier"}, ConfigError, "side"),
        ({"method": "fourier", "side": 0}, ConfigError, "side=0"),
    ],
)
def test_all_else_is_refused(contract, settings, error, says):
    with pytest.raises(error, match=says):
        contract.read_contract(settings)


def config(**changes):
    vision = SimpleNamespace(model_type="clip_vision_model", image_size=336, patch_size=14)
    made = {"model_type": "llava", "vision_config": vision, "vision_feature_select_strategy": "default"}
    return SimpleNamespace(**{**made, "vision_feature_layer": -2, **changes})


def test_models_without_a_fixed_grid_are_refused(contract):
    assert contract.grid_of(config()) == (24, 24)
    siglip = SimpleNamespace(model_type="siglip_vision_model", image_size=384, patch_size=14)
    assert contract.grid_of(config(vision_config=siglip, vision_feature_select_strategy="full")) == (27, 27)
    pixtral = SimpleNamespace(model_type="pixtral")
    for changes in (
        {"model_type": "qwen2_5_vl"},
        {"model_type": "llava_next"},
        {"vision_config": pixtral},
        {"vision_config": siglip},
        {"vision_feature_select_strategy": "full"},
        {"vision_feature_layer": [-2, -5]},
    ):
        with pytest.raises(UnsupportedModelError, match="vlmeff: "):
            contract.grid_of(config(**changes))


def test_register_names_the_class_once_and_imports_nothing_of_it(contract, monkeypatch):
    plugin = sys.modules["vlmeff_vllm"]
    known: dict[str, str] = {}

    class Registry:
        @staticmethod
        def get_supported_archs():
            return known.keys()

        @staticmethod
        def register_model(name, where):
            assert name not in known
            known[name] = where

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=Registry))
    plugin.register()
    plugin.register()
    assert known == {plugin.ARCHITECTURE: plugin.CLASS}
    assert "vlmeff_vllm.llava" not in sys.modules
    module, name = plugin.CLASS.split(":")
    assert f"class {name}(" in (PLUGIN / (module.replace(".", "/") + ".py")).read_text()


def test_the_entry_point_is_vllms_group_of_general_plug_ins():
    points = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"vllm.general_plugins": {"vlmeff": "vlmeff_vllm:register"}}
