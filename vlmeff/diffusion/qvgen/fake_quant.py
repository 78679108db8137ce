"""Linear layers that are quantized in the forward pass only, with learned ranges, and the auxiliary module Phi.

Source: "QVGen" (arXiv 2505.11497): LSQ+ weights per output channel with a learned scale and a learned, real-valued
zero-point; activations per token with a learned clip; Phi in parallel, fed with the quantized activation.

Shape letters: N output features, K input features, P = 2^bits - 1, G slots of timesteps, r0 rank of Phi at the start.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmeff.diffusion.qvgen.factors import low_rank_factors
from vlmeff.errors import QuantConfigError

if TYPE_CHECKING:
    from vlmeff.diffusion.layers import QuantLinear

Compat = Literal["qvgen"] | None
PhiStart = Literal["svd", "lora"] | None
TRAIN_TIMESTEPS = 1000  # of every scheduler of diffusers' video models
CLIP_START = 0.95
COMPAT_CLIP = 0.95  # official code shrinks the range by this constant and by the learned factor
SMALLEST_WEIGHT_SCALE = 1e-8  # kept by ``clamp_scales``
SMALLEST_SCALE = 1e-6  # of a token
COMPAT_SMALLEST_SCALE = 1e-9


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through (exact: round(x) - x has no rounding error)."""
    return x + (x.round() - x).detach()


def clamp_codes(x: Tensor, largest: int) -> Tensor:
    """Clamp to 0..largest; the gradient passes inside, the end codes 0 and ``largest`` included.

    Not ``Tensor.clamp``: in torch 2.13 it did so too, in 2.15 it gives the ends no gradient, which would freeze every
    weight on the first or last code (a third of a Gaussian row at 2 bits, a twentieth at 4).
    """
    return torch.where((x >= 0) & (x <= largest), x, x.detach().clamp(0, largest))


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, bit for bit, whose gradient is multiplied by a factor."""
    small = x * factor
    return x.detach() + (small - small.detach())


def fake_quant_weight(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize a weight with learned ranges (LSQ+).

    W^ = s (clamp(rne(W / s + z), 0, P) - z), z real. With v = W / s + z, q = the codes, m = 1[0 <= rne(v) <= P],
    upstream gradient g and f = 1 / sqrt(K P):

        dW = g m,   ds = f sum_k g ((q - z) - m W / s),   dz = f sum_k g s (m - 1)

    Args:
        weight: [N, K] float32.  scale, zero: [N, 1] float32.  bits: 2 to 8.
    Returns:
        [N, K] float32.
    """
    largest = 2**bits - 1
    factor = 1 / math.sqrt(weight.shape[1] * largest)
    scale, zero = scale_gradient(scale, factor), scale_gradient(zero, factor)
    return scale * (clamp_codes(round_ste(weight / scale + zero), largest) - zero)


def fake_quant_activation(x: Tensor, clip: Tensor, bits: int, *, compat: Compat = None) -> Tensor:
    """Quantize and dequantize each token (last dimension) to unsigned integers, its range shrunk by a learned clip.

    hi = c_hi max(max x, 0), lo = c_lo min(min x, 0), s = max((hi - lo) / P, 1e-6), z = clamp(rne(-lo / s), 0, P),
    x^ = s (clamp(rne(x / s) + z, 0, P) - z). Gradients reach x and the clip through s; z is a constant, as in the
    official code.

    Args:
        x: [..., K], any float dtype; computed in float32.
        clip: [2] float32, (c_lo, c_hi) in (0, 1].
        compat: "qvgen" computes as the official code: the range need not contain 0 (a token of one sign loses its codes
            to clamping) and is shrunk by 0.95 beside the clip.
    Returns:
        [..., K] in x.dtype.
    """
    largest = 2**bits - 1
    dtype, x = x.dtype, x.float()
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if compat == "qvgen":
        lo, hi = lo * COMPAT_CLIP, hi * COMPAT_CLIP
    else:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    lo, hi = lo * clip[0], hi * clip[1]
    smallest = COMPAT_SMALLEST_SCALE if compat == "qvgen" else SMALLEST_SCALE
    scale = ((hi - lo) / largest).clamp(min=smallest)
    zero = (-lo / scale).detach().round().clamp(0, largest)
    codes = clamp_codes(round_ste(x / scale) + zero, largest)
    return (scale * (codes - zero)).to(dtype)


class FakeQuantLinear(nn.Module):
    """Train a linear layer as it will be quantized: y = (Q_w(W) + (L gamma) R) Q_x(x) + b.

    Parameters: ``weight`` [N, K] and ``bias`` (float32 masters), ``w_scale``, ``w_zero`` [N, 1], ``a_clip`` [G, 2]
    (logits of the low and the high factor) and, while the rank is above 0, ``phi_L`` [N, r0], ``phi_R`` [r0, K].
    Buffers: ``gamma`` [r0] (written by the controller, so that no number is baked into a compiled graph; columns from
    ``rank`` on are 0), ``rank`` and ``slot`` (int64).

    Switches: ``use_weight_quant``, ``use_act_quant``, ``use_phi``; with all off the layer is ``F.linear``, bit for bit.
    ``recompute`` computes the fake-quantized tensors again in the backward pass instead of keeping them.

    Args:
        w_bits, a_bits: 2 to 8.
        rank: r0; 0 leaves Phi out.
        slots: G, intervals of the timestep with a clip each.
        compat: "qvgen" computes activations as the official code does.
    Raises:
        QuantConfigError: bits, rank, slots or compat out of range.
    """

    gamma: Tensor | None
    rank: Tensor
    slot: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        w_bits: int = 4,
        a_bits: int = 4,
        bias: bool = True,
        rank: int = 0,
        slots: int = 1,
        compat: Compat = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_bits(w_bits, a_bits)
        if not 0 <= rank <= min(in_features, out_features):
            raise QuantConfigError(
                f"FakeQuantLinear: rank={rank} must lie in 0..{min(in_features, out_features)} for a layer "
                f"{in_features} -> {out_features}."
            )
        if slots < 1:
            raise QuantConfigError(f"FakeQuantLinear: slots={slots} must be at least 1.")
        if compat not in (None, "qvgen"):
            raise QuantConfigError(f"FakeQuantLinear: compat={compat!r} must be None or 'qvgen'.")
        self.in_features, self.out_features = in_features, out_features
        self.w_bits, self.a_bits, self.compat = w_bits, a_bits, compat
        self.use_weight_quant = self.use_act_quant = self.use_phi = True
        self.recompute = False

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=torch.float32))

        self.weight = empty(out_features, in_features)
        self.bias = empty(out_features) if bias else None
        self.w_scale, self.w_zero = empty(out_features, 1), empty(out_features, 1)
        self.a_clip = empty(slots, 2)
        nn.init.ones_(self.w_scale)
        nn.init.constant_(self.a_clip, math.log(CLIP_START / (1 - CLIP_START)))
        self.phi_L = empty(out_features, rank) if rank else None
        self.phi_R = empty(rank, in_features) if rank else None
        self.register_buffer("gamma", torch.ones(rank, device=device) if rank else None)
        self.register_buffer("rank", torch.tensor(rank, device=device))
        self.register_buffer("slot", torch.tensor(0, device=device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        w_bits: int = 4,
        a_bits: int = 4,
        phi: PhiStart = None,
        rank: int = 32,
        slots: int = 1,
        compat: Compat = None,
        initialise: bool = True,
        seed: int = 0,
    ) -> FakeQuantLinear:
        """Take over a linear layer; ranges by the search of least error, Phi from what quantization loses.

        Args:
            phi: "svd": the best approximation of W - Q_w(W) of this rank; "lora": L = 0 and R random (a control that
                shows what the decomposition is good for); None: no Phi.
            rank: at most min(N, K), which it is cut to.
            initialise: False leaves ranges and Phi for a state dict that is to be loaded.
        """
        n, k = linear.weight.shape
        layer = cls(
            k,
            n,
            w_bits=w_bits,
            a_bits=a_bits,
            bias=linear.bias is not None,
            rank=min(rank, n, k) if phi is not None else 0,
            slots=slots,
            compat=compat,
            device=linear.weight.device,
        )
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
            if initialise:
                layer.initialise_ranges()
                layer.initialise_phi(phi, seed=seed)
        return layer.train(linear.training)

    @torch.no_grad()
    def initialise_ranges(self) -> None:
        """Set scale and zero-point of each output channel by the search of least error."""
        from vlmeff.diffusion.quantizers import mse_range

        scale, zero = mse_range(self.weight, self.w_bits, zero="float", contain_zero=self.compat is None)
        self.w_scale.copy_(scale)
        self.w_zero.copy_(zero)

    @torch.no_grad()
    def initialise_phi(self, start: PhiStart, *, seed: int = 0) -> None:
        """Set the factors of Phi; the ranges must have been set."""
        if self.phi_L is None or self.phi_R is None or start is None:
            return
        rank = self.phi_L.shape[1]
        if start == "svd":
            left, right = low_rank_factors(self.weight - self.quantized_weight(), rank, seed=seed)
        else:
            generator = torch.Generator().manual_seed(seed)
            right = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
            left = torch.zeros_like(self.phi_L)
        self.phi_L.copy_(left)
        self.phi_R.copy_(right)

    def quantized_weight(self) -> Tensor:
        """Q_w(W), [N, K] float32, differentiable."""
        return fake_quant_weight(self.weight, self.w_scale, self.w_zero, self.w_bits)

    def phi_factors(self) -> tuple[Tensor, Tensor] | None:
        """(L gamma [N, r0], R [r0, K]), whose product is Phi; None once it is gone."""
        if self.phi_L is None or self.phi_R is None or self.gamma is None:
            return None
        return self.phi_L * self.gamma, self.phi_R

    def clip(self) -> Tensor:
        """The learned factors (c_lo, c_hi) of the current slot, [2]."""
        return self.a_clip.index_select(0, self.slot.view(1))[0].sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        # Codes are defined in float32: mixed precision may only enter the product.
        with torch.autocast(x.device.type, enabled=False):
            if self.use_act_quant:
                x = fake_quant_activation(x, self.clip(), self.a_bits, compat=self.compat)
            if self.use_weight_quant:
                weight = self.quantized_weight()
            if self.use_phi and (factors := self.phi_factors()) is not None:
                weight = weight + factors[0] @ factors[1]
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep scales positive; call after each step of the optimizer."""
        self.w_scale.clamp_(min=SMALLEST_WEIGHT_SCALE)

    def set_slot(self, timestep: float) -> None:
        """Choose the clip of a timestep in [0, 1000]."""
        self.slot.fill_(slot_of(timestep, len(self.a_clip)))

    def remove_phi(self) -> None:
        """Drop the factors: from here on the layer is what will be exported."""
        self.phi_L = self.phi_R = self.gamma = None
        self.rank.zero_()

    def to_inference(self, *, name: str = "this layer", dtype: torch.dtype | None = None) -> QuantLinear:
        """The packed integer layer that computes the same; see ``export.to_inference``."""
        from vlmeff.diffusion.qvgen.export import to_inference

        return to_inference(self, name=name, dtype=dtype)

    def extra_repr(self) -> str:
        phi = "" if self.phi_L is None else f", phi_rank={self.phi_L.shape[1]}"
        bits = f"w_bits={self.w_bits}, a_bits={self.a_bits}, slots={len(self.a_clip)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits}{phi}"


def slot_of(timestep: float, slots: int) -> int:
    """floor(t G / 1000), at most G - 1. By the real timestep: nothing counts calls."""
    return min(max(int(timestep * slots / TRAIN_TIMESTEPS), 0), slots - 1)


def check_bits(w_bits: int, a_bits: int) -> None:
    for name, bits in (("w_bits", w_bits), ("a_bits", a_bits)):
        if type(bits) is not int or not 2 <= bits <= 8:
            raise QuantConfigError(f"{name}={bits!r} must be 2 to 8.")
