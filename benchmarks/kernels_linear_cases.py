"""Cases of ``kernels.py``: quantizers of activations and products with quantized weights.

Codes and scales are random: times do not depend on them, and the checks compare with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import kernels_work as work
import torch
import torch.nn.functional as F
from kernels_cases import PLAIN, Call, Case, Run, generator, random, short
from torch import Tensor

from vlmeff import ops
from vlmeff.ops.packing import pack_nibbles

FP8 = torch.float8_e4m3fn
BF16_TOLERANCE = 2**-9  # half an ulp of a result that was rounded once
FLOAT_TOLERANCE = 1e-6
FP8_TOLERANCE = 1e-2  # Hopper's accumulator has fewer bits than float32


def output_tolerance(dtype: torch.dtype) -> float:
    return BF16_TOLERANCE if dtype == torch.bfloat16 else FLOAT_TOLERANCE


# ---- quantizers


def plain_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def grouped_int8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    codes, scale = plain_int8(x.unflatten(1, (-1, group)))
    return codes.flatten(1), scale.squeeze(-1)


def plain_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    return (x.float() / scale).clamp(-448, 448).to(FP8), scale


def plain_uint(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-6)
    zero = (-low / scale).round()
    codes = ((x / scale).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, zero.int(), codes.sum(-1, keepdim=True, dtype=torch.int32)


def quantizer_case(
    op: str, name: str, m: int, k: int, dtype: torch.dtype, *, bits: int = 8, smooth: bool = False, group: int = 0
) -> Case:
    """``group``: channels that share a scale, of int8; it divides K."""
    plain: Callable[[Tensor], Any] = {
        "act_quant_int8": plain_int8, "act_quant_fp8": plain_fp8, "act_quant_uint": partial(plain_uint, bits=bits),
    }[op]  # fmt: skip

    def make(device: torch.device) -> Call:
        x = random(device, m, k, dtype=dtype)
        arguments: dict[str, Any] = {"x": x} | ({"bits": bits} if op == "act_quant_uint" else {})
        if group:
            return Call({**arguments, "group": group}, {PLAIN: lambda: grouped_int8(x, group)})
        if not smooth:
            return Call(arguments, {PLAIN: lambda: plain(x)})
        factor = 0.5 + torch.rand(k, generator=generator(device, 1), device=device)
        return Call({**arguments, "smooth": factor}, {PLAIN: lambda: plain(x / factor)})

    outputs = 3 if op == "act_quant_uint" else k // group if group else 1
    counted = work.act_quant(m, k, itemsize=dtype.itemsize, vectors=smooth, outputs=outputs)
    return Case(op, name, short(dtype), {"m": m, "k": k, "smooth": smooth, "group": group}, counted, make)


def norm_case(name: str, m: int, k: int, dtype: torch.dtype) -> Case:
    """A block's first norm, without weights, modulated by float32 factors of the time step as in Wan's blocks."""

    def make(device: torch.device) -> Call:
        x = random(device, 1, m, k, dtype=dtype)
        scale, shift = (0.1 * random(device, 1, 1, k, dtype=torch.float32, seed=seed) for seed in (1, 2))

        def plain() -> tuple[Tensor, Tensor]:
            y = (F.layer_norm(x.float(), (k,), eps=1e-6) * (1 + scale) + shift).to(dtype)
            return plain_int8(y[0])

        return Call({"x": x, "scale": scale, "shift": shift, "eps": 1e-6}, {PLAIN: plain})

    counted = work.act_quant(m, k, itemsize=dtype.itemsize, vectors=2)
    return Case("norm_quant_int8", name, short(dtype), {"m": m, "k": k}, counted, make, *producer_tolerance(dtype))


def gelu_case(name: str, m: int, k: int, dtype: torch.dtype, *, approximate: str) -> Case:
    def make(device: torch.device) -> Call:
        x = random(device, m, k, dtype=dtype)
        return Call(
            {"x": x, "approximate": approximate}, {PLAIN: lambda: plain_int8(F.gelu(x, approximate=approximate))}
        )

    sizes = {"m": m, "k": k, "approximate": approximate}
    counted = work.act_quant(m, k, itemsize=dtype.itemsize)
    return Case("gelu_quant_int8", name, short(dtype), sizes, counted, make, *producer_tolerance(dtype))


def producer_tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """(of the scales, share of codes that may be a step off): the float before may differ in its last bit, and where
    that is a row's largest, all codes of the row shift a little."""
    return (2**-9, 0.02) if dtype == torch.bfloat16 else (FLOAT_TOLERANCE, 1e-3)


# ---- products


def codes(device: torch.device, n: int, k: int, low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high, (n, k), generator=generator(device, seed), device=device, dtype=torch.int16)


def packed(codes: Tensor, *, pad: int = 0) -> Tensor:
    if codes.is_meta:  # packing looks at the values
        return codes.new_empty((len(codes), -(-codes.shape[1] // 2)), dtype=torch.uint8)
    return pack_nibbles(codes, pad=pad)


def scales(device: torch.device, *shape: int, seed: int) -> Tensor:
    return 1e-3 * (0.5 + torch.rand(shape, generator=generator(device, seed), device=device))


def torchao_layer(device: torch.device, n: int, k: int, kind: str) -> torch.nn.Module | None:
    """A linear layer of torchao's that quantizes its input itself, or None where there is none."""
    layer = torch.nn.Sequential(torch.nn.Linear(k, n, dtype=torch.bfloat16, device=device)).requires_grad_(False)
    try:
        from dit_cases import with_torchao  # which needs diffusers as well

        with_torchao(layer, f"torchao {kind}")
    except (ImportError, AssertionError, RuntimeError, NotImplementedError, ValueError):
        return None
    return layer


def with_float32_result(op: str, arguments: dict[str, Any]) -> Run:
    return lambda: getattr(ops, op)(**{**arguments, "out_dtype": torch.float32})


def w8a8_case(kind: str, name: str, m: int, n: int, k: int, out_dtype: torch.dtype) -> Case:
    op = f"linear_w8a8_{kind}"

    def make(device: torch.device) -> Call:
        if kind == "int8":
            q, wq = (codes(device, rows, k, -127, 128, seed).to(torch.int8) for seed, rows in enumerate((m, n)))
        else:
            q, wq = (random(device, rows, k, dtype=torch.bfloat16, seed=seed).to(FP8)
                     for seed, rows in enumerate((m, n)))  # fmt: skip
        s, ws = scales(device, m, 1, seed=2), scales(device, n, 1, seed=3)
        bias = random(device, n, dtype=out_dtype, seed=4)
        arguments = {"q": q, "s": s, "wq": wq, "ws": ws, "bias": bias, "out_dtype": out_dtype}
        call = Call(arguments, accurate=with_float32_result(op, arguments))
        if device.type != "cuda":
            call.peers[PLAIN] = lambda: F.linear((q.float() * s).to(out_dtype), (wq.float() * ws).to(out_dtype), bias)
            return call
        x, w = (t.to(torch.bfloat16) for t in (q, wq))
        call.yardsticks["bfloat16 layer"] = lambda: F.linear(x, w, bias)
        if kind == "int8":
            call.yardsticks["torch._int_mm alone"] = lambda: torch._int_mm(q, wq.T)
            if m > 16:
                call.peers["torch._int_mm, then scales"] = lambda: (
                    torch._int_mm(q, wq.T) * s * ws.T + bias).to(out_dtype)  # fmt: skip
        else:
            ws_row = ws.T.contiguous()
            call.peers["torch._scaled_mm"] = lambda: torch._scaled_mm(
                q, wq.T, s, ws_row, bias=bias, out_dtype=torch.bfloat16)  # fmt: skip
        layer = torchao_layer(device, n, k, kind)
        if layer is not None:  # it also quantizes its input
            call.peers[f"torchao {kind} dynamic, its quantizer included"] = lambda: layer(x)
        return call

    counted = work.linear(m, n, k, x_bytes=1, w_bytes=1, y_bytes=out_dtype.itemsize, scales=4 * (m + n) + 2 * n,
                          arithmetic=kind)  # fmt: skip
    tolerance = FP8_TOLERANCE if kind == "fp8" else output_tolerance(out_dtype)
    return Case(op, name, short(out_dtype), {"m": m, "n": n, "k": k}, counted, make, tolerance)


def w4a8_case(name: str, m: int, n: int, k: int, out_dtype: torch.dtype, *, group: int = 0) -> Case:
    groups = math.ceil(k / group) if group else 1

    def make(device: torch.device) -> Call:
        q, w = codes(device, m, k, -127, 128, 0).to(torch.int8), codes(device, n, k, 1, 16, 1)
        wq = packed(w, pad=8)
        s, ws = scales(device, m, 1, seed=2), scales(device, n, groups, seed=3)
        bias = random(device, n, dtype=out_dtype, seed=4)
        arguments = {"q": q, "s": s, "wq": wq, "ws": ws, "bias": bias, "out_dtype": out_dtype, "group": group}

        def plain() -> Tensor:
            spread = ws if groups == 1 else ws.repeat_interleave(group, 1)[:, :k]
            weight = (nibbles(wq, k).float() - 8) * spread
            return F.linear((q.float() * s).to(out_dtype), weight.to(out_dtype), bias)

        return Call(
            arguments, {PLAIN: plain}, dense_layer(q, w, bias), with_float32_result("linear_w4a8_int8", arguments)
        )

    counted = work.linear(m, n, k, x_bytes=1, w_bytes=0.5, y_bytes=out_dtype.itemsize,
                          scales=4 * (m + n * groups) + 2 * n, arithmetic="int8")  # fmt: skip
    sizes = {"m": m, "n": n, "k": k, "group": group}
    return Case("linear_w4a8_int8", name, short(out_dtype), sizes, counted, make, output_tolerance(out_dtype),
                compiled=groups == 1)  # fmt: skip


def wnan_case(name: str, m: int, n: int, k: int, out_dtype: torch.dtype, *, bits: int = 4) -> Case:
    def make(device: torch.device) -> Call:
        q, w = (codes(device, rows, k, 0, 2**bits, seed) for seed, rows in enumerate((m, n)))
        wq, q = packed(w), q.to(torch.uint8)
        s, ws = scales(device, m, 1, seed=2), scales(device, n, 1, seed=3)
        z = codes(device, m, 1, 0, 2**bits, 4).int()
        wz = codes(device, n, 1, 0, 2**bits, 5).float() + 0.25
        bias = random(device, n, dtype=out_dtype, seed=6)
        arguments = {
            "q": q, "s": s, "z": z, "rowsum": q.sum(1, keepdim=True, dtype=torch.int32), "wq": wq, "ws": ws, "wz": wz,
            "colsum": w.sum(1, dtype=torch.int32), "bias": bias, "out_dtype": out_dtype,
        }  # fmt: skip

        def plain() -> Tensor:
            weight = (nibbles(wq, k).float() - wz) * ws
            return F.linear(((q.float() - z) * s).to(out_dtype), weight.to(out_dtype), bias)

        return Call(
            arguments, {PLAIN: plain}, dense_layer(q, w, bias), with_float32_result("linear_wnan_int", arguments)
        )

    counted = work.linear(m, n, k, x_bytes=1, w_bytes=0.5, y_bytes=out_dtype.itemsize, scales=12 * m + 14 * n,
                          arithmetic="int8")  # fmt: skip
    sizes = {"m": m, "n": n, "k": k, "bits": bits}
    return Case("linear_wnan_int", name, short(out_dtype), sizes, counted, make, output_tolerance(out_dtype))


def nibbles(wq: Tensor, k: int) -> Tensor:
    """Codes of packed weights, as one would write it."""
    return torch.stack([wq & 15, wq >> 4], dim=-1).flatten(1)[:, :k]


def wna16_case(name: str, m: int, n: int, k: int, dtype: torch.dtype, *, bits: int = 4, group: int = 128) -> Case:
    groups = math.ceil(k / group) if group else 1

    def make(device: torch.device) -> Call:
        x = random(device, m, k, dtype=dtype)
        w = codes(device, n, k, -127, 128, 1) if bits == 8 else codes(device, n, k, 1, 16, 1)
        wq = w.to(torch.int8) if bits == 8 else packed(w, pad=8)
        ws = scales(device, n, groups, seed=2).to(dtype)
        arguments = {"x": x, "wq": wq, "ws": ws, "wz": None, "bias": None, "bits": bits, "group": group}

        def plain() -> Tensor:
            values = wq.to(dtype) if bits == 8 else nibbles(wq, k).to(dtype) - 8
            return F.linear(x, values * (ws if groups == 1 else ws.repeat_interleave(group, 1)[:, :k]))

        return Call(arguments, {PLAIN: plain}, dense_layer(x, w, None))

    counted = work.linear(m, n, k, x_bytes=dtype.itemsize, w_bytes=bits / 8, y_bytes=dtype.itemsize,
                          scales=dtype.itemsize * n * groups, arithmetic="bf16")  # fmt: skip
    sizes = {"m": m, "n": n, "k": k, "bits": bits, "group": group}
    # Twice half an ulp: the library's own product rounds too.
    tolerance = 2 * BF16_TOLERANCE if dtype == torch.bfloat16 else FLOAT_TOLERANCE
    return Case("linear_wna16", name, short(dtype), sizes, counted, make, tolerance)


def dense_layer(x: Tensor, w: Tensor, bias: Tensor | None) -> dict[str, Run]:
    """The unquantized layer of the same size, on a GPU."""
    if x.device.type != "cuda":
        return {}
    wide, weight = x.to(torch.bfloat16), w.to(torch.bfloat16)
    return {"bfloat16 layer": lambda: F.linear(wide, weight, bias)}
