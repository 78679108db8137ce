"""From a trained, fake-quantized transformer to packed integer layers that compute the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.quantizers import float_zero_codes
from vlmeff.diffusion.qvgen.fake_quant import COMPAT_CLIP, FakeQuantLinear
from vlmeff.diffusion.qvgen.prepare import cast, fake_quant_layers
from vlmeff.diffusion.schemes import LayerSpec, get_scheme
from vlmeff.errors import ExportError

MOST_WEIGHT_BITS, MOST_ACTIVATION_BITS = 4, 7  # packed two to a byte; int8 products
Slots = Literal["exact", "mean"]


def export_spec(w_bits: int, a_bits: int, *, compat: bool = False) -> LayerSpec:
    """The scheme of trained bits: w4a4_int, w3a3_sim, or w4a4_int with other bits (in the same 4-bit containers).

    Raises:
        ExportError: no integer arithmetic for these bits.
    """
    if w_bits > MOST_WEIGHT_BITS or a_bits > MOST_ACTIVATION_BITS:
        raise ExportError(
            f"w_bits={w_bits}, a_bits={a_bits} cannot be exported: at most {MOST_WEIGHT_BITS} bits of weights and "
            f"{MOST_ACTIVATION_BITS} of activations have integer arithmetic here. Train with bits=4, or quantize "
            "without training (w8a8_int8, w4a8_int8)."
        )
    spec = get_scheme("w3a3_sim" if (w_bits, a_bits) == (3, 3) else "w4a4_int")
    return replace(spec, w_bits=w_bits, a_bits=a_bits, a_clip=True, contain_zero=not compat)


@torch.no_grad()
def to_inference(
    layer: FakeQuantLinear, *, name: str = "this layer", dtype: torch.dtype | None = None, slots: Slots = "exact"
) -> QuantLinear:
    """Pack a layer: output equal to the fake-quantized one's up to the rounding of float32 sums.

    Args:
        name: for errors.
        dtype: of the bias; its own by default.
        slots: "exact" refuses a layer with several clips by timestep, which ``QuantLinear`` does not have; "mean" takes
            their mean.
    Raises:
        ExportError: Phi has not decayed, several clip slots, or bits without integer arithmetic.
    """
    rank = int(layer.rank)
    if rank > 0:
        raise ExportError(
            f"{name}: its auxiliary module still has rank {rank}; finish the decay (controller.finish()) before "
            "exporting."
        )
    if not layer.use_weight_quant or not layer.use_act_quant:
        raise ExportError(f"{name}: its quantization is switched off; switch it on before exporting.")
    if len(layer.a_clip) > 1 and slots == "exact":
        raise ExportError(
            f"{name}: has {len(layer.a_clip)} clips by timestep, and an exported layer has one; pass slots='mean' to "
            "take their mean (the outputs then differ), or train with slots=1."
        )
    spec = export_spec(layer.w_bits, layer.a_bits, compat=layer.compat == "qvgen")
    codes = float_zero_codes(layer.weight, layer.w_scale, layer.w_zero, layer.w_bits)
    clip = layer.a_clip.sigmoid().mean(0)
    if layer.compat == "qvgen":
        clip = clip * COMPAT_CLIP
    return QuantLinear.from_codes(
        codes, layer.w_scale, layer.w_zero, layer.bias, spec, dtype=dtype or torch.float32, a_clip=clip
    ).train(layer.training)


def export(transformer: nn.Module, *, dtype: torch.dtype | None = None, slots: Slots = "exact") -> list[str]:
    """Swap every fake-quantized layer for its packed form, in place; all or nothing.

    Args:
        dtype: what the rest of the transformer, and the biases, are cast to, but for the parts that diffusers keeps in
            float32; left alone by default.
    Returns:
        The names of the layers.
    Raises:
        ExportError: a layer cannot be exported (``to_inference``), or there is none.
    """
    layers = fake_quant_layers(transformer)
    if not layers:
        raise ExportError("the transformer has no fake-quantized layer; train it with vlmeff.diffusion.qvgen first.")
    packed = {name: to_inference(layer, name=name, dtype=dtype, slots=slots) for name, layer in layers.items()}
    by_layer = {id(layers[name]): packed[name] for name in layers}
    # A module that stands in two places is listed once: swap it in both.
    everywhere = [
        (name, by_layer[id(module)])
        for name, module in transformer.named_modules(remove_duplicate=False)
        if id(module) in by_layer
    ]
    for name, layer in everywhere:
        transformer.set_submodule(name, layer)
    if dtype is not None:
        cast(transformer, dtype)
    transformer.requires_grad_(False).eval()
    return list(packed)
