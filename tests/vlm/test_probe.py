"""The scores of the vision layers against attention maps written out in full."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import MODELS, llava_inputs, prompts, qwen_inputs, tiny, tiny_llava, tiny_qwen2_5_vl
from transformers import SiglipVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision as rotate

import vlmeff
from tokenpruning import hiprune_select
from vlmeff.errors import NonFiniteScoreError
from vlmeff.vlm.families import FAMILIES
from vlmeff.vlm.probe import probe

# Means of float32 probabilities, summed in another order.
SCORE_TOLERANCE = {"atol": 1e-6, "rtol": 0.0}

every_model = pytest.mark.parametrize("name", MODELS)


def close(a, b):
    torch.testing.assert_close(a, b, **SCORE_TOLERANCE)


@torch.no_grad()
def probed(model, inputs, object_layer=None):
    """{"object" | "deep": [score [H * W] of each picture]}."""
    family = FAMILIES[model.config.model_type]
    layers = family.score_layers(model, ("object", "deep"), object_layer)
    with probe(layers, family.query_key) as recorded:
        family.encode(model, inputs, "image")
    scores = {name: family.token_scores(model, inputs, "image", torch.cat(parts)) for name, parts in recorded.items()}
    return {name: [torch.cat(segments) for segments in pictures] for name, pictures in scores.items()}


@torch.no_grad()
def clip_column_means(model, pixel_values, layer):
    """Mean over heads and queries of the attention map that an eager tower returns, all tokens."""
    return model.model.vision_tower(pixel_values, output_attentions=True).attentions[layer].mean((1, 2))


@torch.no_grad()
def qwen_column_means(model, inputs, layer):
    """Per picture the mean attention each patch receives in a layer without windows, from its input, in naive steps.

    Patches come in the order in which the tower holds them.
    """
    attention, seen = model.model.visual.blocks[layer].attn, {}

    def look(module, args, kwargs):
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["cos"], seen["sin"] = kwargs["position_embeddings"]

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    handle.remove()
    q, k, _ = attention.qkv(seen["x"]).chunk(3, -1)

    def rotated(x):
        x = x.view(len(x), attention.num_heads, -1).transpose(0, 1)
        first, second = x.chunk(2, -1)
        return x * seen["cos"] + torch.cat([-second, first], -1) * seen["sin"]

    lengths = inputs["image_grid_thw"].prod(1).tolist()
    pieces = zip(rotated(q).split(lengths, 1), rotated(k).split(lengths, 1), strict=True)
    return [(a @ b.transpose(1, 2) / a.shape[-1] ** 0.5).softmax(-1).mean((0, 1)) for a, b in pieces]


def window_order(height, width, side):
    """Raster indices of the merged tokens in the order of a windowed tower: window by window, raster within each."""
    return [
        y * width + x
        for top in range(0, height, side)
        for left in range(0, width, side)
        for y in range(top, min(top + side, height))
        for x in range(left, min(left + side, width))
    ]


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_clip_scores_are_the_column_means_of_the_eager_attention_without_cls(layer):
    inputs = llava_inputs(tiny_llava(), [2])
    eager = tiny_llava(attention="eager")
    scores = probed(tiny_llava(), inputs, object_layer=layer)
    close(torch.stack(scores["object"]), clip_column_means(eager, inputs["pixel_values"], layer - 1)[:, 1:])
    close(torch.stack(scores["deep"]), clip_column_means(eager, inputs["pixel_values"], -2)[:, 1:])


@pytest.mark.parametrize(("layer", "attention_index"), [(-1, 3), (-2, 2), (-4, 0), (4, 3), (1, 0)])
def test_the_deep_layer_is_the_one_whose_output_is_projected(layer, attention_index):
    inputs = llava_inputs(tiny_llava(), [1])
    eager = tiny_llava(attention="eager", layer=layer)
    scores = probed(tiny_llava(layer=layer), inputs)["deep"]
    close(scores[0], clip_column_means(eager, inputs["pixel_values"], attention_index)[0, 1:])


def test_siglip_scores_are_the_column_means_of_the_eager_attention():
    options = {"tower": SiglipVisionConfig, "strategy": "full", "layer": -1}
    inputs = llava_inputs(tiny_llava(), [2])
    eager = tiny_llava(attention="eager", **options)
    scores = probed(tiny_llava(**options), inputs, object_layer=3)
    close(torch.stack(scores["object"]), clip_column_means(eager, inputs["pixel_values"], 2))
    close(torch.stack(scores["deep"]), clip_column_means(eager, inputs["pixel_values"], 3))


@pytest.mark.parametrize("grid", [(8, 12), (6, 10), (2, 14), (10, 2)], ids=str)
@pytest.mark.parametrize("window", [8, 64], ids=["windows", "one window"])
def test_qwen_scores_are_means_over_merged_patches_in_raster_order(window, grid):
    model = tiny_qwen2_5_vl(window=window)
    inputs = qwen_inputs(model, [[grid, (8, 8)]])
    height, width = grid[0] // 2, grid[1] // 2
    order = window_order(height, width, side=window // 4)
    scores = probed(model, inputs, object_layer=2)
    for name, layer in (("object", 1), ("deep", 3)):
        merged = qwen_column_means(model, inputs, layer)[0].view(-1, 4).mean(1)
        close(scores[name][0][order], merged)


def test_the_window_order_has_no_influence_on_a_tower_whose_layers_all_see_the_whole_picture():
    every_layer = {"fullatt_block_indexes": [0, 1, 2, 3]}
    windows, whole = tiny_qwen2_5_vl(window=8, **every_layer), tiny_qwen2_5_vl(window=64, **every_layer)
    inputs = qwen_inputs(windows, [[(8, 12), (6, 10)], [(10, 4)]])
    for name, pictures in probed(windows, inputs, object_layer=2).items():
        for a, b in zip(pictures, probed(whole, inputs, object_layer=2)[name], strict=True):
            close(a, b)


@every_model
def test_the_scores_of_a_picture_do_not_depend_on_its_batch_mates(name):
    model = tiny(name)
    inputs = prompts(model, [2])
    alone = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
    if name == "qwen2_5_vl":
        patches = int(inputs["image_grid_thw"][0].prod())
        alone |= {"pixel_values": inputs["pixel_values"][:patches], "image_grid_thw": inputs["image_grid_thw"][:1]}
    for layer, scores in probed(model, alone).items():
        close(scores[0], probed(model, inputs)[layer][0])


@pytest.mark.parametrize("object_layer", [None, 4])
@every_model
@torch.no_grad()
def test_the_tokens_kept_are_those_that_hiprune_chooses_from_the_full_attention_maps(name, object_layer):
    model, eager = tiny(name), tiny(name, attention="eager")
    inputs = prompts(model, [1])
    layer = 2 if object_layer is None else object_layer
    if name == "llava":
        grid = (6, 6)
        o, d = (clip_column_means(eager, inputs["pixel_values"], i)[0, 1:] for i in (layer - 1, 2))
    else:
        grid = (4, 6)
        back = torch.tensor(window_order(*grid, side=2)).argsort()
        o, d = (qwen_column_means(eager, inputs, i)[0].view(-1, 4).mean(1)[back] for i in (layer - 1, 3))
    expected = hiprune_select(o, d, k=10, grid=grid, alpha=0.5)
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=10, alpha=0.5, object_layer=object_layer))
    model.generate(**inputs, max_new_tokens=1)
    plan = vlmeff.report(model).plan
    (chosen,) = plan.items[0].selections
    assert torch.equal(chosen.index, expected.index)
    assert torch.equal(chosen.kind, expected.kind)


def test_the_default_layers_of_towers_of_the_published_depth_are_those_of_the_paper():
    with torch.device("meta"):
        llava = tiny_llava(num_hidden_layers=24)
        qwen = tiny_qwen2_5_vl(depth=32, fullatt_block_indexes=[7, 15, 23, 31])
    for model, deep, number in ((llava, 22, 9), (qwen, 31, 16)):
        family = FAMILIES[model.config.model_type]
        assert (family.deep_layer(model), family.object_layer(model)) == (deep, number)


@every_model
def test_the_hooks_are_gone_after_an_exception_in_the_encoder(name):
    model = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=0.4))
    inputs = prompts(model, [1])
    expected = model.generate(**inputs, max_new_tokens=3)
    last = model.model.multi_modal_projector if name == "llava" else model.model.visual.merger

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(**inputs, max_new_tokens=3)
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)


@pytest.mark.parametrize("call", ["generate", "forward"])
@every_model
def test_activations_that_are_not_finite_raise_an_error_that_names_the_layer_and_the_picture(name, call):
    model = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=0.4))
    inputs = prompts(model, [1, 1])
    inputs["pixel_values"][-1] = torch.nan  # in the last picture
    with pytest.raises(NonFiniteScoreError, match=r"object layer.*picture 1"):
        model.generate(**inputs, max_new_tokens=1) if call == "generate" else model(**inputs)


def test_an_overflow_in_the_deep_layer_alone_is_named():
    model = vlmeff.wrap(tiny_llava(), None, tokens=vlmeff.HiPrune(keep=0.4))
    model.model.vision_tower.get_submodule("encoder.layers.2.self_attn.k_proj").weight.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"deep layer.*picture 0"):
        model(**llava_inputs(model, [1]))


@every_model
def test_a_bfloat16_model_gives_float32_scores_that_tell_the_tokens_apart(name):
    model = tiny(name, dtype=torch.bfloat16)
    for pictures in probed(model, prompts(model, [1])).values():
        assert pictures[0].dtype == torch.float32
        assert len(pictures[0].unique()) == len(pictures[0])


def test_a_bfloat16_model_is_scored_in_float32_from_its_own_queries_and_keys():
    model = tiny_llava(dtype=torch.bfloat16)
    inputs, seen = llava_inputs(model, [2]), []
    module = FAMILIES["llava"].score_layers(model, ("deep",), None)["deep"]
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    scores = probed(model, inputs)["deep"]
    handle.remove()
    q, k = (p(seen[0]).float().view(2, 37, 4, 8).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    close(torch.stack(scores), (q @ k.mT * module.scale).softmax(-1).mean((1, 2))[:, 1:])


def float64_column_means(q, k, scale):
    """[heads, n, D] of one segment -> [n]."""
    return (q.double() @ k.double().mT * scale).softmax(-1).mean((0, 1))


@pytest.mark.parametrize("seed", range(4))
@every_model
@torch.no_grad()
def test_a_bfloat16_model_keeps_what_float64_scores_of_its_activations_keep(name, seed):
    model = tiny(name, dtype=torch.bfloat16, seed=seed)
    inputs, family, inputs_of = prompts(model, [1], seed=seed), FAMILIES[name], {}
    for label, module in family.score_layers(model, ("object", "deep"), None).items():
        module.register_forward_pre_hook(
            lambda _, args, kwargs, label=label: inputs_of.update(
                {label: (args[0] if args else kwargs["hidden_states"], kwargs)}
            ),
            with_kwargs=True,
        )
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.4, alpha=0.5))
    model(**inputs)
    (chosen,) = vlmeff.report(model).plan.items[0].selections
    scores = {}
    for label, module in family.score_layers(model, ("object", "deep"), None).items():
        hidden, kwargs = inputs_of[label]
        if name == "llava":
            q, k = (p(hidden)[0].unflatten(-1, (4, -1)).transpose(0, 1) for p in (module.q_proj, module.k_proj))
            scores[label] = float64_column_means(q, k, module.scale)[1:]
        else:
            q, k, _ = module.qkv(hidden).view(len(hidden), 3, module.num_heads, -1).unbind(1)
            q, k = rotate(q, k, *kwargs["position_embeddings"])
            means = float64_column_means(q.transpose(0, 1), k.transpose(0, 1), module.scaling)
            (scores[label],) = family.token_scores(model, inputs, "image", means)[0]
    grid = vlmeff.report(model).plan.items[0].layout.grids[0]
    expected = hiprune_select(scores["object"], scores["deep"], k=len(chosen.index), grid=grid, alpha=0.5)
    differ = set(chosen.index.tolist()) ^ set(expected.index.tolist())
    if differ:  # only tokens whose scores all but tie may change places
        near = [scores[label][sorted(differ)] for label in scores]
        assert any(float((s.max() - s.min()) / s.max()) < 1e-6 for s in near)


@every_model
@torch.no_grad()
def test_a_probe_records_nothing_of_what_another_thread_encodes_meanwhile(name):
    model = tiny(name)
    inputs, others = prompts(model, [1]), prompts(model, [1, 2], seed=9)
    family = FAMILIES[name]
    layers = family.score_layers(model, ("object", "deep"), None)
    with probe(layers, family.query_key) as recorded:
        thread = threading.Thread(target=family.encode, args=(model, others, "image"))
        thread.start()
        thread.join()
        family.encode(model, inputs, "image")
    assert {key: len(parts) for key, parts in recorded.items()} == {"object": 1, "deep": 1}
