"""Write kvpress_snapkv.npz: what kvpress' SnapKVPress keeps of a tiny random Llama's cache.

kvpress pins an older transformers than vlmeff, so this runs in an environment of its own and CI reads the file:

    python -m venv kvp && kvp/bin/pip install kvpress==0.5.5 transformers==5.2.0 torch
    kvp/bin/python tests/kvcache/golden/make_kvpress_snapkv.py

The weights and the prompt come from numpy's seed (``state_from_seed``), so any version of transformers builds the same
model. The kept slots are found by comparing the keys of the compressed cache with those of a full one; nothing of
kvpress but its press is used.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np

SEED, PROMPT, WINDOW, KERNEL = 0, 96, 16, 5
COMPRESSION = (0.3, 0.5, 0.8)
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
FILE = Path(__file__).with_name("kvpress_snapkv.npz")


def state_from_seed(shapes: dict[str, tuple[int, ...]], seed: int = SEED) -> dict[str, np.ndarray]:
    """float32 weights by name: norms are 1, the rest normal, large enough for peaked attention."""
    rng = np.random.default_rng(seed)
    return {
        name: (np.ones(shapes[name]) if "norm" in name else 0.25 * rng.standard_normal(shapes[name])).astype(np.float32)
        for name in sorted(shapes)
    }


def prompt_from_seed(seed: int = SEED) -> np.ndarray:
    """[1, PROMPT] int64."""
    return np.random.default_rng(seed + 1).integers(3, CONFIG["vocab_size"], (1, PROMPT))


def build_model():
    """The tiny Llama in eval mode, float32, eager attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).eval()
    state = state_from_seed({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model


def main() -> None:
    import kvpress
    import torch
    import transformers

    model, ids = build_model(), torch.from_numpy(prompt_from_seed())
    content: dict[str, np.ndarray] = {}
    with torch.no_grad():
        whole = model(ids, use_cache=True, output_attentions=True)
        rows = [attention[0, :, -WINDOW:].numpy() for attention in whole.attentions]
        content["probs"] = np.stack(rows).astype(np.float32)  # [layers, Hq, window, PROMPT]
        for compression in COMPRESSION:
            press = kvpress.SnapKVPress(compression_ratio=compression, window_size=WINDOW, kernel_size=KERNEL)
            with press(model):
                short = model(ids, use_cache=True, past_key_values=transformers.DynamicCache())
            slots = []
            for full, kept in zip(whole.past_key_values.layers, short.past_key_values.layers, strict=True):
                # [Hkv, k, n]: the kept key equals exactly one of the full cache's.
                same = (kept.keys[0, :, :, None] == full.keys[0, :, None]).all(-1)
                assert (same.sum(-1) == 1).all()
                slots.append(same.int().argmax(-1).sort(-1).values.numpy())
            content[f"kept_{compression}"] = np.stack(slots).astype(np.int64)  # [layers, Hkv, k]
    versions = {
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
    }
    content["about"] = np.array(json.dumps({"versions": versions, "window": WINDOW, "kernel": KERNEL, "seed": SEED}))
    np.savez_compressed(FILE, **content)
    print({name: value.shape for name, value in content.items()}, os.path.getsize(FILE), "bytes")


if __name__ == "__main__":
    main()
