"""Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors (tests/conftest.py sees to it).

The seed of a test is that of its name; VLMEFF_KERNEL_SEED=17 takes another, VLMEFF_KERNEL_SEED=random a new one each
time. It is printed when the test fails.
"""

from __future__ import annotations

import os
import random
import zlib
from importlib.metadata import version

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 fails on loops with NumPy 2.4 and newer")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    asked = os.environ.get("VLMEFF_KERNEL_SEED")
    value = (
        random.SystemRandom().randrange(2**31)
        if asked == "random"
        else int(asked or zlib.crc32(request.node.nodeid.encode()))
    )
    print(f"VLMEFF_KERNEL_SEED={value}")
    torch.manual_seed(value)
    return value


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and ``new_empty`` give with NaN or a sentinel, so that what a kernel forgets shows."""

    def fill(x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "meta" or not x.numel():
            return x
        raw = x.view(torch.uint8) if x.dtype.itemsize == 1 else x
        return (raw.fill_(0x7B) if not x.is_floating_point() or x.dtype.itemsize == 1 else raw.fill_(torch.nan)).view(
            x.dtype
        )

    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fill(new_empty(self, *a, **k)))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch)
