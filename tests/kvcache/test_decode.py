"""Decode steps over a quantized cache: the op answers for the kernel where it can, and the kernel itself elsewhere."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from retaining import CLOSE, Ends, model_and_inputs, plain_generate, retained_forward, retained_generate, row_of
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache import decode, tap
from kvcache.cache import RetainedCache
from kvcache.quantization import Packed
from kvcache.quantized_layer import QuantizedRetainedLayer
from vlmeff import ops
from vlmeff.errors import UnsupportedModelError

OP = "quantized_decode_attention"
STEPS = 6
KEEP = Ends(keep_ratio=0.8)


@pytest.fixture(autouse=True)
def short_residual(monkeypatch):
    """8 columns of keys are quantized at a time, so that short prompts have packed ones."""
    small = {"group": 4, "residual": 8}
    monkeypatch.setattr("kvcache.cache.new_layer", lambda storage, headroom: QuantizedRetainedLayer(storage, **small))


@pytest.fixture(autouse=True)
def everything_is_put_back():
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    yield
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == before
    assert not tap._entries


@contextmanager
def unpacking_every_step():
    """As if no back end could be stood in for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "has_stand_in", lambda backend: False)
        yield


def generate(model, inputs, storage="int4", **options):
    """(result with logits, the cache, runs of the op)."""
    cache = RetainedCache(model.config, KEEP, storage=storage)
    with ops.counters() as ran:
        result, cache = retained_generate(
            model, KEEP, inputs, **{"past_key_values": cache, "max_new_tokens": STEPS, **options}
        )
    return result, cache, sum(count for (op, _), count in ran.items() if op == OP)


def same(result, expected):
    assert torch.equal(result.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(expected.logits), **CLOSE)


FAMILIES = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "internvl", "paligemma"]


@pytest.mark.parametrize(
    ("name", "storage"), [*(("llama", s) for s in ("int8", "int4", "int2")), *((name, "int4") for name in FAMILIES)]
)
def test_the_op_answers_every_step_with_what_the_kernel_makes_of_the_unpacked_columns(name, storage):
    """A padded batch, with fillers."""
    model, inputs = model_and_inputs(name, lengths=(41, 30))
    with unpacking_every_step():
        expected, _, none = generate(model, inputs, storage)
    result, cache, ran = generate(model, inputs, storage)
    assert (none, ran) == (0, len(cache.retained) * (STEPS - 1))
    same(result, expected)
    assert all(cache.layer(p).lent is None for p in range(len(cache.retained)))


def test_no_step_unpacks_the_cache(monkeypatch):
    model, inputs = model_and_inputs("llama", lengths=(41,))
    _, cache, _ = generate(model, inputs)
    monkeypatch.setattr(Packed, "dequantize", lambda self: pytest.fail("unpacked"))
    retained_forward(model, cache, {"input_ids": torch.tensor([[7]])})
    with pytest.raises(pytest.fail.Exception):
        retained_forward(model, cache, {"input_ids": torch.tensor([[7, 8]])})


def test_a_bfloat16_model_gets_bfloat16_and_what_float32_products_make():
    model, inputs = model_and_inputs("llama", lengths=(41, 30))
    model.bfloat16()
    tokens = torch.randint(10, 100, (2, 1))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    given = {"input_ids": tokens, "attention_mask": mask}
    given["position_ids"] = mask.sum(1, keepdim=True) - 1
    _, cache, _ = generate(model, inputs)
    with unpacking_every_step():
        unpacked = retained_forward(model, copy.deepcopy(cache), given).logits
    got = retained_forward(model, cache, given).logits
    assert got.dtype == torch.bfloat16
    assert (got - unpacked).float().norm() < 0.1 * unpacked.float().norm()


def test_several_tokens_at_once_and_a_cache_with_nothing_packed_go_to_the_kernel():
    model, inputs = model_and_inputs("llama", lengths=(41,))
    assert generate(model, {name: x[:, :8] for name, x in inputs.items()}, max_new_tokens=2)[2] == 0
    _, cache, _ = generate(model, inputs)
    with ops.counters() as ran:
        retained_forward(model, cache, {"input_ids": torch.tensor([[7, 8, 9]])})
    assert not ran[OP, "reference"]


def test_back_ends_without_a_stand_in_keep_their_kernel():
    model, inputs = model_and_inputs("llama", backend="eager", lengths=(41, 30))
    _, _, ran = generate(model, inputs)
    assert ran == 0
    names = ("sdpa", "flash_attention_2", "kernels-community/flash-attn3", "eager", "flex_attention", "paged|sdpa")
    assert [decode.has_stand_in(name) for name in names] == [True, True, True, False, False, False]


class Heard:
    """Stands for the library's own kernel, bound to a module; notes what it gets."""

    func = staticmethod(ALL_ATTENTION_FUNCTIONS["sdpa"])

    def __call__(self, query, key, value, mask, *args, **kwargs):
        self.key, self.value, self.rest = key, value, (mask, args, kwargs)
        return "the kernel's"


def lending_layer():
    """A layer that has lent 21 columns, and what they are in full precision."""
    layer = QuantizedRetainedLayer("int4", group=4, residual=8)
    states = torch.randn(2, 2, 2, 21, 16)
    layer.announce(20, None)
    layer.update(*states[:, :, :, :20])
    layer.keep_everything(torch.arange(20, dtype=torch.int32).repeat(2, 1))
    layer.handed_on = True
    twin = copy.deepcopy(layer)
    decode.lend(layer, 1, "sdpa")
    out = []
    for one in (layer, twin):
        one.announce(1, None)
        out.append(one.update(*states[:, :, :, 20:]))
    assert [t.shape[2] for t in out[0]] == [5, 9]
    return layer, out[0], out[1]


@pytest.mark.parametrize(
    "unusual",
    [
        *({"output_attentions": True}, {"sliding_window": 4096}, {"dropout": 0.5}, {"s_aux": torch.zeros(4)}),
        *({"position_bias": torch.zeros(1)}, {"cu_seq_lens_q": torch.zeros(2)}, {"never_heard_of": 1}),
    ],
    ids=str,
)
def test_a_call_that_the_op_does_not_know_goes_to_the_kernel_with_all_columns(unusual):
    layer, lent, whole = lending_layer()
    kernel, query = Heard(), torch.randn(2, 4, 1, 16)
    usual = {"scaling": 0.25, "dropout": 0.0, "sliding_window": None, "output_attentions": False}
    assert decode.attend(layer, kernel, query, *lent, None, **usual | unusual) == "the kernel's"
    assert torch.equal(kernel.key, whole[0])
    assert torch.equal(kernel.value, whole[1])
    assert kernel.rest == (None, (), usual | unusual)
    assert layer.lent is None


@pytest.mark.parametrize("changed", ["mask", "positional", "dtype", "kernel", None])
def test_what_is_unusual_in_other_ways_goes_there_too(changed):
    layer, lent, whole = lending_layer()
    kernel, query = Heard(), torch.randn(2, 4, 1, 16)
    mask = torch.zeros(2, 1, 1, 21) if changed == "mask" else None
    if changed == "kernel":
        kernel.func = print
    if changed == "dtype":
        query = query.bfloat16()
    answer = decode.attend(layer, kernel, query, *lent, mask, *([0.0] if changed == "positional" else []))
    if changed is None:
        assert answer[0].shape == (2, 1, 4, 16)
        expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            torch.nn.Identity(), query, *(t.repeat_interleave(2, 1) for t in whole), None
        )
        torch.testing.assert_close(answer[0], expected, rtol=1e-5, atol=1e-5)
    else:
        assert answer == "the kernel's"
        assert torch.equal(kernel.key, whole[0])


def test_someone_s_own_kernel_is_asked(monkeypatch):
    model, inputs = model_and_inputs("llama", lengths=(41, 30))
    sdpa, heard = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def own(module, query, key, *args, **kwargs):
        heard.append(key.shape[2])
        return sdpa(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        _, cache, ran = generate(model, inputs)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ran == 0
    assert heard[-1] == cache.layer(0).physical_length


def test_a_float_mask_of_one_s_own_goes_to_the_kernel():
    known, valid = decode._visible(torch.zeros(2, 1, 1, 9), 2, 9)
    assert (known, valid) == (False, None)
    assert decode._visible(None, 2, 9) == (True, None)
    assert decode._visible(torch.ones(2, 1, 1, 8, dtype=torch.bool), 2, 9)[0] is False
    assert decode._visible(torch.ones(2, 4, 1, 9, dtype=torch.bool), 2, 9)[0] is False
    assert decode._visible(torch.ones(1, 1, 1, 9, dtype=torch.bool), 2, 9)[1].shape == (2, 9)
    assert decode._visible(torch.ones(2, 9, dtype=torch.bool), 2, 9)[1].shape == (2, 9)  # flash


def altered(self, *args, update=RetainedCache.update, **kwargs):
    keys, values = update(self, *args, **kwargs)
    return keys.clone(), values


def test_a_model_that_changes_the_keys_before_its_kernel_gets_them_unpacked(monkeypatch):
    model, inputs = model_and_inputs("llama", lengths=(41, 30))
    expected, _, _ = generate(model, inputs)
    monkeypatch.setattr(RetainedCache, "update", altered)
    result, _, ran = generate(model, inputs)
    assert ran == 0
    same(result, expected)


def test_one_that_does_so_in_a_step_alone_is_refused_and_nothing_stays_lent(monkeypatch):
    model, inputs = model_and_inputs("llama", lengths=(41,))
    _, cache, _ = generate(model, inputs)
    monkeypatch.setattr(RetainedCache, "update", altered)
    with pytest.raises(UnsupportedModelError, match="kv_storage=None"):
        retained_forward(model, cache, {"input_ids": torch.tensor([[7]])})
    layers = [cache.layer(p) for p in range(len(cache.retained))]
    assert all(layer.lent is None and not layer.lending for layer in layers)


def test_one_that_does_not_ask_its_kernel_is_refused(monkeypatch):
    model, inputs = model_and_inputs("llama", lengths=(41,))
    _, cache, _ = generate(model, inputs)
    attention = model.model.layers[1].self_attn

    def forward(hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        states = torch.zeros(1, 2, 1, 16)
        past_key_values.update(states, states, 1)
        return hidden_states, None

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="kv_storage=None"):
        retained_forward(model, cache, {"input_ids": torch.tensor([[7]])})
    assert cache.layer(1).lent is None


def test_an_error_in_a_step_leaves_nothing_lent(monkeypatch):
    model, inputs = model_and_inputs("llama", lengths=(41,))
    _, cache, _ = generate(model, inputs)
    monkeypatch.setattr(decode, "attend", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        retained_forward(model, cache, {"input_ids": torch.tensor([[7]])})
    assert cache.layer(0).lent is None
    assert cache.layer(0).packed_keys is not None


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": False, "prompt_lookup_num_tokens": 3}], ids=str)
def test_beams_and_assisted_decoding_give_what_they_gave(options):
    model, inputs = model_and_inputs("llama", lengths=(41, 30))
    if "num_beams" not in options:
        inputs = row_of(inputs, 0)
    with unpacking_every_step():
        expected, _, _ = generate(model, inputs, **options)
    result, _, _ = generate(model, inputs, **options)
    assert torch.equal(result.sequences, expected.sequences)


def test_an_unwrapped_model_and_an_unquantized_cache_are_left_alone(monkeypatch):
    model, inputs = model_and_inputs("llama", lengths=(41,))
    monkeypatch.undo()
    with ops.counters() as ran:
        plain_generate(model, inputs, max_new_tokens=2)
        retained_generate(model, KEEP, inputs, max_new_tokens=2)
    assert not [op for op, _ in ran if op == OP]
