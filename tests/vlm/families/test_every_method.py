"""Every registered method that works before the language model, on every family, on pictures and videos."""

from __future__ import annotations

import pytest
import torch
from mixed_prompts import video_request
from oracle import check_answers, check_selection
from resampled import resampled_oracle
from tiny_models import ALL_MODELS, VIDEO_MODELS, prompts, tiny

import vlmeff
from tokenpruning import InnerPruner, Selector, methods
from vlmeff.vlm.families import FAMILIES


def a_step(method):
    """The method with its defaults, at a budget that leaves some tokens of the smallest picture."""
    cls = methods.get(method)
    return cls(keep=0.4) if "keep" in cls.__dataclass_fields__ else cls()


# Methods that drop tokens between the layers of the language model have tests of their own (test_inner).
METHODS = [method for method in methods.names() if not isinstance(a_step(method), InnerPruner)]
CELLS = [
    (name, method, modality)
    for name in ALL_MODELS
    if name in FAMILIES
    for method in METHODS
    for modality in ("image", "video")
    if modality == "image" or name in VIDEO_MODELS
]


@pytest.mark.parametrize(("name", "method", "modality"), CELLS, ids=[" ".join(cell) for cell in CELLS])
@torch.no_grad()
def test_every_method_on_every_family(name, method, modality, covered):
    covered(name, method, modality)
    step = a_step(method)
    model, wrapped = tiny(name), vlmeff.wrap(tiny(name), None, tokens=step)
    inputs = prompts(model, [0, 1, 2]) if modality == "image" else video_request(model, "batch")
    if isinstance(step, Selector):
        plan = check_selection(model, wrapped, inputs)
        for item in plan.items:
            for size, pick in zip(item.layout.sizes, item.selections, strict=True):
                assert len(pick.index) == max(1, round(0.4 * size))
    else:
        assert method == "fourier", "a new resampler needs an oracle of its own here"
        oracle, _ = resampled_oracle(model, inputs, gain=step.gain)
        check_answers(wrapped, inputs, oracle)
