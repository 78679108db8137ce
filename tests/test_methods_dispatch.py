"""No method keeps a private copy of an operation: each, end to end, dispatches the ops of ``vlmeff.ops`` it stands on.

The tests of the methods prove the numbers; these only count calls.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import prompts, tiny
from tiny_video import wan_inputs, wan_transformer

import vlmeff
from tests.speculative.mar_nets import random_mar
from vlmeff import ops
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.speculative.continuous import Continuous

NEW_TOKENS = 4
TINY_KV = {"keep_ratio": 0.4}
SCHEDULE = vlmeff.Schedule(layers=(0, 1), ratios=(0.6, 0.5))

# Method -> what vlmeff.wrap is given, and the ops that it dispatches.
METHODS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "hiprune": (
        {"tokens": vlmeff.HiPrune(keep=0.5, alpha=0.5)},
        {"attention_column_mass", "top_indices", "gather_tokens"},
    ),
    "adaptinfer": (
        {"tokens": vlmeff.AdaptInfer(schedule=SCHEDULE)},
        {"text_to_vision_scores", "top_indices", "gather_tokens"},
    ),
    "fourier": ({"tokens": vlmeff.Fourier(ratio=0.5)}, {"dct_resample"}),
    "prefixkv": (
        {"kv": vlmeff.PrefixKV(sink=1, recent=2, **TINY_KV)},
        {"attention_column_mass", "top_indices", "gather_kv"},
    ),
    "snapkv": (
        {"kv": vlmeff.SnapKV(window=4, **TINY_KV)},
        {"attention_column_mass", "top_indices", "gather_kv"},
    ),
}
# Scheme -> the quantizer of its activations, if they are quantized, and its product.
SCHEMES = {
    "w8a8_int8": {"act_quant_int8", "linear_w8a8_int8"},
    "w8a8_fp8": {"act_quant_fp8", "linear_w8a8_fp8"},
    "w4a8_int8": {"act_quant_int8", "linear_w4a8_int8"},
    "w4a4_int": {"act_quant_uint", "linear_wnan_int"},
    "w4a16": {"linear_wna16"},
    "w8a16_int8": {"linear_wna16"},
}


def by_op(ran: Counter[tuple[str, str]]) -> Counter[str]:
    """Calls of each op; on CPU tensors every one runs on the reference."""
    assert {name for _, name in ran} <= {"reference"}
    return Counter({op: count for (op, _), count in ran.items()})


@pytest.mark.parametrize("model_name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_wrapped_model_dispatches_what_its_method_stands_on(method: str, model_name: str) -> None:
    arguments, expected = METHODS[method]
    model = tiny(model_name)
    inputs = prompts(model, [1])
    with ops.counters() as unwrapped:
        model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    assert not unwrapped
    vlmeff.wrap(model, None, **arguments)
    with ops.counters() as ran:
        model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    counts = by_op(ran)
    assert set(counts) == expected
    layers = model.config.get_text_config().num_hidden_layers
    once_each = {
        "hiprune": {"attention_column_mass": 2, "gather_tokens": 1},  # the object layer and the deep one
        "adaptinfer": {"text_to_vision_scores": len(SCHEDULE.layers)},
        "fourier": {"dct_resample": 1},
        # A layer is scored and compacted once, when the prompt is through.
        "prefixkv": {"attention_column_mass": layers, "gather_kv": layers},
        "snapkv": {"attention_column_mass": layers, "gather_kv": layers},
    }[method]
    assert {op: counts[op] for op in once_each} == once_each


@torch.no_grad()
def test_decoding_from_a_quantized_cache_attends_to_what_is_stored() -> None:
    model = tiny_llama()
    vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=0.8), kv_storage="int8")
    with ops.counters() as ran:
        model.generate(**llama_inputs([200, 190]), max_new_tokens=NEW_TOKENS)
    # The first new token comes with the prompt.
    steps = NEW_TOKENS - 1
    assert by_op(ran)["quantized_decode_attention"] == steps * model.config.num_hidden_layers


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_quantized_model_dispatches_the_ops_of_its_scheme(scheme: str) -> None:
    pytest.importorskip("diffusers")
    model = wan_transformer()
    with ops.counters() as unwrapped:
        model(**wan_inputs())
    assert not unwrapped
    vlmeff.wrap(model, None, quant=scheme)
    of_scheme = [m for m in model.modules() if isinstance(m, QuantLinear) and m.spec.scheme == scheme]
    assert of_scheme
    with ops.counters() as ran:
        model(**wan_inputs())
    counts = by_op(ran)
    assert SCHEMES[scheme] <= set(counts)
    (product,) = (op for op in SCHEMES[scheme] if op.startswith("linear"))
    assert counts[product] >= len(of_scheme)


def test_exact_speculation_dispatches_the_ratio_of_paths() -> None:
    model, draft = random_mar(0), random_mar(1)
    with ops.counters() as plain:
        model.sample(torch.tensor([2, 5]))
    assert not plain
    with ops.counters() as ran:
        out = model.sample(torch.tensor([2, 5]), mode=Continuous(mode="exact", window=3), draft=draft)
    assert out.stats.mode == "exact"
    assert by_op(ran)["gaussian_path_log_ratio"] >= 1
