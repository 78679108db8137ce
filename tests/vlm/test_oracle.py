"""A shortened request against the full-length one with the pruned tokens masked away.

The oracle runs the unwrapped language model on the whole prompt: the pruned tokens cannot be looked at, and every token
has the position that the short prompt gives it. What the kept tokens see is then the same.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, SPECIAL, prompts, tiny

import vlmeff

PRUNE = vlmeff.HiPrune(keep=0.4, alpha=0.5)
BATCHES = [[1], [2], [0, 1, 2]]
# Both sides compute the same sums in float32, over key sets of different length and so in a different order.
# Hidden states are of order 1 to 10, logits up to 20.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}

every_model = pytest.mark.parametrize("name", MODELS)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
every_batch = pytest.mark.parametrize("pictures", BATCHES, ids=str)


def close(a, b):
    torch.testing.assert_close(a, b, **TOLERANCE)


def encoder_arguments(inputs):
    return {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}


def full_positions(model, inputs):
    """[3, B, L]: the positions of Qwen2.5-VL's unshortened prompt."""
    arguments = {key: inputs[key] for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
    return model.model.get_rope_index(**arguments)[0]


class MaskedOracle:
    """The unwrapped model on full-length prompts whose tokens outside ``seen`` [B, L] are hidden."""

    def __init__(self, model, inputs, seen):
        self.model, self.seen = model, seen.long()
        ids = inputs["input_ids"]
        self.embeds = model.get_input_embeddings()(ids)
        if "pixel_values" in inputs:
            features = model.model.get_image_features(**encoder_arguments(inputs), return_dict=True).pooler_output
            picture = (ids == model.config.image_token_id)[..., None]
            self.embeds = self.embeds.masked_scatter(picture, torch.cat(list(features)))
        if model.config.model_type == "llava":
            self.positions = (self.seen.cumsum(1) - 1).clamp(min=0)  # numbered anew
        else:
            self.positions = full_positions(model, inputs)

    def run(self):
        """Hidden states of every layer [B, L, D] and logits [B, L, V]."""
        out = self.model.model.language_model(
            inputs_embeds=self.embeds,
            attention_mask=self.seen,
            position_ids=self.positions,
            use_cache=False,
            output_hidden_states=True,
        )
        return out.hidden_states, self.model.lm_head(out.last_hidden_state)

    def greedy(self, steps):
        """Tokens [B, steps] and the logits [B, V] behind each."""
        tokens, logits = [], []
        for _ in range(steps):
            logits.append(self.run()[1][:, -1])
            allowed = logits[-1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
            tokens.append(allowed.argmax(1, keepdim=True))
            self.embeds = torch.cat([self.embeds, self.model.get_input_embeddings()(tokens[-1])], 1)
            self.seen = torch.cat([self.seen, torch.ones_like(tokens[-1])], 1)
            highest = self.positions.amax(-1, keepdim=True)
            if self.positions.ndim == 3:
                highest = highest.amax(0, keepdim=True).expand(3, -1, -1)
            self.positions = torch.cat([self.positions, highest + 1], -1)
        return torch.cat(tokens, 1), logits


def pair(name, pictures, attention="sdpa"):
    """An unwrapped model, the same model wrapped, and a batch for them."""
    model = tiny(name, attention=attention)
    return model, vlmeff.wrap(tiny(name, attention=attention), None, tokens=PRUNE), prompts(model, pictures)


def seen_tokens(output, inputs):
    return output.vlmeff_keep & inputs["attention_mask"].bool()


@every_attention
@every_batch
@every_model
@torch.no_grad()
def test_hidden_states_and_logits_of_a_forward_pass_equal_the_masked_oracle(name, pictures, attention):
    model, wrapped, inputs = pair(name, pictures, attention)
    output = wrapped(**inputs, output_hidden_states=True)
    seen = seen_tokens(output, inputs)
    states, logits = MaskedOracle(model, inputs, seen).run()
    assert seen.sum() < inputs["attention_mask"].sum()
    for short, full in zip((*output.hidden_states, output.logits), (*states, logits), strict=True):
        for row, slots in enumerate(seen):
            close(short[row, -slots.sum() :], full[row, slots])


@every_attention
@every_batch
@every_model
@torch.no_grad()
def test_greedy_tokens_and_their_logits_equal_the_masked_oracle(name, pictures, attention):
    model, wrapped, inputs = pair(name, pictures, attention)
    seen = seen_tokens(wrapped(**inputs), inputs)
    out = wrapped.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
    tokens, logits = MaskedOracle(model, inputs, seen).greedy(6)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    for a, b in zip(out.logits, logits, strict=True):
        close(a, b)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask of ones"])
@every_attention
@every_model
@torch.no_grad()
def test_no_cache_gives_the_same_prefill_logits_as_a_cache(name, attention, masked):
    # Without a cache and a mask, transformers takes a jump in the positions for the border of two packed sequences.
    _, wrapped, inputs = pair(name, [2], attention)
    if not masked:
        del inputs["attention_mask"]
    close(wrapped(**inputs, use_cache=False).logits, wrapped(**inputs, use_cache=True).logits)


@every_model
@torch.no_grad()
def test_generate_without_a_cache_gives_the_logits_of_generate_with_one(name):
    _, wrapped, inputs = pair(name, [2])
    arguments = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    cached, plain = (wrapped.generate(**inputs, use_cache=cache, **arguments) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        close(a, b)


@pytest.mark.parametrize("call", ["generate", "forward"])
@every_batch
@torch.no_grad()
def test_rope_deltas_continue_behind_the_last_position_of_the_full_prompt(pictures, call):
    model, wrapped, inputs = pair("qwen2_5_vl", pictures)
    seen = seen_tokens(wrapped(**inputs), inputs)
    if call == "generate":
        wrapped.model.rope_deltas = None
        wrapped.generate(**inputs, max_new_tokens=3)
    positions = full_positions(model, inputs)
    expected = [int(positions[:, row].max()) + 1 - int(slots.sum()) for row, slots in enumerate(seen)]
    assert wrapped.model.rope_deltas.tolist() == [[delta] for delta in expected]


def row_alone(inputs, pictures, row):
    """Row ``row`` of a batch as a batch of its own, without its padding."""
    valid = inputs["attention_mask"][row].bool()
    alone = {
        key: inputs[key][row][valid][None]
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")
        if key in inputs
    }
    first, count = sum(pictures[:row]), pictures[row]
    if not count:
        return alone
    if "image_grid_thw" in inputs:
        patches = inputs["image_grid_thw"].prod(1).tolist()
        start = sum(patches[:first])
        alone["image_grid_thw"] = inputs["image_grid_thw"][first : first + count]
        alone["pixel_values"] = inputs["pixel_values"][start : start + sum(patches[first : first + count])]
    else:
        alone["pixel_values"] = inputs["pixel_values"][first : first + count]
    return alone


@every_model
@torch.no_grad()
def test_a_row_is_answered_in_a_batch_as_it_is_alone(name):
    pictures = [1, 0, 2]
    _, wrapped, inputs = pair(name, pictures)
    arguments = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    batch = wrapped.generate(**inputs, **arguments)
    for row in range(len(pictures)):
        alone = wrapped.generate(**row_alone(inputs, pictures, row), **arguments)
        assert torch.equal(alone.sequences[0, -5:], batch.sequences[row, -5:])
        for a, b in zip(alone.logits, batch.logits, strict=True):
            close(a[0], b[row])


@every_model
@torch.no_grad()
def test_the_selection_for_a_picture_does_not_depend_on_its_batch_mates(name):
    pictures = [1, 0, 2]
    _, wrapped, inputs = pair(name, pictures)
    wrapped(**inputs)
    together = [item.kept for item in vlmeff.report(wrapped).plan.items]
    for row in (0, 2):
        wrapped(**row_alone(inputs, pictures, row))
        first = sum(pictures[:row])
        alone = [item.kept for item in vlmeff.report(wrapped).plan.items]
        for a, b in zip(alone, together[first : first + pictures[row]], strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
def test_user_position_ids_of_qwen_are_shortened_like_the_prompt():
    model, wrapped, inputs = pair("qwen2_5_vl", [1, 2])
    stretched = 3 * full_positions(model, inputs)
    output = wrapped(**inputs, position_ids=stretched)
    seen = seen_tokens(output, inputs)
    oracle = MaskedOracle(model, inputs, seen)
    oracle.positions = stretched
    for row, slots in enumerate(seen):
        close(output.logits[row, -slots.sum() :], oracle.run()[1][row, slots])
    tokens, _ = oracle.greedy(4)
    text_row = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[None]
    out = wrapped.generate(**inputs, position_ids=torch.cat([text_row, stretched]), max_new_tokens=4)
    assert torch.equal(out[:, -4:], tokens)
