"""Small random MAR generators. A fresh head predicts nothing (its last layer is zero), so that layer is drawn too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.trunk import MAR


def random_mar(seed: int, **changes: Any) -> MAR:
    """A generator of 4 x 4 tokens of 4 numbers, 8 denoising steps, 10 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MAR(MARConfig.named("mar_nano_digits", **{"num_sampling_steps": 8, **changes})).eval()
        for name, parameter in model.named_parameters():
            if "final_layer.linear" in name or "adaLN_modulation" in name:
                torch.nn.init.normal_(parameter, std=0.05)
            elif "pos_embed" in name or name in ("class_emb.weight", "mask_token", "fake_latent"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


class Calls:
    """Trunk calls and rows of a model, counted by a hook on a layer that every call of the trunk goes through once."""

    def __init__(self) -> None:
        self.passes = self.rows = self.head_calls = self.head_rows = 0


@contextmanager
def counted(model: MAR) -> Iterator[Calls]:
    calls = Calls()

    def trunk(module: Any, args: Any, output: torch.Tensor) -> None:
        calls.passes += 1
        calls.rows += output.shape[0]

    def head(module: Any, args: Any, output: torch.Tensor) -> None:
        calls.head_calls += 1
        calls.head_rows += output.shape[0]

    handles = [
        model.decoder_norm.register_forward_hook(trunk),
        model.diffloss.net.final_layer.register_forward_hook(head),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
