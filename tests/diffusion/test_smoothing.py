"""Calibration: maxima of every channel over all calls, the closed form of the vector, and an unchanged product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlmeff.diffusion.layers import QuantLinear
from vlmeff.diffusion.schemes import get_scheme
from vlmeff.diffusion.smoothing import channel_maxima, smoothing_vector
from vlmeff.errors import ConfigError


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_maxima_are_over_every_call_and_every_leading_dimension() -> None:
    model, calls = Pair(), [gaussian(2, 5, 6), gaussian(7, 6, seed=1) * 3, gaussian(6, seed=2), torch.zeros(0, 6)]
    hidden: list[np.ndarray] = []

    def run() -> None:
        assert not torch.is_grad_enabled()
        for x in calls:
            model(x)
            hidden.extend(np.maximum(model.first(x).numpy().reshape(-1, 4), 0))

    found = channel_maxima(model, ["first", "second"], run)
    inputs = np.concatenate([x.numpy().reshape(-1, 6) for x in calls])
    assert np.allclose(found["first"].numpy(), np.abs(inputs).max(0))
    assert np.allclose(found["second"].numpy(), np.abs(np.stack(hidden)).max(0))
    assert found["first"].dtype == torch.float32
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_never_called_is_an_error_and_hooks_go_even_then() -> None:
    model = Pair()
    with pytest.raises(ConfigError, match="never reached unused"):
        channel_maxima(model, ["first", "unused"], lambda: model(gaussian(2, 6)))
    with pytest.raises(RuntimeError):
        channel_maxima(model, ["first"], lambda: model(gaussian(2, 5)))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("alpha", [0.0, 0.11, 0.5, 0.75, 1.0])
def test_the_vector_is_the_closed_form(alpha: float) -> None:
    a = gaussian(8).abs()
    weights = [gaussian(5, 8, seed=1), gaussian(3, 8, seed=2)]
    got = smoothing_vector(a, weights, alpha)
    for k in range(8):
        w = max(abs(float(v)) for weight in weights for v in weight[:, k])
        assert float(got[k]) == pytest.approx(float(a[k]) ** alpha / w ** (1 - alpha), rel=1e-5)


def test_what_has_no_scale_is_left_alone() -> None:
    a, w = torch.tensor([0.0, 1.0, torch.nan, torch.inf, 4.0]), torch.ones(2, 5)
    w[:, 1] = 0
    assert smoothing_vector(a, [w]).tolist() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_outside_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=f"alpha={alpha}"):
        smoothing_vector(torch.ones(2), [torch.ones(1, 2)], alpha)


def test_the_product_stays_what_it_was_but_for_the_codes() -> None:
    layer, x = nn.Linear(64, 32), gaussian(9, 64)
    x[:, 3] *= 30
    vector = smoothing_vector(x.abs().amax(0), [layer.weight])
    torch.testing.assert_close((x / vector) @ (layer.weight * vector).T, x @ layer.weight.T, rtol=1e-4, atol=1e-4)
    # At full rank nothing is left for the codes: dequantize gives the weight without the vector.
    quantized = QuantLinear.from_linear(layer, get_scheme("svdq_w4a16", rank=32), smooth=vector)
    torch.testing.assert_close(quantized.dequantize(), layer.weight.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(quantized(x), layer(x).detach(), rtol=1e-3, atol=1e-3)
