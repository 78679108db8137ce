"""On every family a shortened request against the full-length one with the pruned tokens hidden (see ``oracle``)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from oracle import TOLERANCE, Oracle, check_selection, encode, encoded, pruned
from tiny_models import ALL_MODELS, IMAGE, NO_CHUNKED_PREFILL, SPECIAL, prompts, tiny, tiny_gemma3

import vlmeff
from tokenpruning import Selection
from vlmeff.vlm.families import FAMILIES

NAMES = [name for name in ALL_MODELS if name in FAMILIES]
TILED = ["llava_next", "llava_onevision"]
PRUNE = vlmeff.HiPrune(keep=0.4, alpha=0.5)
NEW = 5
# Prompts whose pictures differ in size and tiles, both attention implementations, with and without scores.
CASES = {
    "sdpa, batch": ("sdpa", PRUNE, [0, 1, 2]),
    "sdpa, two pictures": ("sdpa", vlmeff.Downsample(keep=0.4), [2]),
    "eager, one picture": ("eager", PRUNE, [1]),
    "eager, batch": ("eager", vlmeff.Downsample(keep=0.4), [2, 0, 1]),
}

every_family = pytest.mark.parametrize("name", NAMES)
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def close(a, b):
    torch.testing.assert_close(a, b, **TOLERANCE)


def answered(wrapped, inputs, **arguments):
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    return wrapped.generate(**inputs, **settings, **arguments)


@every_case
@every_family
def test_a_selection_equals_the_masked_oracle(name, case, covered):
    attention, method, pictures = CASES[case]
    covered(name, "hiprune" if method is PRUNE else "downsample", "image")
    model, wrapped = tiny(name, attention=attention), vlmeff.wrap(tiny(name, attention=attention), None, tokens=method)
    plan = check_selection(model, wrapped, prompts(model, pictures))
    for item in plan.items:
        for size, pick in zip(item.layout.sizes, item.selections, strict=True):
            assert len(pick.index) == max(1, round(0.4 * size))


@pytest.mark.parametrize("newline", ["drop", "keep", "rows"])
@pytest.mark.parametrize("pictures", [[1, 1, 1], [2, 1]], ids=str)
@pytest.mark.parametrize("name", TILED)
def test_newlines_stay_by_policy(name, pictures, newline, covered):
    covered(name, "hiprune", "image")
    model = tiny(name)
    few = vlmeff.HiPrune(keep=0.1)  # so few that rows of the mosaic lose all their tokens
    plan = check_selection(
        model, vlmeff.wrap(tiny(name), None, tokens=few, newline=newline), prompts(model, pictures), newline
    )
    separators = sum(int((item.layout.slots < 0).sum()) for item in plan.items)
    stay = plan.n_after - sum(len(pick.index) for item in plan.items for pick in item.selections)
    assert {"drop": stay == 0, "keep": stay == separators, "rows": 0 < stay < separators}[newline]


def test_gemma_windows_count_the_tokens_that_are_left():
    model, wrapped = tiny_gemma3(window=6), vlmeff.wrap(tiny_gemma3(window=6), None, tokens=PRUNE)
    check_selection(model, wrapped, prompts(model, [0, 1, 2]))


@every_family
def test_no_cache_and_no_mask_give_the_answer_of_a_cache_with_a_mask(name):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=PRUNE)
    inputs = prompts(wrapped, [2])
    cached = answered(wrapped, inputs)
    plain = answered(wrapped, inputs, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    close(cached.logits, plain.logits)
    logits = wrapped(**inputs, use_cache=True).logits
    unmasked = {key: value for key, value in inputs.items() if key != "attention_mask"}
    for use_cache in (True, False):
        # Without a cache and a mask, transformers takes a jump in the positions for the border of packed sequences.
        close(wrapped(**unmasked, use_cache=use_cache).logits, logits)


@every_family
def test_a_static_cache_gives_the_answer_of_a_dynamic_one(name):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=PRUNE)
    inputs = prompts(wrapped, [0, 1, 2])
    dynamic, static = answered(wrapped, inputs), answered(wrapped, inputs, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    close(dynamic.logits, static.logits)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_CHUNKED_PREFILL])
def test_a_chunked_prefill_gives_the_answer_of_a_whole_one(name):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=PRUNE)
    inputs = prompts(wrapped, [0, 1, 2])
    whole, chunked = answered(wrapped, inputs), answered(wrapped, inputs, prefill_chunk_size=7)
    assert torch.equal(whole.sequences, chunked.sequences)
    close(whole.logits, chunked.logits)


@every_family
def test_encoder_outputs_of_the_caller_are_reduced_by_methods_that_need_no_scores(name, covered):
    covered(name, "downsample", "image")
    wrapped = vlmeff.wrap(tiny(name), None, tokens=vlmeff.Downsample(keep=0.4))
    inputs = prompts(wrapped, [0, 1, 2])
    output = encode(wrapped, inputs, "image")
    before = [part.clone() for part in output.pooler_output]
    given = {"image": output}
    instead = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"mm_encoder_outputs": given}
    assert torch.equal(answered(wrapped, instead).sequences, answered(wrapped, inputs).sequences)
    assert torch.equal(wrapped(**instead).logits, wrapped(**inputs).logits)
    assert given == {"image": output}
    assert all(torch.equal(a, b) for a, b in zip(output.pooler_output, before, strict=True))


def row_alone(inputs, pictures, row):
    """Row ``row`` of a batch as a batch of its own, without its padding. ``pictures``: how many each row has."""
    valid = inputs["attention_mask"][row].bool()
    along = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    alone = {key: inputs[key][row][valid][None] for key in along if key in inputs}
    first, count = sum(pictures[:row]), pictures[row]
    if not count:
        return alone
    pixels, mine = inputs["pixel_values"], slice(first, first + count)
    if "image_grid_thw" in inputs:
        patches = inputs["image_grid_thw"].prod(1).tolist()
        mine = slice(sum(patches[:first]), sum(patches[: first + count]))
        alone["image_grid_thw"] = inputs["image_grid_thw"][first : first + count]
    elif "pixel_attention_mask" in inputs:  # pictures stand by row
        mine = slice(row, row + 1)
        alone["pixel_attention_mask"] = inputs["pixel_attention_mask"][mine]
    elif "image_sizes" in inputs:
        alone["image_sizes"] = inputs["image_sizes"][mine]
    if "batch_num_images" in inputs:
        alone["batch_num_images"] = torch.tensor([count])
    alone["pixel_values"] = pixels[mine]
    return alone


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
}


def tiles_of_rows(model, inputs, pictures):
    """How many leading entries of ``pixel_values`` belong to each row."""
    if model.config.model_type != "internvl":
        return pictures
    return ((inputs["input_ids"] == model.config.image_token_id).sum(1) // 9).tolist()


@dataclass(frozen=True)
class Uneven:
    """Keeps another number of tokens of every picture, whatever it is asked for."""

    keep: float = 0.4
    needs: ClassVar[tuple[str, ...]] = ("features",)

    def select(self, segment, k):
        index = torch.arange(1 + int(segment.features[:, 0].argmax()) % (segment.size - 1))
        return Selection(index, torch.zeros_like(index, dtype=torch.int8))


@pytest.mark.parametrize("method", [PRUNE, Uneven()], ids=["even", "uneven"])
@pytest.mark.parametrize("mode", MODES)
@every_family
def test_a_row_is_answered_in_a_batch_as_it_is_alone(name, mode, method):
    pictures = [1, 0, 2]
    wrapped = vlmeff.wrap(tiny(name), None, tokens=method)
    inputs, arguments = prompts(wrapped, pictures), {"max_new_tokens": NEW, **MODES[mode]}
    repeats = MODES[mode].get("num_return_sequences", 1)
    batch = wrapped.generate(**inputs, **arguments)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(batch[:, :width], inputs["input_ids"].repeat_interleave(repeats, 0))
    for row in range(len(pictures)):
        alone = wrapped.generate(**row_alone(inputs, tiles_of_rows(wrapped, inputs, pictures), row), **arguments)
        assert torch.equal(alone[:, -NEW:], batch[row * repeats : (row + 1) * repeats, width:])


@every_family
def test_the_loss_is_that_of_the_labels_of_the_kept_tokens(name):
    model, wrapped = tiny(name), vlmeff.wrap(tiny(name), None, tokens=PRUNE)
    inputs = prompts(model, [0, 1, 2])
    # Not the first token of a row: transformers predicts it from the padding in front of it.
    unasked = (inputs["attention_mask"].cumsum(1) <= 1) | (inputs["input_ids"] == IMAGE)
    labels = inputs["input_ids"].masked_fill(unasked, -100)
    output = wrapped(**inputs, labels=labels)
    seen, features = pruned(inputs, encoded(model, inputs), vlmeff.report(wrapped).plan)
    logits = Oracle(model, inputs, features, seen).logits()
    losses = []
    for row, slots in enumerate(seen):
        # A kept token predicts the next one that is kept.
        steps = slots.nonzero()[:, 0].tolist()
        pairs = [(a, b) for a, b in itertools.pairwise(steps) if labels[row, b] != -100]
        losses += [-logits[row, a].log_softmax(0)[labels[row, b]] for a, b in pairs]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def decoded_by_hand(model, inputs, mask_of):
    """Greedy tokens [B, NEW] of a loop over forward; ``mask_of(output)`` is the mask behind the prompt."""
    output = model(**inputs, use_cache=True)
    mask, tokens = mask_of(output), []
    for _ in range(NEW):
        tokens.append(output.logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf).argmax(1, keepdim=True))
        grown = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            grown = {"attention_mask": mask}
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True, **grown)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("mask", ["full", "short"])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("qwen")])  # they take no mask here
def test_a_hand_written_loop_over_a_padded_batch_equals_generate(name, mask):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=PRUNE)
    inputs = prompts(wrapped, [0, 1, 2])

    def short_mask(output):
        lengths = (output.vlmeff_keep & inputs["attention_mask"].bool()).sum(1, keepdim=True)
        width = output.logits.shape[1]
        return (torch.arange(width) >= width - lengths).long()

    tokens = decoded_by_hand(wrapped, inputs, short_mask if mask == "short" else lambda _: inputs["attention_mask"])
    assert torch.equal(tokens, answered(wrapped, inputs).sequences[:, -NEW:])


@every_family
def test_a_hand_written_loop_without_a_mask_equals_generate(name):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=PRUNE)
    inputs = prompts(wrapped, [2])
    tokens = decoded_by_hand(wrapped, inputs, lambda _: None)
    assert torch.equal(tokens, answered(wrapped, inputs).sequences[:, -NEW:])


@every_family
def test_gradients_reach_the_vision_tower_through_kept_merged_and_resampled_tokens(name):
    for method in ("hiprune", "visionzip", "fourier"):
        wrapped = vlmeff.wrap(tiny(name).train(), None, tokens=method)
        inputs = prompts(wrapped, [1, 2])
        with torch.enable_grad():
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            wrapped(**inputs, labels=labels).loss.backward()
        assert all(p.grad.isfinite().all() for p in wrapped.parameters() if p.grad is not None)
        tower = [p.grad for key, p in wrapped.named_parameters() if "vis" in key and p.grad is not None]
        assert any(grad.abs().max() > 0 for grad in tower)


@pytest.mark.parametrize("name", ["llava_next", "gemma3", "paligemma", "qwen3_vl"])
def test_a_second_turn_on_a_pruned_cache_equals_the_whole_conversation(name):
    wrapped = vlmeff.wrap(tiny(name), None, tokens=PRUNE)
    inputs = prompts(wrapped, [0, 1, 2])
    out = wrapped.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    wrapped(**prompts(wrapped, [1], seed=8))  # another conversation in between
    ids = torch.cat([out.sequences, torch.tensor([[20, 21, 22]] * 3)], 1)
    turn = {**inputs, "input_ids": ids}
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", int(name == "paligemma"))):
        if key in inputs:
            turn[key] = torch.nn.functional.pad(inputs[key], (0, 7), value=value)
    short = {key: turn[key] for key in ("input_ids", "attention_mask")}
    second = answered(wrapped, short, past_key_values=out.past_key_values)
    whole = answered(wrapped, turn)
    assert torch.equal(second.sequences, whole.sequences)
    close(second.logits, whole.logits)
