"""The curve over vision layers against the models' own attention maps and hidden states."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from attention_maps import members, tower_maps
from tiny_llava_family import llava_inputs, tiny_llava
from tiny_models import ALL_MODELS, VIDEO_MODELS, prompts, tiny, tiny_qwen2_5_vl, video_prompts
from tiny_unlisted import UNLISTED, inputs_of

import vlmeff
from vlmeff.curve import draw_curve
from vlmeff.errors import ConfigError, DataError, IncompatibleError, NonFiniteScoreError, UnsupportedModelError
from vlmeff.vlm.calibrate_layers import block_of, calibrate_hiprune, token_embeddings, write_layers
from vlmeff.vlm.families import family_of
from vlmeff.vlm.families.base import present

TOP = 0.25
# Distances of tens, from float32 states that sdpa and eager attention round differently; a tie broken the other way
# would change them in the first digits.
CLOSE = {"rel": 1e-4}


def slow_distance(score, rows, top=TOP):
    n = len(score)
    order = sorted(range(n), key=lambda i: (-float(score[i]), i))[: max(2, int(n * top))]
    pairs = [(i, j) for place, i in enumerate(order) for j in order[place + 1 :]]
    rows = rows.double().tolist()
    return sum(math.dist(rows[i], rows[j]) for i, j in pairs) / len(pairs)


def mean_curve(scores_of_layers, embeddings):
    """``scores_of_layers`` [L][pictures] of [N]; ``embeddings`` [pictures] of [N, C]."""
    return [sum(map(slow_distance, scores, embeddings)) / len(embeddings) for scores in scores_of_layers]


@pytest.mark.parametrize(("name", "projected"), [("llava", 3), ("internvl", 4)])
@torch.no_grad()
def test_the_curve_is_that_of_eager_attention_maps_and_hidden_states(name, projected):
    model, eager = tiny(name), tiny(name, attention="eager")
    samples = [prompts(model, [1, 2]), prompts(model, [1], seed=2)]
    merge = members(name)
    scores, embeddings = [[] for _ in range(projected)], []
    for sample in samples:
        pixels = sample["pixel_values"]
        states = eager.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        maps = tower_maps(eager, pixels)
        for picture in range(len(pixels)):
            embeddings.append(merge @ states[projected][picture, -merge.shape[1] :] / merge.sum(1, keepdim=True))
            for layer in range(projected):
                column = maps[layer][picture].mean((0, 1))[-merge.shape[1] :]
                scores[layer].append(merge @ column / merge.sum(1))
    seen = []
    curve = calibrate_hiprune(model, iter(samples), top=TOP, progress=seen.append)
    assert curve.layers == tuple(range(1, projected + 1))
    assert seen == [len(samples[0]["pixel_values"]), len(embeddings)]
    assert curve.samples == len(embeddings)
    assert curve.distances == pytest.approx(mean_curve(scores, embeddings), **CLOSE)
    greatest = max(range(projected - 1), key=lambda i: curve.rises[i])
    assert curve.object_layer == (greatest + 1 if curve.rises[greatest] > 0 else None)


@torch.no_grad()
def test_qwen2_5_measures_its_full_attention_layers_only_in_raster_order():
    model = tiny_qwen2_5_vl(fullatt_block_indexes=[1, 2, 3])
    inputs = prompts(model, [1, 2])
    blocks, seen = model.model.visual.blocks, {}

    def look(number):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[number] = hidden, *kwargs["position_embeddings"]

        return blocks[number].attn.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [look(number) for number in (1, 2, 3)]
    handles.append(blocks[3].register_forward_hook(lambda module, args, output: seen.update(out=output)))
    model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    for handle in handles:
        handle.remove()

    sizes = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    lengths = [4 * h * w for h, w in sizes]

    def raster(tokens, height, width):
        """Groups of four patches in windows of 2 x 2 tokens -> tokens in raster order."""
        order = [
            y * width + x
            for top in range(0, height, 2)
            for left in range(0, width, 2)
            for y in range(top, min(top + 2, height))
            for x in range(left, min(left + 2, width))
        ]
        out = torch.empty(height * width, *tokens.shape[1:])
        for place, token in enumerate(order):
            out[token] = tokens[4 * place : 4 * place + 4].mean(0)
        return out

    def maps(number):
        x, cos, sin = seen[number]
        attention = blocks[number].attn
        q, k, _ = attention.qkv(x).chunk(3, -1)

        def rotated(x):
            x = x.view(len(x), attention.num_heads, -1).transpose(0, 1)
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        pieces = zip(rotated(q).split(lengths, 1), rotated(k).split(lengths, 1), strict=True)
        return [(a @ b.transpose(1, 2) / a.shape[-1] ** 0.5).softmax(-1).mean((0, 1)) for a, b in pieces]

    scores = [[raster(m, *size) for m, size in zip(maps(number), sizes, strict=True)] for number in (1, 2, 3)]
    embeddings = [raster(x, *size) for x, size in zip(seen["out"].split(lengths), sizes, strict=True)]
    curve = calibrate_hiprune(model, [inputs], top=TOP)
    assert curve.layers == (2, 3, 4)
    assert curve.distances == pytest.approx(mean_curve(scores, embeddings), **CLOSE)


@pytest.mark.parametrize("name", ALL_MODELS)
@torch.no_grad()
def test_every_family_brings_embeddings_to_tokens_channel_by_channel_as_scores(name):
    model = tiny(name)
    inputs = prompts(model, [1, 2])
    family = family_of(model)
    family.layouts(model, inputs, "image")
    seen = []
    block = block_of(model, family.attention_layers(model)[family.deep_layer(model)])
    handle = block.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    encoded = family.encode(model, inputs, "image")
    handle.remove()
    hidden = torch.cat(seen)
    got = token_embeddings(model, family, inputs, "image", hidden)
    assert [[tuple(x.shape) for x in picture] for picture in got] == [
        [(size, hidden.shape[-1]) for size in layout.sizes] for layout in encoded.layouts
    ]
    for channel in (0, 5, 31):
        expected = family.token_scores(model, inputs, "image", hidden[..., channel].contiguous())
        for of_picture, wanted in zip(got, expected, strict=True):
            for x, y in zip(of_picture, wanted, strict=True):
                torch.testing.assert_close(x[:, channel], y)
    curve = calibrate_hiprune(model, [inputs], top=TOP)
    legal = [n for n in family.legal_object_layers(model) if n <= family.deep_layer(model) + 1]
    assert curve.layers == tuple(legal)
    assert curve.samples == len(encoded.layouts)
    assert curve.object_layer is None or curve.object_layer in legal[:-1]


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_a_video_counts_once_and_pictures_do_not_depend_on_their_batch(name):
    model = tiny(name)
    video, pictures = video_prompts(model, [4]), prompts(model, [1])
    alone = [calibrate_hiprune(model, [sample], top=TOP) for sample in (video, pictures)]
    both = calibrate_hiprune(model, [video, pictures], top=TOP)
    assert present(video) == ["video"]
    assert alone[0].samples == 1
    counts = [curve.samples for curve in alone]
    assert both.samples == sum(counts)
    expected = [
        sum(n * d for n, d in zip(counts, ds, strict=True)) / sum(counts)
        for ds in zip(*(c.distances for c in alone), strict=True)
    ]
    assert both.distances == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["aya", "deepseek"])
def test_classes_without_a_family_are_measured_up_to_the_layer_that_is_projected(name):
    build, *_, projected = UNLISTED[name]
    curve = calibrate_hiprune(build(), [inputs_of(name)], top=TOP)
    assert curve.layers == tuple(range(1, projected + 2))
    assert curve.samples == 3


def test_half_precision_models_are_measured_in_float32():
    inputs = llava_inputs(tiny_llava(), [1, 1])
    full = calibrate_hiprune(tiny_llava(), [inputs], top=1.0)  # all tokens: no ranking to be upset by rounding
    half = calibrate_hiprune(
        tiny_llava(dtype=torch.bfloat16), [{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}], top=1.0
    )
    assert half.distances == pytest.approx(full.distances, rel=0.05)
    assert len(set(full.distances)) == 1  # the embeddings are the same for every layer


def test_the_model_is_left_as_it_was_and_models_that_cannot_be_calibrated_are_refused():
    model = tiny("llava")
    inputs = prompts(model, [1])
    with pytest.raises(Exception):  # noqa: B017 - whatever the model says of the picture
        calibrate_hiprune(model, [{**inputs, "pixel_values": torch.zeros(1, 3, 24, 20)}])
    hooks = [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [hook for hook in hooks if hook.__module__.startswith("vlmeff")]  # transformers leaves some of its own
    with pytest.raises(DataError, match="no sample"):
        calibrate_hiprune(model, [{"input_ids": inputs["input_ids"]}])
    with pytest.raises(ConfigError, match="top="):
        calibrate_hiprune(model, [inputs], top=2)
    with pytest.raises(NonFiniteScoreError, match="layer 1"):
        calibrate_hiprune(model, [{**inputs, "pixel_values": inputs["pixel_values"] * math.nan}])
    with pytest.raises(IncompatibleError, match=r"model\.eval"):
        calibrate_hiprune(model.train(), [inputs])
    with pytest.raises(IncompatibleError, match="unwrap"):
        calibrate_hiprune(vlmeff.wrap(model.eval(), None, tokens=vlmeff.HiPrune(keep=0.5)), [inputs])
    windowed = tiny_qwen2_5_vl(fullatt_block_indexes=[3])
    with pytest.raises(UnsupportedModelError, match="1 layer"):
        calibrate_hiprune(windowed, [prompts(windowed, [1])])
    with pytest.raises(UnsupportedModelError):
        calibrate_hiprune(UNLISTED["fast"][0](), [inputs_of("fast")])


def test_the_file_says_the_curve_the_suggestion_and_the_default(tmp_path):
    model = tiny("qwen2_vl")
    curve = calibrate_hiprune(model, [prompts(model, [1, 1])], top=TOP)
    content = json.loads(write_layers(tmp_path / "layers.json", model, curve, {"source": "here"}).read_text())
    assert (content["format"], content["version"]) == ("vlmeff hiprune layers", 1)
    assert content["object_layer"] == curve.object_layer
    assert content["default_object_layer"] == 2  # half of four layers
    assert content["layers"] == [1, 2, 3, 4]
    assert content["distances"] == pytest.approx(curve.distances, abs=1e-6)
    assert (content["top"], content["samples"]) == (TOP, 2)
    assert content["about"]["source"] == "here"
    assert set(content["about"]["versions"]) == {"vlmeff", "transformers", "torch"}


def test_the_chart_has_its_line_highest_where_the_curve_is_and_uprights_at_the_marks():
    line, marked = (0, 114, 178), (213, 94, 0)
    image = np.asarray(draw_curve([1, 2, 3, 4, 5], [1, 1, 9, 1, 1], title="t", x_label="x", marks={"default": 4}))
    rows, columns = (image == line).all(-1).nonzero()
    left, right = columns.min() + 3, columns.max() - 3  # the dots at the ends have a radius of 3
    assert columns[rows == rows.min()].mean() == pytest.approx((left + right) / 2, abs=1)
    uprights = np.bincount((image[60:] == marked).all(-1).nonzero()[1], minlength=image.shape[1])
    assert int(uprights.argmax()) == pytest.approx(left + 0.75 * (right - left), abs=2)
    outside = np.asarray(draw_curve([8, 16], [3.0, 3.0], title="t" * 400, x_label="x", marks={"default": 4}))
    assert not (outside[60:] == marked).all(-1).any()
    assert (outside[30:50] == marked).all(-1).any()
