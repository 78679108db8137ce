"""Packing two codes in a byte: against Python integers, for every size and code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmeff.ops.packing import pack_nibbles, unpack_nibbles

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@PROPERTY
@given(st.integers(1, 5), st.integers(0, 9), st.integers(0, 15), st.data())
def test_the_low_nibble_is_even_k_and_everything_comes_back(n, k, pad, data):
    rows = data.draw(st.lists(st.lists(st.integers(0, 15), min_size=k, max_size=k), min_size=n, max_size=n))
    codes = torch.tensor(rows, dtype=torch.int64).reshape(n, k)
    packed = pack_nibbles(codes, pad=pad)
    expected = [
        [even + 16 * odd for even, odd in zip(row[0::2], [*row[1::2], pad], strict=False)] for row in rows
    ]  # the filling is only reached where K is odd
    assert packed.dtype == torch.uint8
    assert packed.shape == (n, (k + 1) // 2)
    assert packed.tolist() == expected
    assert torch.equal(unpack_nibbles(packed, k), codes.to(torch.uint8))


def test_all_codes_round_trip_for_odd_even_and_single_rows():
    every = torch.arange(16)
    for codes in (every[None], every[None, :15], every[:, None], every.repeat(3, 1)):
        assert torch.equal(unpack_nibbles(pack_nibbles(codes), codes.shape[1]), codes.to(torch.uint8))


def test_the_filling_may_differ_by_row():
    packed = pack_nibbles(torch.zeros(3, 1, dtype=torch.int8), pad=torch.tensor([0.0, 7.0, 15.0]))
    assert packed.tolist() == [[0x00], [0x70], [0xF0]]


def test_a_transposed_matrix_is_packed_like_its_copy():
    codes = torch.randint(0, 16, (6, 7), generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(pack_nibbles(codes), pack_nibbles(codes.contiguous()))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(4), r"must be \[N, K\], got \(4,\)"),
        (torch.tensor([[0, 16]]), r"0..15, got 0..16"),
        (torch.tensor([[-1, 3]]), r"0..15, got -1..3"),
    ],
)
def test_what_does_not_fit_is_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        pack_nibbles(codes)
