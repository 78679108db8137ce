"""The Triton gathers against plain Python loops: bit for bit, whatever the strides, the sizes and the dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64]
sizes = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every bit pattern, NaNs of all kinds included."""
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, device=device)
    return raw.view(dtype)


def strided(x: Tensor, dim: int) -> Tensor:
    """The same values in every other place along ``dim`` of a larger tensor."""
    return torch.stack([x, torch.zeros_like(x.view(torch.uint8)).view(x.dtype)], dim + 1).flatten(dim, dim + 1)[
        (slice(None),) * dim + (slice(None, None, 2),)
    ]


def loop(states: Tensor, index: Tensor) -> Tensor:
    batch, heads, _, width = states.shape
    kept = index.shape[-1]
    out = torch.empty(batch, heads, kept, width, dtype=states.dtype, device=states.device)
    for b in range(batch):
        for h in range(heads):
            for i in range(kept):
                where = index[b, i] if index.ndim == 2 else index[b, h, i]
                out.view(torch.uint8)[b, h, i] = states.view(torch.uint8)[b, h, int(where)]
    return out


@pytest.mark.usefixtures("poison")
@sizes
@given(data=st.data())
def test_keys_and_values_equal_a_loop(data: Any, device: torch.device) -> None:
    draw = data.draw
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    kept, width, other = draw(st.integers(0, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    keys, values = (random_bits((batch, heads, tokens, w), dtype, device) for w in (width, other))
    if draw(st.booleans()):
        keys, values = strided(keys, 2), strided(values, 1)
    shape = (batch, heads, kept) if draw(st.booleans()) else (batch, kept)
    index = torch.randint(0, tokens, shape, device=device)
    with ops.backend("triton"), ops.counters() as ran:
        got = ops.gather_kv(keys, values, index)
    assert ran["gather_kv", "triton"] == 1
    for states, taken in zip((keys, values), got, strict=True):
        expected = loop(states.contiguous(), index)
        assert taken.shape == expected.shape
        assert taken.dtype == dtype
        assert taken.is_contiguous()
        assert torch.equal(bits(taken), bits(expected))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("tokens", "kept", "width"), [(9, 5, 1500), (130, 129, 33), (3, 0, 8), (2, 1, 1)])
def test_tokens_equal_the_rows_that_were_asked_for(tokens: int, kept: int, width: int, device: torch.device) -> None:
    x = strided(random_bits((2, tokens, width), torch.bfloat16, device), 1)
    index = torch.randint(0, tokens, (2, kept), device=device)
    with ops.backend("triton"):
        got, alone = ops.gather_tokens(x, index), ops.gather_tokens(x[0], index[0])
    expected = loop(x[:, None].contiguous(), index)[:, 0]
    assert torch.equal(bits(got), bits(expected))
    assert torch.equal(bits(alone), bits(expected[0]))


def test_neighbours_of_the_rows_are_left_alone(device: torch.device) -> None:
    """Interpreted kernels read and write raw memory: what lies around the tensors must neither be read nor change."""
    room = torch.full((4, 3, 50, 40), torch.nan, device=device)
    keys = room[1:3, 1:2, 7:30, 8:29]
    keys.copy_(torch.randn_like(keys))
    index = torch.tensor([[0, 22, 22], [5, 6, 22]], device=device)
    with ops.backend("triton"):
        got, _ = ops.gather_kv(keys, keys, index)
    assert torch.equal(got, loop(keys.contiguous(), index))
    assert int(room.isnan().sum()) == room.numel() - keys.numel()


def test_layers_of_different_lengths_go_in_one_call(device: torch.device) -> None:
    lengths, kept = (10, 1, 33), (4, 0, 20)
    keys = [torch.randn(1, 2, n, 16, device=device) for n in lengths]
    values = [torch.randn(1, 2, n, 16, device=device) for n in lengths]
    index = [torch.randint(0, n, (1, k), device=device) for n, k in zip(lengths, kept, strict=True)]
    with ops.backend("triton"):
        got = ops.gather_kv(keys, values, index)
    for taken, states in zip(got, (keys, values), strict=True):
        assert all(torch.equal(t, loop(s, i)) for t, s, i in zip(taken, states, index, strict=True))
