"""The tiny models do what the tests built on them take for granted: they run as the real classes do, they look at
their pictures, and neither their attention nor their logits are degenerate."""

from __future__ import annotations

import pytest
import torch
from tiny_llava_family import NEXT_PICTURES, NEXT_PINPOINTS, ONEVISION_PICTURES, ONEVISION_PINPOINTS
from tiny_models import (
    ALL_MODELS,
    IMAGE,
    NO_CHUNKED_PREFILL,
    VIDEO,
    VIDEO_MODELS,
    llava_onevision_inputs,
    paligemma_inputs,
    prompts,
    tiny,
    tiny_perception_lm,
    video_prompts,
)
from tiny_qwen_family import qwen_videos
from transformers import (
    Gemma3ImageProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    PerceptionLMImageProcessor,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
    SmolVLMImageProcessor,
)

ROUNDING = 1e-4  # float32; a prompt alone and one in a batch, cached and not, sum in another order
NEW = 4


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def new_tokens(model, inputs, **options):
    options |= {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :], out.logits[0]


@pytest.mark.parametrize("name", ALL_MODELS)
def test_generate_and_forward_agree_on_every_batch(name):
    model = tiny(name)
    for pictures in ([0], [1], [2], [0, 1, 2], [2, 0, 1]):
        inputs = prompts(model, pictures)
        tokens, first = new_tokens(model, inputs)
        assert tokens.shape == (len(pictures), NEW)
        torch.testing.assert_close(model(**inputs).logits[:, -1], first, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_generate_and_forward_agree_on_videos(name):
    model = tiny(name)
    for frames in ([4], [4, 0, 4]):
        inputs = video_prompts(model, frames)
        assert VIDEO in inputs["input_ids"]
        tokens, first = new_tokens(model, inputs)
        assert tokens.shape == (len(frames), NEW)
        torch.testing.assert_close(model(**inputs).logits[:, -1], first, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_videos_differ_in_length_and_stand_beside_pictures(name):
    model = tiny(name)
    inputs = qwen_videos(model, [5, 0, 2], pictures=[1, 2, 0])
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 6], [1, 4, 6]]
    assert inputs["image_grid_thw"].shape == (3, 3)
    _, first = new_tokens(model, inputs)
    torch.testing.assert_close(model(**inputs).logits[:, -1], first, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_each_picture_changes_the_logits_of_its_own_row_only(name):
    model = tiny(name)
    inputs = prompts(model, [0, 1, 2])
    before = model(**inputs).logits[:, -1]
    by_row = name in ("idefics3", "smolvlm")
    for index, row in ((1 if by_row else 0, 1), (-1, 2)):
        changed = inputs["pixel_values"].clone()
        changed[index] = -changed[index]  # the padding of a picture or row stays zero
        moved = (model(**{**inputs, "pixel_values": changed}).logits[:, -1] - before).abs().amax(-1)
        assert moved[row] > 0.02
        assert moved[[other for other in range(3) if other != row]].max() < ROUNDING


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_each_video_changes_the_logits_of_its_own_row_only(name):
    model = tiny(name)
    inputs = video_prompts(model, [4, 0, 4])
    before = model(**inputs).logits[:, -1]
    for index, row in ((0, 0), (-1, 2)):
        changed = inputs["pixel_values_videos"].clone()
        changed[index] = -changed[index]
        moved = (model(**{**inputs, "pixel_values_videos": changed}).logits[:, -1] - before).abs().amax(-1)
        assert moved[row] > 0.02
        assert moved[[other for other in range(3) if other != row]].max() < ROUNDING


@pytest.mark.parametrize("name", ALL_MODELS)
def test_logits_are_spread_and_rows_differ(name):
    model = tiny(name)
    inputs = prompts(model, [1, 2, 1])
    logits = model(**inputs).logits[:, -1]
    assert (logits.std(-1) > 0.5).all()
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1] > 10 * ROUNDING).all(), "greedy search must not hang on rounding"
    assert len({tuple(row) for row in new_tokens(model, inputs)[0].tolist()}) > 1


@pytest.mark.parametrize("name", ALL_MODELS)
def test_attention_is_neither_uniform_nor_one_hot(name, monkeypatch):
    real = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1) if enable_gqa else k
        s = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        allowed = torch.ones_like(s, dtype=torch.bool)
        if attn_mask is not None:
            allowed &= attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
        if is_causal:
            allowed &= torch.ones(s.shape[-2:], dtype=torch.bool).tril()
        count = allowed.sum(-1, keepdim=True)
        p = s.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        distance = 0.5 * (p - allowed / count.clamp(min=1)).abs().sum(-1)
        several = count[..., 0] > 4
        seen.append((distance[several].mean().item(), p.amax(-1)[several].mean().item()))
        return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = tiny(name)
    model(**prompts(model, [1]))
    assert len(seen) >= 4 + 3  # vision layers (Qwen calls once per picture or window), text layers
    for distance_from_uniform, largest in seen:
        assert distance_from_uniform > 0.25
        assert largest < 0.8


def test_llava_next_cuts_padding_and_keeps_one_tile_pictures():
    model = tiny("llava_next")
    inputs = prompts(model, [len(NEXT_PICTURES)])
    sizes = [
        len(f) for f in model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    ]
    assert sizes == [36 + 4 * 19, 36 + 12 * 5, 36 + 4 * 7, 36 + 12 * 13, 36 + 6 * 17]


def test_llava_onevision_interpolates_large_mosaics_and_gives_one_tile_to_pictures_in_company():
    model = tiny("llava_onevision")

    def sizes(pictures):
        inputs = prompts(model, pictures)
        fields = {k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images")}
        return [len(f) for f in model.model.get_image_features(**fields).pooler_output]

    assert sizes([1, 1, 1, 1]) == [25 + 3 * 11, 25 + 3 * 6, 25 + 12 * 18, 25 + 10 * 4]  # 15 x 20 became 12 x 17
    assert sizes([0, 1, 3]) == [25 + 3 * 11, 26, 26, 26]


def test_llava_onevision_cuts_every_picture_of_a_flat_list_into_tiles():
    model = tiny("llava_onevision")
    inputs = llava_onevision_inputs(model, [1, 2], nested=False)
    assert (inputs["input_ids"] == IMAGE).sum(-1).tolist() == [58, 43 + 241]
    _, first = new_tokens(model, inputs)
    torch.testing.assert_close(model(**inputs).logits[:, -1], first, atol=ROUNDING, rtol=0)


def test_paligemma_generates_with_the_empty_labels_of_its_processor():
    model = tiny("paligemma")
    with_labels, without = paligemma_inputs(model, [1, 2], labels=True), paligemma_inputs(model, [1, 2])
    assert torch.equal(new_tokens(model, with_labels)[0], new_tokens(model, without)[0])


@pytest.mark.parametrize("name", ALL_MODELS)
def test_chunked_prefill_works_but_for_the_models_that_are_listed(name):
    model = tiny(name)
    inputs = prompts(model, [1, 2])
    _, whole = new_tokens(model, inputs)
    try:
        _, chunked = new_tokens(model, inputs, prefill_chunk_size=7)
    except TypeError:
        assert name in NO_CHUNKED_PREFILL
    else:
        assert ((chunked - whole).abs().max() > ROUNDING) == (name in NO_CHUNKED_PREFILL)


def test_qwen3_reads_every_deepstack_layer():
    model = tiny("qwen3_vl")
    inputs = prompts(model, [1])
    before = model(**inputs).logits[:, -1]
    fields = {k: inputs.pop(k) for k in ("pixel_values", "image_grid_thw")}
    positions = model.model.get_rope_index(**inputs, image_grid_thw=fields["image_grid_thw"])[0]
    for layer in range(2):
        encoded = model.model.get_image_features(**fields)
        encoded.deepstack_features[layer] = tuple(-f for f in encoded.deepstack_features[layer])
        after = model(**inputs, position_ids=positions, mm_encoder_outputs={"image": encoded}).logits[:, -1]
        assert (after - before).abs().max() > 0.02


@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("class_token", [True, False])
def test_perception_lm_has_one_token_per_pooled_patch_with_and_without_class_token(class_token, pooling):
    model = tiny_perception_lm(class_token=class_token, pooling=pooling)
    inputs = prompts(model, [1, 2])
    features = model.model.get_image_features(inputs["pixel_values"])
    assert features.last_hidden_state.shape == (3 * 3, 36 + class_token, 32)
    assert features.pooler_output.shape == (3 * 3, 36 // pooling**2, 32)
    assert new_tokens(model, inputs)[0].shape == (2, NEW)


def picture(height, width):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(1, 255, (3, height, width), generator=generator, dtype=torch.uint8)


def square(processor, rows):
    return processor([picture(20, 30) for _ in range(sum(rows))], return_tensors="pt")


def of(sizes):
    def call(processor, rows):
        left = iter(sizes)
        return processor([picture(*next(left)) for _ in range(sum(rows))], return_tensors="pt")

    return call


def nested(sizes):
    def call(processor, rows):
        left = iter(sizes)
        return processor([[picture(*next(left)) for _ in range(count)] for count in rows], return_tensors="pt")

    return call


TILE = {"height": 24, "width": 24}
QWEN = (
    Qwen2VLImageProcessor(patch_size=2, merge_size=2, min_pixels=4, max_pixels=10000),
    of([(16, 24), (12, 20), (8, 16)]),
)
PROCESSORS = {
    "llava_next": (
        LlavaNextImageProcessor(size={"shortest_edge": 24}, crop_size=TILE, image_grid_pinpoints=NEXT_PINPOINTS),
        of(NEXT_PICTURES),
    ),
    "llava_onevision": (
        LlavaOnevisionImageProcessor(size={"height": 20, "width": 20}, image_grid_pinpoints=ONEVISION_PINPOINTS),
        nested(ONEVISION_PICTURES),
    ),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "internvl": (
        GotOcr2ImageProcessor(size=TILE, crop_to_patches=True, min_patches=1, max_patches=4),
        of([(24, 48), (24, 24), (48, 48)]),
    ),
    "gemma3": (Gemma3ImageProcessor(size=TILE), square),
    "paligemma": (SiglipImageProcessor(size=TILE), square),
    "perception_lm": (PerceptionLMImageProcessor(tile_size=24, max_num_tiles=2), of([(24, 48)] * 3)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_prompts_have_the_visual_tensors_of_the_real_image_processor(name):
    processor, call = PROCESSORS[name]
    rows = [0, 1, 2]
    real = {k: v for k, v in call(processor, rows).items() if k not in ("num_patches", "num_crops")}
    ours = prompts(tiny(name), rows)
    text = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    assert set(ours) - text == set(real)
    for key, value in real.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        if not value.is_floating_point():
            assert torch.equal(ours[key], value)
    if real["pixel_values"].ndim == 5:  # zero tiles fill up the short pictures
        assert torch.equal(_filled(ours), _filled(real))


def _filled(inputs):
    return (inputs["pixel_values"] != 0).flatten(2).any(-1)


@pytest.mark.parametrize(("name", "cls"), [("idefics3", Idefics3ImageProcessor), ("smolvlm", SmolVLMImageProcessor)])
def test_idefics_prompts_have_the_visual_tensors_of_the_real_image_processor(name, cls):
    # it enlarges a picture to the longest edge before it splits it, so one size gives one kind of split
    processor = cls(size={"longest_edge": 48}, max_image_size={"longest_edge": 24})
    real = processor([[], [picture(24, 48)]], return_tensors="pt")
    ours = prompts(tiny(name), [0, 1])
    assert set(ours) - {"input_ids", "attention_mask"} == set(real)
    for key, value in real.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
    assert torch.equal(ours["pixel_attention_mask"], real["pixel_attention_mask"])
    assert torch.equal(_filled(ours), _filled(real))


@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_seed_gives_the_same_prompt_and_another_seed_another(name):
    model = tiny(name)
    one, same, other = prompts(model, [1, 2]), prompts(model, [1, 2]), prompts(model, [1, 2], seed=2)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["input_ids"], other["input_ids"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert torch.equal((one["input_ids"] == IMAGE).sum(-1), (other["input_ids"] == IMAGE).sum(-1))
