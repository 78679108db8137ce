"""Swap the linear layers of a transformer for fake-quantized ones, and group its parameters for the optimizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from vlmeff.diffusion.families import rules_for
from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.qvgen.fake_quant import Compat, FakeQuantLinear, PhiStart, check_bits
from vlmeff.diffusion.rules import DEFAULT, Rule, RuleLike, choose_layers
from vlmeff.errors import AlreadyQuantizedError, QuantConfigError

PhiKind = Literal["svd", "lora", "keep", "drop"] | None
PHI_KINDS = ("svd", "lora", "keep", "drop")
ANY_LOW_BIT_SCHEME = "w4a4_int"  # rules name schemes; here only which layers get the low-bit one counts


def prepare_qat(
    transformer: nn.Module,
    rules: Sequence[RuleLike | str] | None = None,
    bits: int | tuple[int, int] = 4,
    phi: PhiKind = "svd",
    *,
    rank: int = 32,
    slots: int = 1,
    compat: Compat = None,
    initialise: bool = True,
    recompute: bool = False,
    seed: int = 0,
) -> dict[str, FakeQuantLinear]:
    """Replace linear layers in place; all parameters become float32 masters.

    Layers that the rules give another scheme than the default (modulation, weight-only) are trained as they are.

    Args:
        transformer: any module whose family has rules, or any at all with ``rules``.
        rules: None: the family's. Rules or tuples (pattern, scheme): in front of the family's. Strings: exactly the
            layers of these names. ``[(".+", "default")]`` quantizes every linear layer, as the official runs do.
        bits: of weights and activations, or (weights, activations).
        phi: "svd", "keep" and "drop" start Phi from what quantization loses (they differ in its schedule); "lora" from
            L = 0; None trains without.
        rank, slots, compat, initialise: see ``FakeQuantLinear``. Layers smaller than the rank get their full rank.
        recompute: compute fake-quantized tensors again in the backward pass instead of keeping them.
    Returns:
        The new layers by name.
    Raises:
        QuantConfigError: a value out of range, or a rule that matches nothing.
        AlreadyQuantizedError, IncompatibleError: quantized layers or adapters are in the way.
        UnsupportedModelError: the class has no rules, and none were given.
    """
    check_bits(*(w_a := _both_bits(bits)))
    if phi is not None and phi not in PHI_KINDS:
        raise QuantConfigError(f"phi={phi!r} must be one of {', '.join(PHI_KINDS)}, or None.")
    if type(rank) is not int or rank < 0:
        raise QuantConfigError(f"rank={rank!r} must be a whole number from 0 on.")
    if any(isinstance(module, FakeQuantLinear) for module in transformer.modules()):
        raise AlreadyQuantizedError("prepare_qat: the transformer is prepared for training already; load it afresh.")
    choices = [
        choice
        for choice in choose_layers(transformer, ANY_LOW_BIT_SCHEME, _rules(transformer, rules))
        if choice.scheme == ANY_LOW_BIT_SCHEME
    ]
    if not choices:
        raise QuantConfigError("rules: no layer gets the low-bit scheme; name one with scheme 'default'.")
    start: PhiStart = "lora" if phi == "lora" else "svd" if phi is not None and rank else None
    small = [c.name for c in choices if min(c.in_features, c.out_features) < rank] if start is not None else []
    if small:
        warnings.warn(
            f"rank {rank} exceeds the size of {len(small)} layers ({small[0]}, ...); their Phi has full rank.",
            stacklevel=2,
        )
    transformer.float()
    layers: dict[str, FakeQuantLinear] = {}
    for number, choice in enumerate(choices):
        if choice.shared_with is not None:  # one weight, one module
            transformer.set_submodule(choice.name, layers[choice.shared_with])
            continue
        linear = transformer.get_submodule(choice.name)
        assert isinstance(linear, nn.Linear)
        layer = FakeQuantLinear.from_linear(
            linear,
            w_bits=w_a[0],
            a_bits=w_a[1],
            phi=start,
            rank=rank,
            slots=slots,
            compat=compat,
            initialise=initialise,
            seed=seed + number,
        )
        layer.recompute = recompute
        transformer.set_submodule(choice.name, layer)
        layers[choice.name] = layer
    return layers


def fake_quant_layers(transformer: nn.Module) -> dict[str, FakeQuantLinear]:
    """The layers that ``prepare_qat`` made, by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, FakeQuantLinear)}


def parameter_groups(
    transformer: nn.Module, *, lr: float = 3e-5, clip_lr: float = 1e-2, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """Five groups for AdamW: other, weights (quantized), ranges, phi and clip; ``name`` tells them apart.

    Weight decay is for weights only: pulling a scale, a zero-point or a clip towards 0 means nothing. (The official
    code decays them too.)
    """
    layers = fake_quant_layers(transformer)
    if not layers:
        raise QuantConfigError("parameter_groups: the transformer has no fake-quantized layer; call prepare_qat first.")
    groups: dict[str, list[nn.Parameter]] = {"other": [], "weights": [], "ranges": [], "phi": [], "clip": []}
    own: set[int] = set()
    for layer in layers.values():
        groups["weights"] += [layer.weight] + ([] if layer.bias is None else [layer.bias])
        groups["ranges"] += [layer.w_scale, layer.w_zero]
        groups["phi"] += [factor for factor in (layer.phi_L, layer.phi_R) if factor is not None]
        groups["clip"].append(layer.a_clip)
        own.update(id(parameter) for parameter in layer.parameters())
    groups["other"] = [p for p in transformer.parameters() if id(p) not in own and p.requires_grad]
    return [
        {
            "name": name,
            "params": parameters,
            "lr": clip_lr if name == "clip" else lr,
            "weight_decay": weight_decay if name in ("other", "weights") else 0.0,
        }
        for name, parameters in groups.items()
    ]


def cast(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters in place, but not the parts that diffusers keeps in float32, nor codes and scales."""
    float32 = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, module in transformer.named_modules():
        if isinstance(module, QuantLinear):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            sensitive = float32 & {*name.split("."), own}
            parameter.data = parameter.data.to(torch.float32 if sensitive else dtype)


def set_switches(
    transformer: nn.Module,
    *,
    weight_quant: bool | None = None,
    act_quant: bool | None = None,
    phi: bool | None = None,
) -> None:
    """Switch parts of the fake quantization on or off in all layers; None leaves a switch."""
    for layer in fake_quant_layers(transformer).values():
        layer.use_weight_quant = layer.use_weight_quant if weight_quant is None else weight_quant
        layer.use_act_quant = layer.use_act_quant if act_quant is None else act_quant
        layer.use_phi = layer.use_phi if phi is None else phi


def set_slot(transformer: nn.Module, timestep: torch.Tensor | float) -> None:
    """Choose the clips of a timestep in every layer.

    Args:
        timestep: a number, or [B] or [B, tokens] in [0, 1000].
    Raises:
        QuantConfigError: the timesteps of a batch lie in different slots.
    """
    from vlmeff.diffusion.qvgen.fake_quant import slot_of

    for layer in fake_quant_layers(transformer).values():
        slots = len(layer.a_clip)
        if slots == 1:
            continue
        values = timestep.flatten().tolist() if isinstance(timestep, torch.Tensor) else [float(timestep)]
        found = {slot_of(value, slots) for value in values}
        if len(found) > 1:
            raise QuantConfigError(
                f"the timesteps of this batch lie in {len(found)} of {slots} clip slots; draw them from one, or use "
                "slots=1."
            )
        layer.slot.fill_(found.pop())


def _rules(transformer: nn.Module, rules: Sequence[RuleLike | str] | None) -> tuple[Rule, ...]:
    if rules and all(isinstance(entry, str) for entry in rules):
        return tuple(Rule(re.escape(str(name)), DEFAULT, "named") for name in rules)
    if rules and any(isinstance(entry, str) for entry in rules):
        raise QuantConfigError("rules: mixes layer names and rules; use tuples (pattern, scheme) for all.")
    return rules_for(transformer, list(rules or ()))  # type: ignore[arg-type]


def _both_bits(bits: int | tuple[int, int]) -> tuple[int, int]:
    return (bits, bits) if isinstance(bits, int) else (bits[0], bits[1])
