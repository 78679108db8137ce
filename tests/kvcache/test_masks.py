"""Masks of a layer that gave up columns, in the form of every attention back end."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask

from kvcache.masks import compact_mask, last_visible, new_validity
from vlmeff.errors import UnsupportedMaskError

# 2 rows, 6 slots seen, 4 columns held; row 1 has two fillers, and pads in slots 0 and 1.
SEEN, COLUMNS, ROWS = 6, 4, 2
VALID = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()


def written_out(valid, new, new_valid):
    """[B, q, C + q]: old columns by validity, new ones causal and by validity."""
    out = torch.zeros(ROWS, new, COLUMNS + new, dtype=torch.bool)
    for b, i, j in itertools.product(range(ROWS), range(new), range(COLUMNS + new)):
        out[b, i, j] = valid[b, j] if j < COLUMNS else j - COLUMNS <= i and new_valid[b, j - COLUMNS]
    return out


def cut(mask, valid, new, backend, **options):
    arguments = {"columns": COLUMNS, "new": new, "seen": SEEN, "rows": ROWS, "device": torch.device("cpu")}
    return compact_mask(mask, valid, backend=backend, dtype=torch.float32, **arguments, **options)


def built(function, new, padding, **options):
    return function(ROWS, new, SEEN + new, SEEN, 0, attention_mask=padding, **options)


def padding_with(new_valid):
    return torch.cat([PADDING, new_valid], 1)


NEW_VALID = {1: torch.ones(2, 1).bool(), 3: torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()}


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("fillers", [False, True])
def test_a_boolean_mask_is_cut(new, fillers):
    mask = built(sdpa_mask, new, padding_with(NEW_VALID[new]))
    got = cut(mask, VALID if fillers else None, new, "sdpa")
    expected = written_out(VALID if fillers else torch.ones_like(VALID), new, NEW_VALID[new])
    assert got.dtype == torch.bool
    assert torch.equal(got[:, 0], expected)


@pytest.mark.parametrize("new", [1, 3])
def test_a_float_mask_is_cut(new):
    mask = built(eager_mask, new, padding_with(NEW_VALID[new]), dtype=torch.float32)
    got = cut(mask, VALID, new, "eager")
    expected = written_out(VALID, new, NEW_VALID[new])
    assert torch.equal(got[:, 0], torch.where(expected, 0.0, torch.finfo(torch.float32).min))


@pytest.mark.parametrize("new", [1, 3])
def test_a_flat_mask_is_cut(new):
    mask = built(flash_attention_mask, new, padding_with(NEW_VALID[new]))
    expected = torch.cat([VALID, NEW_VALID[new]], 1)
    assert torch.equal(cut(mask, VALID, new, "flash_attention_2"), expected)
    everything = cut(mask, None, new, "kernels-community/flash-attn")
    assert torch.equal(everything, torch.cat([torch.ones_like(VALID), NEW_VALID[new]], 1))


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("fillers", [False, True])
def test_a_block_mask_is_cut(new, fillers):
    padding = padding_with(NEW_VALID[new])
    mask = create_block_mask(
        lambda b, h, i, j: (j <= i + SEEN) & padding[b, j], ROWS, None, new, SEEN + new, device="cpu"
    )
    got = cut(mask, VALID if fillers else None, new, "flex_attention")
    assert got.seq_lengths == (new, COLUMNS + new)
    dense = create_mask(got.mask_mod, ROWS, 1, new, COLUMNS + new, device="cpu")
    assert torch.equal(dense[:, 0], written_out(VALID if fillers else torch.ones_like(VALID), new, NEW_VALID[new]))


def test_no_mask_stays_none_where_the_kernel_does_the_same_without():
    assert cut(None, None, 1, "sdpa") is None
    assert cut(None, None, 1, "flash_attention_2") is None
    assert cut(None, None, 3, "flash_attention_2") is None  # causal by itself, aligned to the last key
    mask = built(sdpa_mask, 1, padding_with(NEW_VALID[1]))
    assert cut(mask, None, 1, "sdpa", new_valid=True) is None


def test_no_mask_becomes_one_where_the_kernel_would_see_the_wrong_keys():
    ones = torch.ones(2, 3).bool()
    # sdpa without a mask takes the first q keys of more, as if the cache were a static one.
    assert torch.equal(cut(None, None, 3, "sdpa")[:, 0], written_out(torch.ones_like(VALID), 3, ones))
    for new in (1, 3):
        expected = written_out(VALID, new, ones[:, :new])
        assert torch.equal(cut(None, VALID, new, "sdpa")[:, 0], expected)
        got = cut(None, VALID, new, "eager")
        assert got.dtype == torch.float32
        assert torch.equal(got[:, 0] == 0, expected)
        assert torch.equal(cut(None, VALID, new, "flash_attention_2"), torch.cat([VALID, ones[:, :new]], 1))


def test_the_worked_example_of_three_new_tokens():
    got = cut(built(sdpa_mask, 3, padding_with(torch.ones(2, 3).bool())), VALID, 3, "sdpa")
    rows = ["".join(str(int(x)) for x in row) for row in got[1, 0]]
    assert rows == ["0011100", "0011110", "0011111"]


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 4), {"full_attention": None}])
def test_other_masks_are_refused(mask):
    with pytest.raises(UnsupportedMaskError, match="sdpa"):
        cut(mask, None, 1, "sdpa")
    with pytest.raises(UnsupportedMaskError, match="flex"):
        cut(None, None, 1, "flex_attention")


def forms(allowed):
    """A mask [B, q, K] in every form that shows its rows."""
    yield allowed[:, None]
    yield torch.where(allowed[:, None], 0.0, torch.finfo(torch.float32).min)
    rows, queries, keys = allowed.shape
    yield create_block_mask(lambda b, h, i, j: allowed[b, i, j], rows, None, queries, keys, device="cpu")


def test_new_padding_is_read_off_the_last_query():
    allowed = built(sdpa_mask, 3, padding_with(NEW_VALID[3]))[:, 0]
    for mask in forms(allowed):
        assert torch.equal(new_validity(mask, 3), NEW_VALID[3])
    assert torch.equal(new_validity(padding_with(NEW_VALID[3]), 3), NEW_VALID[3])
    assert new_validity(None, 3) is None


def test_the_last_visible_key_shows_pictures_that_see_themselves():
    # 300 queries: more than a block mask is written out at a time
    size, picture = 300, slice(100, 280)
    allowed = torch.ones(2, size, size, dtype=torch.bool).tril()
    allowed[0, picture, picture] = True
    expected = torch.arange(size).repeat(2, 1)
    expected[0, picture] = 279
    for mask in forms(allowed):
        assert torch.equal(last_visible(mask), expected)
    assert last_visible(None) is None
    assert last_visible(allowed[:, 0]) is None
