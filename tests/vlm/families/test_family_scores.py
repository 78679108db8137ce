"""The scores that reach a method against the models' own attention maps and connectors."""

from __future__ import annotations

import math

import pytest
import torch
from attention_maps import DEEP, OBJECT, members, real_tiles, same_scores, spied, token_scores, tower_maps
from tiny_models import ALL_MODELS, prompts, tiny, tiny_idefics3, video_prompts

import vlmeff
from tokenpruning import hiprune_select

QWEN = [name for name in ALL_MODELS if name.startswith("qwen")]
MAPPED = [
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "idefics3",
    "smolvlm",
    "gemma3",
    "paligemma",
    "perception_lm",
]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", [n for n in MAPPED if n not in ("llava_next", "llava_onevision")])
def test_scores_are_column_means_of_the_attention_over_the_tower_tokens_behind_a_token(name):
    model, eager = tiny(name), tiny(name, attention="eager")
    inputs = prompts(model, [0, 1, 2])
    side = math.isqrt(len(members(name)))
    scores = token_scores(name, eager, real_tiles(model, inputs))
    same_scores(spied(model, inputs), [((side, side), o, d) for o, d in zip(*scores, strict=True)])


@pytest.mark.parametrize(
    ("name", "block"), [("internvl", 2), ("idefics3", 2), ("smolvlm", 3), ("gemma3", 2), ("perception_lm", 2)]
)
def test_a_token_is_made_of_a_square_of_patches_in_raster_order(name, block):
    side = 6 // block
    for token, parts in enumerate(members(name)):
        y, x = divmod(token, side)
        square = torch.zeros(6, 6)
        square[y * block : (y + 1) * block, x * block : (x + 1) * block] = 1
        assert torch.equal(parts.view(6, 6), square)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_the_padding_of_a_picture_neither_votes_nor_is_scored(name):
    model, eager = tiny(name), tiny(name, attention="eager")
    inputs = prompts(model, [1, 2])
    mask = inputs["pixel_attention_mask"]
    mask[0, 0, :, 15:] = 0  # two columns of patches
    mask[1, 1, 8:] = 0
    real = mask.flatten(2).any(2)
    patches = mask[real][:, ::4, ::4].bool()
    assert not patches.all()
    scores = token_scores(name, eager, real_tiles(model, inputs), patches)
    side = math.isqrt(len(members(name)))
    segments = spied(model, inputs)
    same_scores(segments, [((side, side), o, d) for o, d in zip(*scores, strict=True)])
    hidden = members(name) @ patches[0].flatten().float() == 0
    assert not segments[0].scores["deep"][hidden].any()
    assert hidden.any() == (name == "idefics3")


@pytest.mark.parametrize("side", [4, 8])
def test_idefics_pictures_of_another_size_than_the_towers_own_are_scored_on_their_own_grid(side):
    model, eager = tiny_idefics3(image_size=32), tiny_idefics3(image_size=32, attention="eager")
    inputs = prompts(model, [1])
    tiles = inputs["pixel_values"].shape[1]
    inputs["pixel_values"] = torch.randn(1, tiles, 3, 4 * side, 4 * side)
    inputs["pixel_attention_mask"] = torch.ones(1, tiles, 4 * side, 4 * side)
    n = (side // 2) ** 2
    ids = inputs["input_ids"][0].tolist()
    runs = [i for i, token in enumerate(ids) if token == 5 and ids[i - 1] != 5]
    row, last = [], 0
    for start in runs:
        row += ids[last:start] + [5] * n
        last = start + 9
    inputs["input_ids"] = torch.tensor([row + ids[last:]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    maps = tower_maps(eager, inputs["pixel_values"][0])
    columns = [maps[layer].mean((1, 2)).view(-1, side // 2, 2, side // 2, 2).mean((2, 4)) for layer in (OBJECT, DEEP)]
    same_scores(spied(model, inputs), [((side // 2, side // 2), o, d) for o, d in zip(*columns, strict=True)])


# Qwen-VL


def qwen_maps(model, pixels, grids, layer):
    """Per temporal slice the mean attention that each patch receives, from the layer's input, in naive steps."""
    attention, seen = model.model.visual.blocks[layer].attn, {}

    def look(module, args, kwargs):
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["cos"], seen["sin"] = kwargs["position_embeddings"]

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    model.model.visual(pixels, grid_thw=grids)
    handle.remove()
    q, k, _ = attention.qkv(seen["x"]).chunk(3, -1)

    def rotated(x):
        x = x.view(len(x), attention.num_heads, -1).transpose(0, 1)
        first, second = x.chunk(2, -1)
        return x * seen["cos"] + torch.cat([-second, first], -1) * seen["sin"]

    lengths = [h * w for t, h, w in grids.tolist() for _ in range(t)]
    pieces = zip(rotated(q).split(lengths, 1), rotated(k).split(lengths, 1), strict=True)
    return [(a @ b.transpose(1, 2) / a.shape[-1] ** 0.5).softmax(-1).mean((0, 1)) for a, b in pieces]


def raster(name, score, height, width):
    """[H * W] from patches that stand four by four, in windows of 2 x 2 tokens for Qwen2.5-VL."""
    merged = score.view(-1, 4).mean(1)
    if name != "qwen2_5_vl":
        return merged
    order = [
        y * width + x
        for top in range(0, height, 2)
        for left in range(0, width, 2)
        for y in range(top, min(top + 2, height))
        for x in range(left, min(left + 2, width))
    ]
    return merged[torch.tensor(order).argsort()]


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("name", QWEN)
def test_qwen_scores_are_means_over_four_patches_of_a_slice(name, modality):
    model = tiny(name)
    inputs = prompts(model, [0, 1, 2]) if modality == "image" else video_prompts(model, [5, 2])
    pixels = inputs["pixel_values" if modality == "image" else "pixel_values_videos"]
    grids = inputs[f"{modality}_grid_thw"]
    maps = [qwen_maps(model, pixels, grids, layer) for layer in (OBJECT, DEEP)]
    shapes = [(h // 2, w // 2) for t, h, w in grids.tolist() for _ in range(t)]
    expected = [(s, raster(name, o, *s), raster(name, d, *s)) for s, o, d in zip(shapes, *maps, strict=True)]
    same_scores(spied(model, inputs), expected)


@pytest.mark.parametrize("name", QWEN)
def test_qwen_merges_four_patches_that_stand_together(name):
    model = tiny(name)
    merger = model.model.visual.merger
    width = model.model.visual.blocks[0].attn.qkv.in_features
    base = torch.randn(16, width, generator=torch.Generator().manual_seed(1))
    for patch in range(16):
        disturbed = base.clone()
        disturbed[patch] += base[patch - 1]
        moved = (merger(disturbed) - merger(base)).abs().amax(-1) > 1e-5
        assert moved.nonzero()[:, 0].tolist() == [patch // 4]


# What HiPrune makes of them


@pytest.mark.parametrize("name", [*MAPPED, *QWEN])
def test_hiprune_chooses_from_these_scores(name, covered):
    covered(name, "hiprune", "image")
    model = tiny(name)
    inputs = prompts(model, [1, 2])
    segments = spied(model, inputs)
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.4, alpha=0.5))
    model.generate(**inputs, max_new_tokens=1)
    picks = [pick for item in vlmeff.report(model).plan.items for pick in item.selections]
    for segment, pick in zip(segments, picks, strict=True):
        k = max(1, round(0.4 * segment.size))
        scores = segment.scores["object"], segment.scores["deep"]
        expected = hiprune_select(*scores, k=k, grid=segment.grid, alpha=0.5)
        assert torch.equal(pick.index, expected.index)
        assert torch.equal(pick.kind, expected.kind)
