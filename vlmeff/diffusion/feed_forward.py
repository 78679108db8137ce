"""diffusers' feed-forward with a quantized second layer: GELU and the quantization of its result in one op.

``net.0`` (projection, GELU), ``net.1`` (dropout) and ``net.2`` stay what and where they are, with the same names and
tensors; only the owner's ``forward`` is replaced, on the instance. It looks at every call whether nobody could tell:
plain diffusers modules, no dropout, no hooks that would see other numbers, a layer that can do it. If not, it is the
``forward`` of the class.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from vlmeff.diffusion.layers import QuantLinear

SECOND = ".net.2"
COUNTING = "vlmeff.diffusion.counting"  # its hooks read the size of what the layer returns, and nothing else


def fold_gelu(model: nn.Module, name: str) -> None:
    """Let the feed-forward whose second layer is ``name`` leave its GELU to that layer, if it is diffusers' own."""
    owner = _owner(model, name)
    if owner is not None and "forward" not in owner.__dict__:  # offloading replaces it too
        owner.__dict__["forward"] = functools.partial(_forward, owner)


def unfold_gelu(model: nn.Module, name: str) -> None:
    """Undo ``fold_gelu``. What was put around it since stays, and finds nothing to fold."""
    owner = _owner(model, name)
    forward = None if owner is None else owner.__dict__.get("forward")
    if owner is not None and isinstance(forward, functools.partial) and forward.func is _forward:
        del owner.__dict__["forward"]


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    owner = model.get_submodule(name.removesuffix(SECOND)) if name.endswith(SECOND) else None
    return owner if _is(owner, "diffusers.models.attention", "FeedForward") else None


def _forward(owner: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or torch.compiler.is_compiling() or not _foldable(owner.net):
        out: Tensor = type(owner).forward(owner, hidden_states, *args, **kwargs)
        return out
    activation, _, linear = owner.net
    folded: Tensor = linear(activation.proj(hidden_states), gelu=activation.approximate)
    return folded


def _foldable(net: nn.ModuleList) -> bool:
    if len(net) != 3 or nn.modules.module._has_any_global_hook():
        return False
    activation, dropout, linear = net
    return (
        type(linear) is QuantLinear
        and linear.takes_gelu
        and _is(activation, "diffusers.models.activations", "GELU")
        and type(dropout) is nn.Dropout
        and (dropout.p == 0 or not dropout.training)
        and not any(map(_is_watched, net))
    )


def _is(module: nn.Module | None, package: str, name: str) -> bool:
    """Whether a module is of exactly this class, which need not be imported to ask."""
    return (type(module).__module__, type(module).__qualname__) == (package, name)


def _is_watched(module: nn.Module) -> bool:
    if {"forward", "gelu"} & module.__dict__.keys():
        return True
    hooks = [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", "") != COUNTING]
    return bool(hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
