"""Reading checkpoints: official ``.pth`` files, bare state dicts, safetensors. Nothing in a file is executed.

Official files are pickles of {"model", "model_ema", "args": argparse.Namespace, ...}. They are read by torch's
restricted unpickler with that one class allowed besides tensors and plain values; anything else is refused.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmeff.errors import CheckpointError
from vlmeff.models.mar.config import PRESETS, MARConfig

SHOWN = 5  # names of each kind in an error
WEIGHTS = ("model_ema", "model", "state_dict")  # what a checkpoint's weights may stand under, the best first


def read_state(file: str | os.PathLike[str], *, prefer: tuple[str, ...] = WEIGHTS) -> dict[str, Tensor]:
    """The state dict of a file; of several in it, the first of ``prefer`` that is there.

    Raises:
        CheckpointError: the file is missing or broken, holds code, or holds no state dict.
    """
    path = Path(file)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {refused[1]}, which is no tensor" if refused else "it holds more than tensors"
        raise CheckpointError(
            f"{path}: refused, {what}: loading it would run code. Ask its author for safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {' '.join(str(error).split())[:200]}") from error
    return _weights(content, prefer, path)


def _weights(content: Any, prefer: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for name in prefer:
            if isinstance(content.get(name), Mapping):
                content = content[name]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = ", ".join(map(str, list(content)[:SHOWN])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path}: no state dict in it, neither bare nor as {' or '.join(prefer)}; found: {found}."
        )
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def config_of(state: Mapping[str, Tensor], **changes: Any) -> MARConfig:
    """The configuration of a state dict: widths, depths and lengths are read off it, ``changes`` override.

    The number of attention heads is in no shape. It is that of the official model of this encoder width; for other
    widths, pass ``encoder_heads`` and ``decoder_heads`` (or a whole configuration).

    Raises:
        CheckpointError: these are not the weights of a MAR model.
    """
    try:
        token_dim = state["z_proj.weight"].shape[1]
        length = state["diffusion_pos_embed_learned"].shape[1]
        encoder, decoder = state["z_proj.weight"].shape[0], state["decoder_embed.weight"].shape[0]
        found: dict[str, Any] = {
            **{"encoder_dim": encoder, "decoder_dim": decoder},
            "encoder_depth": _depth(state, "encoder_blocks"),
            "decoder_depth": _depth(state, "decoder_blocks"),
            "head_width": state["diffloss.net.input_proj.weight"].shape[0],
            "head_depth": _depth(state, "diffloss.net.res_blocks"),
            "class_num": state["class_emb.weight"].shape[0],
            "buffer_size": state["encoder_pos_embed_learned"].shape[1] - length,
            "mlp_ratio": state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / encoder,
        }
    except KeyError as error:
        raise CheckpointError(f"not the weights of a MAR model: {error} is missing.") from error
    heads = {values["encoder_dim"]: values["encoder_heads"] for values in PRESETS.values()}
    for name, width in (("encoder_heads", encoder), ("decoder_heads", decoder)):
        if name not in changes and width not in heads:
            raise CheckpointError(
                f"a width of {width} is not that of an official model, so the number of heads is unknown; "
                f"pass {name}=... or a configuration."
            )
        found[name] = heads.get(width)
    patch, stride = changes.get("patch_size", 1), changes.get("vae_stride", 16)
    found |= {"vae_embed_dim": token_dim // patch**2, "img_size": math.isqrt(length) * stride * patch}
    return MARConfig(**(found | changes))


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    pattern = re.compile(re.escape(blocks) + r"\.(\d+)\.")
    numbers = [int(match[1]) for match in map(pattern.match, state) if match]
    if not numbers:
        raise KeyError(f"{blocks}.0")
    return max(numbers) + 1


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state dict into a module that has exactly its names and shapes.

    Raises:
        CheckpointError: names are missing, unexpected or of another shape; the message shows the first five of each.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    conflicts = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", conflicts))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{what} does not fit: " + "; ".join(problems) + ". Is the configuration that of the file?"
        )
    module.load_state_dict(dict(state))
