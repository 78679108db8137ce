"""Right padding in ``generate`` under KV retention: the left-padded call's answer behind the caller's own prompt."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracle import grid_positions
from tiny_llama import llama_inputs, tiny_llama
from tiny_models import IMAGE, PAD, prompts, tiny
from torch import Tensor
from transformers import LogitsProcessor

import vlmeff
from vlmeff.errors import IncompatibleError, UnsupportedMaskError

POLICY = vlmeff.PrefixKV(keep_ratio=0.4, sink=1, recent=2)
NAMES = ["llama", "llava", "qwen2_vl", "qwen3_vl", "internvl", "gemma3"]
every_model = pytest.mark.parametrize("name", NAMES)
STEPS = 5


def model_and_inputs(name: str) -> tuple[Any, dict[str, Tensor]]:
    if name == "llama":
        return tiny_llama(), llama_inputs([19, 11, 14])
    model = tiny(name)
    return model, prompts(model, [1, 2, 0])


def on_the_right(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch as a processor with padding_side="right" makes it, row by row."""
    out = dict(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "position_ids"):
        if key in inputs:
            rows = inputs["attention_mask"].sum(1).tolist()
            x, width = inputs[key], inputs[key].shape[-1]
            out[key] = torch.stack(
                [torch.cat([x[..., b, width - n :], x[..., b, : width - n]], -1) for b, n in enumerate(rows)], -2
            )
    assert not bool(out["attention_mask"][:, -1].all())
    return out


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    settings = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**settings, **options})


@every_model
@torch.no_grad()
def test_the_answer_is_that_of_the_left_padded_call_behind_the_callers_prompt(name: str) -> None:
    model, left = model_and_inputs(name)
    right = on_the_right(left)
    vlmeff.wrap(model, None, kv=POLICY)
    expected, kept = generated(model, left), vlmeff.report(model).retention
    with pytest.warns(UserWarning, match="right padding") as caught:
        out = generated(model, right)
    assert len([w for w in caught if "right padding" in str(w.message)]) == 1
    width = left["input_ids"].shape[1]
    assert torch.equal(out.sequences, torch.cat([right["input_ids"], expected.sequences[:, width:]], 1))
    for a, b in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    report = vlmeff.report(model)
    assert [(x.prompt_tokens, x.kept) for x in report.retention.layers] == [
        (x.prompt_tokens, x.kept) for x in kept.layers
    ]
    assert report.prompt_tokens_before == int(right["attention_mask"].sum())


@every_model
@torch.no_grad()
def test_each_row_is_answered_as_if_it_were_alone(name: str) -> None:
    """No left-padded batch involved: keep-all retention against the unwrapped model on rows without any padding."""
    model, left = model_and_inputs(name)
    rows = []
    for b, real in enumerate(left["attention_mask"].bool()):
        row = {k: x[b : b + 1, real] for k, x in left.items() if x.ndim == 2 and x.shape == real.expand(3, -1).shape}
        rows.append({**row, **pictures_of(left, b)})
    alone = [generated(model, row) for row in rows]
    vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=1.0))
    with pytest.warns(UserWarning, match="right padding"):
        out = generated(model, on_the_right(left))
    for b, single in enumerate(alone):
        assert torch.equal(out.sequences[b, -STEPS:], single.sequences[0, -STEPS:])
        for a, c in zip(out.logits, single.logits, strict=True):
            torch.testing.assert_close(a[b], c[0], rtol=0, atol=1e-4)


def pictures_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The pictures of one row of [1, 2, 0] pictures."""
    if "pixel_values" not in inputs or row == 2:
        return {}
    first, last = (0, 1) if row == 0 else (1, 3)
    grids = inputs.get("image_grid_thw")
    if grids is None:
        per = len(inputs["pixel_values"]) // 3
        return {"pixel_values": inputs["pixel_values"][first * per : last * per]}
    ends = torch.cat([torch.zeros(1, dtype=torch.long), grids.prod(1).cumsum(0)]).tolist()
    return {"pixel_values": inputs["pixel_values"][ends[first] : ends[last]], "image_grid_thw": grids[first:last]}


MODES = {
    "beams": {"num_beams": 3},
    "several returned": {"num_beams": 3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 7},
    "total length": {"max_length": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl"])
@torch.no_grad()
def test_modes_of_generate(name: str, mode: str) -> None:
    model, left = model_and_inputs(name)
    right, options = on_the_right(left), dict(MODES[mode])
    width = left["input_ids"].shape[1]
    if "max_length" in options:
        options = {"max_length": width + 3, "max_new_tokens": None}
    vlmeff.wrap(model, None, kv=POLICY)
    expected = generated(model, left, **options).sequences
    with pytest.warns(UserWarning, match="right padding"):
        out = generated(model, right, **options).sequences
    repeats = options.get("num_return_sequences", 1)
    assert torch.equal(out[:, :width], right["input_ids"].repeat_interleave(repeats, 0))
    assert torch.equal(out[:, width:], expected[:, width:])


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llama", None), *((n, t) for n in ("llava", "qwen2_vl") for t in (None, vlmeff.HiPrune(keep=0.5)))],
    ids=["llama", "llava", "llava reduced", "qwen2_vl", "qwen2_vl reduced"],
)
@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
@torch.no_grad()
def test_two_more_turns_by_generate_and_one_by_forward(name: str, tokens: Any, keep_ratio: float) -> None:
    model, left = model_and_inputs(name)
    vlmeff.wrap(model, None, tokens=tokens, kv=vlmeff.PrefixKV(keep_ratio=keep_ratio, sink=1, recent=2))
    results = []
    for inputs in (left, on_the_right(left)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = generated(model, inputs)
        mask, news = inputs["attention_mask"], [out.sequences[:, -STEPS:]]
        for words in ([20, 21, 22], [30]):
            ids = torch.cat([out.sequences, torch.tensor([words] * 3)], 1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*right padding")
                out = generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=out.past_key_values)
            assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
            news.append(out.sequences[:, ids.shape[1] :])
        cache = out.past_key_values
        cache.crop(-1)
        places = mask.sum(1, keepdim=True) + STEPS
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] + STEPS - 1 - mask.shape[1]), value=1)
        step = {"input_ids": torch.tensor([[40]] * 3), "attention_mask": mask, "past_key_values": cache}
        # Told: a bare forward of the unwrapped Qwen2-VL cannot count behind a cache and a mask either.
        step["position_ids"] = places if name != "qwen2_vl" else (places + model.model.rope_deltas).expand(3, -1, -1)
        results.append((news, model(**step).logits))
    (news, logits), (moved, moved_logits) = results
    assert all(torch.equal(a, b) for a, b in zip(news, moved, strict=True))
    torch.testing.assert_close(moved_logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2_vl"])
@torch.no_grad()
def test_positions_and_padding_that_only_the_ids_show(name: str) -> None:
    model, left = model_and_inputs(name)
    vlmeff.wrap(model, None, kv=POLICY)
    width = left["input_ids"].shape[1]
    expected = generated(model, left).sequences[:, width:]
    right = on_the_right(left)
    with pytest.warns(UserWarning, match="right padding"):
        bare = generated(model, {k: x for k, x in right.items() if k != "attention_mask"})
    assert torch.equal(bare.sequences, torch.cat([right["input_ids"], expected], 1))
    if name == "llama":
        right["position_ids"] = torch.arange(width)[None]  # one row for all, as a right-padded batch allows
    else:
        left["position_ids"], right["position_ids"] = (grid_positions(model, x) for x in (left, right))
        expected = generated(model, left).sequences[:, width:]
    with pytest.warns(UserWarning, match="right padding"):
        given = generated(model, right)
    assert torch.equal(given.sequences[:, width:], expected)


@torch.no_grad()
def test_embeddings_in_the_place_of_ids() -> None:
    model, left = model_and_inputs("llama")
    vlmeff.wrap(model, None, kv=POLICY)
    right = on_the_right(left)
    expected = generated(model, left).sequences[:, left["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(right["input_ids"])
    with pytest.warns(UserWarning, match="right padding"):
        out = generated(model, {"inputs_embeds": embeds, "attention_mask": right["attention_mask"]})
    assert torch.equal(out.sequences, expected)


class Watcher(LogitsProcessor):
    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.shown.append(input_ids.clone())
        return scores


@torch.no_grad()
def test_what_the_caller_hangs_into_generate_sees_the_callers_prompt() -> None:
    model, left = model_and_inputs("llava")
    vlmeff.wrap(model, None, kv=POLICY)
    watcher = Watcher()
    with pytest.warns(UserWarning, match="right padding"):
        out = generated(model, on_the_right(left), logits_processor=[watcher])
    assert len(watcher.shown) == STEPS
    assert all(torch.equal(ids, out.sequences[:, : ids.shape[1]]) for ids in watcher.shown)


@torch.no_grad()
def test_a_left_padded_call_and_one_without_retention_are_left_alone() -> None:
    model, left = model_and_inputs("llava")
    right = on_the_right(left)
    plain = generated(model, right)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*right padding")
        generated(vlmeff.wrap(model, None, kv=POLICY), left)
        vlmeff.wrap(model, None, tokens=vlmeff.HiPrune(keep=1.0))
        assert torch.equal(generated(model, right).sequences, plain.sequences)


@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
@torch.no_grad()
def test_a_bare_forward_with_right_padding_is_refused(keep_ratio: float) -> None:
    model, left = model_and_inputs("llama")
    vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=keep_ratio))
    with pytest.raises(UnsupportedMaskError, match="padding_side"):
        model(**on_the_right(left))


@torch.no_grad()
def test_a_later_turn_that_ends_with_padding_or_has_other_rows_is_refused() -> None:
    model, left = model_and_inputs("llama")
    vlmeff.wrap(model, None, kv=POLICY)
    with pytest.warns(UserWarning, match="right padding"):
        out = generated(model, on_the_right(left))
    ids = torch.cat([out.sequences, torch.tensor([[20, PAD]] * 3)], 1)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    with pytest.raises(UnsupportedMaskError, match="ends with padding"):
        generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=out.past_key_values)
    with pytest.raises(IncompatibleError, match="3 rows"):
        generated(model, {"input_ids": ids[:2], "attention_mask": mask[:2]}, past_key_values=out.past_key_values)


def test_the_right_padded_batch_has_each_rows_own_tokens() -> None:
    """In order, and its pictures whole: or the tests above would compare other requests."""
    _, left = model_and_inputs("llava")
    right = on_the_right(left)
    for b in range(3):
        a, c = (x["input_ids"][b][x["attention_mask"][b].bool()] for x in (left, right))
        assert torch.equal(a, c)
    assert int((right["input_ids"] == IMAGE).sum()) == int((left["input_ids"] == IMAGE).sum())
