"""How kernels are launched, where they can run, and how a launch is recorded instead (to compile it without a GPU).

``TRITON_INTERPRET=1``, set before a module with kernels is imported, makes Triton run them in Python on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmeff_kernels import HAS_TRITON


def _interprets() -> bool:
    """What ``triton.jit`` goes by when it decorates."""
    if not HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


INTERPRET = _interprets()
INTERPRETED_CAPABILITY = (9, 0)  # which tiles and paths the interpreter takes
LEAST_CAPABILITY = (8, 0)

Capability = tuple[int, int]

# KiB of shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities). Tables of tiles are
# keyed by it: capability alone would give an sm_120 with 99 KiB the tiles of an sm_90 with 227.
LARGE, MEDIUM, SMALL = 227, 163, 99
SHARED_MEMORY: dict[Capability, int] = {
    (8, 0): MEDIUM, (8, 6): SMALL, (8, 7): MEDIUM, (8, 9): SMALL,
    (9, 0): LARGE, (10, 0): LARGE, (10, 1): LARGE, (10, 3): LARGE, (11, 0): LARGE,
    (12, 0): SMALL, (12, 1): SMALL,
}  # fmt: skip
MOST_BLOCKS = 65535  # of a grid along any axis but the first, which takes 2^31 - 1


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded and not run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    """Positional, in the order of the kernel's parameters; tensors are on the device "meta"."""
    constexprs: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass
class Recording:
    """The launches made inside ``recording``, as for a GPU of ``capability``."""

    capability: Capability
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("vlmeff_kernels_recording", default=None)


@contextmanager
def recording(capability: Capability) -> Iterator[Recording]:
    """Record launches for a GPU of this compute capability; the ops take tensors on the device "meta"."""
    record = Recording(capability)
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    return _recording.get() is not None


def capability_of(device: torch.device) -> Capability:
    """Compute capability of the GPU that a launch for tensors on ``device`` is meant for."""
    record = None if torch.compiler.is_compiling() else _recording.get()
    if record is not None:
        return record.capability
    return _capability(device.type, device.index)


@torch.compiler.assume_constant_result
def _capability(device_type: str, index: int | None) -> Capability:
    return torch.cuda.get_device_capability(index) if device_type == "cuda" else INTERPRETED_CAPABILITY


def shared_memory(device: torch.device) -> int:
    """KiB of shared memory that a block may have there; the least of all where the capability is not known."""
    return SHARED_MEMORY.get(capability_of(device), SMALL)


def has_wgmma(device: torch.device) -> bool:
    """Whether tensor instructions read shared memory and take 64 rows at least, which asks for other tiles."""
    return shared_memory(device) == LARGE


def refusal(device: torch.device, least: Capability = LEAST_CAPABILITY) -> str | None:
    """Why a Triton kernel cannot run on ``device``, or None."""
    if torch.compiler.is_compiling() or not is_recording():
        reason = _refusal(device.type)
        if reason is not None:
            return reason
    got = capability_of(device)
    if got < least:
        return f"it needs compute capability {least[0]}.{least[1]}, the GPU has {got[0]}.{got[1]}"
    return None


@torch.compiler.assume_constant_result
def _refusal(device_type: str) -> str | None:
    if device_type == "cuda" and INTERPRET:
        return "TRITON_INTERPRET is set, so kernels are interpreted on CPU tensors"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if device_type == "cuda" or (device_type == "cpu" and INTERPRET):
        return None
    return f"it runs on cuda, not on {device_type}"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int = 2, **constexprs: Any) -> None:
    """Launch ``kernel`` over ``grid`` on the current stream of the tensors' device; nothing for an empty grid.

    ``arguments`` are positional, tensors and scalars; the first tensor names the device.
    """
    if not all(grid):
        return
    record = _recording.get()
    if record is not None:
        record.launches.append(Launch(kernel, grid, arguments, constexprs, warps, stages))
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with _on(device):
        kernel[grid](*arguments, **constexprs, num_warps=warps, num_stages=stages)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU, to decide how finely a small problem is cut."""
    if device.type != "cuda":
        return 132  # of an H100 or H200: what is recorded is what would run there
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
