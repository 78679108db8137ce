"""Accelerated back ends for the operations of ``vlmeff.ops``.

``vlmeff.ops`` looks here, and only when a CUDA tensor or an explicit choice needs it: ``OPS[op][back end]``, with
``"cuda"``, ``"triton"`` or ``"torch"`` as the back end's name. This package imports nothing of ours, so the arguments
of ``run`` and ``supports`` are those of the public function, by name, already checked by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

__all__ = ["OPS", "BackEnd"]


class BackEnd(Protocol):
    """One implementation of one op."""

    def supports(self, **arguments: Any) -> str | None:
        """Return why these arguments are refused (dtype, head dim, alignment, device, ...), or None if they are not."""
        ...

    def run(self, **arguments: Any) -> Any:
        """Compute the op. ``supports`` has returned None, and every tensor has unit stride in its last dimension."""
        ...


class _Later:
    """A back end whose module is imported when it is first asked, so that importing this package stays light."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def supports(self, **arguments: Any) -> str | None:
        reason: str | None = self._load().supports(**arguments)
        return reason

    def run(self, **arguments: Any) -> Any:
        return self._load().run(**arguments)


# Import statements and not importlib: torch.compile traces through them.
def _torch_fp8() -> Any:
    from vlmeff_kernels import torch_linear

    return torch_linear.FP8_LINEAR


def _torch_int8() -> Any:
    from vlmeff_kernels import torch_linear

    return torch_linear.INT8_LINEAR


OPS: Mapping[str, Mapping[str, BackEnd]] = MappingProxyType(
    {
        "linear_w8a8_fp8": MappingProxyType({"torch": _Later(_torch_fp8)}),
        "linear_w8a8_int8": MappingProxyType({"torch": _Later(_torch_int8)}),
    }
)
"""Op name -> back-end name -> implementation."""
