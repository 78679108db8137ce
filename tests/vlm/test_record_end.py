"""A prompt that ends with its picture and loses the last placeholder: what follows is numbered behind the whole prompt.

The oracle is the unwrapped language model on everything that was ever said, the dropped placeholders hidden by a mask
that is written out, at the positions that the unwrapped model's own calls give to the same conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import TOLERANCE, Oracle, encoded, pruned
from tiny_models import SPECIAL, prompts, tiny
from torch import Tensor

import vlmeff
from vlmeff.vlm.retention import decoder_of

ALONG = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
CASES = {
    "llava keep": ("llava", {"positions": "keep"}),
    "llava repack": ("llava", {"positions": "repack"}),
    "qwen2_vl": ("qwen2_vl", {}),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "qwen3_vl": ("qwen3_vl", {}),
}
FIRST, SECOND = 3, 4  # new tokens of the turns
WORDS = [20, 21]
every_case = pytest.mark.parametrize("case", CASES)


def ending_with_pictures(model: Any, pictures: list[int]) -> dict[str, Tensor]:
    """Left-padded rows whose last token is a placeholder: what stands behind it is cut off, row by row."""
    inputs = prompts(model, pictures)
    ends = [int((row == model.config.image_token_id).nonzero().max()) + 1 for row in inputs["input_ids"]]
    width = max(ends)
    out = dict(inputs)
    for name in ALONG:
        if name in inputs:
            rows = [
                torch.nn.functional.pad(x[:end], (width - end, 0)) for x, end in zip(inputs[name], ends, strict=True)
            ]
            out[name] = torch.stack(rows)
    return out


def conversation(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[list[Any], Tensor]:
    """Two turns of greedy ``generate`` on one cache: the outputs, and the second turn's ids."""
    settings = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, **options}
    first = model.generate(**inputs, max_new_tokens=FIRST, **settings)
    ids = torch.cat([first.sequences, torch.tensor([WORDS] * len(first.sequences))], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, FIRST + len(WORDS)), value=1)
    second = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=SECOND, **settings
    )
    return [first, second], ids


def numbered(model: Any, call: Callable[[], Any]) -> Tensor:
    """[D, B, n] positions of all tokens that went through the decoder, without the text row of M-RoPE."""
    seen: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        positions = kwargs["position_ids"]
        if positions is None:  # the language model counts by its cache
            start = kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") is not None else 0
            positions = torch.arange(start, start + kwargs["inputs_embeds"].shape[1])[None]
        positions = positions[None] if positions.ndim == 2 else positions[-3:]
        seen.append(positions.expand(3 if len(positions) == 3 else -1, -1, -1).clone())

    handle = decoder_of(model).register_forward_pre_hook(note, with_kwargs=True)
    call()
    handle.remove()
    dims, rows = max(len(p) for p in seen), max(p.shape[1] for p in seen)
    return torch.cat([p.expand(dims, rows, -1) for p in seen], -1)


def dropping_the_end(case: str, pictures: list[int]) -> tuple[Any, dict[str, Tensor], Any]:
    """A wrapped model that drops the last placeholder of every row, the request, and the plan."""
    name, options = CASES[case]
    for seed in range(20):
        model = tiny(name)
        inputs = ending_with_pictures(model, pictures)
        vlmeff.wrap(model, None, tokens=vlmeff.Random(keep=3, seed=seed), **options)
        with torch.no_grad():
            keep = model(**inputs).vlmeff_keep
        if not bool(keep[:, -1].any()):
            return model, inputs, vlmeff.report(model).plan
    raise AssertionError


@pytest.mark.parametrize("pictures", [[1], [1, 2]], ids=str)
@every_case
@torch.no_grad()
def test_both_turns_are_numbered_as_by_the_unwrapped_model(case: str, pictures: list[int]) -> None:
    model, inputs, _ = dropping_the_end(case, pictures)
    got = numbered(model, lambda: conversation(model, inputs))
    plain = tiny(CASES[case][0])
    expected = numbered(plain, lambda: conversation(plain, inputs))
    width = inputs["input_ids"].shape[1]
    short = got.shape[-1] - (expected.shape[-1] - width)
    assert short < width
    if case == "llava repack":  # numbered anew, without a gap
        real = (expected[..., width:] - expected[..., width - 1 : width]) + got[..., short - 1 : short]
        assert torch.equal(got[..., short:], real)
    else:
        assert torch.equal(got[..., short:], expected[..., width:])


@pytest.mark.parametrize("pictures", [[1], [1, 2]], ids=str)
@every_case
@torch.no_grad()
def test_both_turns_answer_as_the_masked_full_length_model(case: str, pictures: list[int]) -> None:
    model, inputs, plan = dropping_the_end(case, pictures)
    turns, ids = conversation(model, inputs)
    plain = tiny(CASES[case][0])
    width = inputs["input_ids"].shape[1]
    seen, features = pruned(inputs, encoded(plain, inputs), plan)
    oracle = Oracle(plain, inputs, features, seen)
    if case == "llava keep":
        oracle.positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if case != "llava repack":
        places = numbered(plain, lambda: conversation(plain, inputs))[..., width:]
        places = places[0] if oracle.positions.ndim == 2 else places
    said = torch.cat([turns[0].sequences[:, width:], ids[:, -len(WORDS) :], turns[1].sequences[:, ids.shape[1] :]], 1)
    for token in said[:, :-1].T:
        oracle.append(token[:, None])
    if case != "llava repack":  # the cache is one token behind what was said: the turns meet without a gap
        oracle.positions[..., width:] = places
    full = oracle.logits()
    logits = [*turns[0].logits, *turns[1].logits]
    columns = [*range(width - 1, width + FIRST - 1)]
    columns += range(ids.shape[1] - 1, ids.shape[1] + SECOND - 1)
    for column, answer, token in zip(
        columns,
        logits,
        torch.cat([turns[0].sequences[:, width:], turns[1].sequences[:, ids.shape[1] :]], 1).T,
        strict=True,
    ):
        if column == width - 1:  # the last placeholder itself is gone: the last survivor answers
            last = (seen * torch.arange(width)).amax(1)
            expected = full[torch.arange(len(full)), last]
        else:
            expected = full[:, column]
        torch.testing.assert_close(answer, expected, **TOLERANCE)
        assert torch.equal(expected.index_fill(1, torch.tensor(SPECIAL), -torch.inf).argmax(1), token)


@every_case
@torch.no_grad()
def test_a_hand_written_loop_counts_on_from_the_whole_prompt(case: str) -> None:
    model, inputs, _ = dropping_the_end(case, [1])

    def loop(of: Any) -> None:
        out = of(**inputs, use_cache=True)
        for new in ([20, 21], [30]):
            out = of(input_ids=torch.tensor([new]), past_key_values=out.past_key_values)

    plain = tiny(CASES[case][0])
    got, expected = (numbered(of, lambda of=of: loop(of))[..., -3:] for of in (model, plain))
    dropped = int((~model(**inputs).vlmeff_keep).sum()) if case == "llava repack" else 0
    assert torch.equal(got, expected - dropped)


MODES = ["beams", "assisted", "chunks", "sampling", "static"]


@pytest.mark.parametrize(
    ("case", "mode"), [*((c, m) for c in ("llava keep", "qwen2_5_vl") for m in MODES), ("qwen2_5_vl", "no cache")]
)
@torch.no_grad()
def test_modes_of_generate_agree_with_plain_steps(case: str, mode: str) -> None:
    model, inputs, _ = dropping_the_end(case, [1])
    width, new = inputs["input_ids"].shape[1], 8
    greedy = model.generate(**inputs, max_new_tokens=new)
    if mode == "assisted":
        out = model.generate(**inputs, max_new_tokens=new, prompt_lookup_num_tokens=3)
    elif mode == "chunks":
        out = model.generate(**inputs, max_new_tokens=new, prefill_chunk_size=4)
    elif mode == "static":
        out = model.generate(**inputs, max_new_tokens=new, cache_implementation="static")
    elif mode == "no cache":
        out = model.generate(**inputs, max_new_tokens=new, use_cache=False)
    elif mode == "sampling":  # among one token: the greedy one, twice
        out = model.generate(**inputs, max_new_tokens=new, do_sample=True, top_k=1, num_return_sequences=2)
        greedy = greedy.expand(2, -1)
    else:
        out = model.generate(
            **inputs, max_new_tokens=new, num_beams=3, return_dict_in_generate=True, output_scores=True
        )
        # The score of the best beam, from teacher forcing it in one pass of the wrapped model on its own cache.
        said = out.sequences[:, width:]
        prompt = model(**inputs)
        step = model(
            input_ids=said[:, :-1],
            past_key_values=prompt.past_key_values,
            position_ids=numbered_behind(model, inputs, new - 1),
        )
        score = (
            torch.cat([prompt.logits[:, -1:], step.logits], 1).log_softmax(-1).gather(2, said[..., None]).sum() / new
        )
        torch.testing.assert_close(out.sequences_scores[0], score, rtol=0, atol=1e-4)
        return
    assert torch.equal(out, greedy)


def numbered_behind(model: Any, inputs: dict[str, Tensor], count: int) -> Tensor:
    """Positions of tokens behind the prompt, from the unwrapped model's calls."""
    plain = tiny(model.config.model_type)
    places = numbered(plain, lambda: plain.generate(**inputs, max_new_tokens=count + 1))
    places = places[..., inputs["input_ids"].shape[1] :]
    return places if len(places) == 3 else places[0]


@pytest.mark.parametrize("case", ["llava keep", "qwen2_5_vl"])
@torch.no_grad()
def test_retention_on_top_keeps_the_numbers(case: str) -> None:
    model, inputs, _ = dropping_the_end(case, [1])
    options = CASES[case][1]
    expected = numbered(model, lambda: conversation(model, inputs))
    vlmeff.wrap(
        model,
        None,
        tokens=model._vlmeff.plan.reduction.method,
        kv=vlmeff.PrefixKV(keep_ratio=0.5, sink=1, recent=1),
        **options,
    )
    assert torch.equal(numbered(model, lambda: conversation(model, inputs)), expected)
    assert vlmeff.report(model).retention.keep_ratio < 0.8
