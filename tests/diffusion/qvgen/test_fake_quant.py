"""Fake-quantized layers against formulas written out, and against a quantizer built as the official code builds it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlmeff.diffusion.quantizers import mse_range
from vlmeff.diffusion.qvgen.fake_quant import (
    FakeQuantLinear,
    fake_quant_activation,
    fake_quant_weight,
    round_ste,
    scale_gradient,
    slot_of,
)
from vlmeff.errors import QuantConfigError

GRADIENT = 1e-6  # float32 sums of a few hundred terms of order 1, relative to the largest


class ClampAsBefore(torch.autograd.Function):
    """``torch.clamp`` with the gradient that it had in torch 2.13, as the official code saw it: 1 at the ends."""

    @staticmethod
    def forward(ctx, x, top):
        ctx.save_for_backward((x >= 0) & (x <= top))
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


class OfficialLikeWeight(nn.Module):
    """LSQ+ put together as QVGen's class is: straight-through by detach, gradient scaling by a difference."""

    def __init__(self, scale, zero, bits):
        super().__init__()
        self.scale, self.zero = nn.Parameter(scale.clone()), nn.Parameter(zero.clone())
        self.top = 2**bits - 1

    def forward(self, w):
        factor = 1.0 / (w.numel() / w.shape[0] * self.top) ** 0.5
        scale = (self.scale - self.scale * factor).detach() + self.scale * factor
        zero = (self.zero - self.zero * factor).detach() + self.zero * factor
        inner = w / scale + zero
        codes = ClampAsBefore.apply((inner.round() - inner).detach() + inner, self.top)
        return scale * (codes - zero)


def official_like_activation(x, lower, upper, bits):
    """The learnable clipped per-token quantizer: 0.95 on the range, then sigmoids, no zero forced into the range."""
    top = 2**bits - 1
    hi = torch.sigmoid(upper) * (x.amax(dim=-1, keepdim=True) * 0.95)
    lo = torch.sigmoid(lower) * (x.amin(dim=-1, keepdim=True) * 0.95)
    scale = ((hi - lo) / top).clamp_min(1e-9)
    zero = (-torch.round(lo / scale)).clamp(0, top)
    inner = x / scale
    return scale * (ClampAsBefore.apply((inner.round() - inner).detach() + inner + zero, top) - zero)


def token_by_token(x, c_lo, c_hi, bits):
    """The activation formula in Python floats of float32 values, one token at a time."""
    top = 2**bits - 1
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        hi, lo = max(float(row.max()), 0.0) * c_hi, min(float(row.min()), 0.0) * c_lo
        scale = max((hi - lo) / top, 1e-6)
        zero = min(max(round(-lo / scale), 0), top)
        rows.append([scale * (min(max(round(v / scale) + zero, 0), top) - zero) for v in row.tolist()])
    return torch.tensor(rows).view_as(x)


def problem(n=6, k=40, bits=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    scale, zero = mse_range(w, bits)
    # Narrow some rows so that codes clamp at both ends.
    scale = scale * torch.linspace(0.4, 1.1, n)[:, None]
    return w, scale, zero, torch.randn(n, k, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_gradients_are_the_closed_form(bits):
    w, s, z, g = problem(bits=bits)
    w, s, z = (t.clone().requires_grad_() for t in (w, s, z))
    fake_quant_weight(w, s, z, bits).backward(g)
    top, f = 2**bits - 1, 1 / math.sqrt(w.shape[1] * (2**bits - 1))
    rounded = torch.round(w.detach() / s.detach() + z.detach())
    m = ((rounded >= 0) & (rounded <= top)).float()
    assert 0 < m.mean() < 1
    q = rounded.clamp(0, top)
    ds = f * (g * ((q - z) - m * w / s)).sum(1, keepdim=True)
    dz = f * (g * s * (m - 1)).sum(1, keepdim=True)
    for name, found, expected in (("w", w.grad, g * m), ("s", s.grad, ds.detach()), ("z", z.grad, dz.detach())):
        torch.testing.assert_close(found, expected, atol=GRADIENT * float(expected.abs().max()), rtol=1e-5, msg=name)


@pytest.mark.parametrize("bits", [3, 4])
def test_weights_and_their_gradients_equal_those_of_an_official_like_quantizer(bits):
    w, s, z, g = problem(bits=bits, seed=1)
    ours = [t.clone().requires_grad_() for t in (w, s, z)]
    theirs, official = w.clone().requires_grad_(), OfficialLikeWeight(s, z, bits)
    out, expected = fake_quant_weight(*ours, bits), official(theirs)
    # Their gradient scaling moves the scale by a rounding error; ours is exact.
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    out.backward(g)
    expected.backward(g)
    for found, reference in zip(ours, (theirs, official.scale, official.zero), strict=True):
        torch.testing.assert_close(found.grad, reference.grad, atol=GRADIENT, rtol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_activations_in_compat_mode_are_identical_to_an_official_like_quantizer(bits):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 9, 33, generator=generator)
    x[0, 0] = x[0, 0].abs() + 3  # one sign: the range without zero
    x[0, 1] = 0.0
    lower, upper = torch.tensor(2.9444, requires_grad=True), torch.tensor(2.2, requires_grad=True)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    clip = torch.stack([lower, upper]).detach().requires_grad_()
    out = fake_quant_activation(ours, clip.sigmoid(), bits, compat="qvgen")
    expected = official_like_activation(theirs, lower, upper, bits)
    assert torch.equal(out, expected)
    g = torch.randn(x.shape, generator=generator)
    out.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clip.grad, torch.stack([lower.grad, upper.grad]), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 8]),
    shift=st.floats(-4, 4),
    c_lo=st.floats(0.3, 1.0),
    c_hi=st.floats(0.3, 1.0),
)
def test_activations_follow_the_formula_token_by_token(seed, bits, shift, c_lo, c_hi):
    x = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(seed)) + shift
    clip = torch.tensor([c_lo, c_hi])
    out = fake_quant_activation(x, clip, bits)
    expected = token_by_token(x, float(clip[0]), float(clip[1]), bits)
    step = (c_hi * x.amax(-1, keepdim=True).clamp(min=0) - c_lo * x.amin(-1, keepdim=True).clamp(max=0)) / (2**bits - 1)
    # float32 against float64: a value half-way between two codes may fall to either, rarely.
    off = (out - expected).abs() > 1e-5
    assert off.float().mean() <= 0.05
    assert ((out - expected).abs() <= 1.001 * step + 1e-5).all()


def test_the_clip_learns_and_an_unclipped_token_passes_its_gradient():
    x = torch.tensor([[-1.0, -0.4, 0.3, 2.0]], requires_grad=True)
    clip = torch.tensor([0.5, 0.5], requires_grad=True)
    fake_quant_activation(x, clip, 4).sum().backward()
    assert (clip.grad != 0).all()
    assert x.grad[0, 2] == 1.0  # strictly inside the clipped range, not an end of it


def test_straight_through_values_are_exact():
    x = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor([0.5, 1.5, -2.5, 1e-8, 254.5])]).requires_grad_()
    assert torch.equal(round_ste(x), x.detach().round())
    assert torch.equal(scale_gradient(x, 0.0137), x)
    scale_gradient(x, 0.25).sum().backward()
    assert (x.grad == 0.25).all()


def linear(n=12, k=20, seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_switches_off_the_layer_is_the_linear_layer_bit_for_bit(bias, dtype):
    plain = linear(bias=bias).to(dtype)
    layer = FakeQuantLinear.from_linear(plain, phi="svd", rank=4)
    layer.use_weight_quant = layer.use_act_quant = layer.use_phi = False
    x = torch.randn(2, 3, 20, dtype=dtype)
    assert torch.equal(layer(x), plain(x))


def test_the_layer_multiplies_quantized_activations_with_codes_and_phi():
    layer = FakeQuantLinear.from_linear(linear(), w_bits=3, a_bits=4, phi="svd", rank=4)
    layer.gamma.copy_(torch.tensor([1.0, 1.0, 0.5, 0.0]))
    x = torch.randn(5, 20)
    x_hat = fake_quant_activation(x, torch.full((2,), 0.95), 4)
    w_hat = fake_quant_weight(layer.weight, layer.w_scale, layer.w_zero, 3)
    left, right = layer.phi_L.detach(), layer.phi_R.detach()
    phi = sum(gamma * torch.outer(left[:, j], right[j]) for j, gamma in enumerate((1.0, 1.0, 0.5)))
    torch.testing.assert_close(layer(x), F.linear(x_hat, w_hat + phi, layer.bias), atol=1e-5, rtol=1e-5)
    # The other order of the specification: Phi as two thin products.
    thin = F.linear(x_hat, w_hat, layer.bias) + ((x_hat @ right.T) * layer.gamma) @ left.T
    torch.testing.assert_close(layer(x), thin, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_phi_starts_as_the_best_approximation_of_what_quantization_loses(rank):
    layer = FakeQuantLinear.from_linear(linear(), w_bits=2, phi="svd", rank=rank)
    error = (layer.weight - layer.quantized_weight()).detach()
    left = (error - layer.phi_L @ layer.phi_R).detach()
    tail = torch.linalg.svdvals(error.double())[rank:].pow(2).sum().sqrt()  # Eckart-Young
    torch.testing.assert_close(left.norm().double(), tail, atol=2e-6, rtol=1e-4)
    assert left.norm() < error.norm()
    # The factors share the singular values.
    torch.testing.assert_close(layer.phi_L.norm(dim=0), layer.phi_R.norm(dim=1), atol=1e-5, rtol=1e-4)


def test_lora_starts_at_nothing_and_the_same_seed_starts_alike():
    a, b = (FakeQuantLinear.from_linear(linear(), phi="lora", rank=4, seed=7) for _ in range(2))
    assert (a.phi_L == 0).all()
    assert a.phi_R.norm() > 0
    assert torch.equal(a.phi_R, b.phi_R)


def test_recomputing_gives_the_same_gradients():
    grads = []
    for recompute in (False, True):
        layer = FakeQuantLinear.from_linear(linear(), phi="svd", rank=4)
        layer.recompute = recompute
        x = torch.randn(4, 20, generator=torch.Generator().manual_seed(3), requires_grad=True)
        layer(x).pow(2).sum().backward()
        grads.append([x.grad, *[p.grad for p in layer.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_mixed_precision_enters_the_product_only():
    layer = FakeQuantLinear.from_linear(linear(), phi="svd", rank=4)
    x = torch.randn(4, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    weight = layer.quantized_weight() + (layer.phi_L * layer.gamma) @ layer.phi_R
    x_hat = fake_quant_activation(x, layer.clip(), 4)
    assert torch.equal(out, F.linear(x_hat.bfloat16(), weight.bfloat16(), layer.bias.bfloat16()))


def test_a_slot_is_an_interval_of_the_timestep():
    assert [slot_of(t, 4) for t in (0, 249.9, 250, 999, 1000)] == [0, 0, 1, 3, 3]
    assert {slot_of(t, 1) for t in range(1001)} == {0}
    layer = FakeQuantLinear.from_linear(linear(), slots=4)
    with torch.no_grad():
        layer.a_clip[2] = torch.tensor([0.0, -1.0])
    x = torch.randn(3, 20)
    outs = {}
    for t in (10, 260, 510, 760):
        layer.set_slot(t)
        outs[t] = layer(x)
    assert torch.equal(outs[10], outs[260])
    assert torch.equal(outs[10], outs[760])
    clip = torch.tensor([0.5, 1 / (1 + math.e)])
    expected = F.linear(fake_quant_activation(x, clip, 4), layer.quantized_weight(), layer.bias)
    torch.testing.assert_close(outs[510], expected)


def test_a_nan_stays_in_its_token():
    layer = FakeQuantLinear.from_linear(linear())
    x = torch.randn(3, 20)
    x[1, 4] = torch.nan
    out = layer(x)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_scales_are_kept_positive():
    layer = FakeQuantLinear.from_linear(linear())
    with torch.no_grad():
        layer.w_scale[0] = -1.0
    layer.clamp_scales()
    assert (layer.w_scale > 0).all()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"w_bits": 1}, "w_bits"),
        ({"a_bits": 9}, "a_bits"),
        ({"w_bits": 4.0}, "w_bits"),
        ({"rank": -1}, "rank"),
        ({"rank": 99}, "rank"),
        ({"slots": 0}, "slots"),
        ({"compat": "other"}, "compat"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(arguments, word):
    with pytest.raises(QuantConfigError, match=word):
        FakeQuantLinear(20, 12, **arguments)
