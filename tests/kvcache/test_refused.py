"""What KV retention refuses, by name and before it goes wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from retaining import Ends, TopScores, retained_forward, retained_generate, text_model_of
from tiny_llama import llama_inputs, tiny_llama
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache import tap
from kvcache.cache import RetainedCache
from kvcache.controller import attention_module
from kvcache.policy import ScoreSpec
from kvcache.request import retained_call
from vlmeff.errors import (
    IncompatibleError,
    RetentionStateError,
    UnsupportedCacheError,
    UnsupportedMaskError,
    UnsupportedModelError,
    VlmeffError,
)


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


def refused(error, match, model=None, **kwargs):
    model = model or tiny_llama()
    assert issubclass(error, VlmeffError)
    with pytest.raises(error, match=match):
        retained_generate(
            model, TopScores(keep_ratio=0.4), kwargs.pop("inputs", llama_inputs([12])), max_new_tokens=2, **kwargs
        )
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", ["static", "quantized", "paged", "offloaded"])
def test_caches_of_other_kinds(kind):
    refused(UnsupportedCacheError, "cache_implementation", cache_implementation=kind)
    refused(
        UnsupportedCacheError, "cache_implementation", generation_config=GenerationConfig(cache_implementation=kind)
    )


def test_a_static_cache_that_is_brought_along():
    model = tiny_llama()
    refused(
        UnsupportedCacheError, "StaticCache", model, past_key_values=StaticCache(config=model.config, max_cache_len=32)
    )


def test_a_brought_dynamic_cache_is_left_alone_with_a_warning():
    model = tiny_llama()
    kwargs = {**llama_inputs([9]), "past_key_values": DynamicCache(config=model.config)}
    with pytest.warns(UserWarning, match="past_key_values"):
        assert call_on(model, kwargs, TopScores()) is None


def test_no_cache_at_all():
    refused(UnsupportedCacheError, "use_cache", use_cache=False)


def test_a_compiled_model():
    model = tiny_llama()
    model.compile()
    refused(UnsupportedCacheError, "compile", model)


def test_right_padding():
    inputs = llama_inputs([12, 8])
    inputs = {name: x.flip(1) for name, x in inputs.items()}
    refused(UnsupportedMaskError, "padding_side", inputs=inputs)


@pytest.mark.parametrize(
    "packed", [{"cu_seq_lens_q": torch.tensor([0, 5, 12])}, {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}]
)
def test_packed_sequences(packed):
    model, ids = tiny_llama(), torch.arange(10, 15)[None]
    cache = RetainedCache(model.config, TopScores())
    with pytest.raises(UnsupportedMaskError, match=next(iter(packed))):
        retained_forward(model, cache, {"input_ids": ids, **packed})


def test_a_square_mask_after_eviction():
    model = tiny_llama()
    _, cache = retained_generate(model, TopScores(keep_ratio=0.4), llama_inputs([12]), max_new_tokens=1)
    mask = torch.ones(1, 1, 1, 13).bool()
    with pytest.raises(UnsupportedMaskError, match="attention_mask"):
        retained_forward(model, cache, {"input_ids": torch.tensor([[11]]), "attention_mask": mask})


def test_an_unwrapped_model_cannot_go_on():
    model = tiny_llama()
    _, cache = retained_generate(model, TopScores(keep_ratio=0.4), llama_inputs([12]), max_new_tokens=1)
    with pytest.raises(RetentionStateError, match="wrapped model"), torch.no_grad():
        model(input_ids=torch.tensor([[11]]), past_key_values=cache)


def test_a_model_of_other_depth_cannot_go_on():
    _, cache = retained_generate(tiny_llama(), TopScores(keep_ratio=0.4), llama_inputs([12]), max_new_tokens=1)
    with pytest.raises(UnsupportedCacheError, match="layers"):
        retained_forward(tiny_llama(layers=2), cache, {"input_ids": torch.tensor([[11]])})


def test_training():
    model = tiny_llama().train()
    cache = RetainedCache(model.config, TopScores())
    kwargs = {**llama_inputs([12]), "past_key_values": cache}
    with pytest.raises(RetentionStateError, match="no_grad"):
        retained_call(model, text_model_of(model), None, kwargs, generating=False)
    model.eval()
    with (
        retained_call(model, text_model_of(model), None, kwargs, generating=False),
        pytest.raises(RetentionStateError, match="no_grad"),
    ):
        model(**kwargs)


def test_layers_that_process_different_tokens():
    """As pruning inside the language model has them."""
    model = tiny_llama()

    def drop(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        changed = {"position_embeddings": (cos[:, 2:], sin[:, 2:]), "attention_mask": None}
        return (args[0][:, 2:], *args[1:]), {**kwargs, **changed}

    handle = text_model_of(model).layers[2].register_forward_pre_hook(drop, with_kwargs=True)
    cache = RetainedCache(model.config, TopScores())
    with pytest.raises(IncompatibleError, match="AdaptInfer"):
        retained_forward(model, cache, llama_inputs([12]))
    handle.remove()
    assert hooks(model) == 0


def test_attention_modules_of_other_kinds():
    model = tiny_llama()
    layer = text_model_of(model).layers[0]
    with pytest.raises(UnsupportedModelError, match="attention_mask"):
        attention_module(layer, 7)
    layer.self_attn.sinks = torch.zeros(4)
    with pytest.raises(UnsupportedModelError, match="sinks"):
        attention_module(layer, 0)


@pytest.mark.parametrize("style", ["positional", "hidden from the hooks"])
def test_a_cache_that_does_not_come_as_a_keyword(style):
    model = tiny_llama()
    for layer in text_model_of(model).layers:
        forward = layer.self_attn.forward
        module = layer.self_attn

        def call(hidden_states, *, attention_mask, past_key_values, position_embeddings, module=module, **kwargs):
            if style == "positional":
                return module(hidden_states, position_embeddings, attention_mask, past_key_values)
            return module.forward(hidden_states, position_embeddings, attention_mask, past_key_values)

        layer.self_attn = Indirect(module, call)
        assert layer.self_attn.inner.forward == forward
    cache = RetainedCache(model.config, Ends())
    with pytest.raises(UnsupportedModelError, match="keyword"):
        retained_forward(model, cache, llama_inputs([12]))


class Indirect(torch.nn.Module):
    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, **kwargs):
        return self.call(**kwargs)


def test_attention_that_is_never_heard():
    model = tiny_llama()
    model.config._attn_implementation = "sdpa"

    def silent(module, query, key, value, attention_mask, **kwargs):
        raise AssertionError

    # The kernel is looked up under another name than the configuration says.
    for layer in text_model_of(model).layers:
        layer.self_attn.config = copy.copy(model.config)
        layer.self_attn.config._attn_implementation = "sdpa"
    real = ALL_ATTENTION_FUNCTIONS.get_interface
    ALL_ATTENTION_FUNCTIONS.get_interface = lambda name, default: tap_free(name, default, real)
    try:
        with pytest.raises(UnsupportedModelError, match="never heard"):
            retained_generate(model, TopScores(), llama_inputs([12]), max_new_tokens=1)
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


def tap_free(name, default, real):
    kernel = real(name, default)
    return getattr(kernel, "__wrapped__", kernel)


def test_answers_of_a_policy_that_cannot_be():
    class TooMany(Ends):
        def budgets(self, stats):
            return [s.n + 1 for s in stats]

    class WrongShape(Ends):
        def select(self, stats, k):
            return torch.zeros(stats.kv_heads, k).long()

    for policy, match in ((TooMany(), "budgets"), (WrongShape(), "select")):
        with pytest.raises(RetentionStateError, match=match):
            retained_generate(tiny_llama(), policy, llama_inputs([12]), max_new_tokens=1)


def test_eager_attention_without_weights():
    model = tiny_llama(attention="eager")
    for layer in text_model_of(model).layers:
        layer.self_attn.register_forward_hook(lambda m, a, output: (output[0], None))
    with pytest.raises(UnsupportedModelError, match="weights"):
        retained_generate(model, TopScores(needs=ScoreSpec(kind="window")), llama_inputs([12]), max_new_tokens=1)
