"""Speculative decoding of the tiny vision-language models: the text of plain decoding, in fewer passes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from speculating import Scripted, other, scripted
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import IMAGE, prompts, tiny
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

import vlmeff
from vlmeff.errors import ConfigError, UnsupportedInputError
from vlmeff.speculative.text import TextSpeculation
from vlmeff.speculative.tree import chain_template

MODELS = ["llava", "qwen2_vl", "qwen2_5_vl"]
DRAFTERS = ["lookup", "recycle tree", "recycle chain", "assistant", "language model"]
NEW = 16
SAME_CACHE = 1e-4  # float32 passes of other widths; values are of the order of 1


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """Each model with a prompt of two pictures."""
    return {name: (model := tiny(name), prompts(model, [2])) for name in MODELS}


def drafter(kind: str, model: Any) -> Any:
    if kind == "lookup":
        return vlmeff.Lookup(ngram=2)
    if kind.startswith("recycle"):
        return vlmeff.Recycle(learn_prompt=True, **({} if kind.endswith("tree") else {"tree": chain_template(4)}))
    if kind == "language model":
        return vlmeff.Assistant(tiny_llama(layers=1), confidence=0.0)
    assistant = copy.deepcopy(model)
    with torch.no_grad():  # right most of the time
        assistant.lm_head.weight += 0.02 * torch.randn(assistant.lm_head.weight.shape, generator=seeded())
    return vlmeff.Assistant(assistant, confidence=0.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def eager(kind: str, model: Any) -> TextSpeculation:
    return TextSpeculation(drafter=drafter(kind, model), warmup=0, adaptive=False)


def plain(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


def wrapped(model: Any, speculation: Any, inputs: dict[str, Any], **kwargs: Any) -> tuple[Any, Any]:
    """(what generate returned, its statistics); the model is as before."""
    vlmeff.wrap(model, None, text_speculation=speculation)
    try:
        out = plain(model, inputs, **kwargs)
        return out, vlmeff.report(model).speculation
    finally:
        vlmeff.unwrap(model)


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_plain_decoding(name: str, kind: str, made: dict[str, Any]) -> None:
    model, inputs = made[name]
    speculation = eager(kind, model)
    for kwargs in ({}, {"repetition_penalty": 1.3, "max_new_tokens": 9}):
        expected = plain(model, inputs, **kwargs)
        out, statistics = wrapped(model, speculation, inputs, **kwargs)
        assert torch.equal(out, expected)
        assert statistics.tokens == out.shape[1] - inputs["input_ids"].shape[1]
        assert statistics.tokens == statistics.target_passes + statistics.accepted
        if kind == "assistant" and not kwargs:
            assert statistics.accepted > 0


@pytest.mark.parametrize("kind", ["lookup", "recycle tree", "assistant"])
def test_one_token_is_one_pass(kind: str, made: dict[str, Any]) -> None:
    model, inputs = made["llava"]
    out, statistics = wrapped(model, eager(kind, model), inputs, max_new_tokens=1)
    assert torch.equal(out, plain(model, inputs, max_new_tokens=1))
    assert (statistics.target_passes, statistics.drafted) == (1, 0)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("name", MODELS)
def test_half_right_drafts_leave_text_scores_and_cache_as_plain_decoding_does(
    name: str, tree: bool, made: dict[str, Any]
) -> None:
    model, inputs = made[name]
    kwargs: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = plain(model, inputs, **kwargs)
    width = inputs["input_ids"].shape[1]
    truth = expected.sequences[0, width:].tolist()
    out, statistics = wrapped(model, scripted(truth, wrong=2, tree=tree), inputs, **kwargs)
    assert torch.equal(out.sequences, expected.sequences)
    assert statistics.shape == ("tree" if tree else "chain")
    assert out.past_key_values.get_seq_length() == width + NEW - 1
    for ours, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=SAME_CACHE)
        assert torch.allclose(ours.values, theirs.values, atol=SAME_CACHE)
    for name_ in ("scores", "logits"):
        ours, theirs = torch.stack(getattr(out, name_)), torch.stack(getattr(expected, name_))
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-3)


def test_an_oracle_saves_the_passes_it_can_and_rubbish_saves_none(made: dict[str, Any]) -> None:
    model, inputs = made["llava"]
    truth = plain(model, inputs)[0, inputs["input_ids"].shape[1] :].tolist()
    for depth in (1, 4, 7):
        _, statistics = wrapped(model, scripted(truth, depth=depth), inputs)
        assert statistics.target_passes == math.ceil((NEW - 1) / (depth + 1)) + 1
        assert statistics.accept_rate == 1
    out, statistics = wrapped(model, scripted([other(token) for token in truth]), inputs)
    assert (statistics.target_passes, statistics.accepted) == (NEW, 0)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == truth


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_it_stops_where_plain_decoding_stops_inside_a_draft(tree: bool, made: dict[str, Any]) -> None:
    model, inputs = made["qwen2_5_vl"]
    width = inputs["input_ids"].shape[1]
    truth = plain(model, inputs)[0, width:].tolist()
    for at in range(4, 9):
        end = truth[at]
        kwargs = {"eos_token_id": end, "return_dict_in_generate": True}
        expected = plain(model, inputs, **kwargs)
        out, statistics = wrapped(model, scripted(truth, tree=tree), inputs, **kwargs)
        assert torch.equal(out.sequences, expected.sequences)
        assert out.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
        assert statistics.tokens == truth.index(end) + 1

    class AfterNine(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= width + 9])

    out, _ = wrapped(model, scripted(truth, tree=tree), inputs, stopping_criteria=StoppingCriteriaList([AfterNine()]))
    assert out[0, width:].tolist() == truth[:9]


def test_processors_see_every_true_prefix_once_and_may_have_a_memory(made: dict[str, Any]) -> None:
    model, inputs = made["llava"]

    class Counting(LogitsProcessor):
        def __init__(self) -> None:
            self.lengths: list[int] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.lengths.append(input_ids.shape[1])
            scores[:, 10 + len(self.lengths) :: 5] -= 3.0
            return scores

    expected = plain(model, inputs, logits_processor=LogitsProcessorList([Counting()]))
    counting = Counting()
    truth = expected[0, inputs["input_ids"].shape[1] :].tolist()
    speculation = scripted(truth, wrong=3, tree=True)
    out, _ = wrapped(model, speculation, inputs, logits_processor=LogitsProcessorList([counting]))
    assert torch.equal(out, expected)
    assert counting.lengths == list(range(inputs["input_ids"].shape[1], out.shape[1]))


def test_a_prompt_that_ends_as_its_text_before_the_picture_does(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own lookup copies the placeholders here and fails."""
    model, inputs = made["llava"]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", None)
    ids = inputs["input_ids"].clone()
    before = int((ids[0] == IMAGE).nonzero()[0])
    ids[0, -2:] = ids[0, before - 2 : before]
    inputs = {**inputs, "input_ids": ids}
    with pytest.raises(ValueError, match="Image features"):
        plain(model, inputs, prompt_lookup_num_tokens=4)
    out, _ = wrapped(model, TextSpeculation(warmup=0), inputs)
    assert torch.equal(out, plain(model, inputs))


def test_the_streamer_gets_every_token_once(made: dict[str, Any]) -> None:
    class Listening:
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.heard.append(value.flatten().tolist())

        def end(self) -> None:
            self.heard.append("end")

    model, inputs = made["llava"]
    theirs, ours = Listening(), Listening()
    truth = plain(model, inputs, streamer=theirs)[0, inputs["input_ids"].shape[1] :].tolist()
    wrapped(model, scripted(truth), inputs, streamer=ours)
    assert ours.heard == theirs.heard


def test_seeded_samples_are_those_of_plain_decoding_when_drafts_are_chosen(made: dict[str, Any]) -> None:
    model, inputs = made["llava"]
    kwargs = {"do_sample": True, "temperature": 0.9, "top_k": 20}
    torch.manual_seed(3)
    expected = plain(model, inputs, **kwargs)
    truth = expected[0, inputs["input_ids"].shape[1] :].tolist()
    torch.manual_seed(3)
    out, statistics = wrapped(model, scripted(truth, tree=True, wrong=2), inputs, **kwargs)
    assert torch.equal(out, expected)
    assert statistics.accepted > NEW // 2


def test_sampled_drafts_of_a_copy_are_all_kept(made: dict[str, Any]) -> None:
    model, inputs = made["qwen2_vl"]
    speculation = TextSpeculation(drafter=vlmeff.Assistant(copy.deepcopy(model), confidence=0.0), warmup=0)
    torch.manual_seed(0)
    _, statistics = wrapped(model, speculation, inputs, do_sample=True, temperature=0.8, top_p=0.9)
    assert statistics.drafted >= 10
    assert statistics.accepted == statistics.drafted  # p == q up to rounding


def test_an_assistant_sees_the_pictures_and_a_language_model_the_text(made: dict[str, Any]) -> None:
    model, inputs = made["qwen2_5_vl"]
    copied = TextSpeculation(drafter=vlmeff.Assistant(copy.deepcopy(model), confidence=0.0), warmup=0)
    _, statistics = wrapped(model, copied, inputs)
    assert statistics.accept_rate == 1
    assert statistics.target_passes == math.ceil((NEW - 1) / 5) + 1
    seen = []
    language_model = tiny_llama(layers=1)
    language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    wrapped(model, TextSpeculation(drafter=vlmeff.Assistant(language_model)), inputs)
    text = [t for t in inputs["input_ids"][0].tolist() if t not in range(5, 9) and t]
    assert seen[0][0].tolist() == text


def test_an_assistant_of_another_family_gets_inputs_of_its_own(made: dict[str, Any]) -> None:
    model, inputs = made["qwen2_5_vl"]
    assistant = tiny("llava")
    own = prompts(assistant, [1])
    expected = plain(model, inputs)
    with pytest.raises(ConfigError, match="assistant_inputs"):
        wrapped(model, TextSpeculation(drafter=vlmeff.Assistant(assistant), warmup=0), inputs)
    speculation = TextSpeculation(drafter=vlmeff.Assistant(assistant, confidence=0.0), warmup=0)
    out, statistics = wrapped(model, speculation, inputs, assistant_inputs=own)
    assert torch.equal(out, expected)
    assert statistics.drafted > 0


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_conversation_goes_on_from_its_cache(name: str, made: dict[str, Any]) -> None:
    model, inputs = made[name]
    first = plain(model, inputs, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[11, 12, 13, 14]])], 1)
    turn: dict[str, Any] = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    if "mm_token_type_ids" in inputs:
        turn["mm_token_type_ids"] = torch.zeros_like(more)
    cache = copy.deepcopy(first.past_key_values)
    expected = plain(model, turn, past_key_values=cache)
    truth = first.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    out, _ = wrapped(model, scripted(truth, tree=True, wrong=2), inputs, return_dict_in_generate=True)
    speculation = scripted(expected[0, more.shape[1] :].tolist(), wrong=2, tree=True)
    out, statistics = wrapped(model, speculation, turn, past_key_values=out.past_key_values)
    assert torch.equal(out, expected)
    assert statistics.accepted > 0


def test_short_answers_are_not_drafted_but_by_long_matches(made: dict[str, Any]) -> None:
    model, inputs = made["llava"]
    for speculation in ("lookup", "recycle"):
        _, statistics = wrapped(model, speculation, inputs, max_new_tokens=4)
        assert (statistics.drafted, statistics.target_passes) == (0, 4)


def test_left_padding_is_hidden_from_trees_too(made: dict[str, Any]) -> None:
    model = made["llava"][0]
    both = prompts(model, [2, 1])
    row = {k: v[:1] for k, v in both.items() if k != "pixel_values"} | {"pixel_values": both["pixel_values"][:2]}
    row["input_ids"] = torch.nn.functional.pad(row["input_ids"], (3, 0))
    row["attention_mask"] = torch.nn.functional.pad(row["attention_mask"], (3, 0))
    expected = plain(model, row)
    truth = expected[0, row["input_ids"].shape[1] :].tolist()
    out, statistics = wrapped(model, scripted(truth, tree=True, wrong=2), row)
    assert torch.equal(out, expected)
    assert statistics.shape == "tree"


class Words:
    """As much of a tokenizer as stop strings need: every id is a word of its own."""

    def get_vocab(self) -> dict[str, int]:
        return {f"<{i}>": i for i in range(120)}

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [-1]}

    def _convert_id_to_token(self, token: int) -> str:
        return "abcdef"  # what transformers asks for first

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@pytest.mark.parametrize("way", ["argument", "configuration"])
def test_stop_strings_stop(way: str, made: dict[str, Any]) -> None:
    model, inputs = made["llava"]
    width = inputs["input_ids"].shape[1]
    truth = plain(model, inputs)[0, width:].tolist()
    at = next(i for i in range(4, NEW) if truth[i] not in truth[:i])
    strings = [f"<{truth[at]}>"]
    kwargs: dict[str, Any] = {"stop_strings": strings}
    if way == "configuration":
        kwargs = {"generation_config": copy.deepcopy(model.generation_config)}
        kwargs["generation_config"].stop_strings = strings
    out, statistics = wrapped(model, scripted(truth), inputs, tokenizer=Words(), **kwargs)
    assert out[0, width:].tolist() == truth[: at + 1]
    assert statistics.accepted > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "2 rows"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_calls_that_cannot_be_speculated_on_raise_or_fall_back(
    kwargs: dict[str, Any], message: str, made: dict[str, Any]
) -> None:
    model, inputs = made["llava"]
    with pytest.raises(ConfigError, match=message):
        wrapped(model, "lookup", inputs, **kwargs)
    if "prompt_lookup_num_tokens" in kwargs:
        return
    torch.manual_seed(0)
    expected = plain(model, inputs, **kwargs)
    torch.manual_seed(0)
    out, statistics = wrapped(model, TextSpeculation(fallback=True), inputs, **kwargs)
    tensor = [x if isinstance(x, torch.Tensor) else x.sequences for x in (out, expected)]
    assert torch.equal(*tensor)
    assert message in statistics.fallback
    assert "none:" in str(statistics.rows_of_text())


def test_a_batch_raises_or_falls_back(made: dict[str, Any]) -> None:
    model, _ = made["llava"]
    inputs = prompts(model, [1, 2])
    with pytest.raises(ConfigError, match=r"2 rows.*fallback=True"):
        wrapped(model, "lookup", inputs)
    out, _ = wrapped(model, TextSpeculation(fallback=True), inputs)
    assert torch.equal(out, plain(model, inputs))


def test_a_call_that_names_its_own_loop_gets_it() -> None:
    llama = tiny_llama()
    ids = llama_inputs([9])
    out, statistics = wrapped(llama, "lookup", ids, assistant_model=tiny_llama(layers=1))
    assert torch.equal(out, plain(llama, ids))
    assert "assistant_model" in statistics.fallback


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("anything", "must be 'lookup'"),
        ("assistant", "pass the smaller model itself"),
        (3, "must be 'lookup'"),
        (Scripted, "must be 'lookup'"),
    ],
)
def test_what_is_no_speculation_is_refused(asked: object, message: str, made: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        vlmeff.wrap(made["llava"][0], None, text_speculation=asked)
    assert not vlmeff.is_wrapped(made["llava"][0])


def test_an_assistant_has_to_be_another_model_with_the_prompt_as_ids(made: dict[str, Any]) -> None:
    model, inputs = made["llava"]
    with pytest.raises(ConfigError, match="cannot assist itself"):
        vlmeff.wrap(model, None, text_speculation=model)
    with pytest.raises(ConfigError, match="confidence"):
        vlmeff.Assistant(model, confidence=2)
    with pytest.raises(ConfigError, match="warmup"):
        TextSpeculation(warmup=-1)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(UnsupportedInputError, match="input_ids"):
        wrapped(model, TextSpeculation(drafter=vlmeff.Assistant(copy.deepcopy(model))), {"inputs_embeds": embeds})


def test_a_cache_of_the_callers_is_used(made: dict[str, Any]) -> None:
    model, inputs = made["llava"]
    cache = DynamicCache(config=model.config)
    out, _ = wrapped(model, "recycle", inputs, past_key_values=cache)
    assert torch.equal(out, plain(model, inputs))
    assert cache.get_seq_length() == out.shape[1] - 1
