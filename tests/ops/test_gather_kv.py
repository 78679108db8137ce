"""gather_kv on the reference: an exact copy per head, of one layer or several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff.ops import gather_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


def bits(x: Tensor) -> list[int]:
    return x.contiguous().view(torch.uint8).flatten().tolist()


def raw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, *, strided: bool = False) -> Tensor:
    """Any bits, signalling NaNs among them; ``strided``: the first part of a buffer with headroom."""
    *leading, tokens, dim = shape
    room = (*leading, tokens + 3 * strided, dim * dtype.itemsize)
    return torch.randint(256, room, dtype=torch.uint8, generator=generator).view(dtype)[..., :tokens, :]


def oracle(states: Tensor, index: Tensor) -> list[int]:
    """Entry by entry."""
    out: list[int] = []
    for b in range(states.shape[0]):
        for h in range(states.shape[1]):
            chosen = index[b] if index.ndim == 2 else index[b, h if index.shape[1] > 1 else 0]
            for i in chosen.tolist():
                out += bits(states[b, h, i])
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_entry_is_copied_bit_for_bit(data: Any) -> None:
    draw = data.draw
    batch, heads, tokens, kept = (draw(st.integers(1, high)) for high in (3, 3, 6, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, strided = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    keys = raw((batch, heads, tokens, 4), dtype, generator, strided=strided)
    values = raw((batch, heads, tokens, 8), dtype, generator, strided=strided)
    form = draw(st.sampled_from([(batch, kept), (batch, heads, kept), (batch, 1, kept)]))
    index = torch.randint(tokens, form, generator=generator)
    for states, got in zip((keys, values), gather_kv(keys, values, index), strict=True):
        assert got.shape == (batch, heads, kept, states.shape[3])
        assert got.is_contiguous()
        assert bits(got) == oracle(states, index)


def test_layers_may_differ_in_size() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = [raw((2, 3, tokens, 4), torch.float32, generator) for tokens in (5, 9)]
    values = [raw((2, 3, tokens, 4), torch.float32, generator) for tokens in (5, 9)]
    index = [torch.tensor([[0, 4], [1, 1]]), torch.tensor([[8, 0, 3]] * 2)]
    got = gather_kv(keys, values, index)
    for side, states in zip(got, (keys, values), strict=True):
        assert [bits(t) for t in side] == [oracle(*pair) for pair in zip(states, index, strict=True)]


@pytest.mark.parametrize(
    ("shape", "kept"), [((2, 2, 0, 4), 0), ((2, 2, 3, 4), 0), ((0, 2, 3, 4), 2), ((2, 2, 3, 0), 2)]
)
def test_nothing_to_copy_is_legal(shape: tuple[int, ...], kept: int) -> None:
    states = torch.zeros(shape)
    for got in gather_kv(states, states, torch.zeros(shape[0], kept, dtype=torch.long)):
        assert got.shape == (*shape[:2], kept, shape[3])


def test_a_default_device_is_not_that_of_the_tensors() -> None:
    keys, index = torch.arange(24.0).view(2, 2, 3, 2), torch.tensor([[2], [0]])
    with torch.device("meta"):
        got, _ = gather_kv(keys, keys, index)
    assert bits(got) == oracle(keys, index)


@pytest.mark.parametrize("strided", [False, True])
def test_gradients_reach_the_kept_entries(strided: bool) -> None:
    keys = torch.randn(2, 2, 7, 3, dtype=torch.float64)[:, :, : 4 if strided else 7].requires_grad_()
    index = torch.tensor([[0, 2, 2], [1, 3, 0]])
    assert torch.autograd.gradcheck(lambda k: gather_kv(k, k * 2, index), (keys,))


@pytest.mark.parametrize("bad", [3, -1])
def test_an_index_out_of_range_is_refused_also_in_a_graph(bad: int) -> None:
    keys, index = torch.arange(24.0).view(2, 2, 3, 2), torch.tensor([[bad], [0]])
    with pytest.raises(ValueError, match=r"index must lie in \[0, 3\)"):
        gather_kv(keys, keys, index)
    compiled = torch.compile(lambda k, i: gather_kv(k, k + 0, i)[0], backend="aot_eager", fullgraph=True)
    if bad > 0:
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
            compiled(keys, index)
    assert torch.equal(compiled(keys, index.clamp(0, 2)), gather_kv(keys, keys, index.clamp(0, 2))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": [], "values": [], "index": []}, "at least one layer"),
        ({"index": torch.zeros(3, 1, dtype=torch.long)}, "index must be"),
        ({"index": torch.zeros(2, 1)}, "index must be int64"),
        ({"values": torch.zeros(2, 2, 3, 2).half()}, "one dtype"),
        ({"keys": [torch.zeros(2, 2, 3, 2)] * 2}, "as many, got 2, 1, 1"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    states = torch.zeros(2, 2, 3, 2)
    with pytest.raises((ValueError, TypeError), match=message):
        gather_kv(**{"keys": states, "values": states, "index": torch.zeros(2, 1, dtype=torch.long), **change})
