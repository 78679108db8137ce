"""Quantized keys and values against the formulas in float64, written out group by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kivi_reference import reference_group

from kvcache.quantization import (
    bits_per_entry,
    pack,
    quantize_keys,
    quantize_values,
    storage_bits,
    unpack,
    value_group,
)
from vlmeff.errors import ConfigError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = [8, 4, 2]
ROUNDING = 1e-3  # of a level: how near to half way float32 may decide otherwise than float64


def entries(*shape, dtype=torch.float32, seed=0):
    """Channels of different offsets and spreads, as keys have them."""
    g = torch.Generator().manual_seed(seed)
    offset, spread = torch.randn(shape[-1], generator=g) * 5, torch.rand(shape[-1], generator=g) + 0.1
    return (torch.randn(shape, generator=g) * spread + offset).to(dtype)


def storage_bytes(packed):
    return sum(t.untyped_storage().nbytes() for t in packed.tensors())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_keys_equal_the_formulas_for_each_channel_of_32_tokens(bits, dtype):
    keys = entries(2, 2, 70, 10, dtype=dtype)
    packed = quantize_keys(keys, bits=bits)
    codes, back = unpack(packed.codes, bits)[..., :10], packed.dequantize()
    assert packed.sizes == (32, 32, 6)
    for b, h, d in np.ndindex(2, 2, 10):
        for number, start in enumerate((0, 32, 64)):
            tokens = slice(start, min(start + 32, 70))
            check_group(keys[b, h, tokens, d], codes[b, h, tokens, d], back[b, h, tokens, d], bits,
                        packed.scale[b, h, number, d], packed.zero[b, h, number, d])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("head_dim", "group"), [(64, 32), (80, 20), (15, 15)])
def test_values_equal_the_formulas_for_each_token_of_a_group_of_channels(head_dim, group, bits, dtype):
    values = entries(2, 2, 9, head_dim, dtype=dtype)
    packed = quantize_values(values, bits=bits)
    codes, back = unpack(packed.codes, bits)[..., :head_dim], packed.dequantize()
    for b, h, t in np.ndindex(2, 2, 9):
        for number in range(head_dim // group):
            part = (b, h, t, slice(number * group, (number + 1) * group))
            check_group(
                values[part], codes[part], back[part], bits, packed.scale[b, h, t, number], packed.zero[b, h, t, number]
            )


def check_group(entry, code, back, bits, scale, zero):
    levels, expected_scale, expected_zero = reference_group(entry.double().numpy(), bits, entry.dtype)
    assert (scale.item(), zero.item()) == (expected_scale, expected_zero)
    assert np.abs(code.numpy() - levels).max() <= 0.5 + ROUNDING
    formula = torch.from_numpy(code.numpy() * expected_scale + expected_zero)
    torch.testing.assert_close(back.double(), formula, rtol=torch.finfo(entry.dtype).eps, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(0, 40),
    head_dim=st.sampled_from([1, 5, 8, 33, 48]),
    group=st.sampled_from([11, 16, 32]),
    size=st.sampled_from([0.0, 1e-6, 1.0, 3e3]),
    seed=st.integers(0, 99),
)
def test_no_entry_is_off_by_more_than_half_a_scale_and_rounding(bits, dtype, tokens, head_dim, group, size, seed):
    x = (entries(1, 2, tokens, head_dim, seed=seed) * size).to(dtype)
    keys, values = quantize_keys(x, bits=bits, group=group), quantize_values(x, bits=bits, group=group)
    check_error(x, keys.dequantize(), keys.scale.repeat_interleave(torch.tensor(keys.sizes, dtype=torch.int64), 2))
    check_error(x, values.dequantize(), values.scale.repeat_interleave(head_dim // values.scale.shape[-1], 3))


def check_error(x, back, scale):
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    size = max(x.double().abs().amax().item(), 1e-30) if x.numel() else 1.0
    # The result's own rounding, and float32's in the quotient, which is of the size of the entry and not of the scale.
    rounding = 2 * torch.finfo(x.dtype).eps * size + 2**-20 * size
    assert ((x.double() - back.double()).abs() <= scale.double() / 2 + rounding).all()


@pytest.mark.parametrize("bits", BITS)
def test_equal_entries_come_back_exactly(bits):
    x = torch.full((1, 1, 33, 8), -1.5)
    assert torch.equal(quantize_keys(x, bits=bits).dequantize(), x)
    assert torch.equal(quantize_values(x, bits=bits).dequantize(), x)


@pytest.mark.parametrize("bits", BITS)
def test_entries_on_the_levels_come_back_exactly(bits):
    x = torch.arange(64).remainder(2**bits).view(1, 1, 64, 1).repeat(1, 1, 1, 64) * 0.25 - 2
    x[0, 0, ::32] = 2**bits * 0.25 - 2.25  # the highest level is there in every group
    x[0, 0, 1::32] = -2
    assert torch.equal(quantize_keys(x, bits=bits).dequantize(), x)
    assert torch.equal(quantize_values(x.transpose(2, 3), bits=bits).dequantize(), x.transpose(2, 3))


def test_what_float16_has_no_scale_for_is_clipped_and_stays_finite():
    x = torch.tensor([-1e9, 0.0, 1.0, 1e9]).view(1, 1, 4, 1)
    for back in (quantize_keys(x, bits=2).dequantize(), quantize_values(x.transpose(2, 3), bits=2).dequantize()):
        assert back.abs().amax() < 7e4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
def test_an_entry_takes_b_and_32_over_g_bits_exactly(storage, dtype):
    bits = storage_bits(storage)
    x = entries(2, 3, 64, 128, dtype=dtype)
    assert bits_per_entry(bits) == bits + 1
    for packed in (quantize_keys(x, bits=bits), quantize_values(x, bits=bits)):
        assert storage_bytes(packed) * 8 == x.numel() * (bits + 1)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_of_head_dims_that_fill_no_whole_group_or_byte(bits):
    width = -(-15 * bits // 8)
    x = entries(1, 2, 37, 15)
    assert storage_bytes(quantize_keys(x, bits=bits)) == 2 * (37 * width + 2 * 15 * 4)
    assert storage_bytes(quantize_values(x, bits=bits)) == 2 * (37 * width + 37 * 4)


def test_codes_are_packed_from_the_lowest_bits_on():
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([3, 0, 1, 2, 1], dtype=torch.uint8), 2).tolist() == [0b10_01_00_11, 1]
    assert pack(torch.tensor([255, 7], dtype=torch.uint8), 8).tolist() == [255, 7]


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_gives_every_code_back(bits):
    codes = torch.arange(1, 2 * 515, 2).remainder(2**bits).to(torch.uint8).view(5, 103)
    assert torch.equal(unpack(pack(codes, bits), bits)[:, :103], codes)


def test_values_are_grouped_by_the_largest_divisor():
    sizes = {128: 32, 96: 32, 80: 20, 72: 24, 48: 24, 15: 15, 5: 5, 33: 11}
    assert {dim: value_group(dim) for dim in sizes} == sizes


@pytest.mark.parametrize("head_dim", [37, 34 * 2 - 1, 2 * 47])
def test_a_head_dim_without_a_usable_divisor_is_an_error_that_says_so(head_dim):
    with pytest.raises(ConfigError, match=f"head_dim {head_dim}.*storage=None"):
        value_group(head_dim)


def test_an_unknown_storage_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'int3'.*'int8', 'int4', 'int2'"):
        storage_bits("int3")


@pytest.mark.parametrize("bits", BITS)
def test_fillers_have_no_say_in_the_keys_they_stand_among(bits):
    keys = entries(2, 2, 64, 4)
    valid = torch.arange(64) >= torch.tensor([[5], [40]])  # row 1: a whole group of fillers, and a part of one
    poisoned = torch.where(valid[:, None, :, None], keys, 1e4)
    clean = torch.where(valid[:, None, :, None], keys, keys[:, :, -1:])
    expected = quantize_keys(clean, bits=bits, valid=valid).dequantize()
    got = quantize_keys(poisoned, bits=bits, valid=valid).dequantize()
    assert got.isfinite().all()
    for row, first in enumerate((5, 40)):
        assert torch.equal(got[row, :, first:], expected[row, :, first:])
    alone = quantize_keys(keys[1:, :, 40:], bits=bits).dequantize()  # 24 real tokens are the group
    assert torch.equal(got[1:, :, 40:], alone)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_that_are_joined_and_taken_out_leave_the_others_as_they_were(data):
    bits, keys = data.draw(st.sampled_from(BITS)), data.draw(st.booleans())
    quantize = (lambda x: quantize_keys(x, bits=bits, group=4)) if keys else (lambda x: quantize_values(x, bits=bits))
    x = entries(2, 1, 10, 6)
    packed = quantize(x)
    expected = packed.dequantize()
    for step in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            more = quantize(entries(2, 1, data.draw(st.integers(1, 9)), 6, seed=step))
            packed, expected = packed.joined(more), torch.cat([expected, more.dequantize()], 2)
        else:
            start = data.draw(st.integers(0, packed.length))
            count = data.draw(st.integers(0, packed.length - start))
            packed = packed.without(start, count)
            expected = torch.cat([expected[:, :, :start], expected[:, :, start + count :]], 2)
        assert torch.equal(packed.dequantize(), expected)
        assert packed.length == expected.shape[2]
        if keys:
            assert (sum(packed.sizes), len(packed.sizes)) == (packed.length, packed.scale.shape[2])
            assert 0 not in packed.sizes
        assert storage_bytes(packed) == sum(t.nbytes for t in packed.tensors())  # nothing that is gone is held
