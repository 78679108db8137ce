"""Resampled pictures of every family against scipy's cosine transform and a prompt shortened by hand."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from mixed_prompts import video_request
from oracle import check_answers
from resampled import cosine_resized, resampled_oracle
from tiny_llava_family import NEXT_PICTURES, ONEVISION_PICTURES, llava_next_inputs, llava_onevision_inputs
from tiny_models import ALL_MODELS, VIDEO_MODELS, prompts, tiny

import vlmeff
from tokenpruning.fourier import Fourier
from vlmeff.errors import IncompatibleError
from vlmeff.vlm.families import FAMILIES

NAMES = [name for name in ALL_MODELS if name in FAMILIES]
VIDEOS = [name for name in NAMES if name in VIDEO_MODELS]
SIZES = [{"gain": "preserve"}, {"side": 2, "gain": "ortho"}, {"ratio": Fraction(1, 2), "gain": "preserve"}]

every_size = pytest.mark.parametrize("size", SIZES, ids=["default", "side", "ratio"])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def check(name, inputs, size):
    model = tiny(name)
    given = copy.deepcopy(inputs)
    wrapped = vlmeff.wrap(tiny(name), None, tokens=Fourier(**size))
    oracle, keep = resampled_oracle(model, inputs, **size)
    assert keep.sum() < inputs["attention_mask"].sum()
    assert torch.equal(wrapped(**inputs).vlmeff_keep.sum(1), (keep | (inputs["attention_mask"] == 0)).sum(1))
    assert vlmeff.report(wrapped).visual_tokens_after == int(oracle.visual.sum())
    check_answers(wrapped, inputs, oracle)
    assert all(torch.equal(inputs[key], given[key]) for key in given)


@every_size
@pytest.mark.parametrize("name", NAMES)
def test_resampled_pictures_equal_the_short_prompt_by_hand(name, size, covered):
    if name == "smolvlm" and "side" in size:
        size = {**size, "side": 1}  # its tiles have 2 x 2 tokens
    covered(name, "fourier", "image")
    check(name, prompts(tiny(name), [0, 1, 2]), size)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_of_all_shapes_are_resampled_before_they_are_packed(name, covered):
    covered(name, "fourier", "image")
    make, sizes = (
        (llava_next_inputs, NEXT_PICTURES) if name == "llava_next" else (llava_onevision_inputs, ONEVISION_PICTURES)
    )
    for size in ({"side": 3, "gain": "ortho"}, {"side": 4, "gain": "preserve"}):
        check(name, make(tiny(name), [1] * len(sizes), sizes=sizes), size)


@pytest.mark.parametrize("kind", ["two videos in a row", "a picture and a video", "batch"])
@pytest.mark.parametrize("name", VIDEOS)
def test_resampled_videos_equal_the_short_prompt_by_hand(name, kind, covered):
    covered(name, "fourier", "video")
    size = {"side": 2, "gain": "ortho"} if kind == "batch" else {"gain": "preserve"}
    check(name, video_request(tiny(name), kind), size)


@pytest.mark.parametrize("name", NAMES)
def test_the_full_size_is_the_unwrapped_model_bit_for_bit(name):
    model = tiny(name)
    requests = [prompts(model, [1, 2]), *([video_request(model, "a picture and a video")] if name in VIDEOS else [])]
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    for inputs in requests:
        plain, forward = model.generate(**inputs, **settings), model(**inputs).logits
        for method in (Fourier(side=99), Fourier(ratio=1.0, gain="ortho")):
            vlmeff.wrap(model, None, tokens=method)
            whole = model.generate(**inputs, **settings)
            assert torch.equal(whole.sequences, plain.sequences)
            assert all(torch.equal(a, b) for a, b in zip(whole.logits, plain.logits, strict=True))
            assert torch.equal(model(**inputs).logits, forward)
        vlmeff.unwrap(model)


@pytest.mark.parametrize("name", NAMES)
def test_encoder_outputs_are_resampled_unless_they_have_passed_the_projector(name):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=Fourier())
    inputs = prompts(wrapped, [1, 1])
    names = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask")
    output = wrapped.model.get_image_features(**{k: inputs[k] for k in names if k in inputs}, return_dict=True)
    instead = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": output}}
    if name.startswith("llava"):
        with pytest.raises(IncompatibleError, match="pass the pixels"):
            wrapped.generate(**instead, max_new_tokens=2)
    else:
        expected = wrapped.generate(**inputs, max_new_tokens=3)
        assert torch.equal(wrapped.generate(**instead, max_new_tokens=3), expected)


@pytest.mark.parametrize("name", NAMES)
def test_sequences_returned_for_resampled_pictures_stay_in_their_rows(name):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=Fourier())
    inputs = prompts(wrapped, [0, 1, 2])
    greedy = wrapped.generate(**inputs, max_new_tokens=4)
    copies = wrapped.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(copies, greedy.repeat_interleave(2, 0))


def test_the_transform_by_hand_keeps_the_mean_or_multiplies_it():
    x = torch.ones(1, 24, 1)
    assert torch.allclose(cosine_resized(x, (4, 6), (2, 3), "preserve"), torch.ones(1, 6, 1))
    assert torch.allclose(cosine_resized(x, (4, 6), (2, 3), "ortho"), torch.full((1, 6, 1), 2.0))
