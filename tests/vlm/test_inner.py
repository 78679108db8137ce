"""Pruning inside the language model against the whole sequence with the dropped tokens hidden from deeper layers."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from inner_oracle import (
    EVERYTHING,
    LAYERS,
    NOTHING_LEFT,
    RATIOS,
    TABLE,
    TOLERANCE,
    Oracle,
    assert_equal_to_oracle,
    batch,
    deep,
    generate,
    placeholders,
    text_model,
)
from tiny_models import SPECIAL, prompts, tiny, video_prompts
from transformers import DynamicCache, QuantizedCache, StaticCache

import vlmeff
from tokenpruning.adaptinfer import SCHEDULES, Schedule, label_tokens
from vlmeff.errors import (
    ConfigError,
    IncompatibleError,
    NonFiniteScoreError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from vlmeff.reporting import Clock
from vlmeff.vlm.families import family_of
from vlmeff.vlm.inner import INNER_RECORD, InnerPruning
from vlmeff.vlm.inner_request import check_model, prepare
from vlmeff.vlm.reduce import Reduction, shorten_request
from vlmeff.vlm.voters import visual_rows

MODELS = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
OTHERS = ["llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "perception_lm"]

every_model = pytest.mark.parametrize("name", MODELS)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
every_schedule = pytest.mark.parametrize("schedule", [RATIOS, TABLE, NOTHING_LEFT], ids=["ratios", "table", "none"])


@every_attention
@every_schedule
@every_model
@torch.no_grad()
def test_tokens_logits_and_choice_equal_the_masked_full_length_oracle(name, schedule, attention, covered):
    covered(name, "adaptinfer", "image")
    model = deep(name, attention)
    inputs = batch(model, padded=False)
    out, record = generate(model, inputs, schedule)
    assert_equal_to_oracle(name, inputs, schedule, out, record)


@every_attention
@every_model
@torch.no_grad()
def test_a_left_padded_batch_equals_the_oracle(name, attention):
    model = deep(name, attention)
    inputs = batch(model, 3)
    assert bool((inputs["attention_mask"] == 0).any())
    out, record = generate(model, inputs, RATIOS)
    assert_equal_to_oracle(name, inputs, RATIOS, out, record)


@torch.no_grad()
def test_padding_that_generate_infers_counts_as_padding():
    model = deep("llava")
    inputs = batch(model, 3)
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    run = prepare(model, text_model(model), RATIOS, bare, visual=placeholders(inputs), generating=True)
    assert torch.equal(run.rows.valid, inputs["attention_mask"].bool())
    assert torch.equal(generate(model, bare, RATIOS)[0].sequences, generate(model, inputs, RATIOS)[0].sequences)
    bare["pad_token_id"] = 2  # no token of the prompt: generate masks nothing
    run = prepare(model, text_model(model), RATIOS, bare, visual=placeholders(inputs), generating=True)
    assert bool(run.rows.valid.all())


@every_attention
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_families_equal_the_oracle(name, attention, covered):
    covered(name, "adaptinfer", "image")
    model = deep(name, attention)
    check_model(model, text_model(model), RATIOS)
    inputs = batch(model)
    out, record = generate(model, inputs, RATIOS)
    assert_equal_to_oracle(name, inputs, RATIOS, out, record)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_language_models_that_mask_or_score_otherwise_are_refused(name):
    model = tiny(name)
    with pytest.raises(UnsupportedModelError, match="Attention"):
        check_model(model, text_model(model), Schedule(layers=(0,), keep=(3,)))


@every_attention
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_several_pictures_are_pruned_as_one_set_and_the_text_behind_the_last_votes(name, attention):
    model = deep(name, attention)
    inputs = prompts(model, [2])
    out, record = generate(model, inputs, RATIOS)
    assert_equal_to_oracle(name, inputs, RATIOS, out, record)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "perception_lm"])
@torch.no_grad()
def test_a_video_equals_the_oracle(name, covered):
    covered(name, "adaptinfer", "video")
    model = deep(name)
    inputs = video_prompts(model, [4])
    out, record = generate(model, inputs, RATIOS)
    assert_equal_to_oracle(name, inputs, RATIOS, out, record)


@every_model
@torch.no_grad()
def test_the_keys_per_layer_are_those_of_the_schedule_and_each_step_adds_one(name):
    model = deep(name)
    inputs = batch(model, 2)
    width, nv = inputs["input_ids"].shape[1], int(placeholders(inputs)[0].sum())
    expected = [width - nv + n for n in TABLE.visual_per_layer(nv, LAYERS)]
    for new in (1, 4):
        out, record = generate(model, inputs, TABLE, max_new_tokens=new)
        lengths = [out.past_key_values.get_seq_length(i) for i in range(LAYERS)]
        assert lengths == [n + new - 1 for n in expected]
        assert [columns for columns, _ in record.processed] == expected
    assert [visual for _, visual in record.processed] == [nv, nv, 7, 7, 2]
    assert record.mean_visual == (2 * nv + 16) / LAYERS


@every_attention
@every_model
@torch.no_grad()
def test_a_schedule_that_keeps_everything_changes_no_bit(name, attention):
    model = deep(name, attention)
    inputs = batch(model, 2)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**inputs, **options)
    pruned, record = generate(model, inputs, EVERYTHING, **options)
    assert torch.equal(plain.sequences, pruned.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, pruned.logits, strict=True))
    assert not hasattr(pruned.past_key_values, INNER_RECORD)
    assert record.columns == [None] * LAYERS


@every_attention
@every_model
@torch.no_grad()
def test_forward_gives_the_oracles_logits_at_the_columns_that_are_left(name, attention):
    model = deep(name, attention)
    inputs = batch(model, 2)
    kwargs = dict(inputs)
    visual = placeholders(inputs)
    with prepare(model, text_model(model), RATIOS, kwargs, visual=visual, generating=False) as run:
        logits = model(**kwargs).logits
    full = Oracle(name, inputs, RATIOS).run()
    for row, columns in enumerate(run.record.columns[-1]):
        valid = inputs["attention_mask"][row, columns].bool()
        torch.testing.assert_close(logits[row, valid], full[row, columns[valid]], **TOLERANCE)


@every_attention
@pytest.mark.parametrize("rows", [1, 2])
@every_model
@torch.no_grad()
def test_without_a_cache_every_step_uses_the_choice_of_the_first(name, rows, attention):
    model = deep(name, attention)
    inputs = batch(model, rows)
    cached, _ = generate(model, inputs, RATIOS)
    plain, record = generate(model, inputs, RATIOS, use_cache=False)
    assert_equal_to_oracle(name, inputs, RATIOS, plain, record)
    assert torch.equal(plain.sequences, cached.sequences)


@every_attention
@pytest.mark.parametrize("rows", [1, 2])
@every_model
@torch.no_grad()
def test_a_second_turn_on_the_pruned_cache_equals_the_oracle(name, rows, attention):
    model = deep(name, attention)
    inputs = batch(model, rows)
    first, _ = generate(model, inputs, RATIOS)
    question = torch.randint(10, 100, (rows, 4), generator=torch.Generator().manual_seed(7))
    ids = torch.cat([first.sequences, question], 1)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(rows, new)], 1)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    kwargs = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values, **options}
    with prepare(model, text_model(model), None, kwargs, visual=placeholders(kwargs), generating=True):
        second = model.generate(**kwargs)
    oracle = Oracle(name, inputs, RATIOS)
    oracle.run()  # chooses, with the first turn's prompt alone
    oracle.append(ids[:, inputs["input_ids"].shape[1] :])
    tokens, logits = oracle.greedy(4)
    for a, b in zip(second.logits, logits, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    assert torch.equal(second.sequences[:, ids.shape[1] :], tokens)


@every_attention
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@torch.no_grad()
def test_a_hand_written_loop_goes_on_from_the_pruned_cache(name, attention):
    model = deep(name, attention)
    inputs = batch(model, 2)
    expected, _ = generate(model, inputs, RATIOS)
    with prepare(model, text_model(model), RATIOS, inputs, visual=placeholders(inputs), generating=False):
        out = model(**inputs)
    mask, tokens = inputs["attention_mask"], []
    for _ in range(5):
        tokens.append(out.logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf).argmax(1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
        kwargs = {"input_ids": tokens[-1], "attention_mask": mask, "past_key_values": out.past_key_values}
        # Without them LLaVA counts columns, padding included, and Qwen takes the mask for new tokens.
        kwargs["position_ids"] = mask.sum(1, keepdim=True) - 1
        if name != "llava":
            kwargs["position_ids"] = (kwargs["position_ids"] + model.model.rope_deltas).expand(3, -1, -1)
        with prepare(model, text_model(model), RATIOS, kwargs, visual=placeholders(kwargs), generating=False):
            out = model(**kwargs)
    assert torch.equal(torch.cat(tokens, 1), expected.sequences[:, inputs["input_ids"].shape[1] :])


@every_attention
@every_model
@torch.no_grad()
def test_beams_score_as_the_oracle_scores_their_tokens(name, attention):
    model = deep(name, attention)
    inputs = batch(model, 2)
    out, _ = generate(
        model, inputs, RATIOS, num_beams=3, num_return_sequences=2, output_scores=True, length_penalty=0.0
    )
    width = inputs["input_ids"].shape[1]
    for place in range(2):  # the best and the second best of both rows
        oracle = Oracle(name, inputs, RATIOS)
        oracle.run()
        continuation = out.sequences[place::2, width:]
        oracle.append(continuation)
        logs = oracle.run()[:, width - 1 : -1].log_softmax(-1)
        expected = logs.gather(2, continuation[..., None]).sum((1, 2))
        torch.testing.assert_close(out.sequences_scores[place::2], expected, atol=2e-4, rtol=2e-4)


@every_attention
@torch.no_grad()
def test_sampled_sequences_of_one_prompt_are_those_of_the_prompt_repeated(attention):
    model = deep("llava", attention)
    inputs = batch(model, 2)
    torch.manual_seed(3)
    several, _ = generate(model, inputs, RATIOS, do_sample=True, num_return_sequences=3)
    repeated = {k: v.repeat_interleave(3, 0) for k, v in inputs.items()}
    torch.manual_seed(3)
    single, _ = generate(model, repeated, RATIOS, do_sample=True)
    assert torch.equal(several.sequences, single.sequences)


@torch.no_grad()
def test_a_second_turn_after_beams_equals_the_oracle_of_each_row():
    model = deep("llava", "eager")
    inputs = batch(model, 2)
    first, record = generate(model, inputs, RATIOS, num_return_sequences=2, do_sample=True)
    assert record.kept[0].shape[0] == 4
    ids = torch.cat([first.sequences, torch.full((4, 2), 17)], 1)
    repeated = {k: v.repeat_interleave(2, 0) for k, v in inputs.items()}
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([repeated["attention_mask"], torch.ones(4, new, dtype=torch.long)], 1)
    kwargs = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values, "max_new_tokens": 3}
    with prepare(model, text_model(model), RATIOS, kwargs, visual=placeholders(kwargs), generating=True):
        out = model.generate(**kwargs)
    oracle = Oracle("llava", repeated, RATIOS)
    oracle.run()
    oracle.append(ids[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(out[:, ids.shape[1] :], oracle.greedy(3)[0])


# What is left behind.


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@torch.no_grad()
def test_the_hooks_are_gone_after_a_call_and_after_an_exception():
    model = deep("llava")
    inputs = batch(model)
    model(**inputs)  # transformers leaves hooks of its own at the first call
    before = hooks(model)
    generate(model, inputs, RATIOS)
    assert hooks(model) == before
    text_model(model).layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, inputs, RATIOS)
    assert hooks(model) == before + 1


@torch.no_grad()
def test_another_threads_call_is_not_pruned():
    model = deep("llava")
    inputs = batch(model, padded=False)
    plain = model(**inputs).logits
    results = []
    with prepare(model, text_model(model), RATIOS, inputs, visual=placeholders(inputs), generating=False):

        def call():
            with torch.no_grad():
                results.append(model(**inputs).logits)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        pruned = model(**inputs).logits
    assert torch.equal(results[0], plain)
    assert pruned.shape[1] < plain.shape[1]


@torch.no_grad()
def test_a_prompt_without_pictures_and_a_reset_cache_are_left_alone():
    model = deep("llava")
    words = {"input_ids": torch.arange(10, 20)[None], "pixel_values": torch.zeros(0)}
    assert prepare(model, text_model(model), RATIOS, words, visual=placeholders(words), generating=True) is None
    inputs = batch(model)
    out, _ = generate(model, inputs, RATIOS)
    cache = out.past_key_values
    cache.reset()
    again, record = generate(model, inputs, TABLE, past_key_values=cache)
    assert getattr(again.past_key_values, INNER_RECORD) is record
    assert [k.shape[1] for k in record.kept] == [7, 2]


# Refusals.


def refused(model, inputs, error, message, *, schedule=RATIOS, generating=True, **options):
    visual = placeholders(inputs)
    with pytest.raises(error, match=message):
        prepare(model, text_model(model), schedule, {**inputs, **options}, visual=visual, generating=generating)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": object()},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"guidance_scale": 1.5},
        {"use_cache": False, "num_beams": 2},
        {"labels": torch.zeros(1, 1)},
    ],
    ids=lambda o: "-".join(o),
)
def test_arguments_that_cannot_work_are_named(options):
    model = deep("llava")
    refused(model, batch(model), IncompatibleError, next(iter(options)), **options)


def test_the_generation_configs_are_looked_at_too():
    model = deep("llava")
    config = copy.deepcopy(model.generation_config)
    config.prompt_lookup_num_tokens = 3
    refused(model, batch(model), IncompatibleError, "prompt_lookup_num_tokens=3", generation_config=config)
    model.generation_config.cache_implementation = "static"
    refused(model, batch(model), IncompatibleError, "cache_implementation='static'")


def test_caches_that_cannot_differ_in_length_are_refused():
    model = deep("llava")
    text = model.config.text_config
    offloaded = DynamicCache(config=text)
    offloaded.offloading = True  # its own constructor wants a GPU
    for cache in (StaticCache(config=text, max_cache_len=80), offloaded):
        refused(model, batch(model), IncompatibleError, "cache whose layers may differ", past_key_values=cache)
    quantized = QuantizedCache.__new__(QuantizedCache)
    quantized.layers, quantized.offloading = [], False
    refused(model, batch(model), IncompatibleError, "QuantizedCache", past_key_values=quantized)


def test_inputs_that_cannot_work_are_named():
    model = deep("llava")
    uneven = prompts(model, [1, 2])
    refused(model, uneven, UnsupportedInputError, "36, 72 visual tokens")
    inputs = batch(model)
    last = int(placeholders(inputs)[0].nonzero()[-1])
    cut = {**inputs, "input_ids": inputs["input_ids"][:, : last + 1], "attention_mask": None}
    refused(model, cut, ConfigError, "no text after its last picture")
    refused(model, {**inputs, "attention_mask": torch.ones(1, 1, 4, 4)}, UnsupportedInputError, "attention_mask")
    refused(model, inputs, UnsupportedInputError, "logits_to_keep", logits_to_keep=torch.tensor([1]))
    model.train()
    refused(model, inputs, IncompatibleError, "model.eval")


def test_compiled_models_and_flex_attention_are_refused():
    model = deep("llava")
    text_model(model).layers[2].forward = torch.compile(text_model(model).layers[2].forward)
    refused(model, batch(model), IncompatibleError, "torch.compile")
    model = deep("llava")
    text_model(model).config._attn_implementation = "flex_attention"
    refused(model, batch(model), IncompatibleError, "set_attn_implementation")


@torch.no_grad()
def test_a_pruned_cache_takes_neither_new_pictures_nor_a_crop_into_the_prompt():
    model = deep("llava")
    inputs = batch(model)
    cache = generate(model, inputs, RATIOS)[0].past_key_values
    refused(model, inputs, IncompatibleError, "this turn brings a picture", past_key_values=cache)
    words = {"input_ids": torch.full((1, 3), 20), "past_key_values": cache}
    cache.crop(-8)
    with (
        prepare(model, text_model(model), RATIOS, words, visual=None, generating=False),
        pytest.raises(IncompatibleError, match="cropped"),
    ):
        model(**words)


@torch.no_grad()
def test_a_crop_of_generated_text_goes_on_as_if_it_had_not_been():
    model = deep("llava", "eager")
    inputs = batch(model)
    short, long = (generate(model, inputs, RATIOS, max_new_tokens=n)[0].past_key_values for n in (3, 6))
    long.crop(-3)
    answers = []
    for cache in (short, long):
        words = {"input_ids": torch.full((1, 3), 20), "past_key_values": cache}
        with prepare(model, text_model(model), RATIOS, words, visual=None, generating=False):
            answers.append(model(**words).logits)
    assert torch.equal(*answers)


@torch.no_grad()
def test_scores_that_overflow_name_the_layer():
    model = deep("llava")
    text_model(model).layers[1].self_attn.q_proj.weight.mul_(torch.inf)
    with pytest.raises(NonFiniteScoreError, match="layer 1"):
        generate(model, batch(model), RATIOS)


def test_layers_that_do_not_exist_and_layers_fed_by_deepstack_are_refused():
    llava, qwen = deep("llava"), deep("qwen3_vl")
    check_model(llava, text_model(llava), Schedule(layers=(0, 3), keep=(4, 2)))
    with pytest.raises(ConfigError, match="last legal number is 3"):
        check_model(llava, text_model(llava), SCHEDULES["llava-1.5-7b-128"])
    check_model(qwen, text_model(qwen), Schedule(layers=(1,), keep=(4,)))
    with pytest.raises(ConfigError, match="after layer 1 at the earliest"):
        check_model(qwen, text_model(qwen), Schedule(layers=(0, 3), keep=(4, 2)))


@torch.no_grad()
def test_rows_may_differ_in_padding_and_in_the_length_of_the_text_that_votes():
    visual = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0]]).bool()
    rows = visual_rows(visual, torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]))
    assert rows.vision.tolist() == [[2, 3], [1, 4]]
    assert [t[v].tolist() for t, v in zip(rows.text, rows.text_valid, strict=True)] == [[4, 5, 6], [5, 6]]
    assert isinstance(InnerPruning(text_model(deep("llava")), RATIOS, rows), InnerPruning)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "perception_lm"])
@torch.no_grad()
def test_wrap_joins_it_with_a_method_before_the_language_model(name):
    before, model = vlmeff.HiPrune(keep=0.6), deep(name)
    inputs = prompts(model, [1])
    request = shorten_request(
        model,
        family_of(model),
        Reduction(method=before),
        dict(inputs),
        generating=True,
        lock=threading.RLock(),
        clock=Clock(torch.device("cpu")),
    )
    short = request.kwargs
    visual = short["input_ids"] == model.config.image_token_id
    run = prepare(model, text_model(model), RATIOS, short, visual=visual, generating=True)
    with run:
        expected = model.generate(**short, max_new_tokens=4)[:, -4:]

    vlmeff.wrap(model, None, tokens=[before, vlmeff.AdaptInfer(schedule=RATIOS)])
    assert torch.equal(model.generate(**inputs, max_new_tokens=4)[:, -4:], expected)
    report = vlmeff.report(model)
    assert report.method == "hiprune + adaptinfer"
    assert report.visual_tokens_after == int(visual.sum()) < report.visual_tokens_before
    for kept, again in zip(report.inner.kept, run.record.kept, strict=True):
        assert torch.equal(kept, again)
    assert report.visual_tokens_processed == run.record.mean_visual < report.visual_tokens_after
    layers = len(text_model(model).layers)
    assert report.visual_tokens_label == pytest.approx(label_tokens(RATIOS, report.visual_tokens_after, layers))
    with pytest.raises(IncompatibleError, match="ratios"):
        vlmeff.wrap(model, None, tokens=[before, vlmeff.AdaptInfer(schedule=TABLE)])
    with pytest.raises(ConfigError, match="cannot be combined"):
        vlmeff.wrap(model, None, tokens=["hiprune", "fourier"])
