"""Every ordinary way to call a model works on a wrapped one and gives what the shortened request gives by hand."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from tiny_models import IMAGE, MODELS, PAD, SPECIAL, VOCABULARY, left_padded, llava_inputs, prompts, qwen_inputs, tiny
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vlmeff
from vlmeff.errors import IncompatibleError

PRUNE = vlmeff.HiPrune(keep=0.4, alpha=0.5)
NEW = 6
BATCHES = [[1], [0, 1, 2]]

every_model = pytest.mark.parametrize("name", MODELS)
every_batch = pytest.mark.parametrize("pictures", BATCHES, ids=str)


def wrapped_tiny(name, tokens=PRUNE, **options):
    return vlmeff.wrap(tiny(name, **options), None, tokens=tokens)


def kept_tokens(wrapped, inputs):
    """Per picture the raster indices that a wrapped model keeps."""
    wrapped(**inputs)
    return [item.kept.tolist() for item in vlmeff.report(wrapped).plan.items]


def short_by_hand(model, inputs, kept):
    """What the unwrapped ``model`` has to be called with for its pictures to be reduced to ``kept``."""
    arguments = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    with torch.no_grad():
        features = model.model.get_image_features(**arguments, return_dict=True).pooler_output
    fate = iter([j in index for f, index in zip(features, kept, strict=True) for j in range(len(f))])
    columns = [
        [c for c, token in enumerate(ids) if mask[c] and (token != IMAGE or next(fate))]
        for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    ]
    short = left_padded([ids[row].tolist() for ids, row in zip(inputs["input_ids"], columns, strict=True)])
    chosen = [f[index] for f, index in zip(features, kept, strict=True)]
    short["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=chosen)}
    if model.config.model_type == "qwen2_5_vl":
        along = {key: inputs[key] for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        full, _ = model.model.get_rope_index(**along)
        positions = torch.zeros(4, *short["input_ids"].shape, dtype=torch.long)
        for row, kept_columns in enumerate(columns):
            positions[0, row, -len(kept_columns) :] = torch.arange(len(kept_columns))
            positions[1:, row, -len(kept_columns) :] = full[:, row, kept_columns]
        short["position_ids"] = positions
    return short


def new_tokens_by_hand(name, inputs, kept, **arguments):
    """The new tokens of the unwrapped model for the request shortened by hand."""
    model = tiny(name)
    short = short_by_hand(model, inputs, kept)
    torch.manual_seed(3)
    out = model.generate(**short, **{"max_new_tokens": NEW, **arguments})
    return out[:, short["input_ids"].shape[1] :]


def with_words(inputs, sequences, words):
    """The next turn: everything said so far and ``words`` more, the same in each row."""
    ids = torch.cat([sequences, torch.tensor([words]).expand(len(sequences), -1)], 1)
    extra = ids.shape[1] - inputs["input_ids"].shape[1]
    turn = {**inputs, "input_ids": ids}
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in inputs:
            turn[key] = torch.nn.functional.pad(inputs[key], (0, extra), value=value)
    return turn


def text_only(inputs):
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


GENERATION_MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling, several returned": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 7},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", GENERATION_MODES)
@every_batch
@every_model
def test_generate_gives_the_prompt_of_the_caller_and_the_tokens_of_the_short_request(name, pictures, mode):
    arguments = GENERATION_MODES[mode]
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, pictures)
    kept = kept_tokens(wrapped, inputs)
    torch.manual_seed(3)
    out = wrapped.generate(**inputs, max_new_tokens=NEW, **arguments)
    width = inputs["input_ids"].shape[1]
    repeats = arguments.get("num_return_sequences", 1)
    assert torch.equal(out[:, :width], inputs["input_ids"].repeat_interleave(repeats, 0))
    assert torch.equal(out[:, width:], new_tokens_by_hand(name, inputs, kept, **arguments))
    assert out.shape[1] == width + NEW


@every_model
def test_return_dict_in_generate_gives_whole_sequences_and_everything_else(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [0, 1, 2])
    plain = wrapped.generate(**inputs, max_new_tokens=NEW)
    out = wrapped.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, plain)
    assert len(out.scores) == NEW
    assert out.past_key_values.get_seq_length() < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
@every_model
def test_assisted_decoding_gives_the_greedy_tokens(name, drafts):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    plain = wrapped.generate(**inputs, max_new_tokens=12)
    assisted = {"prompt_lookup_num_tokens": 3} if drafts == "prompt lookup" else {"assistant_model": tiny(name, seed=3)}
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=12, **assisted), plain)


@pytest.mark.parametrize("given", ["positional", "inputs"])
@every_model
def test_the_prompt_may_be_given_under_the_other_names_of_generate(name, given):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [0, 1])
    plain = wrapped.generate(**inputs, max_new_tokens=3)
    ids = inputs.pop("input_ids")
    out = (
        wrapped.generate(ids, **inputs, max_new_tokens=3)
        if given == "positional"
        else wrapped.generate(inputs=ids, **inputs, max_new_tokens=3)
    )
    assert torch.equal(out, plain)


@every_model
def test_padding_is_recognised_without_a_mask_as_by_generate(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [0, 1, 2])
    plain = wrapped.generate(**inputs, max_new_tokens=NEW)
    del inputs["attention_mask"]
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=NEW), plain)


@pytest.mark.parametrize("grid", [(2, 14), (14, 2), (6, 10), (2, 2)], ids=str)
def test_narrow_and_odd_grids_are_reduced(grid):
    wrapped = wrapped_tiny("qwen2_5_vl")
    inputs = qwen_inputs(wrapped, [[grid, (4, 8)]])
    kept = kept_tokens(wrapped, inputs)
    out = wrapped.generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(out[:, -NEW:], new_tokens_by_hand("qwen2_5_vl", inputs, kept))
    assert len(kept[0]) == max(1, round(0.4 * grid[0] * grid[1] / 4))


def test_a_picture_within_the_budget_stays_whole_beside_one_that_is_reduced():
    wrapped = wrapped_tiny("qwen2_5_vl", vlmeff.HiPrune(keep=10))
    inputs = qwen_inputs(wrapped, [[(8, 12), (4, 8)]])
    kept = kept_tokens(wrapped, inputs)
    assert [len(index) for index in kept] == [10, 8]
    out = wrapped.generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(out[:, -NEW:], new_tokens_by_hand("qwen2_5_vl", inputs, kept))


def test_pictures_without_text_in_between_are_told_apart_by_count():
    wrapped = wrapped_tiny("llava")
    inputs = llava_inputs(wrapped, [2])
    text = [token for token in inputs["input_ids"][0].tolist() if token != IMAGE]
    inputs |= left_padded([text[:2] + [IMAGE] * 72 + text[2:]])
    kept = kept_tokens(wrapped, inputs)
    assert kept[0] != kept[1]
    out = wrapped.generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(out[:, -NEW:], new_tokens_by_hand("llava", inputs, kept))


# Lengths given as totals


@pytest.mark.parametrize("given_by", ["keyword", "generation_config", "model"])
@every_model
def test_max_length_counts_the_prompt_of_the_caller(name, given_by):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [0, 1, 2])
    total = inputs["input_ids"].shape[1] + 4
    arguments = {}
    if given_by == "keyword":
        arguments = {"max_length": total}
    elif given_by == "generation_config":
        arguments = {"generation_config": GenerationConfig(max_length=total, pad_token_id=PAD)}
    else:
        wrapped.generation_config.max_length = total
    assert wrapped.generate(**inputs, **arguments).shape[1] == total


@every_model
def test_the_max_length_of_the_model_counts_the_prompt_of_the_caller_when_a_generation_config_leaves_it_open(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    wrapped.generation_config.max_length = inputs["input_ids"].shape[1] + 4
    out = wrapped.generate(**inputs, generation_config=GenerationConfig(pad_token_id=PAD))
    assert out.shape[1] == wrapped.generation_config.max_length


@pytest.mark.parametrize("given_by", ["keyword", "generation_config"])
@every_model
def test_min_length_counts_the_prompt_of_the_caller(name, given_by):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    width = inputs["input_ids"].shape[1]
    first = int(wrapped.generate(**inputs, max_new_tokens=1)[0, -1])
    assert wrapped.generate(**inputs, eos_token_id=first, max_new_tokens=NEW).shape[1] == width + 1
    if given_by == "keyword":
        arguments = {"eos_token_id": first, "min_length": width + 3, "max_new_tokens": NEW}
    else:
        settings = GenerationConfig(
            eos_token_id=first, min_length=width + 3, max_new_tokens=NEW, pad_token_id=PAD, suppress_tokens=SPECIAL
        )
        arguments = {"generation_config": settings}
    new = wrapped.generate(**inputs, **arguments)[0, width:]
    assert first not in new[:3]
    kept = kept_tokens(wrapped, inputs)
    short = short_by_hand(tiny(name), inputs, kept)["input_ids"].shape[1]
    expected = new_tokens_by_hand(name, inputs, kept, eos_token_id=first, min_length=short + 3)
    assert torch.equal(new, expected[0])


@every_model
def test_a_generation_config_is_not_changed(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    given = GenerationConfig(max_length=inputs["input_ids"].shape[1] + 4, min_length=2, pad_token_id=PAD)
    before = given.to_dict(), wrapped.generation_config.to_dict()
    wrapped.generate(**inputs, generation_config=given)
    wrapped.generate(**inputs, max_length=inputs["input_ids"].shape[1] + 4)
    assert (given.to_dict(), wrapped.generation_config.to_dict()) == before


# Streaming


class Words:
    """A tokenizer as far as a text streamer needs one."""

    def decode(self, ids, **_):
        return "".join(f"{token} " for token in ids)


class Collector:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


@every_model
def test_a_streamer_gets_the_prompt_of_the_caller_and_then_each_new_token(name):
    wrapped, streamer = wrapped_tiny(name), Collector()
    inputs = prompts(wrapped, [1])
    out = wrapped.generate(**inputs, max_new_tokens=NEW, streamer=streamer)
    assert torch.equal(streamer.values[0], inputs["input_ids"])
    assert [int(value) for value in streamer.values[1:]] == out[0, -NEW:].tolist()
    assert streamer.ended == 1


@every_model
def test_a_text_streamer_prints_prompt_and_answer(name, capsys):
    wrapped = wrapped_tiny(name)
    out = wrapped.generate(**prompts(wrapped, [1]), max_new_tokens=NEW, streamer=TextStreamer(Words()))
    assert capsys.readouterr().out.split() == [str(token) for token in out[0].tolist()]


@every_model
def test_a_text_iterator_streamer_in_another_thread_yields_the_answer(name):
    wrapped, streamer = wrapped_tiny(name), TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    inputs = prompts(wrapped, [1])
    thread = threading.Thread(target=wrapped.generate, kwargs={**inputs, "max_new_tokens": NEW, "streamer": streamer})
    thread.start()
    words = "".join(streamer).split()
    thread.join()
    expected = wrapped.generate(**inputs, max_new_tokens=NEW)
    assert words == [str(token) for token in expected[0, -NEW:].tolist()]


class Watcher(StoppingCriteria, LogitsProcessor):
    """Notes what it is shown; as a stopping criterion it never stops, as a logits processor it changes nothing."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores, **_):
        self.shown.append(input_ids.clone())
        return scores if isinstance(self, Processor) else torch.zeros(len(input_ids), dtype=torch.bool)

    def allow_everything(self, row, input_ids):
        self.shown.append(input_ids[None].clone())
        return list(range(VOCABULARY))


class Processor(Watcher):
    pass


@pytest.mark.parametrize("role", ["stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"])
@every_model
def test_what_the_caller_hangs_into_generate_sees_the_prompt_of_the_caller(name, role):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    width = inputs["input_ids"].shape[1]
    watcher = Processor() if role == "logits_processor" else Watcher()
    given = watcher.allow_everything if role == "prefix_allowed_tokens_fn" else [watcher]
    out = wrapped.generate(**inputs, max_new_tokens=3, **{role: given})
    before = 1 if role == "stopping_criteria" else 0  # it is asked after a token was chosen, the others before
    assert [ids.shape[1] for ids in watcher.shown] == [width + before + step for step in range(3)]
    assert all(torch.equal(ids, out[:, : ids.shape[1]]) for ids in watcher.shown)


# Several turns


@pytest.mark.parametrize("own_cache", [False, True], ids=["returned cache", "own cache"])
@every_batch
@every_model
def test_later_turns_on_a_pruned_cache_give_the_tokens_of_the_whole_conversation(name, pictures, own_cache):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, pictures)
    kept = kept_tokens(wrapped, inputs)
    cache = DynamicCache(config=wrapped.config.get_text_config()) if own_cache else None
    out = wrapped.generate(**inputs, max_new_tokens=4, past_key_values=cache, return_dict_in_generate=True)
    for words in ([20, 21, 22], [30], [40, 41]):
        wrapped(**prompts(wrapped, [1], seed=8))  # another conversation in between
        turn = with_words(inputs, out.sequences, words)
        out = wrapped.generate(
            **text_only(turn), past_key_values=out.past_key_values, max_new_tokens=4, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences[:, :-4], turn["input_ids"])
        assert torch.equal(out.sequences[:, -4:], new_tokens_by_hand(name, turn, kept, max_new_tokens=4))
        assert torch.equal(out.sequences[:, -4:], wrapped.generate(**turn, max_new_tokens=4)[:, -4:])


@every_model
def test_a_later_turn_needs_no_mask(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    out = wrapped.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    turn = with_words(inputs, out.sequences, [20, 21])
    second = wrapped.generate(input_ids=turn["input_ids"], past_key_values=out.past_key_values, max_new_tokens=4)
    assert torch.equal(second, wrapped.generate(**turn, max_new_tokens=4))


@every_model
def test_max_length_counts_the_whole_conversation_in_a_later_turn(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    out = wrapped.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    ids = with_words(inputs, out.sequences, [20, 21])["input_ids"]
    total = ids.shape[1] + 3
    assert wrapped.generate(input_ids=ids, past_key_values=out.past_key_values, max_length=total).shape[1] == total


@every_model
def test_a_later_turn_may_follow_several_returned_sequences(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    torch.manual_seed(0)
    out = wrapped.generate(
        **inputs, do_sample=True, num_return_sequences=2, max_new_tokens=4, return_dict_in_generate=True
    )
    ids = torch.cat([out.sequences, torch.tensor([[20, 21]] * 2)], 1)
    second = wrapped.generate(input_ids=ids, past_key_values=out.past_key_values, max_new_tokens=4)
    for row in range(2):
        turn = with_words(inputs, out.sequences[row : row + 1], [20, 21])
        assert torch.equal(second[row], wrapped.generate(**turn, max_new_tokens=4)[0])


@pytest.mark.parametrize(
    "tokens", [vlmeff.HiPrune(keep=0.9), vlmeff.HiPrune(keep=1.0), None], ids=["0.9", "1.0", "none"]
)
@every_model
def test_a_pruned_cache_outlives_a_change_of_the_configuration(name, tokens):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    out = wrapped.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    turn = with_words(inputs, out.sequences, [20, 21])
    expected = wrapped.generate(**turn, max_new_tokens=4)
    vlmeff.wrap(wrapped, None, tokens=tokens)
    second = wrapped.generate(**text_only(turn), past_key_values=out.past_key_values, max_new_tokens=4)
    assert torch.equal(second, expected)


@every_model
def test_a_picture_may_follow_a_turn_of_text_on_the_same_cache(name):
    wrapped = wrapped_tiny(name)
    words = torch.tensor([[11, 12, 13]])
    first = wrapped.generate(input_ids=words, max_new_tokens=3, return_dict_in_generate=True)
    inputs = prompts(wrapped, [1])
    inputs["input_ids"] = torch.cat([first.sequences, inputs["input_ids"]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if name == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    expected = wrapped.generate(**inputs, max_new_tokens=4)
    assert torch.equal(wrapped.generate(**inputs, past_key_values=first.past_key_values, max_new_tokens=4), expected)


@every_model
def test_a_static_cache_that_was_reset_takes_another_prompt(name):
    wrapped = wrapped_tiny(name)
    cache = StaticCache(config=wrapped.config.get_text_config(), max_cache_len=128)
    wrapped.generate(**prompts(wrapped, [1], seed=5), past_key_values=cache, max_new_tokens=4)
    cache.reset()
    inputs = prompts(wrapped, [1])
    expected = wrapped.generate(**inputs, max_new_tokens=4)
    assert torch.equal(wrapped.generate(**inputs, past_key_values=cache, max_new_tokens=4), expected)


@pytest.mark.parametrize("change", ["another word", "too short", "more rows", "a new picture"])
@every_model
def test_a_later_turn_that_does_not_fit_its_cache_is_an_error(name, change):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    out = wrapped.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    turn = with_words(inputs, out.sequences, [20])
    ids = turn["input_ids"].clone()
    if change == "another word":
        ids[0, 0] += 1
    elif change == "too short":
        ids = ids[:, -4:]
    elif change == "more rows":
        ids = ids.expand(2, -1)
    else:
        arguments = {**turn, "past_key_values": out.past_key_values}
    if change != "a new picture":
        arguments = {"input_ids": ids, "past_key_values": out.past_key_values}
    with pytest.raises(IncompatibleError, match="past_key_values"):
        wrapped.generate(**arguments, max_new_tokens=2)


@pytest.mark.parametrize("how", ["argument", "config"])
@every_model
@torch.no_grad()
def test_padding_that_only_the_call_names_is_not_looked_at(name, how):
    model = vlmeff.wrap(tiny(name), None, tokens=vlmeff.HiPrune(keep=0.4))
    inputs = prompts(model, [1, 2])
    expected = model.generate(**inputs, max_new_tokens=4)
    pad, model.generation_config.pad_token_id = model.generation_config.pad_token_id, None
    bare = {key: value for key, value in inputs.items() if key != "attention_mask"}
    if how == "argument":
        out = model.generate(**bare, max_new_tokens=4, pad_token_id=pad)
    else:
        config = copy.deepcopy(model.generation_config)
        config.pad_token_id, config.max_new_tokens = pad, 4
        out = model.generate(**bare, generation_config=config)
    assert torch.equal(out, expected)
