"""gather_tokens: an exact copy, and a range check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmeff.ops import gather_tokens

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def oracle(x: Tensor, index: Tensor) -> Tensor:
    """Row by row."""
    return torch.stack([torch.stack([x[b, i] for i in index[b].tolist()]) for b in range(x.shape[0])])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_copies_rows_in_any_order_with_repeats(
    batch: int, tokens: int, channels: int, kept: int, seed: int, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=generator)
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    index = torch.randint(tokens, (batch, kept), generator=generator)
    got = gather_tokens(x, index)
    assert got.is_contiguous()
    assert torch.equal(got, oracle(x, index))
    assert torch.equal(gather_tokens(x[0], index[0]), got[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_dtype_is_copied_bit_for_bit(dtype: torch.dtype, batch: int) -> None:
    raw = torch.randint(
        256, (batch, 6, 64 * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    raw[:, :, dtype.itemsize - 1 :: dtype.itemsize] |= 0x7C  # high bytes: infinities and NaNs, signalling ones included
    raw = raw % 2 if dtype == torch.bool else raw
    got = gather_tokens(raw.view(dtype), torch.tensor([[5, 0, 3]]).expand(batch, -1))
    assert got.dtype == dtype
    assert got.shape == (batch, 3, 64)
    assert torch.equal(bits(got), raw[:, [5, 0, 3]])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_result_is_new_memory_even_when_everything_is_kept(batch: int) -> None:
    x = torch.randn(batch, 4, 3)
    got = gather_tokens(x, torch.arange(4).expand(batch, -1))
    assert torch.equal(got, x)
    got.zero_()
    assert x.abs().sum() > 0


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 4, 3), (0, 4, 3), (2, 4, 0), (1, 0, 3)])
def test_keeping_nothing_gives_the_right_shape(shape: tuple[int, int, int]) -> None:
    x = torch.zeros(shape)
    index = torch.zeros(shape[0], 0, dtype=torch.long)
    assert gather_tokens(x, index).shape == (shape[0], 0, shape[2])
    if shape[0]:
        assert gather_tokens(x[0], index[0]).shape == (0, shape[2])


def test_nan_is_copied_and_does_not_spread() -> None:
    x = torch.zeros(2, 3, 2)
    x[0, 1] = torch.nan
    got = gather_tokens(x, torch.tensor([[0, 1], [1, 2]]))
    assert got.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 1]]


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_reach_the_kept_tokens(batch: int) -> None:
    x = torch.randn(batch, 4, 3, requires_grad=True)
    gather_tokens(x, torch.tensor([[2, 0, 2]]).expand(batch, -1)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([1.0, 0, 2, 0])[None, :, None].expand_as(x))


x_, index_ = torch.zeros(2, 4, 3), torch.zeros(2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("x", "index", "error", "message"),
    [
        (x_, index_ + 4, ValueError, r"index must lie in \[0, 4\), got values from 4 to 4"),
        (x_, torch.tensor([[0, 1], [2, -1]]), ValueError, r"index must lie in \[0, 4\), got values from -1 to 2"),
        (x_[:, :0], index_, ValueError, r"index must lie in \[0, 0\)"),
        (x_, index_.int(), TypeError, "index must be int64, got int32"),
        (x_, index_[:1], ValueError, r"index must be \[B, K\] with B = 2 \(from x\), got \(1, 2\)"),
        (x_, index_[0], ValueError, r"index must be \[B, K\] with B = 2 \(from x\), got \(2,\)"),
        (x_[0], index_, ValueError, r"index must be \[K\], got \(2, 2\)"),
        (x_[0, 0], index_[0], ValueError, r"x must be \[B, S, C\] or \[S, C\], got \(3,\)"),
        (x_, [[0, 1]], TypeError, "index must be a tensor, got list"),
        (x_, index_.to("meta"), ValueError, r"index must be on cpu \(as x\), got meta"),
    ],
)
def test_errors_name_the_argument(x: Any, index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^gather_tokens: {message}"):
        gather_tokens(x, index)


def test_on_cuda_values_are_looked_at_only_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():  # a fake tensor has no values: looking at one raises
        x, index = torch.zeros(2, 4, 3, device="cuda"), torch.zeros(2, 2, dtype=torch.long, device="cuda")
        assert gather_tokens(x, index).shape == (2, 2, 3)
        monkeypatch.setenv("VLMEFF_DEBUG", "1")
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            gather_tokens(x, index)
