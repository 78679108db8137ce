"""Videos of every family that takes them: frames are segments, text and pictures around them stay what they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from mixed_prompts import KINDS, in_a_row, rows_of, video_request
from oracle import PIXELS, check_selection, encode, grid_positions, modalities
from tiny_models import ALL_MODELS, VIDEO, VIDEO_MODELS, tiny, video_prompts

import vlmeff
from tokenpruning import PerFrame
from tokenpruning.plan import all_of
from vlmeff.vlm.families import FAMILIES

NAMES = [name for name in ALL_MODELS if name in VIDEO_MODELS and name in FAMILIES]
PRUNE = vlmeff.HiPrune(keep=0.4, alpha=0.5)
NEW = 4

every_family = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


every_kind = pytest.mark.parametrize("kind", KINDS)


def answered(model, inputs):
    return model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("method", [PRUNE, vlmeff.Downsample(keep=0.4)], ids=["hiprune", "downsample"])
@every_kind
@every_family
def test_a_selection_equals_the_masked_oracle(name, kind, method, covered):
    covered(name, "hiprune" if method is PRUNE else "downsample", "video")
    model = tiny(name)
    inputs = video_request(model, kind)
    plan = check_selection(model, vlmeff.wrap(tiny(name), None, tokens=method), inputs)
    # Pictures come first in a plan, videos behind them; every frame has its share.
    assert [item.modality for item in plan.items] == sorted(item.modality for item in plan.items)
    frames = [size for item in plan.items for size in item.layout.sizes]
    kept = [len(pick.index) for item in plan.items for pick in item.selections]
    assert kept == [max(1, round(0.4 * size)) for size in frames]


def frames_of(model, inputs):
    """Per video the tokens of each of its frames."""
    if "video_grid_thw" in inputs:
        return [[h * w // 4] * t for t, h, w in inputs["video_grid_thw"].tolist()]
    return [[9] * inputs["pixel_values_videos"].shape[1] for _ in inputs["pixel_values_videos"]]


@pytest.mark.parametrize("keep", [0.34, 7, 1, PerFrame(2), PerFrame(100)], ids=str)
@every_family
def test_a_budget_is_spent_frame_by_frame(name, keep):
    model = tiny(name)
    inputs = video_request(model, "two videos in a row")
    wrapped = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=keep))
    wrapped(**inputs)
    items = vlmeff.report(wrapped).plan.items
    for item, frames in zip(items, frames_of(model, inputs), strict=True):
        if isinstance(keep, PerFrame):
            expected = [min(keep.tokens, n) for n in frames]
        elif isinstance(keep, int):
            expected = [min(max(1, keep // len(frames)), n) for n in frames]
        else:
            expected = [round(keep * n) for n in frames]
        assert [len(pick.index) for pick in item.selections] == expected


@pytest.mark.parametrize("keep", [7, PerFrame(2)], ids=str)
@every_family
def test_budgets_in_tokens_equal_the_masked_oracle(name, keep, covered):
    covered(name, "hiprune", "video")
    model = tiny(name)
    method = vlmeff.HiPrune(keep=keep, alpha=0.5)
    check_selection(model, vlmeff.wrap(tiny(name), None, tokens=method), video_request(model, "two videos in a row"))


@pytest.mark.parametrize("name", [name for name in NAMES if name == "qwen2_5_vl"])
def test_time_stamps_move_the_positions_of_the_kept_tokens(name):
    model, wrapped, seen = tiny(name), vlmeff.wrap(tiny(name), None, tokens=PRUNE), []
    wrapped.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    inputs = video_request(model, "two videos in a row")
    for seconds in ([0.5, 1.0], [1.0, 2.5]):
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
        output = wrapped(**inputs)
        short = seen[-1][1:, 0]
        assert torch.equal(short, grid_positions(model, inputs)[:, 0, output.vlmeff_keep[0]])
        video = inputs["input_ids"][0, output.vlmeff_keep[0]] == VIDEO
        steps = short[0, video].diff()
        # The slices of the first video are this far apart; the second has one slice only.
        rate = model.config.vision_config.tokens_per_second
        assert set(steps[steps > 0].tolist()) >= {int(rate * seconds[0])}


@pytest.mark.parametrize("name", [name for name in NAMES if name == "qwen3_vl"])
def test_the_times_between_the_frames_of_qwen3_stay(name):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=PerFrame(1)))
    inputs = video_request(wrapped, "two videos in a row")
    ids, keep = inputs["input_ids"][0], wrapped(**inputs).vlmeff_keep[0]
    assert torch.equal(ids[keep][ids[keep] != VIDEO], ids[ids != VIDEO])
    short = ids[keep].tolist()
    assert short.count(VIDEO) == 4
    assert all(short[i + 1] != VIDEO for i, token in enumerate(short) if token == VIDEO)  # one in each frame's run


@dataclass(frozen=True)
class KeepAllTheLongWay:
    """See test_family_identity."""

    keep: float = 0.5
    needs: ClassVar[tuple[str, ...]] = ("object", "deep")

    def select(self, segment, k):
        return all_of(segment)


@every_kind
@every_family
def test_a_request_that_is_shortened_by_nothing_gives_the_answer_of_the_unwrapped_model(name, kind):
    model = tiny(name)
    inputs = video_request(model, kind)
    given = copy.deepcopy(inputs)
    plain = answered(model, inputs)
    for method in (vlmeff.HiPrune(keep=1.0), vlmeff.HiPrune(keep=10**9), KeepAllTheLongWay()):
        vlmeff.wrap(model, None, tokens=method, newline="keep")
        whole = answered(model, inputs)
        assert torch.equal(whole.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(whole.logits, plain.logits, strict=True))
    assert inputs.keys() == given.keys()
    assert all(torch.equal(inputs[key], given[key]) for key in given)


@every_kind
@every_family
def test_encoder_outputs_of_the_caller_are_reduced_by_methods_that_need_no_scores(name, kind, covered):
    covered(name, "downsample", "video")
    model = tiny(name)
    inputs = video_request(model, kind)
    outputs = {modality: encode(model, inputs, modality) for modality in modalities(inputs)}
    before = copy.deepcopy({modality: output.pooler_output for modality, output in outputs.items()})
    instead = {k: v for k, v in inputs.items() if k not in PIXELS.values()} | {"mm_encoder_outputs": dict(outputs)}
    vlmeff.wrap(model, None, tokens=vlmeff.Downsample(keep=0.4))
    expected, found = answered(model, inputs), answered(model, instead)
    assert torch.equal(expected.sequences, found.sequences)
    assert all(torch.equal(a, b) for a, b in zip(expected.logits, found.logits, strict=True))
    assert torch.equal(model(**instead).logits, model(**inputs).logits)
    assert instead["mm_encoder_outputs"] == outputs
    for modality, output in outputs.items():
        assert all(torch.equal(a, b) for a, b in zip(output.pooler_output, before[modality], strict=True))


@every_family
def test_beams_over_videos_are_those_of_each_row_alone(name, covered):
    covered(name, "hiprune", "video")
    wrapped = vlmeff.wrap(tiny(name), None, tokens=PRUNE)
    rows = [video_request(wrapped, "a picture and a video"), video_request(wrapped, "two videos in a row")]
    if not name.startswith("qwen"):  # frames of one call are as many
        rows[1] = in_a_row(*(video_prompts(wrapped, [4], seed=seed) for seed in (3, 4)))
    arguments = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW}
    batch = wrapped.generate(**rows_of(*rows), **arguments)
    for number, row in enumerate(rows):
        assert torch.equal(wrapped.generate(**row, **arguments)[:, -NEW:], batch[2 * number : 2 * number + 2, -NEW:])
