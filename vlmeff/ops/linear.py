"""Linear layers on quantized weights: y = x W^T + b, with W given as codes and scales.

Integer paths are exact up to the last step: codes are multiplied and summed in int32, corrections of zero-points are
subtracted in int32, and only then scales come in, in float32, with one rounding to the output dtype. (Expanding the
zero-points in float32 instead costs two digits.)

Weights lie as in the checkpoint: 8-bit codes [N, K], narrower ones packed two to a byte (``packing``), signed codes as
code + 8; scales [N, 1] or [N, n_g] for groups of ``group`` channels, the last of which may be short.

All raise TypeError or ValueError where an argument does not fit. Tolerance of the back ends, relative Frobenius error:
1e-6 for float32 outputs of the integer paths and for weight-only products in float32, half an ulp for half outputs,
1e-2 for fp8 (the accumulators of tensor cores have fewer bits).

Shape letters: M tokens, K input features, N output features, n_g groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmeff.ops._arguments import autocast_off, check_tensors
from vlmeff.ops._dispatch import dispatch, operator
from vlmeff.ops.packing import unpack_nibbles
from vlmeff.ops.quantize import spread

SIGNED_OFFSET = 8  # a signed 4-bit code is stored as code + 8


@operator
def linear_w8a8_int8(
    q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Y[m, n] = s[m] ws[n] sum_k q[m, k] wq[n, k] + bias[n].

    Args:
        q: [M, K] int8.  s: [M, 1] float32.  wq: [N, K] int8.  ws: [N, 1] float32.  bias: [N] or None.
    Returns:
        [M, N] of out_dtype.
    Raises, tolerance: see the module.  Source: LLM.int8's per-token and per-channel scales, arXiv 2208.07339.
    """
    _check("linear_w8a8_int8", q, wq, bias, ws, s=s, codes=torch.int8)
    return dispatch("linear_w8a8_int8", _w8a8_int8, q=q, s=s, wq=wq, ws=ws, bias=bias, out_dtype=out_dtype)


def _w8a8_int8(*, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return _finish(int_matmul(q, wq).float() * s * ws.float().T, bias, out_dtype)


@operator
def linear_w8a8_fp8(
    q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As ``linear_w8a8_int8`` with float8_e4m3fn codes; products are summed in float32 in no particular order.

    Source of the format: arXiv 2209.05433.
    """
    _check("linear_w8a8_fp8", q, wq, bias, ws, s=s, codes=torch.float8_e4m3fn)
    return dispatch("linear_w8a8_fp8", _w8a8_fp8, q=q, s=s, wq=wq, ws=ws, bias=bias, out_dtype=out_dtype)


def _w8a8_fp8(*, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    with autocast_off(q):
        product = q.float() @ wq.float().T
    return _finish(product * s * ws.float().T, bias, out_dtype)


@operator
def linear_wna16(
    x: Tensor, wq: Tensor, ws: Tensor, wz: Tensor | None, bias: Tensor | None, *, bits: int, group: int = 0
) -> Tensor:
    """Weight-only: W = ws (wq - wz) in float32, rounded to the dtype of x, then an ordinary product.

    At many tokens this is bound by arithmetic and no faster than the unquantized layer: it saves memory.

    Args:
        x: [M, K] float.  bits: 8 (wq int8 or float8_e4m3fn [N, K]) or at most 4 (wq packed uint8 [N, ceil(K / 2)]).
        ws: [N, 1] or [N, n_g].
        wz: as ws, the zero-point in codes; None means symmetric codes (packed ones are code + 8).
    Returns:
        [M, N] in x.dtype.
    Raises, tolerance: see the module.  Source: groups of scales as in GPTQ (arXiv 2210.17323) and AWQ (arXiv
    2306.00978).
    """
    if bits != 8 and not 2 <= bits <= 4:
        raise ValueError(f"linear_wna16: bits must be 8 or 2 to 4, got {bits}")
    _check("linear_wna16", x, wq, bias, ws, wz=wz, group=group, packed=bits != 8)
    return dispatch("linear_wna16", _wna16, x=x, wq=wq, ws=ws, wz=wz, bias=bias, bits=bits, group=group)


def _wna16(
    *, x: Tensor, wq: Tensor, ws: Tensor, wz: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    weight = dequantize_weight(wq, ws, wz, bits=bits, group=group, k=x.shape[1]).to(x.dtype)
    with autocast_off(x):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@operator
def linear_w4a8_int8(
    q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype, *, group: int = 0
) -> Tensor:
    """Signed 4-bit weights on int8 codes: Y = sum_g s[m, g] ws[n, g] sum_{k in g} q[m, k] w[n, k] + bias.

    Args:
        q: [M, K] int8.  s: [M, 1], or [M, n_g] for activations that were quantized in the same groups, float32.
        wq: packed [N, ceil(K / 2)] uint8 (code + 8).  ws: [N, 1] or [N, n_g].  group: 0 for one scale per output.
    Returns:
        [M, N] of out_dtype.
    Raises, tolerance: see the module.  Source: W4A8 with integer products, QServe, arXiv 2405.04532.
    """
    _check("linear_w4a8_int8", q, wq, bias, ws, s=s, group=group, packed=True, codes=torch.int8)
    return dispatch("linear_w4a8_int8", _w4a8_int8, q=q, s=s, wq=wq, ws=ws, bias=bias, out_dtype=out_dtype, group=group)


def _w4a8_int8(
    *, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype, group: int
) -> Tensor:
    k = q.shape[1]
    codes = unpack_nibbles(wq, k, dtype=torch.int8).sub_(SIGNED_OFFSET)
    width = group if 0 < group < k else max(k, 1)
    out = torch.zeros(len(q), len(wq), dtype=torch.float32, device=q.device)
    for i in range(ws.shape[1]):
        here = slice(i * width, min((i + 1) * width, k))
        scale = s[:, i : i + 1] if s.shape[1] > 1 else s
        out += int_matmul(q[:, here], codes[:, here]).float() * scale * ws[:, i].float()
    return _finish(out, bias, out_dtype)


@operator
def linear_wnan_int(
    q: Tensor,
    s: Tensor,
    z: Tensor,
    rowsum: Tensor,
    wq: Tensor,
    ws: Tensor,
    wz: Tensor,
    colsum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Unsigned weights on unsigned activations, both with zero-points (QVGen's W4A4 and W3A3).

    Y[m, n] = s[m] ws[n] ((acc - z[m] colsum[n]) - wz[n] (rowsum[m] - K z[m])) + bias[n],  acc = q wq^T.

    Args:
        q: [M, K] uint8 codes of at most 7 bits.  s: [M, 1] float32.  z, rowsum: [M, 1] int32.
        wq: packed [N, ceil(K / 2)] uint8.  ws, wz: [N, 1] float32, wz real-valued.  colsum: [N] int32, sums of codes.
    Returns:
        [M, N] of out_dtype.
    Raises, tolerance: see the module.  Source: QVGen, arXiv 2505.11497; the expansion of zero-points in int32 is ours.
    """
    _check("linear_wnan_int", q, wq, bias, ws, s=s, wz=wz, packed=True, codes=torch.uint8)
    check_tensors("linear_wnan_int", z=z, rowsum=rowsum, colsum=colsum)
    for name, sums, shape in (("z", z, (len(q), 1)), ("rowsum", rowsum, (len(q), 1)), ("colsum", colsum, (len(wq),))):
        if sums.shape != shape or sums.dtype != torch.int32:
            got = f"{str(sums.dtype).removeprefix('torch.')} {list(sums.shape)}"
            raise ValueError(f"linear_wnan_int: {name} must be int32 {list(shape)}, got {got}")
    arguments = {"q": q, "s": s, "z": z, "rowsum": rowsum, "wq": wq, "ws": ws, "wz": wz, "colsum": colsum}
    return dispatch("linear_wnan_int", _wnan_int, **arguments, bias=bias, out_dtype=out_dtype)


def _wnan_int(
    *,
    q: Tensor,
    s: Tensor,
    z: Tensor,
    rowsum: Tensor,
    wq: Tensor,
    ws: Tensor,
    wz: Tensor,
    colsum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    k = q.shape[1]
    codes = unpack_nibbles(wq, k, dtype=torch.int8)
    inner = int_matmul(q.to(torch.int8), codes) - z * colsum
    outer = rowsum - k * z
    return _finish(s * ws.float().T * (inner.float() - wz.float().T * outer.float()), bias, out_dtype)


def dequantize_weight(wq: Tensor, ws: Tensor, wz: Tensor | None, *, bits: int, group: int, k: int) -> Tensor:
    """W = ws (wq - wz), [N, K] float32, from codes as they are stored."""
    codes = wq.float() if bits == 8 else unpack_nibbles(wq, k, dtype=torch.float32)
    if wz is not None:
        codes = codes - spread(wz.float(), group, k)
    elif bits != 8:
        codes.sub_(SIGNED_OFFSET)
    if ws.shape[1] > 1 and group * ws.shape[1] == k:  # without a copy of the scales for every channel
        return (codes.unflatten(1, (-1, group)) * ws.float()[..., None]).flatten(1)
    return codes * spread(ws.float(), group, k)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact [M, K] int8 times [N, K] int8, transposed: [M, N] int32."""
    if a.shape[0] == 0 or a.shape[1] == 0:
        return torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    if a.device.type != "cuda":
        return torch._int_mm(a.contiguous(), b.contiguous().T)
    # cuBLAS wants more than 16 rows and multiples of 8.
    rows, columns, k = max(0, 17 - len(a)), -len(b) % 8, -a.shape[1] % 8
    product = torch._int_mm(F.pad(a, (0, k, 0, rows)), F.pad(b, (0, k, 0, columns)).contiguous().T)
    return product[: len(a), : len(b)]


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.float()).to(dtype)


def _check(
    op: str,
    x: Tensor,
    wq: Tensor,
    bias: Tensor | None,
    ws: Tensor,
    *,
    s: Tensor | None = None,
    wz: Tensor | None = None,
    group: int = 0,
    packed: bool = False,
    codes: torch.dtype | None = None,
) -> None:
    check_tensors(op, **{"x" if codes is None else "q": x}, wq=wq, ws=ws, optional={"s": s, "wz": wz, "bias": bias})
    if x.ndim != 2:
        raise ValueError(f"{op}: the input must be [M, K], got {tuple(x.shape)}; flatten the leading dimensions")
    rows, k = x.shape
    stored = (k + 1) // 2 if packed else k
    if wq.ndim != 2 or wq.shape[1] != stored:
        what = f"packed [N, {stored}]" if packed else f"[N, {stored}]"
        raise ValueError(f"{op}: wq must be {what} (from the input), got {tuple(wq.shape)}")
    if codes is not None and x.dtype != codes:
        raise TypeError(f"{op}: q must be {codes}, got {x.dtype}")
    if codes is None and not x.is_floating_point():
        raise TypeError(f"{op}: x must be a float tensor, got {x.dtype}")
    stored_as = (torch.uint8,) if packed else (torch.int8, torch.float8_e4m3fn) if codes is None else (codes,)
    if wq.dtype not in stored_as:
        raise TypeError(f"{op}: wq must be {' or '.join(map(str, stored_as))}, got {wq.dtype}")
    groups = -(-k // group) if 0 < group < k else 1
    for name, scale in (("ws", ws), ("wz", wz)):
        if scale is not None and scale.shape != (len(wq), groups):
            raise ValueError(f"{op}: {name} must be {[len(wq), groups]} (from wq and group), got {tuple(scale.shape)}")
    # Without the last dimension a scale would broadcast along the wrong one where M = N.
    if s is not None and s.shape not in ((rows, 1), (rows, groups)):
        raise ValueError(f"{op}: s must be {[rows, 1]} (from q) or of the weights' groups, got {tuple(s.shape)}")
    if bias is not None and bias.shape != (len(wq),):
        raise ValueError(f"{op}: bias must be [{len(wq)}] (from wq), got {tuple(bias.shape)}")
