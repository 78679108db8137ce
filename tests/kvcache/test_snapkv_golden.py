"""SnapKV against kvpress 0.5.5 on a tiny random Llama (``golden/make_kvpress_snapkv.py``)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcache import LayerStats, SnapKV

GOLDEN = Path(__file__).parent / "golden"
COMPRESSION = (0.3, 0.5, 0.8)
ATTENTION_TOLERANCE = 1e-4  # float32 softmax of two versions of torch and transformers


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "kvpress_snapkv.npz") as file:
        return {name: file[name] for name in file.files}


def kept(probs, compression, **arguments):
    """[layers, Hkv, k] of our SnapKV, from attention rows [layers, Hq, w, n]."""
    policy = SnapKV(keep_ratio=1 - compression, **arguments)
    out = []
    for layer, rows in enumerate(torch.from_numpy(probs)):
        stats = LayerStats(layer=layer, layers=len(probs), n=rows.shape[-1], kv_heads=2, scores=rows.sum(1))
        out.append(policy.select(stats, policy.budgets([stats])[0]))
    return torch.stack(out).numpy()


@pytest.mark.parametrize("compression", COMPRESSION)
def test_the_kept_slots_are_those_of_kvpress(golden, compression):
    about = json.loads(str(golden["about"]))
    assert about["versions"]["kvpress"] == "0.5.5"
    arguments = {"window": about["window"], "kernel": about["kernel"]}
    expected = golden[f"kept_{compression}"]
    assert np.array_equal(kept(golden["probs"], compression, **arguments), expected)
    # The file tells formulas apart: without the pooling other slots stay, and the heads differ.
    assert not np.array_equal(kept(golden["probs"], compression, **arguments | {"kernel": 1}), expected)
    assert not np.array_equal(expected[:, 0], expected[:, 1])


def test_the_model_built_from_the_seed_has_the_attention_of_the_file(golden):
    spec = importlib.util.spec_from_file_location("make_kvpress_snapkv", GOLDEN / "make_kvpress_snapkv.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with torch.no_grad():
        attentions = script.build_model()(
            torch.from_numpy(script.prompt_from_seed()), output_attentions=True
        ).attentions
    probs = np.stack([attention[0, :, -script.WINDOW :].numpy() for attention in attentions])
    assert np.abs(probs - golden["probs"]).max() < ATTENTION_TOLERANCE
    for compression in COMPRESSION:
        ours = kept(probs, compression, window=script.WINDOW, kernel=script.KERNEL)
        assert np.array_equal(ours, golden[f"kept_{compression}"])
