"""What the ops share about their arguments: an ambient autocast does not count, and tensors must be tensors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """Keep an ambient autocast from turning float32 products back into half precision."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def check_tensors(op: str, *, optional: Mapping[str, object] | None = None, **values: object) -> None:
    """Raises TypeError: an argument is not a tensor; an optional one may be None."""
    present = {name: value for name, value in (optional or {}).items() if value is not None}
    for name, value in {**values, **present}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
