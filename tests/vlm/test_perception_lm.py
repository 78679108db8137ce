"""PerceptionLM, pictures in tiles and video: identity, the masked oracle, and scores against timm's attention maps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import IMAGE, SPECIAL, VIDEO, perception_inputs, perception_videos, tiny_perception_lm

import vlmeff
from tokenpruning import hiprune_select
from tokenpruning.plan import all_of
from vlmeff.errors import UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.families import FAMILIES
from vlmeff.vlm.probe import probe

FAMILY = FAMILIES["perception_lm"]
PRUNE = vlmeff.HiPrune(keep=0.45, alpha=0.9)
TOWERS = [
    {},
    {"class_token": False},
    {"pooling": 1},
    {"pooling": 3, "class_token": False},
]
# Both sides compute the same sums in float32 in another order; hidden states are of order 1 to 10.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
# Means of float32 probabilities.
SCORE_TOLERANCE = {"atol": 1e-6, "rtol": 0.0}

every_tower = pytest.mark.parametrize("options", TOWERS, ids=str)
every_modality = pytest.mark.parametrize("modality", ["image", "video"])
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def request_of(model, modality, counts=(1, 0, 2)):
    """Rows with counts[i] pictures of three tiles, or with a video of two frames where counts[i] is not zero."""
    if modality == "image":
        return perception_inputs(model, list(counts))
    return perception_videos(model, [2 * bool(count) for count in counts])


def raster_maps(model, pixels, layer):
    """[tiles, 6, 6]: mean attention that each patch receives, from timm's unfused attention."""
    attention, maps = model.model.vision_tower.timm_model.blocks[layer].attn, []
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda _, args, out: maps.append(out))
    model.model.vision_tower(pixels.flatten(0, 1))
    handle.remove()
    attention.fused_attn = True
    return maps[0].mean((1, 2))[:, -36:].view(-1, 6, 6)


def naive_pool(maps, ratio):
    """[tiles, 6, 6] -> [tiles, tokens]."""
    side = 6 // ratio
    cells = itertools.product(range(side), repeat=2)
    blocks = [maps[:, y * ratio : (y + 1) * ratio, x * ratio : (x + 1) * ratio] for y, x in cells]
    return torch.stack([block.mean((1, 2)) for block in blocks], 1)


def oracle_logits(model, inputs, keep):
    """Logits of the unwrapped language model on the whole prompt with what is not kept hidden, numbered as if away."""
    ids, seen = inputs["input_ids"], (keep & inputs["attention_mask"].bool()).long()
    embeds = model.get_input_embeddings()(ids)
    for token, name in ((IMAGE, "pixel_values"), (VIDEO, "pixel_values_videos")):
        if name in inputs:
            features = model.model.get_image_features(inputs[name]).pooler_output
            embeds = embeds.masked_scatter((ids == token)[..., None], features)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    return seen.bool(), model(inputs_embeds=embeds, attention_mask=seen, position_ids=positions, use_cache=False).logits


def assert_equals_oracle(model, wrapped, inputs):
    output = wrapped(**inputs)
    seen, logits = oracle_logits(model, inputs, output.vlmeff_keep)
    assert seen.sum() < inputs["attention_mask"].sum()
    for row, slots in enumerate(seen):
        torch.testing.assert_close(output.logits[row, -slots.sum() :], logits[row, slots], **TOLERANCE)
    first = wrapped.generate(**inputs, max_new_tokens=1)[:, -1]
    assert torch.equal(first, logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf).argmax(1))


@dataclass(frozen=True)
class KeepAllTheLongWay:
    """Asked for some of the tokens it answers all: a request is taken apart and put together with nothing lost."""

    keep: float = 0.9
    needs: ClassVar[tuple[str, ...]] = ("object", "deep")

    def select(self, segment, k):
        return all_of(segment)


@every_modality
@every_tower
def test_a_request_that_is_shortened_by_nothing_gives_the_answer_of_the_unwrapped_model(options, modality):
    model = tiny_perception_lm(**options)
    inputs = request_of(model, modality)
    plain = model.generate(**inputs, max_new_tokens=5)
    vlmeff.wrap(model, None, tokens=KeepAllTheLongWay())
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain)


@every_modality
@every_tower
def test_a_shortened_request_equals_the_masked_oracle(options, modality):
    model = tiny_perception_lm(**options)
    wrapped = vlmeff.wrap(tiny_perception_lm(**options), None, tokens=PRUNE)
    assert_equals_oracle(model, wrapped, request_of(model, modality))


def test_a_request_with_pictures_and_a_video_equals_the_masked_oracle():
    model, wrapped = tiny_perception_lm(), vlmeff.wrap(tiny_perception_lm(), None, tokens=PRUNE)
    images, videos = perception_inputs(model, [1, 1]), perception_videos(model, [2, 2], seed=2)
    inputs = {**images, **videos}
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([images[name], videos[name]], 1)
    assert_equals_oracle(model, wrapped, inputs)
    items = vlmeff.report(wrapped).plan.items
    assert [(item.modality, len(item.selections)) for item in items] == [("image", 3)] * 2 + [("video", 2)] * 2


@every_modality
@every_tower
def test_scores_are_pooled_column_means_of_the_attention_maps_of_timm(options, modality):
    model = tiny_perception_lm(**options)
    inputs = request_of(model, modality)
    layers = FAMILY.score_layers(model, ("object", "deep"), 2)
    with probe(layers, FAMILY.query_key) as recorded:
        FAMILY.encode(model, inputs, modality)
    for name, layer in (("object", 1), ("deep", 3)):
        scores = FAMILY.token_scores(model, inputs, modality, torch.cat(recorded[name]))
        maps = raster_maps(model, inputs[PIXELS[modality]], layer)
        expected = naive_pool(maps, model.config.projector_pooling_ratio)
        torch.testing.assert_close(torch.stack([*itertools.chain(*scores)]), expected, **SCORE_TOLERANCE)


@every_modality
def test_the_tokens_kept_of_every_tile_and_frame_are_those_that_hiprune_chooses_from_the_full_maps(modality):
    model, wrapped = tiny_perception_lm(), vlmeff.wrap(tiny_perception_lm(), None, tokens=PRUNE)
    inputs = request_of(model, modality)
    wrapped.generate(**inputs, max_new_tokens=1)
    picks = [pick for item in vlmeff.report(wrapped).plan.items for pick in item.selections]
    o, d = (naive_pool(raster_maps(model, inputs[PIXELS[modality]], layer), 2) for layer in (1, 3))
    for pick, o_tile, d_tile in zip(picks, o, d, strict=True):
        expected = hiprune_select(o_tile, d_tile, k=4, grid=(3, 3), alpha=0.9)
        assert torch.equal(pick.index, expected.index)


def test_pooling_windows_that_do_not_divide_the_side_are_those_of_the_projector():
    model = tiny_perception_lm(pooling=4)  # 6 patches along an edge become one token
    score = torch.rand(3, 37, generator=torch.Generator().manual_seed(1))
    inputs = {"pixel_values": torch.zeros(1, 3, 3, 24, 24)}
    assert [layout.grids for layout in FAMILY.layouts(model, inputs, "image")] == [[(1, 1)] * 3]
    pooled = model.model.multi_modal_projector.pooling(score[:, 1:, None])[..., 0]
    scores = FAMILY.token_scores(model, inputs, "image", score)
    torch.testing.assert_close(torch.stack([*itertools.chain(*scores)]), pooled)


@every_modality
def test_a_budget_of_tokens_is_divided_by_the_tiles_of_a_picture_and_the_frames_of_a_video(modality):
    model = vlmeff.wrap(tiny_perception_lm(), None, tokens=vlmeff.Downsample(keep=13))
    inputs = request_of(model, modality)
    model.generate(**inputs, max_new_tokens=1)
    kept = [[len(pick.index) for pick in item.selections] for item in vlmeff.report(model).plan.items]
    assert kept == ([[4, 4, 4]] * 3 if modality == "image" else [[6, 6]] * 2)


@every_modality
def test_features_that_the_caller_encoded_can_be_downsampled(modality):
    model = tiny_perception_lm()
    inputs = request_of(model, modality, (1, 1))
    plain = vlmeff.wrap(tiny_perception_lm(), None, tokens=vlmeff.Downsample(keep=0.5))
    expected = plain.generate(**inputs, max_new_tokens=3)
    encoded = model.model.get_image_features(inputs.pop(PIXELS[modality]))
    out = plain.generate(**inputs, mm_encoder_outputs={modality: encoded}, max_new_tokens=3)
    assert torch.equal(out, expected)
    assert vlmeff.report(plain).visual_tokens_after == 4 * len(encoded.pooler_output)


def test_a_class_token_that_the_model_does_not_drop_is_refused():
    model = tiny_perception_lm()
    model.config.vision_use_cls_token = False
    with pytest.raises(UnsupportedModelError, match="vision_use_cls_token"):
        vlmeff.wrap(model, None, tokens="hiprune")


def test_pictures_without_an_axis_for_tiles_are_refused():
    model = vlmeff.wrap(tiny_perception_lm(), None, tokens=PRUNE)
    inputs = perception_inputs(model, [1])
    inputs["pixel_values"] = inputs["pixel_values"][0]
    with pytest.raises(UnsupportedInputError, match=r"pixel_values must be \[pictures, tiles"):
        model.generate(**inputs, max_new_tokens=1)
