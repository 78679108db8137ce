"""``generate`` with a retained cache: prompts in chunks, assistants, beams, several turns, decode rules."""

from __future__ import annotations

import copy

import pytest
import torch
from retaining import CLOSE, STEPS, Ends, TopScores, model_and_inputs, retained_forward, retained_generate, row_of
from tiny_llama import llama_inputs, tiny_llama

# Prompts in several passes.


@pytest.mark.parametrize("selection", ["shared", "per_head"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_a_prompt_in_chunks_keeps_the_same(chunk, backend, selection):
    model, inputs = model_and_inputs("llama", backend=backend, lengths=(40, 26))
    policies = [TopScores(keep_ratio=0.4, selection=selection)]
    policies.append(TopScores(keep_ratio=0.4, scope="layer", selection=selection))
    for policy in policies:
        expected, whole = retained_generate(model, policy, inputs, max_new_tokens=STEPS)
        got, cache = retained_generate(model, policy, inputs, max_new_tokens=STEPS, prefill_chunk_size=chunk)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)
        for a, b in zip(cache.layers, whole.layers, strict=True):
            assert torch.equal(a.kept_slots, b.kept_slots)


# Assisted decoding.


@pytest.mark.parametrize("assistant", ["prompt lookup", "draft model"])
def test_assisted_decoding_gives_the_same_tokens(assistant):
    model = tiny_llama()
    inputs = llama_inputs([24])
    inputs["input_ids"] = inputs["input_ids"][:, :8].repeat(1, 3)  # repetitions, so that lookups find candidates
    options = {"prompt_lookup_num_tokens": 4} if assistant == "prompt lookup" else {"assistant_model": tiny_llama()}
    for policy in (TopScores(keep_ratio=0.4), TopScores(keep_ratio=0.4, scope="layer"), Ends(keep_ratio=0.4)):
        expected, plain = retained_generate(model, policy, inputs, max_new_tokens=20)
        got, cache, passes = with_passes(model, policy, inputs, max_new_tokens=20, **options)
        assert passes[0] == 24, "the prompt goes first, alone"
        assert max(passes[1:]) > 1, "no candidate was ever checked"
        assert torch.equal(got.sequences, expected.sequences)
        assert cache.get_seq_length() == plain.get_seq_length()
        for a, b in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(a.slots(), b.slots())
            torch.testing.assert_close(a.keys, b.keys, **CLOSE)


def with_passes(model, policy, inputs, **options):
    """Result, cache and the number of tokens of every pass."""
    passes = []
    count = model.register_forward_pre_hook(lambda m, a, k: passes.append(k["input_ids"].shape[1]), with_kwargs=True)
    got, cache = retained_generate(model, policy, inputs, **options)
    count.remove()
    return got, cache, passes


def test_plain_decoding_goes_on_from_an_assisted_cache():
    """Decode rules wait for ``crop`` while past is recorded, which plain decoding never calls."""
    model, policy = tiny_llama(), TopScores(keep_ratio=0.4, decode="window", decode_window=4, evict_interval=1)
    inputs = llama_inputs([24])
    first, cache = retained_generate(model, policy, inputs, max_new_tokens=6, prompt_lookup_num_tokens=3)
    ids = torch.cat([first.sequences, torch.tensor([[11]])], 1)
    retained_generate(
        model,
        policy,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        max_new_tokens=6,
        past_key_values=cache,
    )
    layer = cache.layer(0)
    assert layer.physical_length - layer.kept_slots.shape[-1] == 4


# Beams and several sequences of a prompt.


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_beams_keep_their_cache_together(name):
    """The winning beams' scores are those of the same tokens, forced through a cache of their own."""
    model, inputs = model_and_inputs(name)
    policy = TopScores(keep_ratio=0.4)
    got, _ = retained_generate(model, policy, inputs, max_new_tokens=STEPS, num_beams=3, output_scores=True, headroom=2)
    generated = got.sequences[:, -STEPS:]
    forced, _ = retained_generate(model, policy, inputs, max_new_tokens=STEPS, logits_processor=[Force(generated)])
    # suppressed tokens are taken out after the log-softmax of beam search
    total = torch.stack(forced.logits, 1).log_softmax(-1).gather(2, generated[..., None]).sum((1, 2))
    torch.testing.assert_close(got.sequences_scores * STEPS, total, rtol=0, atol=1e-4)


class Force:
    """A logits processor that dictates the tokens."""

    def __init__(self, tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return forced


def test_several_sequences_of_a_prompt_share_its_visual_tokens():
    model, inputs = model_and_inputs("llama")
    vision = torch.zeros(2, 19, dtype=torch.bool)
    vision[:, 12:15] = True
    policy = TopScores(keep_ratio=0.5)
    torch.manual_seed(0)
    got, cache = retained_generate(
        model, policy, inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2, vision=vision
    )
    assert got.sequences.shape[0] == 4
    for layer in cache.layers:
        assert torch.equal(layer.kept_slots[0], layer.kept_slots[1])
        assert torch.equal(layer.kept_slots[2], layer.kept_slots[3])


# Turns.


@pytest.mark.parametrize("whole", [True, False])
def test_a_second_turn_goes_on_from_the_returned_cache(whole):
    model, inputs = model_and_inputs("llama")
    policy = TopScores(keep_ratio=0.4)
    first, cache = retained_generate(model, policy, inputs, max_new_tokens=5)
    by_hand = copy.deepcopy(cache)
    g = torch.Generator().manual_seed(3)
    said = torch.randint(10, 100, (2, 4), generator=g)
    ids = torch.cat([first.sequences, said], 1)
    told = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])  # the second row says less, padded on the left
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5).long(), told], 1)
    new = ids if whole else ids[:, cache.get_seq_length() :]
    got, _ = retained_generate(
        model, policy, {"input_ids": new, "attention_mask": mask}, past_key_values=cache, max_new_tokens=4
    )
    feed, logits = ids[:, by_hand.get_seq_length() :], []
    for _ in range(4):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -feed.shape[1] :]
        step = retained_forward(model, by_hand, {"input_ids": feed, "attention_mask": mask, "position_ids": positions})
        logits.append(step.logits[:, -1])
        feed = (
            logits[-1]
            .index_fill(1, torch.tensor(model.generation_config.suppress_tokens), -torch.inf)
            .argmax(1)[:, None]
        )
        mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(logits), **CLOSE)
    assert cache.layer(0).kept_slots.shape == by_hand.layer(0).kept_slots.shape, "the prompt is compacted once"
    assert torch.equal(cache.layer(0).slots(), by_hand.layer(0).slots())


def test_the_second_turn_of_a_padded_row_is_as_if_alone():
    model, policy = tiny_llama(), TopScores(keep_ratio=0.4)
    inputs = llama_inputs([18, 11])
    first, cache = retained_generate(model, policy, inputs, max_new_tokens=3)
    ids = torch.cat([first.sequences, torch.tensor([[21, 22, 23], [0, 31, 32]])], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 1, 1]])], 1)
    got, _ = retained_generate(
        model, policy, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache, max_new_tokens=4
    )
    alone, own = retained_generate(model, policy, row_of(inputs, 1), max_new_tokens=3)
    ids = torch.cat([alone.sequences, torch.tensor([[31, 32]])], 1)
    single, _ = retained_generate(
        model, policy, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=own, max_new_tokens=4
    )
    torch.testing.assert_close(
        torch.stack([step[1] for step in got.logits]), torch.stack([step[0] for step in single.logits]), **CLOSE
    )


# Decode rules, in a model.


@pytest.mark.parametrize("headroom", [0, 6])
@pytest.mark.parametrize(
    "decode", [{"decode": "fixed_point", "evict_distance": 3}, {"decode": "window", "decode_window": 4}]
)
def test_decode_rules_act_while_generating(decode, headroom):
    model = tiny_llama()
    inputs = llama_inputs([30, 20])
    policy = Ends(keep_ratio=0.5, evict_interval=4, **decode)
    got, cache = retained_generate(model, policy, inputs, max_new_tokens=33, headroom=headroom)
    layer = cache.layer(2)
    if decode["decode"] == "window":
        expected = [*range(58, 62)]  # of the 32 tokens in the cache, slots 30 .. 61
        assert layer.slots()[0].tolist() == [0, *range(16, 30), *expected]
    else:
        assert layer.physical_length == 15 + 32 - 32 * 25 // 50
        # column 12 is where entries go: 3 of the prompt, then the oldest generated ones
        assert layer.slots()[0].tolist() == [0, *range(16, 27), *range(30 + 13, 62)]
    assert not torch.isnan(torch.stack(got.logits)).any()


def test_decode_rules_give_what_masks_would():
    """With a deletion after every token, a pass over all tokens where query t sees what was left at step t."""
    model, inputs = tiny_llama(), llama_inputs([20])
    policy = Ends(keep_ratio=0.5, decode="window", decode_window=3, evict_interval=1)
    got, _ = retained_generate(model, policy, inputs, max_new_tokens=10)
    total = got.sequences.shape[1] - 1
    sees = torch.ones(total, total).bool().tril()
    for t in range(20, total):
        sees[t, 1:11] = False  # the prompt keeps slot 0 and the last nine
        sees[t, 20 : t - 3] = False  # three generated tokens are left before the query's own
    with torch.no_grad():
        logits = model(input_ids=got.sequences[:, :-1], attention_mask=sees[None, None], use_cache=False).logits
    torch.testing.assert_close(torch.stack(got.logits, 1), logits[:, 19:], **CLOSE)
