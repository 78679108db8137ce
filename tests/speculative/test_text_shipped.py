"""The shipped models write the same text in fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmeff
from vlmeff.asking import prepare

PICTURE = Path(__file__).resolve().parents[2] / "demos" / "pictures" / "four-shapes.png"


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def asked(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, processor = vlmeff.load(request.param, dtype=torch.float32)
    return model, prepare(processor, Image.open(PICTURE).convert("RGB"), "describe the picture.")


def test_a_description_is_the_same_with_every_drafter(asked: tuple[Any, Any]) -> None:
    model, inputs = asked
    width = inputs["input_ids"].shape[1]
    kwargs = {"min_new_tokens": 24, "max_new_tokens": 24, "do_sample": False}  # tiny-qwen would say a word or two
    expected = model.generate(**inputs, **kwargs)
    for speculation in ("lookup", "recycle"):
        vlmeff.wrap(model, None, text_speculation=speculation)
        passes = []
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **kwargs), expected)
            passes.append(vlmeff.report(model).speculation.target_passes)
        vlmeff.unwrap(model)
        assert passes[0] <= expected.shape[1] - width
        if speculation == "recycle":  # what it has seen, it knows
            assert passes[1] < expected.shape[1] - width
