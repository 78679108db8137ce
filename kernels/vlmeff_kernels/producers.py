"""Triton back ends of (norm + modulate + quantize) and (GELU + quantize): a row is read once, its codes are written.

    norm:  y = (x - mean) / sqrt(var + eps) * w + b,   y (1 + scale) + shift    var of the differences, not of squares
    gelu:  y = x / 2 (1 + erf(x / sqrt 2)),            or with tanh(sqrt(2 / pi) (x + 0.044715 x^3)) for erf
    then:  s = max|y| / 127, q = rne(y / s), of y rounded to the dtype of x and divided by the smoothing factors

A program owns a row, as HEAD and TAIL (``quantize``). From the rounded y on all is exact; before it a sum in another
order or tanh from an exponential may differ from the reference in the last bit of float32. Then y may differ in the
last bit of its dtype, a code by one step, and a scale by that bit of the row's largest |y|.

Kernel arguments: pointers, sizes, strides, scalars, constexprs. Shape letters: B batch, T tokens, K channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmeff_kernels import _launch
from vlmeff_kernels._backend import Kernel
from vlmeff_kernels._library import call, define
from vlmeff_kernels.quantize import ONE_PASS, and_smoothed, channels_of, dtype_refusal, row_blocks, row_warps, size_of
from vlmeff_kernels.rounding import magnitude, number_of, rounded_to, symmetric_codes, symmetric_scale

INT8_MAX = tl.constexpr(127.0)
HALF_ROOT = tl.constexpr(0.7071067811865476)  # sqrt(1 / 2)
TANH_FACTOR = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
TANH_CUBE = tl.constexpr(0.044715)
DOUBLE_LOG2_E = tl.constexpr(2.8853900817779268)


@triton.jit
def after_smoothing(y, smooth, k, inside, SMOOTH: tl.constexpr):
    if SMOOTH:
        factors = tl.load(smooth + k) if inside is None else tl.load(smooth + k, mask=inside, other=1.0)
        return tl.div_rn(y.to(tl.float32), factors)
    else:
        return y


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """As PyTorch writes it, cancellation far below zero included. erf and tanh are within some units of 2^-24."""
    if TANH:
        inner = (x + x * x * x * TANH_CUBE) * TANH_FACTOR
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(inner * DOUBLE_LOG2_E))
    else:
        bent = tl.math.erf(x * HALF_ROOT)
    return x * 0.5 * (1.0 + bent)


@triton.jit
def gelu_part(x, smooth, k, inside, SMOOTH: tl.constexpr, TANH: tl.constexpr):
    values = channels_of(x, k, inside)
    y = rounded_to(gelu(values.to(tl.float32), TANH), values.dtype)
    return after_smoothing(y, smooth, k, inside, SMOOTH)


@triton.jit
def gelu_quant_row(
    x, smooth, codes, scales, channels, x_m,
    SMOOTH: tl.constexpr, TANH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_m
    codes += row * channels
    k = tl.arange(0, HEAD)
    head = gelu_part(x, smooth, k, None, SMOOTH, TANH)
    largest = tl.max(magnitude(head))
    if TAIL:
        rest = HEAD + tl.arange(0, TAIL)
        tail = gelu_part(x, smooth, rest, rest < channels, SMOOTH, TANH)
        largest = tl.maximum(largest, tl.max(magnitude(tail)))
    scale = symmetric_scale(number_of(largest, head.dtype), INT8_MAX)
    tl.store(scales + row, scale)
    tl.store(codes + k, symmetric_codes(head, scale, INT8_MAX, False))
    if TAIL:
        tl.store(codes + rest, symmetric_codes(tail, scale, INT8_MAX, False), mask=rest < channels)


@triton.jit
def factors_of(pointer, k, inside):
    return channels_of(pointer, k, inside).to(tl.float32)


@triton.jit
def in_steps_of(y, DTYPE: tl.constexpr):
    return rounded_to(y, DTYPE).to(tl.float32)


@triton.jit
def modulated(
    y, weight, bias, scale, shift, smooth, k, inside, DTYPE: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SMOOTH: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Channels k of a normalized row to what is quantized. EACH: every step is rounded to DTYPE, else the last one."""
    step: tl.constexpr = DTYPE if EACH else tl.float32
    if WEIGHT:
        y *= factors_of(weight, k, inside)
    if BIAS:
        y += factors_of(bias, k, inside)
    y = in_steps_of(y, step)
    if SCALE:
        y = in_steps_of(y * in_steps_of(factors_of(scale, k, inside) + 1.0, step), step)
    if SHIFT:
        y = in_steps_of(y + factors_of(shift, k, inside), step)
    return after_smoothing(rounded_to(y, DTYPE), smooth, k, inside, SMOOTH)


@triton.jit(do_not_specialize=["tokens"])
def norm_quant_row(
    x, weight, bias, scale, shift, smooth, codes, scales, tokens, channels,
    x_b, x_t, scale_b, scale_t, shift_b, shift_t, eps,
    LAYER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    SMOOTH: tl.constexpr, EACH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    dtype: tl.constexpr = x.dtype.element_ty
    x += batch * x_b + token * x_t
    codes += row * channels
    if SCALE:
        scale += batch * scale_b + token * scale_t
    if SHIFT:
        shift += batch * shift_b + token * shift_t
    k, rest = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)
    inside = rest < channels
    head = channels_of(x, k, None).to(tl.float32)
    if TAIL:
        tail = channels_of(x, rest, inside).to(tl.float32)
    if LAYER:
        mean = tl.sum(head)
        if TAIL:
            mean += tl.sum(tail)
        mean = tl.div_rn(mean, channels * 1.0)
        head -= mean
        if TAIL:
            tail = tl.where(inside, tail - mean, 0.0)
    square = tl.sum(head * head)
    if TAIL:
        square += tl.sum(tail * tail)
    variance = (tl.div_rn(square, channels * 1.0) + eps).to(tl.float32)  # eps may come as a float64
    spread = tl.div_rn(1.0, tl.sqrt_rn(variance))
    head = modulated(
        head * spread, weight, bias, scale, shift, smooth, k, None, dtype, WEIGHT, BIAS, SCALE, SHIFT, SMOOTH, EACH
    )
    largest = tl.max(magnitude(head))
    if TAIL:
        tail = modulated(
            tail * spread, weight, bias, scale, shift, smooth, rest, inside, dtype,
            WEIGHT, BIAS, SCALE, SHIFT, SMOOTH, EACH,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.where(inside, magnitude(tail), 0)))
    step = symmetric_scale(number_of(largest, head.dtype), INT8_MAX)
    tl.store(scales + row, step)
    tl.store(codes + k, symmetric_codes(head, step, INT8_MAX, False))
    if TAIL:
        tl.store(codes + rest, symmetric_codes(tail, step, INT8_MAX, False), mask=inside)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, channels = x.shape[:-1].numel(), x.shape[-1]
    return x.new_empty((rows, channels), dtype=torch.int8), x.new_empty((rows, 1), dtype=torch.float32)


def _gelu_quant(x: Tensor, smooth: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _outputs(x)
    rows, channels = x.shape
    _launch.launch(
        gelu_quant_row, (rows,), x, smooth, codes, scales, channels, x.stride(0),
        warps=2 * row_warps(channels), SMOOTH=smooth is not None, TANH=tanh, **row_blocks(channels),
    )  # fmt: skip
    return codes, scales


def _gelu_quant_fake(x: Tensor, smooth: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    return _outputs(x)


def _norm_warps(channels: int) -> int:
    """Long rows of float32 spill, with all factors, unless they are spread over all the threads of a block."""
    return 32 if channels > ONE_PASS // 2 else 2 * row_warps(channels)


def _norm_quant(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, eps: float, layer: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [B, T, K]; scale and shift expanded to that."""
    codes, scales = _outputs(x)
    batch, tokens, channels = x.shape
    modulation = scale if scale is not None else shift
    strides = [(0, 0) if factor is None else factor.stride()[:2] for factor in (scale, shift)]
    _launch.launch(
        norm_quant_row, (batch * tokens,), x, weight, bias, scale, shift, smooth, codes, scales, tokens, channels,
        *x.stride()[:2], *strides[0], *strides[1], eps,
        warps=_norm_warps(channels), LAYER=layer, WEIGHT=weight is not None, BIAS=bias is not None,
        SCALE=scale is not None, SHIFT=shift is not None, SMOOTH=smooth is not None,
        EACH=modulation is not None and modulation.dtype != torch.float32, **row_blocks(channels),
    )  # fmt: skip
    return codes, scales


def _norm_quant_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, eps: float, layer: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(x)


define("gelu_quant_int8", "(Tensor x, Tensor? smooth, bool tanh) -> (Tensor, Tensor)", _gelu_quant, _gelu_quant_fake)
define(
    "norm_quant_int8",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? smooth, float eps, bool layer) "
    "-> (Tensor, Tensor)",
    _norm_quant,
    _norm_quant_fake,
)


class GeluQuantInt8(Kernel):
    op = "gelu_quant_int8"

    def refuses(self, *, x: Tensor, smooth: Tensor | None, approximate: str) -> str | None:
        return _length_refusal(x) or dtype_refusal(x, smooth=smooth)

    def bucket(self, *, x: Tensor, smooth: Tensor | None, approximate: str) -> str:
        return f"{size_of(x)}, {'erf' if approximate == 'none' else approximate}{and_smoothed(smooth)}"

    def run(self, *, x: Tensor, smooth: Tensor | None, approximate: str) -> Any:
        return call("gelu_quant_int8", x, smooth, approximate == "tanh")


class NormQuantInt8(Kernel):
    op = "norm_quant_int8"

    def refuses(self, *, x: Tensor, smooth: Tensor | None, **others: Any) -> str | None:
        return _length_refusal(x) or dtype_refusal(x, smooth=smooth)

    def bucket(self, *, x: Tensor, smooth: Tensor | None, kind: str, **factors: Any) -> str:
        given = [name for name in ("weight", "bias", "scale", "shift") if factors.get(name) is not None]
        return ", ".join([size_of(x), kind, *given]) + and_smoothed(smooth)

    def run(
        self,
        *,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        smooth: Tensor | None,
        eps: float,
        kind: str,
    ) -> Any:
        x = x if x.ndim == 3 else x[None]
        scale, shift = (None if factor is None else factor.expand(x.shape) for factor in (scale, shift))
        return call("norm_quant_int8", x, weight, bias, scale, shift, smooth, eps, kind == "layer")


def _length_refusal(x: Tensor) -> str | None:
    if 1 <= x.shape[-1] <= ONE_PASS:
        return None
    return f"it takes rows of 1 to {ONE_PASS} channels, not {x.shape[-1]}"


GELU_QUANT_INT8, NORM_QUANT_INT8 = GeluQuantInt8(), NormQuantInt8()
