"""Back end ``"torch"`` of the 8-bit linear layers: ``torch._scaled_mm`` and ``torch._int_mm``, which call cuBLASLt.

Both ops take sizes that the library does not: the operands are filled up with zeros and the result is cut. They have
failed before in single builds of PyTorch (reads out of bounds for M not a multiple of 256, pytorch#133334; cuBLASLt
errors with CUDA 12.9, ao#4582), so each checks one small product on its device before it is used there.

Shape letters: M tokens, K input features, N output features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY, INT8_CAPABILITY = (8, 9), (7, 5)
FP8_MULTIPLE = 16  # of K and N, in bytes
INT8_MULTIPLE, INT8_ROWS = 8, 17  # of K and N; the fewest rows that cuBLASLt takes
# Sizes of the self-test: none is a multiple of what the library wants, and M is over 256.
TEST_M, TEST_N, TEST_K = 261, 37, 83
FP8_TOLERANCE = 1e-2  # relative Frobenius norm; the result is rounded to bfloat16, 2^-9


class _Library:
    """A product of PyTorch's own: what a measurement would compare our kernels with."""

    def unproven(self, **arguments: Any) -> str | None:
        return None


class Fp8Linear(_Library):
    """Row-wise scaled float8 product with a bfloat16 result, cast to the dtype asked for.

    A bfloat16 bias goes into a bfloat16 product; any other is added afterwards in float32, as the reference does.
    """

    def supports(
        self, *, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> str | None:
        if q.dtype != FP8 or wq.dtype != FP8:
            return f"it multiplies {FP8} only, got {q.dtype} and {wq.dtype}"
        return refusal("fp8", q.device.type, q.device.index)

    def run(
        self, *, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        rows, outputs = len(q), len(wq)
        if not rows or not q.shape[1]:
            empty = q.new_zeros(rows, outputs, dtype=torch.float32)
            return (empty if bias is None else empty + bias.float()).to(out_dtype)
        inside = bias is not None and bias.dtype == torch.bfloat16 and out_dtype == torch.bfloat16
        a, b = _filled(q, 1, FP8_MULTIPLE), _filled(wq, FP8_MULTIPLE, FP8_MULTIPLE)
        more = len(b) - outputs
        y = torch._scaled_mm(
            a,
            b.T,  # row-major [N, K] is the column-major right operand that it wants
            s.contiguous(),
            F.pad(ws.float().T, (0, more)).contiguous(),
            bias=F.pad(bias, (0, more)) if inside and bias is not None else None,
            out_dtype=torch.bfloat16,
        )[:, :outputs]
        if bias is not None and not inside:
            y = y.float() + bias.float()
        # The caller views the result with more dimensions: it must be one block.
        return y.to(out_dtype).contiguous()


class Int8Linear(_Library):
    """Exact int8 product in int32, then the scales and the bias in float32: bit for bit the reference."""

    def supports(
        self, *, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> str | None:
        if q.dtype != torch.int8 or wq.dtype != torch.int8:
            return f"it multiplies int8 only, got {q.dtype} and {wq.dtype}"
        return refusal("int8", q.device.type, q.device.index)

    def run(
        self, *, q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        rows, outputs = len(q), len(wq)
        if not rows or not q.shape[1]:
            y = s.new_zeros(rows, outputs)
        else:
            a, b = _filled(q, 1, INT8_MULTIPLE), _filled(wq, INT8_MULTIPLE, INT8_MULTIPLE)
            a = F.pad(a, (0, 0, 0, max(0, INT8_ROWS - rows)))
            y = torch._int_mm(a, b.T)[:rows, :outputs].float()
        y = y * s * ws.float().T
        return (y if bias is None else y + bias.float()).to(out_dtype)


FP8_LINEAR, INT8_LINEAR = Fp8Linear(), Int8Linear()


def _filled(x: Tensor, rows: int, columns: int) -> Tensor:
    """Contiguous x with zeros up to multiples of ``rows`` and ``columns``; x itself where there is nothing to fill."""
    more = (0, -x.shape[1] % columns, 0, -x.shape[0] % rows)
    if not any(more):
        return x.contiguous()
    return F.pad(x.view(torch.uint8), more).view(x.dtype)  # zero bytes are zeros in every format


@torch.compiler.assume_constant_result
def refusal(kind: str, device_type: str, index: int | None) -> str | None:
    """Why a device cannot be trusted with the product ("fp8" or "int8"), or None.

    Found out once for each device. A compiler that traces the caller takes the answer as it is.
    """
    if device_type == "cuda":
        least = FP8_CAPABILITY if kind == "fp8" else INT8_CAPABILITY
        capability = torch.cuda.get_device_capability(index)
        if capability < least:
            return f"it needs compute capability {least[0]}.{least[1]}, the GPU has {capability[0]}.{capability[1]}"
        if not self_test_is_done(kind, device_type, index) and torch.cuda.is_current_stream_capturing():
            return "it was never called before this graph capture, so its self-test has not been made"
    elif device_type != "cpu":
        return f"it runs on cuda and cpu, not on {device_type}"
    return self_test(kind, device_type, index)


_tested: dict[tuple[str, str, int | None], str | None] = {}


def self_test_is_done(kind: str, device_type: str, index: int | None) -> bool:
    return (kind, device_type, index) in _tested


def self_test(kind: str, device_type: str, index: int | None) -> str | None:
    """What is wrong with the product on this device, or None; found out once. Running out of memory is no answer."""
    key = kind, device_type, index
    if key not in _tested:
        _tested[key] = _self_test(*key)
    return _tested[key]


def _self_test(kind: str, device_type: str, index: int | None) -> str | None:
    """Compare one small product with float64 on the host: what is wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    a, b = (torch.randn(n, TEST_K, generator=generator) for n in (TEST_M, TEST_N))
    s, ws = (0.5 + torch.rand(n, 1, generator=generator) for n in (TEST_M, TEST_N))
    q, wq = (a.to(FP8), b.to(FP8)) if kind == "fp8" else ((a * 25).to(torch.int8), (b * 25).to(torch.int8))
    expected = (q.double() @ wq.double().T) * s.double() * ws.double().T
    implementation = FP8_LINEAR if kind == "fp8" else INT8_LINEAR
    arguments: dict[str, Any] = {"q": q, "s": s, "wq": wq, "ws": ws}
    try:
        arguments = {name: value.to(device) for name, value in arguments.items()}
        got = implementation.run(**arguments, bias=None, out_dtype=torch.float32).double().cpu()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of cuBLASLt; anything else is a fault of ours and must be seen
        return f"its self-test failed: {error}"
    wrong = float((got - expected).norm() / expected.norm())
    tolerance = FP8_TOLERANCE if kind == "fp8" else 1e-6  # int8: float32 scales on exact sums
    if wrong <= tolerance:  # a NaN is not
        return None
    return f"its self-test is off by {wrong:.2g} (relative), allowed are {tolerance:.0e}"
