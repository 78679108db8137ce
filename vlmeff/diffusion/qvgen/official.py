"""Read checkpoints that QVGen's own code wrote (repository ModelTC/QVGen): a converter of keys and values, no model.

A quantized linear layer X there is ``X.w`` (full precision), ``X.b``, ``X.wquantizer.scale`` and ``.zero_point``
[N, 1], ``X.aquantizer.upper`` and ``.lower`` (one logit for each of 50 slots); a linear without ``wquantizer.scale`` is
full precision. Keys were read from the code; no hosted file was opened.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vlmeff.diffusion.qvgen.fake_quant import COMPAT_CLIP, check_bits
from vlmeff.errors import CheckpointError

SCALE, ZERO = "wquantizer.scale", "wquantizer.zero_point"
UPPER, LOWER = "aquantizer.upper", "aquantizer.lower"
LEFT = "wquantizer.L"
Target = Literal["inference", "training"]


def convert_official(
    state: Mapping[str, Tensor], *, bits: int = 4, a_bits: int | None = None, target: Target = "inference"
) -> tuple[dict[str, Tensor], list[str]]:
    """Convert a state dict of the official code.

    Of the 50 clips by (timestep modulo 50) the mean is taken: 0.95 sigmoid(logit) over the slots, one factor a side.

    Args:
        bits, a_bits: of weights and activations; the files do not say.
        target: "inference": keys of ``QuantLinear`` (``qweight``, ``w_scale``, ``w_zero``, ``a_clip`` [2] factors,
            ``bias``). "training": keys of ``FakeQuantLinear`` for ``compat="qvgen"`` (``weight``, ..., ``a_clip``
            [1, 2] logits, ``rank``, ``slot``; the official 0.95 is in the layer).
    Returns:
        (state dict, names of the quantized layers); all other entries keep their values, ``X.w`` becomes ``X.weight``.
    Raises:
        CheckpointError: a quantized layer lacks a part, or its shapes do not fit.

    Factors of an auxiliary module that are left in the file are dropped with a warning, as the official inference drops
    them: its training ends with them faded to almost nothing and does not delete them. How far they had faded is not in
    the file, so a checkpoint from the middle of a training cannot be told apart.
    """
    check_bits(bits, bits if a_bits is None else a_bits)
    layers = sorted(key.removesuffix(f".{SCALE}") for key in state if key.endswith(f".{SCALE}"))
    left = [name for name in layers if f"{name}.{LEFT}" in state]
    if left:
        warnings.warn(
            f"{len(left)} layers ({left[0]}, ...) have an auxiliary module, which is dropped; the result is only "
            "right if their training had come to its end.",
            stacklevel=2,
        )
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in layers:
        parts = _parts(state, name)
        used.update(key for key in state if key.startswith(f"{name}.") and _is_ours(key.removeprefix(f"{name}.")))
        converted.update({f"{name}.{key}": value for key, value in _layer(parts, name, bits, target).items()})
    for key, value in state.items():
        if key in used:
            continue
        parent, _, last = key.rpartition(".")
        converted[f"{parent}.{_PLAIN[last]}" if parent and last in _PLAIN else key] = value
    return converted, layers


_PLAIN = {"w": "weight", "b": "bias"}


def _is_ours(part: str) -> bool:
    return part in ("w", "b", "loraA.weight", "loraB.weight") or part.startswith(("wquantizer.", "aquantizer."))


def _parts(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    for needed in ("w", ZERO, UPPER, LOWER):
        if f"{name}.{needed}" not in state:
            raise CheckpointError(f"{name}: the checkpoint has its {SCALE} and lacks {name}.{needed}.")
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _layer(parts: dict[str, Tensor], name: str, bits: int, target: Target) -> dict[str, Tensor]:
    from vlmeff.diffusion.quantizers import float_zero_codes
    from vlmeff.ops.packing import pack_nibbles

    weight = parts["w"].float()
    if "loraA.weight" in parts and "loraB.weight" in parts:
        weight = weight + parts["loraB.weight"].float() @ parts["loraA.weight"].float()
    n = len(weight)
    scale, zero = parts[SCALE].float(), parts[ZERO].float()
    for key, value in ((SCALE, scale), (ZERO, zero)):
        if value.numel() != n:
            raise CheckpointError(f"{name}.{key} has shape {tuple(value.shape)}; a weight of {n} rows needs [{n}, 1].")
    scale, zero = scale.view(n, 1), zero.view(n, 1)
    clip = torch.stack([parts[LOWER].float().sigmoid().mean(), parts[UPPER].float().sigmoid().mean()])
    result = {"w_scale": scale, "w_zero": zero}
    if "b" in parts:
        result["bias"] = parts["b"]
    if target == "training":
        logits = torch.stack([torch.logit(c) if c < 1 else torch.tensor(math.inf) for c in clip])
        return {
            "weight": weight,
            **result,
            "a_clip": logits[None],
            "rank": torch.tensor(0),
            "slot": torch.tensor(0),
        }
    if bits > 4:
        raise CheckpointError(f"bits={bits}: only weights of at most 4 bits are packed.")
    codes = float_zero_codes(weight, scale, zero, bits)
    return {"qweight": pack_nibbles(codes), **result, "a_clip": clip * COMPAT_CLIP}
