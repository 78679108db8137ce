"""The ops of this package as PyTorch sees them: one ``torch.library.Library``, a schema and a fake for each launcher.

``Library.define`` and ``.default`` rather than ``torch.library.custom_op``: 3-4 us a call against 11-17, where several
of our kernels take no longer than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlmeff_kernels import _launch

NAMESPACE = "vlmeff_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
_launchers: dict[str, Callable[..., Any]] = {}
_overloads: dict[str, Any] = {}


def define(name: str, signature: str, launcher: Callable[..., Any] | None, fake: Callable[..., Any]) -> None:
    """Register the op ``vlmeff_kernels::name``.

    Args:
        signature: as in a schema, without the name: ``"(Tensor x, int n) -> Tensor"``.
        launcher: allocates the outputs and launches; takes CUDA tensors, and CPU tensors where kernels are interpreted.
            None for an op whose implementation a compiled library brings.
        fake: same arguments, outputs of the same shape, strides, dtype and device, without any values.
    """
    _library.define(f"{name}{signature}")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if launcher is not None:
        _launchers[name] = launcher
        _library.impl(name, launcher, "CUDA")
        if _launch.INTERPRET:
            _library.impl(name, launcher, "CPU")
    _overloads[name] = getattr(getattr(torch.ops, NAMESPACE), name).default


def call(name: str, *arguments: Any) -> Any:
    """Run the op; while launches are recorded, its launcher itself, which then takes meta tensors."""
    if not torch.compiler.is_compiling() and _launch.is_recording():
        return _launchers[name](*arguments)
    return _overloads[name](*arguments)
