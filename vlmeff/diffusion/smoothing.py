"""Calibration of a smoothing vector: outlier channels of activations move into the weights (arXiv 2211.10438).

s_k = a_k^alpha / w_k^(1 - alpha) with a_k = max |x_k| over the calibration calls and w_k = max_n |W_nk|; then
X <- X / s and W <- W s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmeff.errors import ConfigError


def channel_maxima(model: nn.Module, names: Iterable[str], run: Callable[[], Any]) -> dict[str, Tensor]:
    """max |x_k| of the input of each named linear layer over everything that ``run`` computes.

    Calls of every timestep, conditional and unconditional, count alike; call the pipeline for all its steps.

    Returns:
        [K] float32 for each name, on the layer's device.
    Raises:
        ConfigError: a layer was never called.
    """
    maxima: dict[str, Tensor] = {}
    handles = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if not x.numel():
                return
            seen = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
            maxima[name] = torch.maximum(maxima[name], seen) if name in maxima else seen

        return hook

    names = list(names)
    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_pre_hook(watch(name)))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in names if name not in maxima]
    if missed:
        raise ConfigError(
            f"calibrate: the calibration calls never reached {missed[0]} and {len(missed) - 1} other layers; call the "
            "whole transformer."
        )
    return maxima


def smoothing_vector(activation: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """s [K] float32 for layers that share one input.

    Args:
        activation: [K] maxima.  weights: [N_i, K] of every layer that takes this input.
        alpha: 1 makes the channels of the activations alike, 0 those of the weights.
    Raises:
        ConfigError: alpha is not in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha} must lie in [0, 1].")
    largest = torch.stack([w.detach().abs().amax(0).float() for w in weights]).amax(0)
    s = activation.float().pow(alpha) / largest.pow(1 - alpha)
    usable = torch.isfinite(s) & (s > 0)
    return torch.where(usable, s, 1.0)
