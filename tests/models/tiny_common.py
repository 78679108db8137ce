"""What the tiny models share: token ids, the decoder's sizes, left padding and the rows of a prompt."""

from __future__ import annotations

from typing import Any

import torch

IMAGE, VIDEO, VISION_START, VISION_END, PAD, VOCABULARY = 5, 6, 7, 8, 0, 120
TAG, NEWLINE, BOS, EOS = 9, 3, 1, 2
SPECIAL = [IMAGE, VIDEO, VISION_START, VISION_END]
SIDE, PATCH = 24, 4  # a picture or tile of 24 px in 4 px patches: a grid of 6 x 6


def decoder(**options: Any) -> dict[str, Any]:
    """The text configuration; ``options`` add or replace fields."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **options,
    }


def vit(**options: Any) -> dict[str, Any]:
    """The configuration of a vision transformer; ``options`` add or replace fields."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        **options,
    }


def ready(model: Any, dtype: torch.dtype, attention: str) -> Any:
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop early: every run has the same length
    # A random model may well choose a placeholder, and generate(use_cache=False) then looks for a picture to put there.
    model.generation_config.suppress_tokens = SPECIAL
    model = model.eval().to(dtype)
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def sharpen(module: torch.nn.Module, std: float = 0.3) -> None:
    """Draw the linear layers of a vision tower anew: timm and SigLIP ignore ``initializer_range``; timm's own choice
    leaves the attention of so narrow a tower uniform, SigLIP's rather flat. Equal scores test nothing."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.normal_(0, std)


def text(g: torch.Generator, count: int) -> list[int]:
    return torch.randint(10, VOCABULARY, (count,), generator=g).tolist()


def interleaved(blocks: list[list[list[int]]], g: torch.Generator, *, words: int = 5) -> dict[str, torch.Tensor]:
    """A left-padded batch; ``blocks[i]`` the token runs of row i, with text before, between and after them."""
    rows = []
    for number, row_blocks in enumerate(blocks):
        row = text(g, 2 + number)
        for block in row_blocks:
            row += block + text(g, words - number % 2)
        rows.append(row + text(g, 3))
    return left_padded(rows)


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def dealt(pictures: list[int], kinds: list[Any]) -> list[list[Any]]:
    """Deal ``kinds`` in turn to the pictures of the rows, so that neighbours differ: [1, 2] -> [[a], [b, c]]."""
    flat = [kinds[i % len(kinds)] for i in range(sum(pictures))]
    return [[flat.pop(0) for _ in range(count)] for count in pictures]
