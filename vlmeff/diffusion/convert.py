"""Replaces the linear layers of a model by quantized ones, and gives them back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmeff.diffusion.families import READS_WEIGHT, find_family, rules_for
from vlmeff.diffusion.feed_forward import fold_gelu, unfold_gelu
from vlmeff.diffusion.layers import PROTECTED, QuantLinear, share_activations
from vlmeff.diffusion.rules import LayerChoice, LayerReport, Rule, RuleLike, choose_layers, layer_report
from vlmeff.diffusion.schemes import LayerSpec, check_hardware, get_scheme
from vlmeff.diffusion.smoothing import channel_maxima, smoothing_vector
from vlmeff.errors import IncompatibleError, QuantConfigError

logger = logging.getLogger(__name__)

# Projections of one attention that take the same input, by their last name.
SIBLINGS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
Progress = Callable[[int, int], None]


@dataclass(eq=False)
class Quantized:
    """What ``quantize_`` did to a model.

    ``table`` lists quantized and skipped layers with bytes and reasons; ``originals`` are the replaced layers (in host
    memory), empty where they were not kept.
    """

    model: nn.Module
    scheme: str
    table: LayerReport
    specs: dict[str, LayerSpec]
    originals: dict[str, nn.Linear] = field(default_factory=dict, repr=False)
    calibrated: bool = False

    def restore(self) -> nn.Module:
        """Put the original layers back, bit for bit.

        Raises:
            QuantConfigError: they were not kept.
        """
        if not self.originals:
            raise QuantConfigError(
                "the original weights were not kept (keep_original=False, or a quantized checkpoint was loaded); load "
                "the model again."
            )
        for name, original in self.originals.items():
            layer: Any = self.model.get_submodule(name)
            original = original.to(layer.qweight.device, layer.cast_to)  # follows casts of the model
            self.model.set_submodule(name, original.train(layer.training))
            unfold_gelu(self.model, name)
        self.originals = {}
        self.model.__dict__.pop("save_pretrained", None)
        return self.model


def quantize_(
    model: nn.Module,
    scheme: str,
    *,
    rules: Sequence[RuleLike] | None = None,
    replace_rules: bool = False,
    group: int | None = None,
    rank: int | None = None,
    calibrate: Callable[[], Any] | None = None,
    alpha: float = 0.5,
    refine: int = 0,
    search: bool | None = None,
    keep_original: bool = True,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize the linear layers of a video transformer in place, one at a time.

    Args:
        model: a diffusers transformer of a known family, or any module with ``rules``.
        scheme: a name of ``schemes.SCHEMES``; layers whose rule names another one get that.
        rules: (pattern, scheme or "keep" or "default") in front of the family's; alone with ``replace_rules``.
        group, rank: change the scheme's group size and the rank of its branch.
        calibrate: calls the model on typical inputs, for schemes that smooth; without it nothing is smoothed.
        alpha: of ``smoothing_vector``.  refine: rounds of refitting a low-rank branch.
        search: choose the ranges of codes with a zero-point by their error (``QuantLinear.from_linear``).
        keep_original: keep the replaced layers in host memory, so that ``restore`` can give them back.
        progress: called with (layers done, layers in all).
    Raises:
        UnsupportedModelError: the class is unknown and no rules are given.
        QuantConfigError, UnknownNameError: scheme, group, rank or rules cannot work.
        AlreadyQuantizedError, IncompatibleError: the model is quantized, carries an adapter or casts its layers.
        SchemeNotSupportedError: the hardware lacks the arithmetic.
    """
    used = rules_for(model, list(rules) if rules is not None else None, replace=replace_rules)
    return convert(
        model,
        scheme,
        used,
        group=group,
        rank=rank,
        calibrate=calibrate,
        alpha=alpha,
        refine=refine,
        search=search,
        keep_original=keep_original,
        progress=progress,
    )


def convert(
    model: nn.Module,
    scheme: str,
    rules: Sequence[Rule],
    *,
    group: int | None = None,
    rank: int | None = None,
    calibrate: Callable[[], Any] | None = None,
    alpha: float = 0.5,
    refine: int = 0,
    search: bool | None = None,
    keep_original: bool = True,
    progress: Progress | None = None,
) -> Quantized:
    """``quantize_`` with all rules given; for text encoders too."""
    _refuse_hooks(model)
    specs: dict[str, LayerSpec] = {scheme: get_scheme(scheme, group=group, rank=rank)}

    def spec_of(name: str) -> LayerSpec:
        return specs.setdefault(name, get_scheme(name))

    choices = choose_layers(model, scheme, rules)
    table = layer_report(choices, model, spec_of=spec_of)
    wanted = [choice for choice in choices if choice.scheme is not None]
    for choice in wanted:
        weight = model.get_parameter(f"{choice.name}.weight")
        if weight.is_meta:
            raise IncompatibleError(
                f"quantize: the weight of {choice.name} is not in memory (meta device): quantize before enabling "
                "offload."
            )
        check_hardware(spec_of(choice.scheme or ""), weight.device)
    smooths = _smooths(model, wanted, spec_of, calibrate, alpha)
    result = Quantized(model, scheme, table, {}, calibrated=bool(smooths))
    made: dict[str, QuantLinear] = {}
    biases: dict[str, Tensor | None] = {}
    try:
        for i, choice in enumerate(wanted):
            original: Any = model.get_submodule(choice.name)
            owner = choice.shared_with
            if owner is not None and biases[owner] is original.bias:
                layer = made[owner]
            else:  # layers of one weight and two biases are two layers
                spec = spec_of(choice.scheme or "")
                layer = QuantLinear.from_linear(
                    original, spec, smooth=smooths.get(choice.name), search=search, refine=refine
                )
                layer.train(original.training)
            place(model, choice.name, layer)
            made[choice.name], biases[choice.name] = layer, original.bias
            result.specs[choice.name] = layer.spec
            if keep_original:
                # Out of the accelerator's memory; on a CPU this is the same storage.
                result.originals[choice.name] = original
                original.to("cpu")
            if progress is not None:
                progress(i + 1, len(wanted))
    except BaseException as error:  # an interrupt too: a model that is half quantized must not stay behind
        if result.originals:
            result.restore()
        elif made:
            error.add_note("quantize: the model is partly quantized and its weights were not kept: load it again.")
        raise
    link_siblings(made)
    save_as_quantized(model)
    return result


def save_as_quantized(model: nn.Module) -> None:
    """Let ``save_pretrained`` of this model write a quantized checkpoint: its own would lose what the layers are."""
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(_save, model)


def _save(model: nn.Module, save_directory: Any, **ignored: Any) -> None:
    from vlmeff.diffusion.checkpoint import save_quantized

    save_quantized(model, save_directory)


def place(model: nn.Module, name: str, layer: QuantLinear) -> None:
    """Put a quantized layer where a linear one was."""
    import re

    if re.fullmatch(READS_WEIGHT, name):  # its owner asks whether the weight is a tensor
        layer.__dict__["weight"] = None
    model.set_submodule(name, layer)
    fold_gelu(model, name)


def link_siblings(layers: Mapping[str, QuantLinear]) -> None:
    """Let projections of one attention quantize their common input once."""
    for names in _sibling_groups(layers):
        share_activations([layers[name] for name in names])


def _sibling_groups(names: Mapping[str, Any]) -> list[list[str]]:
    """Names that take one input: q, k and v of self-attention, k and v of cross-attention (``attn2``)."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        for i, siblings in enumerate(SIBLINGS):
            crossed = parent.endswith("attn2") and last == "to_q"
            if last in siblings and not crossed:
                groups.setdefault((parent, i), []).append(name)
    return list(groups.values())


def _smooths(
    model: nn.Module,
    wanted: Sequence[LayerChoice],
    spec_of: Callable[[str], LayerSpec],
    calibrate: Callable[[], Any] | None,
    alpha: float,
) -> dict[str, Tensor]:
    names = [choice.name for choice in wanted if spec_of(choice.scheme or "").smooth]
    if not names or calibrate is None:
        if names:
            logger.info("vlmeff: no calibration data: activations are not smoothed")
        return {}
    maxima = channel_maxima(model, names, calibrate)
    group_of = {name: group for group in _sibling_groups(dict.fromkeys(names)) for name in group}
    smooths: dict[str, Tensor] = {}
    for name in names:
        if name in smooths:
            continue
        group = group_of.get(name, [name])
        weights = [model.get_parameter(f"{member}.weight") for member in group]
        vector = smoothing_vector(torch.stack([maxima[member] for member in group]).amax(0), weights, alpha)
        smooths.update(dict.fromkeys(group, vector))
    return smooths


def _refuse_hooks(model: nn.Module) -> None:
    """diffusers' layerwise casting would cast codes, and its group offloading moves only the tensors that it has seen;
    both mark the modules that they hook."""
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None:
            continue
        if registry.get_hook("group_offloading") is not None:
            raise IncompatibleError(
                f"quantize: {name or type(model).__name__} is offloaded (enable_group_offload): quantize before "
                "enabling offload."
            )
        if registry.get_hook("layerwise_casting") is not None:
            raise IncompatibleError(
                f"quantize: {name or type(model).__name__} casts its layers (enable_layerwise_casting); load the model "
                "without it, quantized layers are smaller than cast ones."
            )


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that most of the float parameters have, those of quantized layers' codes and scales apart."""
    counts: dict[torch.dtype, int] = {}
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.itemsize > 1 and name.rpartition(".")[2] not in PROTECTED:
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    if not counts:
        raise QuantConfigError(f"{type(model).__name__} has no float parameters.")
    return max(counts, key=lambda dtype: counts[dtype])


def is_known(model: nn.Module) -> bool:
    """Whether there are rules for the class of ``model``."""
    return find_family(model) is not None
