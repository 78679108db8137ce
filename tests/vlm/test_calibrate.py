"""Calibrating a model: what is measured equals its attention maps, and the file it writes works."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_common import ready
from tiny_models import IMAGE, VIDEO, prompts, tiny

import vlmeff
from tokenpruning.adaptinfer import AdaptInfer
from vlmeff.errors import DataError, IncompatibleError, UnsupportedModelError
from vlmeff.vlm.calibrate import calibrate_adaptinfer, text_to_vision, write_calibration
from vlmeff.vlm.voters import visual_rows

LAYERS = 8


def deep(name, attention="sdpa"):
    config = copy.deepcopy(tiny(name).config)
    config.text_config.num_hidden_layers = LAYERS
    config.text_config.layer_types = ["full_attention"] * LAYERS
    torch.manual_seed(0)
    return ready(type(tiny(name))(config), torch.float32, attention)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_the_mass_is_the_mean_of_the_attention_maps_of_the_text_behind_the_picture(name):
    model = deep(name, "eager")
    inputs = prompts(model, [1, 1]) if name == "llava" else prompts(model, [1])
    visual = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))
    rows = visual_rows(visual, inputs["attention_mask"])
    with text_to_vision(model.model.language_model, rows) as mass:
        maps = model(**inputs, output_attentions=True).attentions
    assert len(mass) == len(maps) == LAYERS
    for got, a in zip(mass, maps, strict=True):
        for b, flags in enumerate(visual):
            text = slice(int(flags.nonzero()[-1]) + 1, None)
            torch.testing.assert_close(got[b], a[b, :, text][:, :, flags].mean((0, 1)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_a_model_is_calibrated_and_its_file_is_a_schedule_that_fits_it(name, tmp_path):
    model = deep(name)
    seen = []
    samples = [prompts(model, [1], seed=seed) for seed in range(3)]
    result = calibrate_adaptinfer(model, iter(samples), target=0.6, progress=seen.append)
    assert seen == [1, 2, 3]
    assert result.samples == 3
    path = write_calibration(tmp_path / "schedule.json", model, result)
    method = AdaptInfer(schedule=path).for_model(model_type=name, layers=LAYERS, hidden_size=32)
    assert method.schedule.layers == result.schedule.layers
    assert method.schedule.ratios == result.schedule.ratios
    about = json.loads(path.read_text())["about"]
    assert about["samples"] == 3
    assert set(about["versions"]) == {"vlmeff", "transformers", "torch"}
    assert len(about["shifts"]) == LAYERS
    if name == "qwen3_vl":  # features are added behind layers 0 and 1
        assert result.schedule.layers[0] >= 1


def test_text_samples_are_passed_over_and_batches_count_their_rows():
    model = deep("llava")
    words = {"input_ids": torch.arange(10, 20)[None]}
    result = calibrate_adaptinfer(model, [words, prompts(model, [1, 1, 1])], target=0.6)
    assert result.samples == 3
    with pytest.raises(DataError, match="no sample"):
        calibrate_adaptinfer(model, [words], target=0.6)
    with pytest.raises(DataError, match="input_ids"):
        calibrate_adaptinfer(model, [{}], target=0.6)


def test_hooks_are_removed_and_models_that_cannot_be_calibrated_are_refused():
    model = deep("llava")
    bad = {**prompts(model, [1]), "pixel_values": torch.zeros(1)}
    with pytest.raises(Exception):  # noqa: B017 - whatever the model says of the picture
        calibrate_adaptinfer(model, [bad], target=0.6)
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
    with pytest.raises(IncompatibleError, match=r"model\.eval"):
        calibrate_adaptinfer(model.train(), [], target=0.6)
    with pytest.raises(IncompatibleError, match="unwrap"):
        calibrate_adaptinfer(vlmeff.wrap(model.eval(), None, tokens=vlmeff.HiPrune(keep=0.5)), [], target=0.6)
    with pytest.raises(UnsupportedModelError):
        calibrate_adaptinfer(tiny("gemma3"), [], target=0.6)
