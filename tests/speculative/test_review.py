"""Faults that a review found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

import vlmeff
from tests.speculative.mar_nets import random_mar
from vlmeff.asking import prepare
from vlmeff.cli_generate_image import make_config
from vlmeff.errors import ConfigError, UnknownPresetError
from vlmeff.models.mar.loading import load_draft
from vlmeff.models.mar.sampling import NoiseBank, batch_size
from vlmeff.speculative.continuous import Continuous
from vlmeff.speculative.wrapped import attach

LABELS = torch.tensor([2, 5])
PICTURE = Path(__file__).resolve().parents[2] / "demos" / "pictures" / "four-shapes.png"


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "exact", "max_tries": 2.5},
        {"mode": "exact", "max_tries": True},
        {"mode": "cspd", "max_tries": "3"},
        {"delta": float("inf")},
        {"delta": "0.1"},
        {"delta": True},
        {"prefill": "half"},
        {"prefill": False},
        {"mode": "cspd", "softening": float("inf")},
        {"mode": "cspd", "softening": "42"},
    ],
)
def test_values_of_the_wrong_kind_name_their_field(fields: dict[str, Any]) -> None:
    name = list(fields)[-1]
    with pytest.raises(ConfigError) as caught:
        Continuous(**fields)
    assert f"{name}={fields[name]!r}" in str(caught.value)


def test_unaligned_samples_do_not_depend_on_their_batch() -> None:
    model, draft = vlmeff.load("tiny-mar")[0], load_draft()
    config = Continuous(mode="cspd", align=False)
    labels = torch.tensor([7, 3, 1, 0])
    together = model.sample(labels, mode=config, draft=draft, seed=5).latents
    for b in range(4):
        alone = model.sample(labels[b : b + 1], mode=config, draft=draft, seed=5 + b).latents
        assert torch.allclose(together[b], alone[0], atol=1e-4)


class Stopping:
    """A streamer that is interrupted after so many tokens."""

    def __init__(self, after: int) -> None:
        self.after, self.tokens = after, 0

    def put(self, value: torch.Tensor) -> None:
        if value.numel() > 1:  # the prompt
            return
        self.tokens += 1
        if self.tokens == self.after:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


def test_an_interruption_leaves_no_rejected_columns() -> None:
    model, processor = vlmeff.load("tiny-llava", dtype=torch.float32)
    inputs = prepare(processor, Image.open(PICTURE).convert("RGB"), "describe the picture.")
    kwargs: dict[str, Any] = {"min_new_tokens": 24, "max_new_tokens": 24, "do_sample": False}
    vlmeff.wrap(model, None, text_speculation="recycle")
    model.generate(**inputs, **kwargs)  # so that it knows something
    prompt = inputs["input_ids"].shape[1]
    for after in range(1, 16):
        cache = DynamicCache()
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **kwargs, past_key_values=cache, streamer=Stopping(after))
        assert cache.get_seq_length() == prompt + after - 1
    vlmeff.unwrap(model)


def test_a_draft_in_the_call_is_used() -> None:
    model, first, second = random_mar(0), random_mar(1), random_mar(0)
    attach(model, Continuous(mode="cspd", gamma=3), first)
    assert model.sample(LABELS).stats.acceptance_rate < 0.5
    assert model.sample(LABELS, draft=second).stats.acceptance_rate > 0.9  # the target's twin
    other = random_mar(0)
    attach(other, Continuous())
    with pytest.raises(ConfigError, match="does not use a draft"):
        other.sample(LABELS, draft=second)


def test_a_draft_beside_plain_decoding_is_no_error() -> None:
    plain = random_mar(0).sample(LABELS).latents
    for fields in ({"gamma": 0}, {"prefill": 1}):
        model = random_mar(0)
        attach(model, Continuous(mode="exact", **fields), random_mar(1))
        assert torch.equal(model.sample(LABELS).latents, plain)
    attach(random_mar(0), Continuous(proposal="draft", prefill=1))


@pytest.mark.parametrize("draft", ["tiny-mar", torch.nn.Linear(2, 2), object()])
def test_a_draft_that_is_no_generator_is_named(draft: Any) -> None:
    with pytest.raises(ConfigError, match=r"draft.*no MAR generator"):
        attach(random_mar(0), Continuous(mode="exact"), draft)


def test_a_preset_beside_a_mode_is_read() -> None:
    model = vlmeff.load("tiny-mar")[0]
    with pytest.raises(UnknownPresetError):
        vlmeff.wrap(model, "fsat", mode="coupled")
    vlmeff.wrap(model, "fast")
    fast = model._vlmeff.config
    vlmeff.wrap(model, "fast", mode="coupled", window=3)
    assert model._vlmeff.config == fast.but(window=3)
    vlmeff.unwrap(model)


def test_continuous_is_taken_as_it_is() -> None:
    model = vlmeff.load("tiny-mar")[0]
    for beside in ({"draft": load_draft()}, {"mode": "coupled"}, {"softening": 3.0}):
        with pytest.raises(ConfigError, match=r"draft|continuous"):
            vlmeff.wrap(model, None, continuous=Continuous(), **beside)
        assert not vlmeff.is_wrapped(model)


def test_seeds_and_labels_have_bounds() -> None:
    with pytest.raises(ConfigError, match=r"below 2\*\*63"):
        NoiseBank(2**63 - 2, 2, 4, 2, 2)
    with pytest.raises(ConfigError, match="0 labels"):
        batch_size(torch.zeros(0, dtype=torch.long), None)
    bank, alone = NoiseBank([9, 4], 2, 4, 2, 2), NoiseBank(4, 1, 4, 2, 2)
    assert torch.equal(bank.eps[1], alone.eps[0])


def test_text_speculation_false_is_off() -> None:
    model, _ = vlmeff.load("tiny-llava")
    vlmeff.wrap(model, text_speculation=False)
    assert model._vlmeff.plan.text_speculation is None
    vlmeff.unwrap(model)


def test_a_draft_of_a_plain_run_is_refused() -> None:
    for mode, window in (("plain", None), ("exact", 0), ("cspd", 0)):
        with pytest.raises(ConfigError, match="--draft"):
            make_config(mode, window=window, delta=None, draft="x")
