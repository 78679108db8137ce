"""Back end ``"cuda"``: the kernels of ``csrc/``, which ``python -m vlmeff_kernels.build`` compiles.

gather_kv moves keys and values of all layers in one launch; act_quant_int8 reads a row once. The library is loaded when
a CUDA tensor first asks. One that is there and does not load is warned of, and the calls go elsewhere unless this back
end was named.

Shape letters: B batch, Hk key/value heads, S tokens, D channels of a row, K rows taken, L layers; M tokens.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmeff_kernels import _backend, _launch, build
from vlmeff_kernels._library import NAMESPACE, call, define

DEVICE = "cuda"  # where the kernels run; tests of emulated kernels put another here
PIECE = 16  # bytes that the gather moves at once
OPS = ("gather_kv_cuda", "act_quant_int8_cuda")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 2**30 - 1  # of a stride in pieces, of a number of rows: they travel as 32 bits


def _gather_kv_fake(keys: list[Tensor], values: list[Tensor], index: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    keys_out, values_out = (
        [x.new_empty((*x.shape[:2], i.shape[2], x.shape[3])) for x, i in zip(states, index, strict=True)]
        for states in (keys, values)
    )
    return keys_out, values_out


def _act_quant_int8_fake(x: Tensor, smooth: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


_LISTS = "(Tensor[] keys, Tensor[] values, Tensor[] index) -> (Tensor[], Tensor[])"
define("gather_kv_cuda", _LISTS, None, _gather_kv_fake)
define("act_quant_int8_cuda", "(Tensor x, Tensor? smooth, int bits) -> (Tensor, Tensor)", None, _act_quant_int8_fake)


@torch.compiler.assume_constant_result
def load() -> str | None:
    """Load the library unless that has been tried; why its ops cannot run, or None."""
    return _load(DEVICE)


@functools.cache
def _library(device: str) -> Path | None:
    """The library of this process: ops are registered once. One that suits the current GPU if there is one."""
    path = None
    if device == "cuda" and torch.cuda.is_available():
        path = build.built(torch.cuda.get_device_capability())
    return path or build.built()


@torch.compiler.assume_constant_result
def architecture_refusal(capability: _launch.Capability) -> str | None:
    """Why the library has no code for a GPU of this compute capability, or None."""
    path = _library(DEVICE) if DEVICE == "cuda" else None
    if path is None:
        return None
    architectures = build.architectures_of(path)
    if build.runs_on(architectures, capability):
        return None
    return (
        f"its library was compiled for {', '.join(f'sm_{a}' for a in architectures)}, the GPU has "
        f"{_dotted(capability)}: run python -m vlmeff_kernels.build --arch {capability[0]}{capability[1]}"
    )


@functools.cache
def _load(device: str) -> str | None:
    if device == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    path = _library(device)
    if path is None:
        return "not built: run python -m vlmeff_kernels.build"
    try:
        torch.ops.load_library(str(path))
        missing = [op for op in OPS if not has_kernel(op, device)]
        if missing:
            raise OSError(f"{path} registers nothing for {', '.join(missing)}")
    except OSError as error:
        reason = f"{error.__cause__ or error}; run python -m vlmeff_kernels.build --force, or delete {path}"
        warnings.warn(f"the library of CUDA kernels does not load: {reason}", RuntimeWarning, stacklevel=2)
        return f"its library does not load: {reason}"
    return None


def has_kernel(op: str, device: str) -> bool:
    """Whether something is registered for the op on this type of device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", device.upper()))


class CudaKernel(_backend.Kernel):
    name = "cuda"

    def supports(self, **arguments: Any) -> str | None:
        # Not that of the Triton kernels: these are not interpreted, and never recorded.
        tensors = _backend._tensors(list(arguments.values()))
        if not tensors:
            return "there is no tensor to work on"
        device = tensors[0].device
        if device.type != DEVICE:
            return f"it runs on {DEVICE}, not on {device.type}"
        reason = load()
        if reason is not None:
            return reason
        capability = _launch.capability_of(device)
        if capability < self.least:
            return f"it needs compute capability {_dotted(self.least)}, the GPU has {_dotted(capability)}"
        return architecture_refusal(capability) or self.refuses(**arguments)


class GatherKV(CudaKernel):
    """All layers in one launch (50 of them at most, and only neighbours with rows of one size, share one)."""

    op = "gather_kv"

    def refuses(self, *, keys: list[Tensor], values: list[Tensor], index: list[Tensor]) -> str | None:
        device = keys[0].device if keys else None
        for states in (*keys, *values):
            if states.device != device:
                return f"all layers must be on one device, got {device} and {states.device}"
            reason = _rows_refusal(states)
            if reason is not None:
                return reason
        if any(i.numel() and (i.shape[-1] > LARGEST or max(i.stride()) > LARGEST) for i in index):
            return f"the index has more than {LARGEST} entries or strides beyond that"
        return None

    def run(
        self, *, keys: list[Tensor], values: list[Tensor], index: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        taken: tuple[list[Tensor], list[Tensor]] = call(
            "gather_kv_cuda", keys, values, [i if i.ndim == 3 else i[:, None] for i in index]
        )
        return taken


def _rows_refusal(states: Tensor) -> str | None:
    """Why [B, Hk, S, D] cannot be moved in aligned pieces of 16 bytes, or None."""
    itemsize = states.dtype.itemsize
    width = states.shape[3]
    if width * itemsize % PIECE:
        return f"rows must be a multiple of {PIECE} bytes, got {width} elements of {states.dtype}"
    if not states.numel():
        return None
    strides = [s * itemsize for s, size in zip(states.stride()[:3], states.shape[:3], strict=True) if size > 1]
    if width > 1 and states.stride(3) != 1:  # run() will be given a contiguous copy
        return None
    if any(stride % PIECE or stride > LARGEST * PIECE for stride in strides):
        return f"rows must start at multiples of {PIECE} bytes, got strides {states.stride()} of {states.dtype}"
    # A traced tensor has no address; memory that torch allocates starts at a multiple of 256 or more.
    start = states.storage_offset() * itemsize if torch.compiler.is_compiling() else states.data_ptr()
    return f"a tensor must start at a multiple of {PIECE} bytes" if start % PIECE else None


class ActQuantInt8(CudaKernel):
    op = "act_quant_int8"

    def refuses(self, *, x: Tensor, smooth: Tensor | None, bits: int, group: int) -> str | None:
        if x.dtype not in FLOATS:
            return f"x must be float32, float16 or bfloat16, got {x.dtype}"
        if 0 < group < x.shape[1]:
            return f"it has one scale a token, not one for {group} channels"
        if smooth is not None and (smooth.dtype != torch.float32 or smooth.device != x.device):
            return f"smooth must be float32 on {x.device}, got {smooth.dtype} on {smooth.device}"
        return None

    def bucket(self, *, x: Tensor, smooth: Tensor | None, bits: int, group: int) -> str:
        """By dtype and size: what is below some 8 million numbers stays in the GPU's cache."""
        size = "large" if x.numel() >= 2**23 else "small"
        return f"{size}, {str(x.dtype).removeprefix('torch.')}{'' if smooth is None else ', smoothed'}"

    def run(self, *, x: Tensor, smooth: Tensor | None, bits: int, group: int) -> tuple[Tensor, Tensor]:
        taken: tuple[Tensor, Tensor] = call("act_quant_int8_cuda", x, smooth, bits)
        return taken


def _dotted(capability: _launch.Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


GATHER_KV, ACT_QUANT_INT8 = GatherKV(), ActQuantInt8()
