"""How the tokens of tiled pictures stand in the prompt, and their scores, against the models' own packing."""

from __future__ import annotations

import math

import pytest
import torch
from attention_maps import real_tiles, same_scores, spied, token_scores
from tiny_llava_family import ONEVISION_PICTURES, llava_next_inputs, llava_onevision_inputs
from tiny_models import prompts, tiny_llava_next, tiny_llava_onevision, video_prompts

import vlmeff
from vlmeff.vlm.families import FAMILIES
from vlmeff.vlm.families.tiles import Mosaic


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def packed_by_the_model(model, tiles, sizes, newline):
    """What the model makes of per-picture tiles [t, side * side, C]."""
    if model.config.model_type == "llava_next":
        out, _ = model.model.pack_image_features(tiles, sizes, "default", image_newline=newline)
    else:
        out, _ = model.model.pack_image_features(tiles, sizes, newline, model.config.vision_aspect_ratio)
    return out


def tile_counts(inputs):
    counts = (inputs["pixel_values"] != 0).flatten(2).any(2).sum(1).tolist()
    assert all(counts)
    return counts


NEXT_SIZES = [(16, 60), (45, 17), (14, 20), (48, 48), (20, 50), (6, 90), (90, 6), (24, 71), (33, 47)]
ONEVISION_SIZES = [*ONEVISION_PICTURES, (80, 60), (70, 40), (6, 90), (33, 40)]


def tiled_inputs(name):
    if name == "llava_next":
        model = tiny_llava_next()
        return model, llava_next_inputs(model, [len(NEXT_SIZES)], sizes=NEXT_SIZES)
    model = tiny_llava_onevision()
    return model, llava_onevision_inputs(model, [1] * len(ONEVISION_SIZES), sizes=ONEVISION_SIZES)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_the_layout_of_tiles_is_what_the_model_packs(name):
    model, inputs = tiled_inputs(name)
    layouts, counts = FAMILIES[name].layouts(model, inputs, "image"), tile_counts(inputs)
    n = 36 if name == "llava_next" else 25
    ids = [torch.arange(float(t * n)).view(t, n, 1) for t in counts]
    slots = packed_by_the_model(model, ids, inputs["image_sizes"], torch.tensor([-1.0]))
    ones = packed_by_the_model(model, [torch.ones_like(i) for i in ids], inputs["image_sizes"], torch.tensor([0.0]))
    interpolated = 0
    for layout, packed, kind in zip(layouts, slots, ones, strict=True):
        separators = kind[:, 0] == 0
        assert layout.n_slots == len(packed)
        assert torch.equal(layout.slots < 0, separators)
        assert layout.slots[~separators].sort().values.tolist() == list(range(layout.n_tokens))
        if name == "llava_onevision":
            assert torch.equal(layout.slots[~separators], torch.arange(layout.n_tokens))
            rows = (len(packed) - n) // (layout.grids[1][1] + 1)
            assert layout.grids[1] == (int(separators.sum()), layout.grids[1][1])
            assert rows == layout.grids[1][0]
            interpolated += bool((packed != packed.round()).any())
            continue
        original = packed[:, 0].long()
        tiles = sorted({i // n for i in original.tolist() if i >= 0})
        assert len(layout.grids) == len(tiles)
        start = 0
        for tile, (height, width) in zip(tiles, layout.grids, strict=True):
            inside = sorted(i % n for i in original.tolist() if i >= 0 and i // n == tile)
            y, x = {i // 6 for i in inside}, {i % 6 for i in inside}
            assert (len(y), len(x)) == (height, width)
            # Token ``start + j`` of the layout stands where the model puts the j-th surviving patch of the tile.
            for j, patch in enumerate(inside):
                assert int(original[layout.slots == start + j]) == tile * n + patch
            start += height * width
    assert bool(interpolated) == (name == "llava_onevision")


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_rows_of_separators_are_the_slots_before_them(name):
    model, inputs = tiled_inputs(name)
    for layout in FAMILIES[name].layouts(model, inputs, "image"):
        separators = (layout.slots < 0).nonzero()[:, 0].tolist()
        thumbnail = layout.sizes[0] if len(layout.grids) > 1 else 0
        starts = [thumbnail, *(s + 1 for s in separators[:-1])]
        assert layout.spans.tolist() == [[a, b] for a, b in zip(starts, separators, strict=True)]


def test_a_tile_that_is_lost_in_the_padding_is_no_segment():
    # The canvas of 1 x 3 tiles for a picture of 20 x 24: the outer two show nothing but padding.
    model = tiny_llava_next()
    model.config.image_grid_pinpoints = [[24, 72], [72, 24]]
    for size in ((20, 20), (24, 10), (10, 72), (70, 11)):
        inputs = llava_next_inputs(model, [1], sizes=[size])
        (layout,) = FAMILIES["llava_next"].layouts(model, inputs, "image")
        ids = torch.arange(float(4 * 36)).view(4, 36, 1)
        (packed,) = packed_by_the_model(model, [ids], inputs["image_sizes"], torch.tensor([-1.0]))
        tiles = {int(i) // 36 for i in packed[:, 0].tolist() if i >= 0}
        assert len(layout.grids) == len(tiles)
        assert len(tiles) == (2 if min(size) < 24 and max(size) <= 24 else 4)
        wrapped = vlmeff.wrap(tiny_llava_next(), None, tokens=vlmeff.HiPrune(keep=6))
        wrapped.config.image_grid_pinpoints = model.config.image_grid_pinpoints
        wrapped(**inputs)
        assert vlmeff.report(wrapped).visual_tokens_after == 6 // len(tiles) * len(tiles)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_mosaic_packs_features_as_the_model_does_bit_for_bit(name):
    model, inputs = tiled_inputs(name)
    n, counts = (36 if name == "llava_next" else 25), tile_counts(inputs)
    g = torch.Generator().manual_seed(0)
    tiles = [torch.randn(t, n, 8, generator=g) for t in counts]
    newline = torch.randn(8, generator=g)
    most = None if name == "llava_next" else 9
    vision, pinpoints = model.config.vision_config, model.config.image_grid_pinpoints
    expected = packed_by_the_model(model, tiles, inputs["image_sizes"], newline)
    for size, part, want in zip(inputs["image_sizes"].tolist(), tiles, expected, strict=True):
        mosaic = Mosaic.of_picture(tuple(size), pinpoints, vision.image_size, math.isqrt(n), most)
        assert torch.equal(mosaic.pack(part, newline), want)


def test_scores_of_llava_next_tiles_are_those_of_their_surviving_patches():
    model, inputs = tiled_inputs("llava_next")
    scores = token_scores("llava_next", tiny_llava_next(attention="eager"), real_tiles(model, inputs))
    counts, expected = tile_counts(inputs), []
    ids = [torch.arange(float(t * 36)).view(t, 36, 1) for t in counts]
    packed = packed_by_the_model(model, ids, inputs["image_sizes"], torch.tensor([-1.0]))
    for slots, *of_picture in zip(packed, *(s.split(counts) for s in scores), strict=True):
        alive = sorted(int(i) for i in slots[:, 0] if i >= 0)
        for tile in sorted({i // 36 for i in alive}):
            inside = [i % 36 for i in alive if i // 36 == tile]
            grid = len({i // 6 for i in inside}), len({i % 6 for i in inside})
            expected.append((grid, *(score[tile, inside] for score in of_picture)))
    same_scores(spied(model, inputs), expected)


def test_scores_of_a_onevision_mosaic_go_through_the_packing_of_the_model():
    model, inputs = tiled_inputs("llava_onevision")
    scores = token_scores("llava_onevision", tiny_llava_onevision(attention="eager"), real_tiles(model, inputs))
    counts, sizes = tile_counts(inputs), inputs["image_sizes"]
    ones = packed_by_the_model(model, [torch.ones(t, 25, 1) for t in counts], sizes, torch.tensor([0.0]))
    maps = [packed_by_the_model(model, list(s[..., None].split(counts)), sizes, torch.tensor([0.0])) for s in scores]
    expected = []
    for kind, o, d in zip(ones, *maps, strict=True):
        real = kind[:, 0] != 0
        o, d = o[real, 0], d[real, 0]
        height = int((~real).sum())
        expected.append(((5, 5), o[:25], d[:25]))
        expected.append(((height, len(o[25:]) // height), o[25:], d[25:]))
    same_scores(spied(model, inputs), expected)


def test_pictures_of_a_onevision_prompt_with_several_have_one_tile():
    model = tiny_llava_onevision()
    inputs = prompts(model, [2])
    scores = token_scores("llava_onevision", tiny_llava_onevision(attention="eager"), inputs["pixel_values"][:, 0])
    same_scores(spied(model, inputs), [((5, 5), o, d) for o, d in zip(*scores, strict=True)])


def test_scores_of_onevision_frames_are_pooled_as_the_model_pools_their_features():
    model = tiny_llava_onevision()
    inputs = video_prompts(model, [3, 0, 3])
    scores = token_scores(
        "llava_onevision", tiny_llava_onevision(attention="eager"), inputs["pixel_values_videos"].flatten(0, 1)
    )
    pooled = [model.model.apply_pooling(s[..., None]) for s in scores]
    same_scores(spied(model, inputs), [((3, 3), o, d) for o, d in zip(*pooled, strict=True)])
