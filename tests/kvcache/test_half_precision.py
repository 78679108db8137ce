"""KV retention of bfloat16 models: keep-all changes no bit, and a part is that of a masked float32 pass."""

from __future__ import annotations

import copy

import pytest
import torch
from retaining import text_model_of
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny

import vlmeff

NAMES = ["llama", "llava", "qwen2_5_vl"]
STEPS = 6
TOLERANCE = 5e-2  # of logits of size 1 to 2; bfloat16 alone makes 0.01 to 0.02


def bfloat16_model(name):
    """A tiny model and a padded batch. Its language model is a quarter as sharp as the tiny models are: in those
    rounding moves logits by 0.1 to 1, as much as dropping entries does, and the comparison would show nothing."""
    model = tiny_llama(dtype=torch.bfloat16) if name == "llama" else tiny(name, dtype=torch.bfloat16)
    for module in (*text_model_of(model).modules(), model.lm_head):
        if isinstance(module, torch.nn.Linear):
            module.weight.mul_(0.25)
    inputs = llama_inputs([40, 23]) if name == "llama" else prompts(model, [1, 2])
    return model, {k: x.bfloat16() if x.is_floating_point() else x for k, x in inputs.items()}


def generated(model, inputs):
    return model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )


def float32_logits(model, inputs, sequences, cache):
    """[B, STEPS, V] of a float32 copy in one pass without a cache over all of ``sequences`` but the last token. Behind
    the prompt, layer l sees of the prompt what ``cache`` keeps in l; everything where ``cache`` is None."""
    width, total = inputs["input_ids"].shape[1], sequences.shape[1] - 1
    whole = {}
    for name, x in inputs.items():
        if x.ndim == 2 and x.shape[1] == width:
            new = sequences[:, width:total] if name == "input_ids" else torch.zeros_like(sequences[:, width:total])
            x = torch.cat([x, new + 1 if name == "attention_mask" else new], 1)
        whole[name] = x.float() if x.is_floating_point() else x
    reference = copy.deepcopy(model).float()
    real = whole["attention_mask"].bool()

    def seen_by(layer):
        def hook(module, args, kwargs):
            mask = torch.ones(total, total, dtype=torch.bool).tril() & real[:, None, :]
            mask |= torch.eye(total, dtype=torch.bool)  # a padding query looks at itself
            for row, slots in enumerate(layer.kept_slots):
                gone = sorted(set(range(width)) - set(slots.tolist()))
                mask[row, width:, gone] = False
            return args, {**kwargs, "attention_mask": mask[:, None]}

        return hook

    for index in () if cache is None else cache.retained:
        attention = text_model_of(reference).layers[index].self_attn
        attention.register_forward_pre_hook(seen_by(cache.layers[index]), with_kwargs=True)
    return reference(**whole, use_cache=False).logits[:, width - 1 :]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keeping_everything_changes_no_bit(name):
    model, inputs = bfloat16_model(name)
    plain = generated(model, inputs)
    wrapped = generated(vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=1.0)), inputs)
    assert wrapped.past_key_values.layer(0).keys.dtype == torch.bfloat16
    assert torch.equal(plain.sequences, wrapped.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, wrapped.logits, strict=True))


@pytest.mark.parametrize("policy", [vlmeff.PrefixKV(keep_ratio=0.3, sink=1, recent=2), vlmeff.TOVA(keep_ratio=0.3)])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_part_is_that_of_the_float32_model_with_the_same_slots(name, policy):
    model, inputs = bfloat16_model(name)
    plain = copy.deepcopy(model)
    got = generated(vlmeff.wrap(model, None, kv=policy), inputs)
    assert 0.25 < vlmeff.report(model).retention.keep_ratio < 0.4
    logits = torch.stack(got.logits, 1).float()
    expected = float32_logits(plain, inputs, got.sequences, got.past_key_values)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    everything = float32_logits(plain, inputs, got.sequences, None)
    assert (logits - everything)[:, 1:].abs().max() > 2 * TOLERANCE, "what is kept must show"
