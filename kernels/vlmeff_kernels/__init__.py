"""Accelerated back ends for the operations of ``vlmeff.ops``.

``vlmeff.ops`` looks here, and only when a CUDA tensor or an explicit choice needs it: ``OPS[op][back end]``, with
``"cuda"``, ``"triton"`` or ``"torch"`` as the back end's name. This package imports nothing of ours, so the arguments
of ``run`` and ``supports`` are those of the public function, by name, already checked by it.
"""

from __future__ import annotations

from collections.abc import Mapping
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


OPS: Mapping[str, Mapping[str, BackEnd]] = MappingProxyType({})
"""Op name -> back-end name -> implementation. Empty: nothing is accelerated yet."""
