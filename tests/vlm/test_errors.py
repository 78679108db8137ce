"""What cannot work is refused before the language model runs, by an error that names the argument and the remedy."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import IMAGE, MODELS, VIDEO, llava_inputs, prompts, qwen_inputs, tiny, tiny_llava, tiny_qwen2_5_vl
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import vlmeff
from vlmeff.errors import (
    ConfigError,
    IncompatibleError,
    UnknownNameError,
    UnsupportedInputError,
    UnsupportedModelError,
    VlmeffError,
)

PRUNE = vlmeff.HiPrune(keep=0.4)
every_model = pytest.mark.parametrize("name", MODELS)
every_call = pytest.mark.parametrize("call", ["generate", "forward"])


def wrapped_tiny(name, tokens=PRUNE):
    return vlmeff.wrap(tiny(name), None, tokens=tokens)


def ask(model, call, arguments):
    return model.generate(**arguments, max_new_tokens=2) if call == "generate" else model(**arguments)


@contextmanager
def refused(model, error, match):
    """The block raises ``error`` and its message matches; the language model is not called."""
    calls = []
    handle = model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=match) as caught:
        yield
    handle.remove()
    assert isinstance(caught.value, VlmeffError)
    assert not calls


def encoded(model, inputs):
    arguments = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    with torch.no_grad():
        return model.model.get_image_features(**arguments, return_dict=True)


# At wrap time


@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.5, float("nan"), True])
@every_model
def test_wrap_refuses_a_budget_that_is_none_and_leaves_the_model_alone(name, keep):
    model = tiny(name)
    with pytest.raises(ConfigError, match=r"keep=.*\(0, 1\]"):
        vlmeff.wrap(model, None, tokens="hiprune", keep=keep)
    with pytest.raises(ConfigError, match=r"keep=.*\(0, 1\]"):
        vlmeff.wrap(model, None, tokens=PRUNE, keep=keep)
    assert not vlmeff.is_wrapped(model)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_wrap_refuses_an_alpha_outside_0_to_1(alpha):
    with pytest.raises(ValueError, match=r"alpha=.*\[0, 1\]"):
        vlmeff.wrap(tiny_llava(), None, tokens=PRUNE, alpha=alpha)


def test_an_object_layer_that_does_not_exist_lists_the_legal_ones():
    with pytest.raises(ConfigError, match=r"object_layer=5.*1, 2, 3, 4"):
        vlmeff.wrap(tiny_llava(), None, tokens=vlmeff.HiPrune(object_layer=5))
    with pytest.raises(ConfigError, match=r"object_layer=9.*does not exist.*2, 4"):
        vlmeff.wrap(tiny_qwen2_5_vl(), None, tokens=vlmeff.HiPrune(object_layer=9))


@pytest.mark.parametrize("layer", [1, 3])
def test_a_windowed_object_layer_lists_the_layers_that_see_the_whole_picture(layer):
    with pytest.raises(ValueError, match=rf"object_layer={layer}.*windowed.*2, 4"):
        vlmeff.wrap(tiny_qwen2_5_vl(), None, tokens=vlmeff.HiPrune(object_layer=layer))


def test_a_tower_whose_last_layer_is_windowed_is_refused_by_hiprune_and_taken_by_downsample():
    model = tiny_qwen2_5_vl(fullatt_block_indexes=[1])
    with pytest.raises(UnsupportedModelError, match=r"windowed.*downsample"):
        vlmeff.wrap(model, None, tokens=PRUNE)
    vlmeff.wrap(model, None, tokens="downsample").generate(**prompts(model, [1]), max_new_tokens=1)


@pytest.mark.parametrize("layer", [[-2, -1], 0, 9, -6], ids=str)
def test_a_feature_layer_that_is_not_one_layer_of_the_tower_is_refused(layer):
    model = tiny_llava()
    model.config.vision_feature_layer = layer
    with pytest.raises(UnsupportedModelError, match="vision_feature_layer"):
        vlmeff.wrap(model, None, tokens=PRUNE)


def test_a_method_without_scores_takes_a_tower_that_hiprune_cannot_read():
    model = vlmeff.wrap(tiny_llava(layer=[-2, -3]), None, tokens=vlmeff.Downsample(keep=9))
    inputs = llava_inputs(model, [1])
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert vlmeff.report(model).visual_tokens_after == 9


def test_a_tower_whose_cls_token_is_projected_is_refused_by_the_name_of_the_setting():
    with pytest.raises(UnsupportedModelError, match="vision_feature_select_strategy"):
        vlmeff.wrap(tiny_llava(strategy="full"), None, tokens=PRUNE)


def test_a_language_model_without_pictures_is_refused_by_tokens():
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(UnsupportedModelError, match=r"tokens.*LlamaForCausalLM.*no pictures"):
        vlmeff.wrap(LlamaForCausalLM(config), None, tokens=PRUNE)


@pytest.mark.parametrize("thing", ["llava-hf/llava-1.5-7b-hf", nn.Linear(2, 2), None], ids=["name", "layer", "none"])
def test_what_is_no_transformers_model_is_refused(thing):
    with pytest.raises(UnsupportedModelError, match="from_pretrained"):
        vlmeff.wrap(thing, None, tokens=PRUNE)


@every_model
def test_the_inner_model_without_a_head_is_refused_or_gives_short_hidden_states(name):
    model = tiny(name)
    inputs = prompts(model, [1])
    try:
        vlmeff.wrap(model.model, None, tokens=PRUNE)
    except UnsupportedModelError:
        return
    with torch.no_grad():
        output = model.model(**inputs)
    assert output.last_hidden_state.shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("technique", ["quant", "draft"])
def test_a_technique_of_a_later_version_is_refused_by_name(technique):
    with pytest.raises(ConfigError, match=rf"{technique}=.*not available"):
        vlmeff.wrap(tiny_llava(), None, tokens=PRUNE, **{technique: "anything"})


def test_an_unknown_override_gets_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"'alpa'.*Did you mean 'alpha'"):
        vlmeff.wrap(tiny_llava(), None, tokens=PRUNE, alpa=0.2)


def test_an_unknown_method_gets_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"'hyprune'.*Did you mean 'hiprune'"):
        vlmeff.wrap(tiny_llava(), None, tokens="hyprune")


def test_an_override_without_a_method_is_refused():
    with pytest.raises(ConfigError, match=r"keep=.*none is asked for"):
        vlmeff.wrap(tiny_llava(), None, keep=0.5)


@pytest.mark.parametrize("tokens", [0.5, vlmeff.HiPrune, object()], ids=["number", "class", "object"])
def test_tokens_must_be_a_method_or_its_name(tokens):
    with pytest.raises(ConfigError, match=r"tokens=.*HiPrune\("):
        vlmeff.wrap(tiny_llava(), None, tokens=tokens)


def test_a_failed_second_wrap_leaves_the_first_in_force():
    model = wrapped_tiny("llava")
    inputs = prompts(model, [1])
    expected = model.generate(**inputs, max_new_tokens=3)
    with pytest.raises(ConfigError):
        vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(object_layer=77))
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)


def test_unwrap_of_a_model_that_is_not_wrapped_is_an_error():
    with pytest.raises(ConfigError, match="not wrapped"):
        vlmeff.unwrap(tiny_llava())


def test_a_report_of_a_model_that_is_not_wrapped_says_how_to_wrap_it():
    with pytest.raises(ConfigError, match=r"not wrapped.*vlmeff\.wrap"):
        vlmeff.report(tiny_llava())


@every_model
def test_a_report_before_the_first_call_says_so(name):
    model = wrapped_tiny(name)
    with pytest.raises(ConfigError, match="not been called"):
        vlmeff.report(model)
    model.generate(**prompts(model, [1]), max_new_tokens=1)
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=3))
    with pytest.raises(ConfigError, match="not been called"):
        vlmeff.report(model)


# At call time


@pytest.mark.parametrize("placeholders", [0, 35, 37, 72])
@every_call
def test_placeholders_that_do_not_match_the_pictures_are_counted_in_the_error(call, placeholders):
    model = wrapped_tiny("llava")
    inputs = llava_inputs(model, [1])
    text = inputs["input_ids"][inputs["input_ids"] != IMAGE]
    ids = torch.cat([text[:2], torch.full((placeholders,), IMAGE), text[2:]])[None]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with refused(model, VlmeffError, rf"{placeholders} picture placeholders.*36 tokens.*processor"):
        ask(model, call, inputs)


@every_model
def test_embeddings_given_instead_of_ids_are_passed_on_with_a_warning(name):
    model = tiny(name)
    inputs = prompts(model, [1])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    if name == "qwen2_5_vl":
        inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        expected = model(**inputs).logits
        vlmeff.wrap(model, None, tokens=PRUNE)
        with pytest.warns(UserWarning, match=r"inputs_embeds.*not reduced"):
            assert torch.equal(model(**inputs).logits, expected)


@every_model
def test_embeddings_given_with_the_ids_are_passed_on_with_a_warning(name):
    model = tiny(name)
    inputs = prompts(model, [1])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    expected = model.generate(**inputs, max_new_tokens=3)
    vlmeff.wrap(model, None, tokens=PRUNE)
    with pytest.warns(UserWarning, match=r"inputs_embeds.*not reduced"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)


@every_call
@every_model
def test_encoder_outputs_of_the_caller_are_refused_by_hiprune(name, call):
    model = wrapped_tiny(name)
    inputs = prompts(model, [1])
    outputs = {"image": encoded(model, inputs)}
    del inputs["pixel_values"]
    with refused(model, IncompatibleError, r"mm_encoder_outputs.*(pixel_values|downsample)"):
        ask(model, call, {**inputs, "mm_encoder_outputs": outputs})


@every_call
def test_user_position_ids_are_refused_where_the_prompt_is_numbered_anew(call):
    model = wrapped_tiny("llava")
    inputs = llava_inputs(model, [1])
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with refused(model, IncompatibleError, r"position_ids.*Leave position_ids out"):
        ask(model, call, {**inputs, "position_ids": positions})


@every_call
def test_flat_position_ids_are_refused_where_positions_have_three_rows(call):
    model = wrapped_tiny("qwen2_5_vl")
    inputs = prompts(model, [1])
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with refused(model, UnsupportedInputError, r"position_ids.*\[4, B, L\]"):
        ask(model, call, {**inputs, "position_ids": positions})


def video_inputs(model):
    inputs = qwen_inputs(model, [[(8, 12)]])
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VIDEO
    inputs["mm_token_type_ids"] *= 2
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    inputs["video_grid_thw"] = inputs.pop("image_grid_thw")
    return inputs


@every_call
def test_a_video_is_refused_where_the_model_takes_none_and_never_silently_unpruned(call):
    model = wrapped_tiny("llava")
    video = {**prompts(model, [0]), "pixel_values_videos": torch.zeros(1, 2, 3, 24, 24)}
    with refused(model, NotImplementedError, "video.*pictures.*unwrap"):
        ask(model, call, video)


@every_call
@pytest.mark.parametrize("request_of", ["a video", "encoder outputs"])
def test_a_full_share_passes_on_even_what_could_not_be_reduced(request_of, call):
    model = tiny_qwen2_5_vl()
    inputs = video_inputs(model) if request_of == "a video" else prompts(model, [1])

    def answer():
        arguments = dict(inputs)
        if request_of == "encoder outputs":
            arguments["mm_encoder_outputs"] = {"image": encoded(model, inputs)}
            del arguments["pixel_values"]
        output = ask(model, call, arguments)
        return output if call == "generate" else output.logits

    expected = answer()
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=1.0))
    assert torch.equal(answer(), expected)


@every_model
def test_logits_to_keep_as_a_tensor_is_refused(name):
    model = wrapped_tiny(name)
    with refused(model, UnsupportedInputError, r"logits_to_keep.*vlmeff_keep"):
        model(**prompts(model, [1]), logits_to_keep=torch.tensor([0, 3]))


@every_model
def test_a_mask_of_more_than_two_dimensions_is_refused_by_name(name):
    model = wrapped_tiny(name)
    inputs = prompts(model, [1])
    width = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, width, width).tril()
    with refused(model, UnsupportedInputError, "attention_mask"):
        model(**inputs)


def test_a_picture_without_its_grid_is_refused():
    model = wrapped_tiny("qwen2_5_vl")
    inputs = prompts(model, [1])
    del inputs["image_grid_thw"]
    with refused(model, UnsupportedInputError, r"image_grid_thw.*processor"):
        model(**inputs)


@pytest.mark.parametrize(
    "argument", [{"vision_feature_layer": -1}, {"vision_feature_select_strategy": "full"}], ids=lambda a: next(iter(a))
)
def test_a_feature_layer_given_per_call_is_refused(argument):
    model = wrapped_tiny("llava")
    with refused(model, UnsupportedInputError, rf"{next(iter(argument))}.*model\.config"):
        model(**llava_inputs(model, [1]), **argument)


def test_another_conversation_on_the_cache_of_a_shortened_prompt_is_refused():
    model = wrapped_tiny("llava")
    inputs = llava_inputs(model, [1])
    cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    with refused(model, IncompatibleError, r"past_key_values.*does not begin with that prompt"):
        model.generate(input_ids=inputs["input_ids"].flip(1), past_key_values=cache, max_new_tokens=2)


class _Answers:
    def __init__(self, answer):
        self.answer = answer

    def relevance(self, question):
        return self.answer(question)


@pytest.mark.parametrize(
    "answer",
    [
        lambda q: [torch.rand(5) for _ in q.grids],
        lambda q: [torch.rand(200) for _ in q.grids],
        lambda q: torch.rand(36),
        lambda q: [],
        lambda q: None,
        lambda q: [torch.rand(6, 6)],
    ],
)
def test_a_text_source_that_answers_something_else_is_named(answer):
    model = vlmeff.wrap(tiny_llava(), None, tokens=vlmeff.TextTopK(keep=0.3), text_source=_Answers(answer))
    with refused(model, ConfigError, r"text_source.*_Answers.*\[36\]"):
        model(**llava_inputs(model, [1]))
    source = _Answers(lambda q: [q.tower_features()[:, 0]])
    vlmeff.wrap(model, None, tokens=vlmeff.TextTopK(keep=0.3), text_source=source)
    with refused(model, ConfigError, "uses_tower = True"):
        model(**llava_inputs(model, [1]))


def test_options_without_a_method_are_refused():
    for arguments in ({"tokens": []}, {"positions": "keep"}, {"newline": "rows"}):
        with pytest.raises(ConfigError, match=r"names no token method"):
            vlmeff.wrap(tiny_llava(), None, **arguments)
    with pytest.raises(ConfigError, match="text_source"):
        vlmeff.wrap(tiny_llava(), None, tokens="text", text_source=vlmeff.EmbeddingText)
