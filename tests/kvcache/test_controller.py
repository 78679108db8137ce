"""The hooks: what they touch, what they leave alone, when they wait for the device, and what is refused."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from retaining import Ends, TopScores, plain_generate, retained_forward, retained_generate, text_model_of
from tiny_llama import llama_inputs, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache import tap
from kvcache.cache import RetainedCache
from kvcache.controller import RetainedCall
from kvcache.request import retained_call


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def call_on(model, kwargs, policy, **options):
    return retained_call(model, text_model_of(model), policy, kwargs, generating=True, **options)


@pytest.fixture(autouse=True)
def everything_is_put_back():
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    yield
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == before
    assert not tap._entries
    assert tap._listening.get() is None


# Isolation.


def test_hooks_and_mapping_are_there_for_the_call_only():
    model, inputs = tiny_llama(), llama_inputs([12])
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    kwargs = dict(inputs)
    call = call_on(model, kwargs, TopScores())
    assert hooks(model) == 0
    with call:
        assert hooks(model) == 2 * 4
        assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is original
        assert model.config._attn_implementation == "sdpa"
    assert hooks(model) == 0
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert "_get_candidate_generator" not in model.__dict__


def test_everything_is_put_back_after_an_error():
    model = tiny_llama()

    class Broken(TopScores):
        def budgets(self, stats):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        retained_generate(model, Broken(), llama_inputs([12]), max_new_tokens=2)
    assert hooks(model) == 0
    _, cache = retained_generate(model, TopScores(), llama_inputs([12]), max_new_tokens=2)
    assert cache.layer(0).compacted


def test_a_policy_that_looks_at_no_attention_leaves_the_mapping_alone():
    model, kwargs = tiny_llama(), llama_inputs([12])
    with call_on(model, kwargs, Ends()):
        assert not tap._entries
        assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_calls_inside_one_another_share_the_mapping():
    first, second = tiny_llama(), tiny_llama(seed=1)
    a, b = dict(llama_inputs([12])), dict(llama_inputs([9]))
    outer, inner = call_on(first, a, TopScores()), call_on(second, b, TopScores())
    with outer:
        wrapper = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with inner:
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapper
            second.generate(**b, max_new_tokens=2)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapper
        first.generate(**a, max_new_tokens=2)
    assert inner.cache.layer(0).compacted
    assert outer.cache.layer(0).compacted


def test_a_call_inside_the_call_of_the_same_cache_does_nothing_twice():
    model, kwargs = tiny_llama(), dict(llama_inputs([12]))
    call = call_on(model, kwargs, TopScores())
    with call, RetainedCall(text_model_of(model), call.cache):
        assert hooks(model) == 2 * 4
        model.generate(**kwargs, max_new_tokens=3)
    assert call.cache.report().layers[0].columns < 12
    assert not call.cache.watched


def test_a_mapping_of_someone_else_survives():
    calls = []

    def theirs(module, *args, **kwargs):
        calls.append(module)
        return original(module, *args, **kwargs)

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model = tiny_llama()
    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        retained_generate(model, TopScores(), llama_inputs([12]), max_new_tokens=2)
        assert ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"] is theirs
        assert len(calls) == 2 * 4
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_other_caches_and_other_models_pass_untouched():
    model, other, inputs = tiny_llama(), tiny_llama(seed=1), llama_inputs([14, 9])
    expected, elsewhere = (
        plain_generate(model, inputs, max_new_tokens=4),
        plain_generate(other, inputs, max_new_tokens=4),
    )
    kwargs = dict(inputs)
    call = call_on(model, kwargs, TopScores(keep_ratio=0.4))
    with call:
        for asked, answer in ((model, expected), (other, elsewhere)):
            got = plain_generate(asked, inputs, max_new_tokens=4)
            assert all(torch.equal(a, b) for a, b in zip(got.logits, answer.logits, strict=True))
        assert call.cache.get_seq_length() == 0


def test_another_model_between_the_steps_changes_nothing():
    model, other, inputs = tiny_llama(), tiny_llama(seed=1), llama_inputs([14, 9])
    policy = TopScores(keep_ratio=0.4)
    expected, _ = retained_generate(model, policy, inputs, max_new_tokens=5)

    class Between:
        def __call__(self, ids, scores):
            plain_generate(other, inputs, max_new_tokens=2)
            return scores

    got, _ = retained_generate(model, policy, inputs, max_new_tokens=5, logits_processor=[Between()])
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


def test_threads_on_one_model_do_not_meet():
    model = tiny_llama()
    prompts = [llama_inputs([10 + 3 * i, 8], seed=i) for i in range(4)]
    policy = TopScores(keep_ratio=0.4)
    expected = [retained_generate(model, policy, x, max_new_tokens=5)[0].sequences for x in prompts]
    got = [None] * 4

    def work(i):
        got[i] = retained_generate(model, policy, prompts[i], max_new_tokens=5)[0].sequences

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert hooks(model) == 0


def test_copies_of_a_cache_go_their_own_ways():
    model, inputs = tiny_llama(), llama_inputs([16])
    _, cache = retained_generate(model, TopScores(keep_ratio=0.4), inputs, max_new_tokens=1, headroom=4)
    twin, fresh = copy.deepcopy(cache), copy.deepcopy(cache)
    outputs = {}
    for step in range(3):
        for name, which, token in (("a", cache, 20), ("b", twin, 60)):
            outputs[name, step] = retained_forward(model, which, {"input_ids": torch.tensor([[token + step]])}).logits
    for step in range(3):
        alone = retained_forward(model, fresh, {"input_ids": torch.tensor([[60 + step]])}).logits
        assert torch.equal(alone, outputs["b", step])
    assert not torch.equal(outputs["a", 2], outputs["b", 2])


# A loop by hand.


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_loop_of_forwards_gives_what_generate_gives(padded, backend):
    model, inputs = tiny_llama(attention=backend), llama_inputs([15, 9] if padded else [15])
    policy = TopScores(keep_ratio=0.4)
    expected, own = retained_generate(model, policy, inputs, max_new_tokens=5)
    cache, mask = RetainedCache(model.config, policy), inputs["attention_mask"]
    feed = inputs["input_ids"]
    for step in range(5):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -feed.shape[1] :]
        out = retained_forward(model, cache, {"input_ids": feed, "attention_mask": mask, "position_ids": positions})
        torch.testing.assert_close(out.logits[:, -1], expected.logits[step], rtol=0, atol=1e-4)
        feed = expected.sequences[:, 15 + step : 16 + step]
        mask = torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
    assert torch.equal(cache.layer(1).slots(), own.layer(1).slots())


def test_a_forward_asks_for_a_cache_of_its_own_only_where_the_model_uses_one():
    model, inputs = tiny_llama(), llama_inputs([12])
    text = text_model_of(model)
    kwargs = {**inputs, "use_cache": False}
    assert retained_call(model, text, TopScores(), kwargs, generating=False) is None
    assert "past_key_values" not in kwargs
    kwargs = dict(inputs)
    with retained_call(model, text, TopScores(), kwargs, generating=False) as call, torch.no_grad():
        out = model(**kwargs)
    assert out.past_key_values is call.cache
    assert call.cache.layer(0).compacted
    assert retained_call(model, text, None, dict(inputs), generating=True) is None


def test_a_mask_of_four_dimensions_for_the_prompt():
    model, inputs = tiny_llama(), llama_inputs([15, 9])
    policy = TopScores(keep_ratio=0.4)
    _, expected = retained_generate(model, policy, inputs, max_new_tokens=1)
    mask = inputs["attention_mask"].bool()
    square = torch.ones(15, 15).bool().tril() & mask[:, None, None]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cache = RetainedCache(model.config, policy)
    retained_forward(
        model, cache, {"input_ids": inputs["input_ids"], "attention_mask": square, "position_ids": positions}
    )
    for a, b in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(a.slots(), b.slots())


# Waiting for the device.


class Waits(TorchDispatchMode):
    """Counts, by the function of kvcache that is on the stack, what would make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if any(name.startswith(waiting) for waiting in self.WAITING):
            frame = sys._getframe()
            while frame is not None:
                if "/kvcache/" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename:
                    self.ours.append((name, frame.f_code.co_name))
                    break
                frame = frame.f_back
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "policy", [TopScores(keep_ratio=0.4), Ends(decode="window", decode_window=2, evict_interval=2)]
)
def test_no_decode_step_waits_for_the_device(policy, backend):
    model, inputs = tiny_llama(attention=backend), llama_inputs([15, 9])
    waits, seen = Waits(), []

    class Step:
        """Switches the watch on behind the prompt."""

        def __call__(self, ids, scores):
            if not seen:
                waits.__enter__()
            seen.append(1)
            return scores

    retained_generate(model, policy, inputs, max_new_tokens=8, logits_processor=[Step()], headroom=3)
    waits.__exit__(None, None, None)
    assert len(seen) == 8
    assert waits.ours == []


def test_no_step_of_a_loop_by_hand_waits_and_the_watch_would_see_it():
    model, inputs = tiny_llama(), llama_inputs([15, 9])
    cache = RetainedCache(model.config, TopScores(keep_ratio=0.4))
    with Waits() as waits:
        retained_forward(model, cache, inputs)
    assert waits.ours, "the prompt is looked at"
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], 1)
    with Waits() as waits:
        retained_forward(model, cache, {"input_ids": torch.tensor([[11], [12]]), "attention_mask": mask})
    assert waits.ours == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_decode_step_synchronises_cuda():
    model, inputs = tiny_llama().cuda(), {k: v.cuda() for k, v in llama_inputs([15]).items()}
    cache = RetainedCache(model.config, TopScores(keep_ratio=0.4))
    retained_forward(model, cache, inputs)
    feed, position = torch.tensor([[11]], device="cuda"), torch.tensor([[15]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            retained_forward(model, cache, {"input_ids": feed, "position_ids": position})
    finally:
        torch.cuda.set_sync_debug_mode("default")
