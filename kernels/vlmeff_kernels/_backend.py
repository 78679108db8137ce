"""What every back end of ours has in common: where it can run, and whether a measurement says that it should."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmeff_kernels import _launch

ACCEPTED_FILE = "accepted.json"


class Kernel:
    """A back end made of our kernels. Subclasses say what they refuse, and run.

    Automatic dispatch takes it only where ``accepted.json`` says that it was measured on a GPU of the same compute
    capability, met its share of the roofline and beat the reference and every peer; ``benchmarks/kernels.py --accept``
    writes that file. Asked for by name, it runs wherever it can.
    """

    op: ClassVar[str]
    name: ClassVar[str] = "triton"
    least: ClassVar[_launch.Capability] = _launch.LEAST_CAPABILITY

    # Typed as "any arguments": every op has its own.
    refuses: Callable[..., str | None] = staticmethod(lambda **arguments: None)
    """Why these arguments are refused on a device that is fine (dtype, head dim, alignment, ...), or None."""
    bucket: Callable[..., str] = staticmethod(lambda **arguments: "all")
    """The name of the range of sizes that is accepted or not as one."""
    run: Callable[..., Any]

    def supports(self, **arguments: Any) -> str | None:
        """Why these arguments are refused, or None."""
        reason = _launch.refusal(_device(arguments), self.least)
        return self.refuses(**arguments) if reason is None else reason

    def unproven(self, **arguments: Any) -> str | None:
        """Why automatic dispatch passes this over although it is supported, or None."""
        capability = _launch.capability_of(_device(arguments))
        return _unproven(self.op, self.name, capability, self.bucket(**arguments))


def _device(arguments: dict[str, Any]) -> torch.device:
    return next(tensor.device for tensor in _tensors(list(arguments.values())))


def _tensors(values: list[Any]) -> list[Tensor]:
    """Tensors among the values, those in lists included."""
    found: list[Tensor] = []
    for value in values:
        found += _tensors(list(value)) if isinstance(value, list | tuple) else [value] * isinstance(value, Tensor)
    return found


@torch.compiler.assume_constant_result
def _unproven(op: str, name: str, capability: _launch.Capability, bucket: str) -> str | None:
    if (op, name, f"{capability[0]}.{capability[1]}", bucket) in accepted():
        return None
    return (
        f"no measurement on compute capability {capability[0]}.{capability[1]} says that it is faster for {bucket!r} "
        f'sizes; ask for it by name, or for every kernel with backend("accelerated")'
    )


@functools.cache
def accepted() -> frozenset[tuple[str, str, str, str]]:
    """(op, back end, compute capability, bucket) that a committed measurement accepts."""
    text = resources.files("vlmeff_kernels").joinpath(ACCEPTED_FILE).read_text(encoding="utf-8")
    rows = json.loads(text)["accepted"]
    return frozenset((row["op"], row["backend"], row["capability"], row["bucket"]) for row in rows)
