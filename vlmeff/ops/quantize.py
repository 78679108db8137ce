"""Dynamic quantization of activations, one scale per token (row) or per group of channels of a token.

Everything is computed in float32; codes are rounded half to even. A row with a NaN or an infinity gets the scale NaN,
so that what is computed from it is NaN and not a silent zero. A row of zeros has the scale 1.

Shape letters: M tokens, K channels, n_g = ceil(K / group) groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmeff.ops._arguments import check_tensors
from vlmeff.ops._dispatch import dispatch, operator

FP8_MAX = 448.0  # of float8_e4m3fn
FP8 = torch.float8_e4m3fn
SMALLEST_SCALE = 1e-6  # of asymmetric codes


@operator
def act_quant_int8(x: Tensor, smooth: Tensor | None = None, *, bits: int = 8, group: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize each token to symmetric integers.

    s = max|x| / P with P = 2^(bits-1) - 1, q = clamp(rne(x / s), -P, P).

    Args:
        x: [M, K], any float dtype.
        smooth: [K] float32; x is divided by it first (SmoothQuant's migration), None for 1.
        bits: 2 to 8; the codes are int8 whatever it is.
        group: channels that share a scale, 0 for a whole token. The last group may be short.
    Returns:
        (q [M, K] int8, s [M, 1] or [M, n_g] float32).
    Raises:
        TypeError, ValueError: an argument does not fit.

    Tolerance of the back ends: none, codes and scales are equal bit for bit. Source: SmoothQuant, arXiv 2211.10438.
    """
    _check("act_quant_int8", x, smooth, bits)
    if group < 0:
        raise ValueError(f"act_quant_int8: group must be 0 (a whole token) or a number of channels, got {group}")
    return dispatch("act_quant_int8", _int8_reference, x=x, smooth=smooth, bits=bits, group=group)


def _int8_reference(*, x: Tensor, smooth: Tensor | None, bits: int, group: int) -> tuple[Tensor, Tensor]:
    largest = 2 ** (bits - 1) - 1
    x = _smoothed(x, smooth)
    scale = _scale_of(_largest(per_group(x.abs(), group)), largest)
    codes = (x / spread(scale, group, x.shape[1])).round_().clamp_(-largest, largest)
    return codes.nan_to_num_(0.0).to(torch.int8), scale


@operator
def act_quant_fp8(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each token to float8 (e4m3): s = max|x| / 448, q = clamp(x / s, -448, 448).

    Args:
        x: [M, K], any float dtype.  smooth: as in ``act_quant_int8``.
    Returns:
        (q [M, K] float8_e4m3fn, s [M, 1] float32).
    Raises:
        TypeError, ValueError: an argument does not fit.

    Tolerance of the back ends: none on a GPU. Source of the format: arXiv 2209.05433.
    """
    _check("act_quant_fp8", x, smooth, 8)
    return dispatch("act_quant_fp8", _fp8_reference, x=x, smooth=smooth)


def _fp8_reference(*, x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    x = _smoothed(x, smooth)
    scale = _scale_of(_largest(per_group(x.abs(), 0)), FP8_MAX)
    # The clamp is not for show: whether the cast saturates differs between versions of torch.
    return (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


@operator
def act_quant_uint(
    x: Tensor, *, bits: int, clip: Tensor | None = None, contain_zero: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize each token to unsigned integers with an integer zero-point.

    hi = c_hi max(max x, 0), lo = c_lo min(min x, 0), s = max((hi - lo) / P, 1e-6), z = clamp(rne(-lo / s), 0, P),
    q = clamp(rne(x / s) + z, 0, P), with P = 2^bits - 1.

    Args:
        x: [M, K], any float dtype.
        bits: 2 to 7, so that the codes fit an int8 product.
        clip: [2] float32, (c_lo, c_hi) in (0, 1]; None for 1.
        contain_zero: False leaves the range as it is, as QVGen's code does (arXiv 2505.11497): a token of one sign
            then loses its codes to clamping.
    Returns:
        (q [M, K] uint8, s [M, 1] float32, z [M, 1] int32, row sums of q [M, 1] int32).
    Raises:
        TypeError, ValueError: an argument does not fit.

    Tolerance of the back ends: none, everything is equal bit for bit.
    """
    _check("act_quant_uint", x, clip=clip, bits=bits, most=7)
    return dispatch("act_quant_uint", _uint_reference, x=x, bits=bits, clip=clip, contain_zero=contain_zero)


def _uint_reference(
    *, x: Tensor, bits: int, clip: Tensor | None, contain_zero: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    largest = 2**bits - 1
    x = x.float()
    lo, hi = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if x.shape[1] else (x.new_zeros(len(x), 1),) * 2
    if contain_zero:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if clip is not None:
        lo, hi = lo * clip[0], hi * clip[1]
    scale = _divided(hi - lo, largest).clamp(min=SMALLEST_SCALE)
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    zero = (-lo / scale).round().clamp(0, largest).nan_to_num(0.0)
    codes = (x / scale).round_().add_(zero).clamp_(0, largest).nan_to_num_(0.0).to(torch.uint8)
    return codes, scale, zero.to(torch.int32), codes.sum(-1, keepdim=True, dtype=torch.int32)


def per_group(x: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., n_g, group], the last group filled with zeros; one group of all channels where it is 0."""
    if group <= 0 or group >= x.shape[-1]:
        return x.unsqueeze(-2)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group))
    return padded.unflatten(-1, (-1, group))


def spread(scale: Tensor, group: int, k: int) -> Tensor:
    """Scales [..., n_g] for every channel: [..., K], or [..., 1] where one scale serves all."""
    return scale if scale.shape[-1] == 1 else scale.repeat_interleave(group, -1)[..., :k]


def _largest(values: Tensor) -> Tensor:
    return values.amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])


def _scale_of(largest_value: Tensor, largest_code: float) -> Tensor:
    scale = _divided(largest_value, largest_code)
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.where(torch.isfinite(scale), scale, torch.nan)


def _divided(x: Tensor, number: float) -> Tensor:
    """IEEE division: on CUDA torch multiplies by the reciprocal of a Python number, one bit less exact."""
    return x / torch.full_like(x, number)


def _smoothed(x: Tensor, smooth: Tensor | None) -> Tensor:
    return x.float() if smooth is None else x.float() / smooth


def _check(
    op: str, x: Tensor, smooth: Tensor | None = None, bits: int = 8, *, clip: Tensor | None = None, most: int = 8
) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{op}: x must be a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be [M, K], got {tuple(x.shape)}; flatten the leading dimensions")
    check_tensors(op, optional={"smooth": smooth, "clip": clip})
    if not isinstance(bits, int) or not 2 <= bits <= most:
        raise ValueError(f"{op}: bits must be 2 to {most}, got {bits}")
    if smooth is not None and smooth.shape != (x.shape[1],):
        raise ValueError(f"{op}: smooth must be [K] with K = {x.shape[1]} (from x), got {tuple(smooth.shape)}")
    if clip is not None and clip.shape != (2,):
        raise ValueError(f"{op}: clip must be [2], got {tuple(clip.shape)}")
