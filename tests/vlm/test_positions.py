"""positions="keep": the surviving tokens of a model with one-dimensional positions stay where they were."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SPECIAL, prompts, tiny

import vlmeff
from vlmeff.errors import ConfigError, IncompatibleError

PRUNE = vlmeff.HiPrune(keep=0.4, alpha=0.5)
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
every_model = pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3", "paligemma"])


def pair(name, attention="sdpa"):
    model = tiny(name, attention=attention)
    return model, vlmeff.wrap(tiny(name, attention=attention), None, tokens=PRUNE, positions="keep")


def masked(model, inputs, seen, new=None):
    """Logits of the unwrapped model on the whole prompt (and ``new`` tokens), pruned ones hidden, no position moved."""
    inputs = dict(inputs)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if new is not None:
        ones = torch.ones_like(new)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        seen = torch.cat([seen, ones.bool()], 1)
        positions = torch.cat([positions, positions[:, -1:] + ones.cumsum(1)], 1)
    return model(
        **{**inputs, "attention_mask": seen.long()}, position_ids=positions + (model.config.model_type == "paligemma")
    ).logits


def greedy(model, inputs, seen, steps):
    new = torch.empty(len(seen), 0, dtype=torch.int64)
    for _ in range(steps):
        logits = masked(model, inputs, seen, new)[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
        new = torch.cat([new, logits.argmax(1, keepdim=True)], 1)
    return new


@every_attention
@every_model
@torch.no_grad()
def test_forward_equals_the_model_with_the_pruned_tokens_hidden_in_place(name, attention):
    model, wrapped = pair(name, attention)
    inputs = {k: v for k, v in prompts(model, [1, 2]).items() if k not in ("token_type_ids", "labels")}
    out = wrapped(**inputs)
    seen = out.vlmeff_keep & inputs["attention_mask"].bool()
    assert int(seen.sum()) < int(inputs["attention_mask"].sum())
    expected = masked(model, inputs, seen)
    for row, slots in enumerate(seen):
        torch.testing.assert_close(out.logits[row, -int(slots.sum()) :], expected[row, slots], **TOLERANCE)


@every_attention
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3"])
@torch.no_grad()
def test_greedy_tokens_and_a_second_turn_equal_the_model_with_hidden_tokens(name, attention):
    model, wrapped = pair(name, attention)
    inputs = prompts(model, [1, 2])
    seen = wrapped(**inputs).vlmeff_keep & inputs["attention_mask"].bool()
    out = wrapped.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, width:], greedy(model, inputs, seen, 4))

    turn = torch.tensor([[31, 32, 33], [41, 42, 43]])
    ids = torch.cat([out.sequences, turn], 1)
    new = ids[:, width:]
    second = wrapped.generate(
        input_ids=ids,
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1),
        past_key_values=out.past_key_values,
        max_new_tokens=3,
    )
    expected = []
    for _ in range(3):
        logits = masked(model, inputs, seen, new)[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
        expected.append(logits.argmax(1, keepdim=True))
        new = torch.cat([new, expected[-1]], 1)
    assert torch.equal(second[:, -3:], torch.cat(expected, 1))


@torch.no_grad()
def test_a_hand_written_decode_loop_goes_on_behind_the_last_position():
    _, wrapped = pair("llava")
    inputs = prompts(wrapped, [1, 1])
    tokens = wrapped.generate(**inputs, max_new_tokens=4)[:, -4:]
    out, mask = wrapped(**inputs, use_cache=True), inputs["attention_mask"]
    for step in range(3):
        logits = out.logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
        assert torch.equal(logits.argmax(1), tokens[:, step])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        out = wrapped(input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=out.past_key_values)


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 7}, {"cache_implementation": "static"}],
    ids=lambda a: next(iter(a)),
)
def test_modes_of_generate_that_move_positions_about(arguments):
    _, wrapped = pair("llava")
    inputs = prompts(wrapped, [1])
    out = wrapped.generate(**inputs, max_new_tokens=5, **arguments)
    if "num_beams" in arguments:
        scores = {}
        for beams in (inputs, {k: torch.cat([v, v]) for k, v in inputs.items()}):
            scores[len(beams["input_ids"])] = wrapped.generate(**beams, max_new_tokens=5, **arguments)[0]
        assert torch.equal(scores[1], scores[2])
    else:
        assert torch.equal(out, wrapped.generate(**inputs, max_new_tokens=5))


def test_what_cannot_keep_positions_says_so():
    model = tiny("qwen2_5_vl")
    with pytest.raises(ConfigError, match=r"positions='repack'.*qwen2_5_vl"):
        vlmeff.wrap(model, None, tokens=PRUNE, positions="repack")
    with pytest.raises(ConfigError, match=r"positions='stay'.*'repack', 'keep'"):
        vlmeff.wrap(model, None, tokens=PRUNE, positions="stay")
    _, wrapped = pair("llava")
    inputs = prompts(wrapped, [1])
    with pytest.raises(IncompatibleError, match="use_cache=True"):
        wrapped.generate(**inputs, use_cache=False, max_new_tokens=2)
    wrapped.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(IncompatibleError, match=r"sdpa.*repack"):
        wrapped(**inputs)


@torch.no_grad()
def test_resampled_tokens_stand_in_the_middle_of_their_cells():
    _, wrapped = pair("llava")
    vlmeff.wrap(wrapped, None, tokens=vlmeff.Fourier(side=3), positions="keep")
    inputs = prompts(wrapped, [1])
    seen = {}
    handle = wrapped.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    wrapped(**inputs)
    handle.remove()
    first = int((inputs["input_ids"][0] == wrapped.config.image_token_id).nonzero()[0])
    # 6 x 6 tokens in 3 x 3 cells of 2 x 2: rows and columns 1, 3, 5.
    expected = [first + 6 * row + column for row in (1, 3, 5) for column in (1, 3, 5)]
    assert seen["position_ids"][0, first : first + 9].tolist() == expected
    assert seen["position_ids"][0, first + 9 :].tolist() == list(range(first + 36, inputs["input_ids"].shape[1]))
    tiled = vlmeff.wrap(tiny("llava_next"), None, tokens=vlmeff.Fourier(side=3), positions="keep")
    with pytest.raises(IncompatibleError, match="repack"):
        tiled(**prompts(tiled, [1]))
