"""Classes without a family of their own: verified by experiment at the first picture, or refused with the reason."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_common import PATCH, SIDE, decoder, interleaved
from tiny_models import IMAGE, SPECIAL, tiny_gemma3, tiny_idefics3, tiny_internvl, tiny_llava, tiny_perception_lm
from tiny_unlisted import UNLISTED, aya, deepseek, fast, idefics2, inputs_of, vipllava
from torch import nn
from transformers import (
    BlipForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

import vlmeff
from tokenpruning.plan import all_of
from vlmeff.errors import UnsupportedInputError, UnsupportedModelError
from vlmeff.vlm.families import FAMILIES, family_of
from vlmeff.vlm.families.generic import Generic
from vlmeff.vlm.probe import probe

PRUNE = vlmeff.HiPrune(keep=0.45, alpha=0.9)
# Both sides compute the same sums in float32 in another order; hidden states are of order 1 to 10.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
# Means of float32 probabilities.
SCORE_TOLERANCE = {"atol": 1e-6, "rtol": 0.0}

ATTENTIVE = ["aya", "vipllava", "deepseek"]
every_model = pytest.mark.parametrize("name", UNLISTED)
attentive_models = pytest.mark.parametrize("name", ATTENTIVE)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def oracle_logits(model, inputs, keep):
    """Logits of the unwrapped language model on the whole prompt with what is not kept hidden, numbered as if away."""
    ids, seen = inputs["input_ids"], (keep & inputs["attention_mask"].bool()).long()
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], features)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    return seen.bool(), model(inputs_embeds=embeds, attention_mask=seen, position_ids=positions, use_cache=False).logits


@dataclass(frozen=True)
class KeepAllTheLongWay:
    """Asked for some of the tokens it answers all: a request is taken apart and put together with nothing lost."""

    keep: float = 0.9
    needs: ClassVar[tuple[str, ...]] = ()

    def select(self, segment, k):
        return all_of(segment)


@every_model
def test_the_class_has_no_family_of_its_own_and_its_geometry_is_found(name):
    builder, side, (raster, prefix), tokens, layer = UNLISTED[name]
    model = builder()
    assert model.config.model_type not in FAMILIES
    family = family_of(model)
    assert isinstance(family, Generic)
    found = family.geometry(model, torch.randn(1, 3, side, side))
    assert (found.grid, found.block, found.prefix) == ((tokens, tokens), raster // tokens, prefix)
    assert found.feeding == (() if layer is None else (layer,))
    assert found.scored == (frozenset() if layer is None else frozenset(range(4)))


@every_model
def test_a_request_that_is_shortened_by_nothing_gives_the_answer_of_the_unwrapped_model(name):
    model, inputs = UNLISTED[name][0](), inputs_of(name)
    plain, forward = model.generate(**inputs, max_new_tokens=5), model(**inputs).logits
    vlmeff.wrap(model, None, tokens=vlmeff.Downsample(keep=1.0))
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain)
    vlmeff.wrap(model, None, tokens=KeepAllTheLongWay())
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain)
    vlmeff.unwrap(model)
    assert torch.equal(model(**inputs).logits, forward)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[(name, PRUNE) for name in ATTENTIVE],
        *[(name, vlmeff.Downsample(keep=4)) for name in UNLISTED],
        *[(name, vlmeff.DivPrune(keep=0.5)) for name in UNLISTED],
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_shortened_request_equals_the_masked_oracle(name, method):
    builder, inputs = UNLISTED[name][0], inputs_of(name)
    model, wrapped = builder(), vlmeff.wrap(builder(), None, tokens=method)
    output = wrapped(**inputs)
    seen, logits = oracle_logits(model, inputs, output.vlmeff_keep)
    assert seen.sum() < inputs["attention_mask"].sum()
    for row, slots in enumerate(seen):
        torch.testing.assert_close(output.logits[row, -slots.sum() :], logits[row, slots], **TOLERANCE)
    first = wrapped.generate(**inputs, max_new_tokens=1)[:, -1]
    assert torch.equal(first, logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf).argmax(1))


@every_model
def test_tokens_are_resampled_behind_the_encoder(name):
    builder, inputs = UNLISTED[name][0], inputs_of(name, [2])
    side, method = UNLISTED[name][3], vlmeff.Fourier(side=2, gain="preserve")
    wrapped = vlmeff.wrap(builder(), None, tokens=method)
    logits = wrapped(**inputs).logits[0, -1]
    model = builder()
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    features.pooler_output = method.resample(features.pooler_output, (side, side))
    ids = inputs["input_ids"][0]
    kept = torch.ones_like(ids, dtype=torch.bool)
    places = (ids == IMAGE).nonzero()[:, 0].view(2, side**2)
    kept[places[:, 4:]] = False  # four of each picture
    short = model(input_ids=ids[kept][None], mm_encoder_outputs={"image": _plain(features.pooler_output)})
    torch.testing.assert_close(logits, short.logits[0, -1], **TOLERANCE)


def _plain(tokens):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=tokens)


@attentive_models
def test_scores_are_block_means_of_the_column_means_of_the_eager_attention(name):
    builder, _, (raster, prefix), tokens, layer = UNLISTED[name]
    model, inputs, s = builder(), inputs_of(name, [2]), raster // tokens
    family = family_of(model)
    family.layouts(model, inputs, "image")
    with probe(family.score_layers(model, ("object", "deep"), 2), family.query_key) as recorded:
        family.encode(model, inputs, "image")
    maps = builder("eager").model
    maps = (maps.vision_tower if hasattr(maps, "vision_tower") else maps.vision_model)(
        inputs["pixel_values"], output_attentions=True
    ).attentions
    for key, index in (("object", 1), ("deep", layer)):
        mean = maps[index].mean((1, 2))[:, prefix:].view(2, raster, raster)
        places = [(y * s, x * s) for y in range(tokens) for x in range(tokens)]
        expected = torch.stack([mean[:, y : y + s, x : x + s].mean((1, 2)) for y, x in places], 1)
        scores = family.token_scores(model, inputs, "image", torch.cat(recorded[key]))
        torch.testing.assert_close(torch.stack([row for (row,) in scores]), expected, **SCORE_TOLERANCE)


@pytest.mark.parametrize(
    ("builder", "pixels"),
    [
        (tiny_llava, (1, 3, 24, 24)),
        (tiny_internvl, (1, 3, 24, 24)),
        (tiny_idefics3, (1, 1, 3, 24, 24)),
        (tiny_gemma3, (1, 3, 24, 24)),
        (tiny_perception_lm, (1, 1, 3, 24, 24)),
    ],
)
def test_what_is_found_of_a_class_with_a_family_is_what_its_family_says(builder, pixels):
    model, generic = builder(), Generic(builder())
    inputs = {"pixel_values": torch.randn(pixels)}
    own, found = FAMILIES[model.config.model_type], generic.geometry(model, inputs["pixel_values"])
    assert own.layouts(model, inputs, "image")[0].grids == [found.grid]
    assert own.patches_per_token(model) == found.block**2 == generic.patches_per_token(model)
    assert generic.attention_layers(model) == own.attention_layers(model)
    assert generic.deep_layer(model) == own.deep_layer(model)
    score = torch.rand(1, found.tower_tokens)
    ((expected,),) = own.token_scores(model, inputs, "image", score)
    torch.testing.assert_close(generic.token_scores(model, inputs, "image", score)[0][0], expected)


def test_pictures_that_are_no_squares_have_the_grid_of_their_aspect():
    model = tiny_llava()
    tower, encode = model.model.vision_tower, model.model.vision_tower.forward
    tower.forward = lambda *args, **kwargs: encode(*args, **kwargs, interpolate_pos_encoding=True)
    generic = Generic(model)
    assert generic.geometry(model, torch.randn(1, 3, 3 * PATCH, 5 * PATCH)).grid == (3, 5)
    assert generic.geometry(model, torch.randn(1, 3, 8 * PATCH, 2 * PATCH)).grid == (8, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_are_verified_too(dtype):
    for builder, grid in ((aya, (3, 3)), (deepseek, (6, 6))):
        model = builder(dtype=dtype)
        found = family_of(model).geometry(model, torch.randn(1, 3, SIDE, SIDE, dtype=dtype))
        assert (found.grid, len(found.scored)) == (grid, 4)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """A connector followed by something that breaks the correspondence of tokens and blocks."""

    def __init__(self, connector, mix):
        super().__init__()
        self.connector, self.mix = connector, mix

    def forward(self, *args, **kwargs):
        return self.mix(self.connector(*args, **kwargs))


MIXES = {
    "a leak of one in a thousand to the neighbour": lambda x: x + 1e-3 * x.roll(1, 1),
    "two tokens swapped": lambda x: x[:, [1, 0, *range(2, 36)]],
    "columns for rows": lambda x: x.unflatten(1, (6, 6)).transpose(1, 2).flatten(1, 2),
    "attention to all": lambda x: x + x.mean(1, keepdim=True),
    "pictures swapped": lambda x: x.flip(0),
    "a constant token": lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], 1),
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_connector_whose_tokens_are_not_made_of_their_own_block_is_refused(mix):
    model = deepseek()
    model.model.aligner = Mixing(model.model.aligner, MIXES[mix])
    vlmeff.wrap(model, None, tokens="downsample")
    with pytest.raises(UnsupportedModelError, match=r"not made of one block.*adding-a-family"):
        model.generate(**inputs_of("deepseek"), max_new_tokens=1)


def test_a_tower_that_does_not_cut_the_picture_in_raster_order_is_refused():
    model = deepseek()
    model.model.vision_model.embeddings.register_forward_hook(lambda _, args, out: out.flip(1))
    vlmeff.wrap(model, None, tokens="downsample")
    with pytest.raises(UnsupportedModelError, match="raster order"):
        model.generate(**inputs_of("deepseek"), max_new_tokens=1)


def test_a_perceiver_is_refused_at_the_first_picture():
    model = vlmeff.wrap(idefics2(), None, tokens="hiprune")
    inputs = interleaved([[[IMAGE] * 9]], torch.Generator().manual_seed(1))
    with pytest.raises(UnsupportedModelError, match=r"Idefics2.*9 tokens.*36 tower tokens.*adding-a-family"):
        model.generate(**inputs, pixel_values=torch.randn(1, 1, 3, SIDE, SIDE), max_new_tokens=1)
    with pytest.raises(UnsupportedInputError, match="pixel_attention_mask"):
        model.generate(
            **inputs,
            pixel_values=torch.randn(1, 1, 3, SIDE, SIDE),
            pixel_attention_mask=torch.ones(1, 1, SIDE, SIDE),
            max_new_tokens=1,
        )


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def test_a_q_former_that_reads_the_question_is_refused_by_wrap():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", **decoder()}
    config = InstructBlipConfig(vision_config=small, qformer_config=small, text_config=text, image_token_index=IMAGE)
    with pytest.raises(UnsupportedModelError, match=r"InstructBlip.*needs qformer_input_ids.*adding-a-family"):
        vlmeff.wrap(on_meta(InstructBlipForConditionalGeneration, config), None, tokens="downsample")


def test_positions_of_several_dimensions_are_refused_by_wrap():
    vision = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    config = Glm4vConfig(vision_config=vision, text_config=decoder())
    with pytest.raises(UnsupportedModelError, match=r"Glm4v.*several dimensions.*adding-a-family"):
        vlmeff.wrap(on_meta(Glm4vForConditionalGeneration, config), None, tokens="downsample")


def test_a_class_without_the_public_points_is_refused_by_wrap_with_the_supported_ones():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    from transformers import BlipConfig

    config = BlipConfig(vision_config=small, text_config={**small, "encoder_hidden_size": 16})
    with pytest.raises(UnsupportedModelError, match=r"BlipForConditionalGeneration.*llava.*qwen2_5_vl"):
        vlmeff.wrap(on_meta(BlipForConditionalGeneration, config), None, tokens="downsample")


def test_a_tower_without_attention_is_refused_for_methods_that_need_scores():
    with pytest.raises(UnsupportedModelError, match=r"fast_vlm.*no attention scores.*downsample"):
        vlmeff.wrap(fast(), None, tokens="hiprune")


def test_tokens_of_several_layers_are_refused_for_methods_that_need_scores_and_served_for_others():
    model, inputs = vipllava(layers=[-2, -3, 1]), inputs_of("vipllava")
    vlmeff.wrap(model, None, tokens=PRUNE)
    with pytest.raises(UnsupportedModelError, match=r"several layers of the tower \(1, 2, 3\).*downsample"):
        model.generate(**inputs, max_new_tokens=1)
    vlmeff.wrap(model, None, tokens="downsample")
    model.generate(**inputs, max_new_tokens=1)
    assert vlmeff.report(model).visual_tokens_after == 3 * 12


def test_attention_that_is_not_what_was_guessed_is_refused_for_methods_that_need_scores():
    model, inputs = deepseek(), inputs_of("deepseek")
    attention = model.model.vision_model.encoder.layers[1].self_attn
    plain = attention.forward
    turned = torch.linspace(0.5, 1.5, 32)  # as a rotation would, something happens to q that q_proj does not tell

    def forward(hidden_states, **kwargs):
        handle = attention.q_proj.register_forward_hook(lambda _, args, out: out * turned)
        try:
            return plain(hidden_states, **kwargs)
        finally:
            handle.remove()

    attention.forward = forward
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.5, object_layer=2))
    with pytest.raises(UnsupportedModelError, match=r"layer 2 of the tower does more than softmax.*downsample"):
        model.generate(**inputs, max_new_tokens=1)
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.5, object_layer=3))
    model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("name", ["vision_feature_layer", "vision_feature_select_strategy"])
def test_arguments_of_the_encoder_whose_effect_is_not_known_are_refused(name):
    model = vlmeff.wrap(aya(), None, tokens="downsample")
    with pytest.raises(UnsupportedInputError, match=name):
        model.generate(**inputs_of("aya"), **{name: -1}, max_new_tokens=1)


def test_encoded_pictures_without_their_pixels_are_refused():
    model, inputs = vlmeff.wrap(deepseek(), None, tokens="downsample"), inputs_of("deepseek")
    encoded = model.model.get_image_features(inputs.pop("pixel_values"))
    with pytest.raises(UnsupportedInputError, match="pixel_values as one tensor"):
        model.generate(**inputs, mm_encoder_outputs={"image": encoded}, max_new_tokens=1)


# -- the experiment leaves no trace ----------------------------------------------------------------------------------


def traces(model):
    modules = model.named_modules()
    return {path: (sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in modules}


@every_model
def test_nothing_stays_behind_in_the_model(name):
    model, inputs = UNLISTED[name][0](), inputs_of(name)
    model.generate(**inputs, max_new_tokens=1)  # transformers sets up hooks of its own in the first call
    before = traces(model)
    vlmeff.wrap(model, None, tokens="downsample")
    model.generate(**inputs, max_new_tokens=1)
    vlmeff.unwrap(model)
    assert traces(model) == before


def test_nothing_stays_behind_after_an_exception_and_a_forward_of_the_instance_comes_back():
    model, inputs = deepseek(), inputs_of("deepseek")
    layer = model.model.vision_model.encoder.layers[0]
    own = layer.forward
    layer.forward = own  # as accelerate's hooks do
    model.generate(**inputs, max_new_tokens=1)
    before = traces(model)
    vlmeff.wrap(model, None, tokens="downsample")
    handle = model.model.aligner.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        model.generate(**inputs, max_new_tokens=1)
    handle.remove()
    assert layer.__dict__["forward"] is own
    assert {k: v for k, v in traces(model).items() if k} == {k: v for k, v in before.items() if k}


def test_the_experiment_is_made_once_per_size_and_costs_one_pass_of_the_tower():
    model, inputs = vlmeff.wrap(deepseek(), None, tokens="downsample"), inputs_of("deepseek")
    passes = []
    model.model.vision_model.encoder.layers[0].mlp.register_forward_hook(lambda *_: passes.append(1))
    for expected in (2, 3, 4):
        model.generate(**inputs, max_new_tokens=1)
        assert len(passes) == expected


def test_another_thread_that_encodes_during_the_experiment_gets_real_features():
    model, inputs = deepseek(), inputs_of("deepseek")
    others = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    expected, seen, owner = model.model.get_image_features(others).pooler_output, [], threading.get_ident()

    def interfere(*_):
        if threading.get_ident() != owner or len(seen) > 5:
            return
        thread = threading.Thread(target=lambda: seen.append(model.model.get_image_features(others).pooler_output))
        thread.start()
        thread.join()

    model.model.aligner.register_forward_pre_hook(interfere)
    family = family_of(model)
    assert family.geometry(model, inputs["pixel_values"]).grid == (6, 6)
    assert len(seen) == 6
    assert all(torch.equal(features, expected) for features in seen)


def test_a_wrapped_model_can_be_copied_and_pickled():
    model, inputs = vlmeff.wrap(deepseek(), None, tokens=PRUNE), inputs_of("deepseek")
    expected = model.generate(**inputs, max_new_tokens=3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(**inputs, max_new_tokens=3), expected)
