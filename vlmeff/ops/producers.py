"""What a transformer block computes just before a linear layer, fused with the quantization of that layer's input.

Each op equals the sequence of operations that it stands for, and its reference is that sequence: a normalization or a
GELU, rounded to the dtype of its input, then ``act_quant_int8``. A kernel need not write the float tensor in between.
Accelerated back ends take the float steps in another order or with another exponential, so that a float may differ in
its last bit, a code then by one step, and a scale by one unit in the last place of x's dtype.

Shape letters: B batch, T tokens, K channels, M rows (B * T).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmeff.ops._arguments import check_tensors
from vlmeff.ops._dispatch import dispatch, operator
from vlmeff.ops.quantize import act_quant_int8

Norm = Literal["layer", "rms"]
Approximate = Literal["none", "tanh"]


@operator
def norm_quant_int8(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    eps: float,
    kind: Norm = "layer",
) -> tuple[Tensor, Tensor]:
    """Normalize each token, modulate it and quantize it to int8.

    n = (x - mean) / sqrt(var + eps) * weight + bias, or x / sqrt(mean(x^2) + eps) * weight; y = n (1 + scale) + shift,
    rounded to x.dtype; then ``act_quant_int8(y, smooth)``.

    n is computed in float32. Where it is rounded follows from the dtype of scale and shift, as in diffusers' blocks:
    float32 (Wan: ``(norm(x.float()) * (1 + scale) + shift).type_as(x)``) leaves y in float32 until its end; x.dtype
    (CogVideoX, HunyuanVideo, LTX: ``norm(x) * (1 + scale) + shift``) rounds n, 1 + scale, the product and the sum.
    A weight multiplies before n is rounded, as in ``torch.nn.LayerNorm``, ``torch.nn.RMSNorm`` and ``FP32LayerNorm``;
    diffusers' own ``RMSNorm`` with a weight in half precision rounds in between, and is not this.

    Args:
        x: [M, K] or [B, T, K], any float dtype.
        weight, bias: [K], any float dtype; bias only of kind "layer".
        scale, shift: [K], or of [B, T, K] inputs also [B, K], [B, 1, K] or [B, T, K]; float32 or x.dtype, both alike.
        smooth: [K] float32, as in ``act_quant_int8``.
        eps: added to the variance.  kind: "layer" or "rms".
    Returns:
        (q [M, K] int8, s [M, 1] float32).
    Raises:
        TypeError, ValueError: an argument does not fit.

    Tolerance of the back ends: scales within 2^-9 for bfloat16 and 1e-6 for float32, relative; at most 2 % and 0.1 %
    of the codes one step away. Sources: adaptive layer norm of diffusion transformers (arXiv 2212.09748), SmoothQuant
    (arXiv 2211.10438).

    A token whose channels are all equal has nothing but rounding errors left after a layer norm; unless a shift covers
    them, its codes are those of the errors.
    """
    op = "norm_quant_int8"
    _check_input(op, x, (2, 3), "[M, K] or [B, T, K]")
    if kind not in get_args(Norm):
        raise ValueError(f"{op}: kind must be one of {', '.join(get_args(Norm))}, got {kind!r}")
    if bias is not None and kind == "rms":
        raise ValueError(f"{op}: kind 'rms' takes no bias; pass it as shift")
    vectors = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "smooth": smooth}
    check_tensors(op, optional=vectors)
    k = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias), ("smooth", smooth)):
        if vector is not None and vector.shape != (k,):
            raise ValueError(f"{op}: {name} must be [K] with K = {k} (from x), got {tuple(vector.shape)}")
    for name, factor in (("scale", scale), ("shift", shift)):
        if factor is not None:
            _check_modulation(op, name, factor, x)
    if scale is not None and shift is not None and scale.dtype != shift.dtype:
        raise TypeError(f"{op}: scale and shift must have one dtype, got {scale.dtype} and {shift.dtype}")
    return dispatch(
        op,
        _norm_reference,
        x=x,
        weight=weight,
        bias=bias,
        scale=per_token(scale, x),
        shift=per_token(shift, x),
        smooth=smooth,
        eps=float(eps),
        kind=kind,
    )


def _norm_reference(
    *,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    smooth: Tensor | None,
    eps: float,
    kind: Norm,
) -> tuple[Tensor, Tensor]:
    weight, bias = (None if vector is None else vector.float() for vector in (weight, bias))
    if kind == "layer":
        y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    else:
        y = F.rms_norm(x.float(), x.shape[-1:], weight, eps)
    modulation = scale if scale is not None else shift
    if modulation is not None:
        y = y.to(modulation.dtype)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return act_quant_int8(y.to(x.dtype).flatten(0, -2), smooth)


@operator
def gelu_quant_int8(
    x: Tensor, smooth: Tensor | None = None, *, approximate: Approximate = "none"
) -> tuple[Tensor, Tensor]:
    """Apply GELU and quantize each token to int8: ``act_quant_int8(gelu(x, approximate), smooth)``.

    GELU is computed in float32 and rounded to x.dtype, as ``torch.nn.functional.gelu`` does.

    Args:
        x: [M, K], any float dtype.  smooth: as in ``act_quant_int8``.
        approximate: "none" for x Phi(x) with the error function, "tanh" for its approximation.
    Returns:
        (q [M, K] int8, s [M, 1] float32).
    Raises:
        TypeError, ValueError: an argument does not fit.

    Tolerance of the back ends: as of ``norm_quant_int8``. Source: arXiv 1606.08415.
    """
    op = "gelu_quant_int8"
    _check_input(op, x, (2,), "[M, K]")
    if approximate not in get_args(Approximate):
        raise ValueError(f"{op}: approximate must be one of {', '.join(get_args(Approximate))}, got {approximate!r}")
    check_tensors(op, optional={"smooth": smooth})
    if smooth is not None and smooth.shape != (x.shape[1],):
        raise ValueError(f"{op}: smooth must be [K] with K = {x.shape[1]} (from x), got {tuple(smooth.shape)}")
    return dispatch(op, _gelu_reference, x=x, smooth=smooth, approximate=approximate)


def _gelu_reference(*, x: Tensor, smooth: Tensor | None, approximate: Approximate) -> tuple[Tensor, Tensor]:
    return act_quant_int8(F.gelu(x, approximate=approximate), smooth)


def per_token(factor: Tensor | None, x: Tensor) -> Tensor | None:
    """A factor of tokens, with the dims of x: [K], or [1 or B, 1 or T, K]."""
    return factor[:, None] if factor is not None and x.ndim == 3 and factor.ndim == 2 else factor


def _check_input(op: str, x: Tensor, dims: tuple[int, ...], shape: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{op}: x must be a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim not in dims:
        raise ValueError(f"{op}: x must be {shape}, got {tuple(x.shape)}")


def _check_modulation(op: str, name: str, factor: Tensor, x: Tensor) -> None:
    k = x.shape[-1]
    legal: set[tuple[int, ...]] = {(k,)}
    if x.ndim == 3:
        batch, tokens = x.shape[:2]
        legal |= {(batch, k), (batch, 1, k), (1, 1, k), (batch, tokens, k)}
    if tuple(factor.shape) not in legal:
        also = f", [B, K], [B, 1, K] or [B, T, K] with x {tuple(x.shape)}" if x.ndim == 3 else ""
        raise ValueError(f"{op}: {name} must be [K] with K = {k}{also}, got {tuple(factor.shape)}")
    if factor.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{op}: {name} must be float32 or {x.dtype} (from x), got {factor.dtype}")
