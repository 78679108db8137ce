"""Several questions share one picture's prefill: the same answers as alone, and the picture goes through once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import ALL_MODELS, SPECIAL, prompts, tiny
from torch import Tensor
from transformers import DynamicCache

import vlmeff
from kvcache import policies
from tokenpruning import methods
from vlmeff.asking import prepare
from vlmeff.errors import ConfigError, IncompatibleError, UnsupportedInputError, UnsupportedModelError, VlmeffError
from vlmeff.shared import ask_many, generate_shared
from vlmeff.vlm.retention import decoder_of

PICTURE = Path(__file__).resolve().parent.parent / "demos" / "pictures" / "four-shapes.png"
QUESTIONS = ["how many shapes are there?", "describe the picture.", "how many circles are there?"]
WORDS = ([20, 21, 22], [30], [40, 41, 42, 43])
CAUSAL = [name for name in ALL_MODELS if name != "paligemma"]
TOKENS = {
    "none": None,
    "hiprune": vlmeff.HiPrune(keep=0.5),
    "divprune": vlmeff.DivPrune(keep=0.5),
    "fourier": vlmeff.Fourier(ratio=0.5),
}


def shared_requests(model: Any, words: Any = WORDS) -> list[dict[str, Tensor]]:
    """Prompts that differ only in the words at their end."""
    inputs, out = prompts(model, [1]), []
    for behind in words:
        request = dict(inputs)
        for key, fill in (
            ("input_ids", behind),
            ("attention_mask", 1),
            ("mm_token_type_ids", 0),
            ("token_type_ids", 0),
        ):
            if key in inputs:
                new = torch.tensor([behind if fill is behind else [fill] * len(behind)], dtype=inputs[key].dtype)
                request[key] = torch.cat([inputs[key], new], 1)
        out.append(request)
    return out


def alone(model: Any, request: dict[str, Tensor], steps: int = 5) -> Tensor:
    out = model.generate(**request, max_new_tokens=steps, do_sample=False)
    return out[0, request["input_ids"].shape[1] :]


def picture_end(model: Any, request: dict[str, Tensor]) -> int:
    return int((request["input_ids"][0] == model.config.image_token_id).nonzero().max()) + 1


def decoder_layer(model: Any) -> Any:
    return next(m for m in model.modules() if hasattr(m, "layers") and hasattr(m, "embed_tokens")).layers[0]


def count_tokens(module: Any, counts: list[int]) -> Any:
    """Note the columns of each pass through a decoder layer."""

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        counts.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("tokens", TOKENS)
def test_tiny_llava_answers_many_questions_as_it_answers_each_alone(tokens: str) -> None:
    model, processor = vlmeff.load("tiny-llava")
    if TOKENS[tokens] is not None:
        vlmeff.wrap(model, None, tokens=TOKENS[tokens])
    picture = Image.open(PICTURE).convert("RGB")
    requests = [prepare(processor, picture, question) for question in QUESTIONS]
    expected = [processor.decode(alone(model, request, 20), skip_special_tokens=True).strip() for request in requests]
    answers = ask_many(model, processor, picture, QUESTIONS, max_new_tokens=20)
    assert isinstance(answers, list)
    assert answers == expected
    assert len(set(expected)) > 1
    end = picture_end(model, requests[0])
    assert answers.report.prefix_tokens_before == end
    assert answers.report.question_tokens == tuple(r["input_ids"].shape[1] - end for r in requests)
    assert (answers.report.prefix_tokens < end) == (tokens != "none")


@pytest.mark.parametrize("tokens", ["none", "hiprune", "fourier"])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_goes_on_from_the_shared_picture_as_from_its_own(name: str, tokens: str) -> None:
    model = tiny(name)
    if TOKENS[tokens] is not None:
        vlmeff.wrap(model, None, tokens=TOKENS[tokens])
    requests = shared_requests(model)
    got, _ = generate_shared(model, requests, max_new_tokens=5)
    for new, request in zip(got, requests, strict=True):
        assert torch.equal(new, alone(model, request))


@pytest.mark.parametrize("wrapped", [False, True], ids=["unwrapped", "wrapped"])
def test_the_picture_is_encoded_and_prefilled_once_and_the_report_counts_what_ran(wrapped: bool) -> None:
    model = tiny("qwen2_5_vl")
    if wrapped:
        vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.5))
    requests = shared_requests(model)
    columns: list[int] = []
    encoded: list[int] = []
    handles = [
        count_tokens(decoder_layer(model), columns),
        model.model.visual.register_forward_hook(lambda *_: encoded.append(1)),
    ]
    _, shared = generate_shared(model, requests, max_new_tokens=1)
    for handle in handles:
        handle.remove()
    assert len(encoded) == 1
    assert columns == [shared.prefix_tokens, *shared.question_tokens]
    assert shared.prefilled_tokens == sum(columns)
    assert shared.prefilled_tokens_alone - shared.prefilled_tokens == 2 * shared.prefix_tokens
    assert all(ms is not None and ms > 0 for ms in (shared.prefill_ms, *shared.question_ms, *shared.total_ms))
    assert len(shared.question_ms) == len(shared.total_ms) == 3
    kv_bytes = 3 * 2 * 2 * 8 * 4 * shared.prefix_tokens  # layers, keys and values, heads, head size, float32
    assert shared.kv_bytes == kv_bytes
    assert shared.to_dict()["question_tokens"] == list(shared.question_tokens)


def kept_by_hand(policy: Any, keys: Tensor) -> Tensor:
    """[Hkv, k] kept of [Hkv, n, D] keys: the formulas of StreamingLLM and KNorm."""
    heads, n, _ = keys.shape
    k = int(policy.keep_ratio * n + 0.5)
    if isinstance(policy, vlmeff.StreamingLLM):
        return torch.tensor([[*range(policy.sink), *range(n - k + policy.sink, n)]] * heads)
    return torch.stack([head.norm(dim=-1).argsort()[:k].sort().values for head in keys])


@torch.no_grad()
def continued_by_hand(model: Any, policy: Any, request: dict[str, Tensor], steps: int) -> list[int]:
    """Prefill the picture, cut its cache down, and feed the question and the answer with their positions spelt out."""
    end = picture_end(model, request)
    tokenwise = ("input_ids", "attention_mask", "mm_token_type_ids")
    out = model(**{k: x[:, :end] if k in tokenwise else x for k, x in request.items()}, use_cache=True)
    cache = DynamicCache()
    for number, layer in enumerate(out.past_key_values.layers):
        index = kept_by_hand(policy, layer.keys[0])
        rows = torch.arange(len(index))[:, None]
        cache.update(layer.keys[:, rows, index], layer.values[:, rows, index], number)
    start = end + (int(model.model.rope_deltas) if model.config.model_type.startswith("qwen") else 0)
    new, answer = request["input_ids"][:, end:], []
    for _ in range(steps):
        positions = torch.arange(start, start + new.shape[1])[None]
        if model.config.model_type.startswith("qwen"):
            positions = positions.expand(3, 1, -1)
        logits = model(input_ids=new, position_ids=positions, past_key_values=cache, use_cache=True).logits
        logits[..., SPECIAL] = -torch.inf  # as the tiny models' generation configuration has it
        start += new.shape[1]
        new = logits[:, -1:].argmax(-1)
        answer.append(int(new))
    return answer


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "policy",
    [vlmeff.StreamingLLM(keep_ratio=0.4, sink=2), vlmeff.KNorm(keep_ratio=0.4)],
    ids=["streaming_llm", "knorm"],
)
def test_a_query_agnostic_policy_keeps_a_share_of_the_picture_and_all_of_the_question(name: str, policy: Any) -> None:
    model = tiny(name)
    requests = shared_requests(model)
    expected = [continued_by_hand(model, policy, request, 5) for request in requests]
    plain = [alone(model, request).tolist() for request in requests]
    vlmeff.wrap(model, None, kv=policy)
    got, shared = generate_shared(model, requests, max_new_tokens=5)
    assert [ids.tolist() for ids in got] == expected
    assert expected != plain  # what was evicted matters, or the test would say nothing
    assert shared.prefix_tokens == picture_end(model, requests[0])


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("policy", ["streaming_llm", "knorm", "random"])
def test_no_question_leaves_a_trace_for_the_next(policy: str, storage: str | None) -> None:
    model = tiny("llava")
    options = {} if storage is None else {"kv_storage": storage}
    vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=0.5), kv=policy, keep_ratio=0.6, **options)
    requests = shared_requests(model)
    together, _ = generate_shared(model, requests, max_new_tokens=6)
    for new, request in zip(together, requests, strict=True):
        (single,), _ = generate_shared(model, [request], max_new_tokens=6)
        assert torch.equal(new, single)


@pytest.mark.parametrize(("name", "positions"), [("llava", "keep"), ("qwen2_5_vl", None), ("qwen3_vl", None)])
@pytest.mark.parametrize("seed", range(3))
def test_questions_are_numbered_behind_the_whole_picture_when_its_last_token_was_dropped(
    name: str, positions: str | None, seed: int
) -> None:
    model = tiny(name)
    options = {} if positions is None else {"positions": positions}
    vlmeff.wrap(model, None, tokens=vlmeff.Random(keep=2, seed=seed), **options)
    requests = shared_requests(model)
    numbered: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        numbered.append(kwargs["position_ids"][-1, ..., -1].flatten()[-1])

    handle = decoder_of(model).register_forward_pre_hook(note, with_kwargs=True)
    generate_shared(model, requests, max_new_tokens=1)
    shared = [int(n) for n in numbered[1:]]
    numbered.clear()
    for request in requests:
        alone(model, request, 1)
    handle.remove()
    assert shared == [int(n) for n in numbered]


def query_aware() -> list[str]:
    return [name for name in policies.names() if policies.get(name).query_aware and name != "prefixkv"]


def test_what_keeps_everything_looks_at_nothing() -> None:
    model = vlmeff.wrap(tiny("llava"), None, kv=vlmeff.PrefixKV(keep_ratio=1.0), kv_storage="int8")
    answers, _ = generate_shared(model, shared_requests(model), max_new_tokens=3)
    assert len(answers) == len(WORDS)


@pytest.mark.parametrize("name", [*query_aware(), "prefixkv"])
def test_query_aware_retention_is_refused_with_the_policies_that_will_do(name: str) -> None:
    model = vlmeff.wrap(tiny("llava"), None, kv=name)
    refused(model, rf"kv='{name}'.*knorm, random, streaming_llm.*kv=False")


@pytest.mark.parametrize("name", [n for n in methods.names() if "text" in getattr(methods.get(n), "needs", ())])
def test_methods_that_read_the_question_are_refused(name: str) -> None:
    model, _ = vlmeff.load("tiny-llava")
    refused(
        vlmeff.wrap(model, "fast", tokens=name), rf"tokens='{re.escape(name)}' scores.*against the question.*HiPrune"
    )


def test_pruning_inside_the_language_model_is_refused() -> None:
    model, _ = vlmeff.load("tiny-llava")
    refused(vlmeff.wrap(model, "fast", tokens="adaptinfer"), "tokens='adaptinfer'.*before the language model")


def refused(model: Any, message: str, error: type[VlmeffError] = IncompatibleError, requests: Any = None) -> None:
    """The error comes before the model has run."""
    requests = shared_requests(tiny("llava")) if requests is None else requests
    columns: list[int] = []
    handle = count_tokens(decoder_layer(model), columns)
    with pytest.raises(error, match=message):
        generate_shared(model, requests, max_new_tokens=2)
    handle.remove()
    assert not columns


def test_a_prompt_that_sees_itself_in_both_directions_is_refused() -> None:
    refused(tiny("paligemma"), "PaliGemma.*see the question", UnsupportedModelError)


def test_a_question_before_the_picture_is_refused() -> None:
    model = tiny("llava")
    requests = shared_requests(model)
    requests[1]["input_ids"] = requests[1]["input_ids"].clone()
    requests[1]["input_ids"][0, 0] += 1
    refused(model, "not the same up to the picture's end", requests=requests)


def test_another_picture_is_refused_and_one_that_is_left_out_is_the_first() -> None:
    model = tiny("llava")
    requests = shared_requests(model)
    expected = [alone(model, request) for request in requests]
    requests[2]["pixel_values"] = requests[2]["pixel_values"] + 1
    refused(model, "pixel_values differs", requests=requests)
    del requests[2]["pixel_values"]
    got, _ = generate_shared(model, requests, max_new_tokens=5)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_requests_without_picture_question_or_with_padding_are_refused() -> None:
    model = tiny("llava")
    text = {"input_ids": torch.tensor([[11, 12, 13]])}
    refused(model, "no picture", UnsupportedInputError, [text])
    (whole,) = shared_requests(model, [[20]])
    end = picture_end(model, whole)
    refused(
        model, "ends with the picture", UnsupportedInputError, [{**whole, "input_ids": whole["input_ids"][:, :end]}]
    )
    padded = whole["attention_mask"].clone()
    padded[0, 0] = 0
    refused(model, "attention_mask hides", UnsupportedInputError, [{**whole, "attention_mask": padded}])
    refused(model, r"input_ids \[1, L\]", UnsupportedInputError, [prompts(model, [1, 1])])
    refused(model, "position_ids", UnsupportedInputError, [{**whole, "position_ids": padded}])
    refused(model, "requests is empty", ConfigError, [])


def test_a_static_cache_is_refused() -> None:
    model = tiny("llava")
    model.generation_config.cache_implementation = "static"
    refused(model, "cache_implementation='static'", vlmeff.errors.UnsupportedCacheError)


@pytest.mark.parametrize("questions", ["how many?", [], ()])
def test_questions_must_be_a_list(questions: Any) -> None:
    model, processor = vlmeff.load("tiny-llava")
    with pytest.raises(ConfigError, match="questions="):
        ask_many(model, processor, Image.open(PICTURE), questions)


def test_a_refused_wrap_is_refused_by_ask_many_too() -> None:
    model, processor = vlmeff.load("tiny-llava")
    vlmeff.wrap(model, None, kv="snapkv")
    with pytest.raises(IncompatibleError, match="kv='snapkv'"):
        ask_many(model, processor, Image.open(PICTURE), QUESTIONS)
