"""``forward`` of a wrapped model: logits, loss, gradients, hand-written decoding."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, SPECIAL, prompts, tiny

import vlmeff

PRUNE = vlmeff.HiPrune(keep=0.4, alpha=0.5)
NEW = 6
# The same sums over the same keys, with the padding on another side.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}

every_model = pytest.mark.parametrize("name", MODELS)
every_batch = pytest.mark.parametrize("pictures", [[1], [0, 1, 2]], ids=str)


def wrapped_tiny(name, tokens=PRUNE):
    return vlmeff.wrap(tiny(name), None, tokens=tokens)


def cross_entropy_by_hand(logits, labels):
    losses = [
        -logits[row, column].log_softmax(0)[labels[row, column + 1]]
        for row in range(len(labels))
        for column in range(labels.shape[1] - 1)
        if labels[row, column + 1] != -100
    ]
    return torch.stack(losses).mean()


@every_batch
@every_model
@torch.no_grad()
def test_the_loss_is_that_of_the_labels_of_the_kept_tokens(name, pictures):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, pictures)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = wrapped(**inputs, labels=labels)
    seen = output.vlmeff_keep & inputs["attention_mask"].bool()
    short = torch.full(output.logits.shape[:2], -100)
    for row, slots in enumerate(seen):
        short[row, -slots.sum() :] = labels[row, slots]
    torch.testing.assert_close(output.loss, cross_entropy_by_hand(output.logits, short))


@every_model
@torch.no_grad()
def test_right_padding_is_turned_into_left_padding_with_a_warning(name):
    wrapped = wrapped_tiny(name)
    left = prompts(wrapped, [0, 1, 2])
    right = dict(left)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in left:
            pads = (left["attention_mask"] == 0).sum(1).tolist()
            right[key] = torch.stack([row.roll(-n) for row, n in zip(left[key], pads, strict=True)])
    expected = wrapped(**left)
    with pytest.warns(UserWarning, match="right padding"):
        output = wrapped(**right)
    for row, slots in enumerate(expected.vlmeff_keep & left["attention_mask"].bool()):
        n = int(slots.sum())
        torch.testing.assert_close(output.logits[row, -n:], expected.logits[row, -n:], **TOLERANCE)


@every_model
@torch.no_grad()
def test_forward_may_return_a_tuple(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    assert torch.equal(wrapped(**inputs, return_dict=False)[0], wrapped(**inputs).logits)


@every_model
@torch.no_grad()
def test_logits_to_keep_gives_the_last_columns(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [0, 1, 2])
    # Not bit for bit: the head is a product of another size.
    torch.testing.assert_close(wrapped(**inputs, logits_to_keep=2).logits, wrapped(**inputs).logits[:, -2:])


@every_model
def test_gradients_flow_through_the_kept_tokens_in_training(name):
    wrapped = wrapped_tiny(name).train()
    inputs = prompts(wrapped, [1, 2])
    wrapped(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss.backward()
    vision = wrapped.model.vision_tower if name == "llava" else wrapped.model.visual
    for part in (vision, wrapped.model.language_model):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("method", [vlmeff.Downsample(keep=0.4), vlmeff.Random(keep=0.4)], ids=["downsample", "random"])
@pytest.mark.parametrize("call", ["generate", "forward"])
@every_model
@torch.no_grad()
def test_encoder_outputs_of_the_caller_are_reduced_by_methods_that_need_no_scores(name, call, method):
    wrapped = wrapped_tiny(name, method)
    inputs = prompts(wrapped, [1, 2])
    arguments = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    encoded = wrapped.model.get_image_features(**arguments, return_dict=True)
    given, before = {"image": encoded}, [f.clone() for f in encoded.pooler_output]
    instead = {key: value for key, value in inputs.items() if key != "pixel_values"} | {"mm_encoder_outputs": given}
    if call == "generate":
        assert torch.equal(wrapped.generate(**instead, max_new_tokens=4), wrapped.generate(**inputs, max_new_tokens=4))
    else:
        assert torch.equal(wrapped(**instead).logits, wrapped(**inputs).logits)
    assert given == {"image": encoded}
    assert all(torch.equal(a, b) for a, b in zip(encoded.pooler_output, before, strict=True))


@torch.no_grad()
def test_arguments_may_be_given_by_position():
    wrapped = wrapped_tiny("llava")
    inputs = prompts(wrapped, [0, 1, 2])
    by_position = wrapped(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    assert torch.equal(by_position.logits, wrapped(**inputs).logits)


@every_model
def test_an_argument_given_twice_is_a_type_error(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [1])
    with pytest.raises(TypeError, match=r"multiple values.*input_ids"):
        wrapped(inputs["input_ids"], **inputs)


def decode_by_hand(model, inputs, steps, mask_of):
    """Greedy tokens [B, steps]; ``mask_of(output, mask)`` is the mask after the prompt."""
    output = model(**inputs, use_cache=True)
    mask, tokens = mask_of(output, inputs.get("attention_mask")), []
    for _ in range(steps):
        tokens.append(output.logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf).argmax(1, keepdim=True))
        grown = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            grown = {"attention_mask": mask}
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True, **grown)
    return torch.cat(tokens, 1)


@torch.no_grad()
def test_a_hand_written_loop_with_the_growing_mask_of_the_full_prompt_equals_generate():
    wrapped = wrapped_tiny("llava")  # transformers' Qwen2.5-VL takes no mask in such a step
    inputs = prompts(wrapped, [2])
    tokens = decode_by_hand(wrapped, inputs, NEW, lambda output, mask: mask)
    assert torch.equal(tokens, wrapped.generate(**inputs, max_new_tokens=NEW)[:, -NEW:])


@torch.no_grad()
def test_a_hand_written_loop_with_the_growing_mask_of_the_short_prompt_equals_generate_however_long():
    wrapped = wrapped_tiny("llava")
    inputs = prompts(wrapped, [1])
    steps = 36  # more than the prompt has lost, so that the short mask outgrows the full prompt
    tokens = decode_by_hand(wrapped, inputs, steps, lambda output, mask: mask.new_ones(output.logits.shape[:2]))
    assert torch.equal(tokens, wrapped.generate(**inputs, max_new_tokens=steps)[:, -steps:])


@every_model
@torch.no_grad()
def test_a_hand_written_loop_without_a_mask_equals_generate(name):
    wrapped = wrapped_tiny(name)
    inputs = prompts(wrapped, [2])
    tokens = decode_by_hand(wrapped, inputs, NEW, lambda output, mask: None)
    assert torch.equal(tokens, wrapped.generate(**inputs, max_new_tokens=NEW)[:, -NEW:])
