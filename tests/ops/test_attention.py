"""row_logsumexp and attention_column_mass against a materialised float64 softmax, and against identities."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmeff.ops import attention, attention_column_mass, row_logsumexp

# Relative Frobenius error against float64 on the same, already rounded inputs. Products of half inputs are exact in
# float32, so what remains there is the order of summation; the bound is the one the accelerated back ends must meet.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}


# The oracle: nothing blocked, nothing grouped, masks by loops over positions.


def oracle_mask(
    batch: int,
    width: int,
    keys: int,
    *,
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> np.ndarray:
    mask = np.zeros((batch, width, keys), dtype=bool)
    for b in range(batch):
        for i in range(width):
            for j in range(keys):
                at_q = keys - width + i if q_pos is None else int(q_pos[b, i])
                at_k = j if k_pos is None else int(k_pos[b, j])
                valid = key_valid is None or bool(key_valid[b, j])
                mask[b, i, j] = valid and (not causal or at_k <= at_q)
    return mask


def oracle(
    q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, **masks: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return lse [B, Hq, W] and the attention matrix p [B, Hq, W, S], both float64."""
    queries, keys = q.double().numpy(), k.double().numpy()
    (batch, heads, width, _), group = queries.shape, queries.shape[1] // keys.shape[1]
    mask = oracle_mask(batch, width, keys.shape[2], **masks)
    lse = np.full((batch, heads, width), -np.inf)
    p = np.zeros((batch, heads, width, keys.shape[2]))
    for b in range(batch):
        for h in range(heads):
            for i in range(width):
                allowed = mask[b, i]
                if not allowed.any():
                    continue
                z = scale * keys[b, h // group, allowed] @ queries[b, h, i]
                z = z if softcap is None else softcap * np.tanh(z / softcap)
                lse[b, h, i] = logsumexp(z)
                p[b, h, i, allowed] = np.exp(z - lse[b, h, i])
    return lse, p


def relative_error(got: Tensor, expected: np.ndarray) -> float:
    """Frobenius error over the finite entries; infinities must match exactly."""
    assert tuple(got.shape) == expected.shape
    values, finite = got.double().numpy(), np.isfinite(expected)
    if not np.array_equal(values[~finite], expected[~finite]):
        return math.inf
    return float(np.linalg.norm(values[finite] - expected[finite]) / (np.linalg.norm(expected[finite]) or 1.0))


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Elementwise; infinities must match exactly. NumPy's, because torch.testing takes seconds to import."""
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def make_qk(
    seed: int,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 1,
    width: int = 5,
    keys: int = 11,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, width, dim, generator=generator)
    return q.to(dtype), torch.randn(batch, kv_heads, keys, dim, generator=generator).to(dtype)


def eviction(seed: int, batch: int, width: int, keys: int) -> dict[str, Any]:
    """Masks as after an eviction: gaps in the positions, slots out of order, some padding, one row fully masked."""
    generator = torch.Generator().manual_seed(seed)
    k_pos = torch.stack([torch.randperm(3 * keys, generator=generator)[:keys] for _ in range(batch)]).int()
    q_pos = torch.randint(keys, 4 * keys, (batch, width), generator=generator).int()
    q_pos[0, 0] = -1
    key_valid = torch.rand(batch, keys, generator=generator) < 0.8
    return {"causal": True, "q_pos": q_pos, "k_pos": k_pos, "key_valid": key_valid}


MASKS = ["none", "causal", "padding", "eviction"]


def masks_of(kind: str, batch: int, width: int, keys: int) -> dict[str, Any]:
    if kind == "causal":
        return {"causal": True}
    if kind == "padding":
        key_valid = torch.ones(batch, keys, dtype=torch.bool)
        key_valid[0, :4] = False
        return {"causal": True, "key_valid": key_valid}
    return eviction(3, batch, width, keys) if kind == "eviction" else {}


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":  # one or two query rows at a time
        monkeypatch.setattr(attention, "_LOGITS_BLOCK_BYTES", 1500)


# Against the oracle.


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("dim", [64, 72, 80, 128])
def test_matches_the_oracle_for_every_dtype_group_and_head_dim(dtype: torch.dtype, group: int, dim: int) -> None:
    q, k = make_qk(dim + group, group=group, dim=dim, dtype=dtype)
    lse, p = oracle(q, k, scale=dim**-0.5, causal=True)
    got_lse = row_logsumexp(q, k, scale=dim**-0.5, causal=True)
    got_mass = attention_column_mass(q, k, scale=dim**-0.5, causal=True)
    assert got_lse.dtype == got_mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(got_lse, lse) < TOLERANCE[dtype]
    assert relative_error(got_mass, p.sum(2)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("width", [1, 5, 13])  # 13 rows on 11 keys: the first two come before every key
def test_matches_the_oracle_for_every_mask(kind: str, softcap: float | None, width: int) -> None:
    q, k = make_qk(width, group=3, width=width)
    masks = masks_of(kind, 2, width, 11)
    lse, p = oracle(q, k, scale=0.5, softcap=softcap, **masks)
    weight = torch.rand(2, 6, width, generator=torch.Generator().manual_seed(1))
    mass = (weight.double().numpy()[..., None] * p).sum(2)
    assert relative_error(row_logsumexp(q, k, scale=0.5, softcap=softcap, **masks), lse) < 1e-5
    got = attention_column_mass(q, k, scale=0.5, softcap=softcap, query_weight=weight, **masks)
    assert relative_error(got, mass) < 1e-5


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("weighted", [False, True])
def test_reduce_averages_over_groups_and_over_all_heads(weighted: bool) -> None:
    q, k = make_qk(5, kv_heads=2, group=3)
    _, p = oracle(q, k, scale=0.3)
    weight = torch.tensor([[1.0, 0, 2, 0.5, 1]] * 2) if weighted else None
    mass = p.sum(2) if weight is None else (weight.double().numpy()[:, None, :, None] * p).sum(2)
    grouped = mass.reshape(2, 2, 3, 11)
    for reduce, expected in (("none", mass), ("group", grouped.mean(2)), ("mean", mass.mean(1))):
        got = attention_column_mass(q, k, scale=0.3, query_weight=weight, reduce=reduce)  # type: ignore[arg-type]
        assert relative_error(got, expected) < 1e-5


def test_float64_follows_the_oracle_far_beyond_float32() -> None:
    q, k = make_qk(8, group=7, dtype=torch.float64)
    lse, p = oracle(q, k, scale=2.0, softcap=30.0, **(masks := eviction(9, 2, 5, 11)))
    assert relative_error(row_logsumexp(q, k, scale=2.0, softcap=30.0, **masks), lse) < 1e-12
    assert relative_error(attention_column_mass(q, k, scale=2.0, softcap=30.0, **masks), p.sum(2)) < 1e-12


def test_large_logits_neither_overflow_nor_vanish() -> None:
    q, k = make_qk(10, dim=64)
    lse, p = oracle(q, k, scale=40.0)
    assert np.abs(lse).max() > 500
    assert relative_error(row_logsumexp(q, k, scale=40.0), lse) < 1e-5
    assert (
        relative_error(attention_column_mass(q, k, scale=40.0), p.sum(2)) < 1e-3
    )  # exp of a difference of 1e3 +- 1e-4


def test_bfloat16_scores_choose_the_top_keys_of_the_oracle() -> None:
    q, k = make_qk(11, width=20, keys=60, dim=64, dtype=torch.bfloat16)
    mass = oracle(q, k, scale=0.125)[1].sum(2).mean(1)
    got = attention_column_mass(q, k, scale=0.125, reduce="mean").topk(15).indices
    for b in range(2):
        ranked = np.sort(mass[b])[::-1]
        assert ranked[14] - ranked[15] > 1e-4 * ranked[14]  # the gap is above the tolerance, so the sets must agree
        assert set(got[b].tolist()) == set(np.argsort(-mass[b])[:15].tolist())


# The comparison itself: it must notice each of these mistakes.

MISTAKES: dict[str, dict[str, Any]] = {
    "causal offset + 1": {"q_pos": torch.arange(11 - 5, 11).expand(2, 5) + 1},
    "causal offset - 1": {"q_pos": torch.arange(11 - 5, 11).expand(2, 5) - 1},
    "left-aligned": {"q_pos": torch.arange(5).expand(2, 5)},
    "key positions shifted": {"k_pos": torch.arange(11).expand(2, 11) + 1},
    "not causal": {"causal": False},
    "mask shifted by one key": {"key_valid": torch.arange(11).expand(2, 11) != 4},
    "mask ignored": {"key_valid": None},
    "scale": {"scale": 0.25 * 1.001},
    "base 2": {"scale": 0.25 / math.log(2)},
    "no softcap": {"softcap": None},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake: str, dtype: torch.dtype) -> None:
    q, k = make_qk(12, group=2, dtype=dtype)
    right: dict[str, Any] = {
        "scale": 0.25,
        "softcap": 4.0,
        "causal": True,
        "key_valid": torch.arange(11).expand(2, 11) != 3,
    }
    lse, p = oracle(q, k, **right)
    wrong = right | MISTAKES[mistake]
    assert relative_error(row_logsumexp(q, k, **right), lse) < TOLERANCE[dtype]
    assert relative_error(attention_column_mass(q, k, **right), p.sum(2)) < TOLERANCE[dtype]
    assert relative_error(row_logsumexp(q, k, **wrong), lse) > TOLERANCE[dtype]
    assert relative_error(attention_column_mass(q, k, **wrong), p.sum(2)) > TOLERANCE[dtype]


def test_the_comparison_notices_a_wrong_key_head() -> None:
    q, k = make_qk(13, kv_heads=2, group=2)
    lse, _ = oracle(q[:, [0, 2, 1, 3]], k, scale=0.25)  # heads dealt out in turn instead of in groups
    assert relative_error(row_logsumexp(q, k, scale=0.25), lse) > 1e-2


# Edges.


def test_fully_masked_rows_are_minus_infinity_and_contribute_nothing() -> None:
    q, k = make_qk(14)
    key_valid = torch.ones(2, 11, dtype=torch.bool)
    key_valid[1] = False
    lse = row_logsumexp(q, k, scale=0.25, key_valid=key_valid)
    mass = attention_column_mass(q, k, scale=0.25, key_valid=key_valid)
    assert lse[0].isfinite().all()
    assert (lse[1] == -torch.inf).all()
    assert (mass[1] == 0).all()
    assert_close(mass[0].sum(-1), torch.full((2,), 5.0))


def test_a_given_lse_of_minus_infinity_silences_its_row() -> None:
    q, k = make_qk(15)
    lse = row_logsumexp(q, k, scale=0.25)
    weight = torch.tensor([1.0, 0, 1, 1, 1]).expand(2, 5)
    expected = attention_column_mass(q, k, scale=0.25, query_weight=weight)
    lse[:, :, 1] = -torch.inf
    assert_close(attention_column_mass(q, k, scale=0.25, lse=lse), expected)
    q[:, :, 1] *= 1e4  # logits whose exponential overflows
    assert_close(attention_column_mass(q, k, scale=0.25, lse=lse), expected)


@pytest.mark.parametrize(("batch", "width", "keys"), [(2, 0, 11), (2, 5, 0), (2, 0, 0), (0, 5, 11)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_sizes_give_the_right_shapes(batch: int, width: int, keys: int, causal: bool) -> None:
    q, k = make_qk(16, batch=batch, width=width, keys=keys, group=3)
    lse = row_logsumexp(q, k, scale=1.0, causal=causal)
    assert lse.shape == (batch, 6, width)
    assert keys > 0 or (lse == -torch.inf).all()
    for reduce, shape in (("none", (batch, 6, keys)), ("group", (batch, 2, keys)), ("mean", (batch, keys))):
        mass = attention_column_mass(q, k, scale=1.0, causal=causal, reduce=reduce)  # type: ignore[arg-type]
        assert mass.shape == shape
        assert width > 0 or (mass == 0).all()


@pytest.mark.parametrize("layout", ["heads behind rows", "strided last dim", "expanded batch", "sliced cache"])
def test_non_contiguous_inputs_give_the_same_bits(layout: str) -> None:
    q, k = make_qk(17, group=2, dim=16)
    if layout == "heads behind rows":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    elif layout == "strided last dim":
        q, k = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in (q, k))
    elif layout == "expanded batch":
        q, k = q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1)
    else:
        q, k = q[:, :, 2:], torch.cat([k, k], dim=2)[:, :, 3:14]
    assert not q.is_contiguous()
    assert not k.is_contiguous()
    for op in (row_logsumexp, attention_column_mass):
        expected = op(q.contiguous(), k.contiguous(), scale=0.25, causal=True)
        assert torch.equal(op(q, k, scale=0.25, causal=True), expected)


def test_a_nan_query_row_spoils_what_depends_on_it_and_nothing_else() -> None:
    q, k = make_qk(18, keys=5)
    q[0, 1, 2, 3] = torch.nan  # row 2 may attend to keys 0, 1, 2
    lse = row_logsumexp(q, k, scale=0.25, causal=True)
    mass = attention_column_mass(q, k, scale=0.25, causal=True)
    assert lse.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert mass.isnan().nonzero().tolist() == [[0, 1, 0], [0, 1, 1], [0, 1, 2]]
    zero_weight = torch.tensor([1.0, 1, 0, 1, 1]).expand(2, 5)
    assert attention_column_mass(q, k, scale=0.25, causal=True, query_weight=zero_weight)[0, 1, :3].isnan().all()


def test_a_nan_key_spoils_the_rows_that_may_attend_to_it() -> None:
    q, k = make_qk(19, keys=5)
    k[0, 1, 3, 0] = torch.nan  # seen by rows 3 and 4
    lse = row_logsumexp(q, k, scale=0.25, causal=True)
    assert lse.isnan().nonzero().tolist() == [[0, 1, 3], [0, 1, 4]]
    assert attention_column_mass(q, k, scale=0.25, causal=True).isnan().nonzero().tolist() == [
        [0, 1, j] for j in range(5)
    ]
    padding = torch.arange(5).expand(2, 5) != 3
    for op in (row_logsumexp, attention_column_mass):
        assert op(q, k, scale=0.25, causal=True, key_valid=padding).isfinite().all()


# Identities.


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any], int]:
    size = st.integers(1, 4)
    batch, kv_heads, group = draw(size), draw(size), draw(size)
    width, keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**31))
    q, k = make_qk(seed, batch=batch, kv_heads=kv_heads, group=group, width=width, keys=keys, dim=draw(size))
    arguments: dict[str, Any] = masks_of(
        draw(st.sampled_from([m for m in MASKS if m != "padding"])), batch, width, keys
    )
    arguments |= {"scale": draw(st.floats(-3, 3)), "softcap": draw(st.sampled_from([None, 0.5, 20.0]))}
    return q, k, arguments, seed


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(calls(), st.booleans())
def test_identities_of_the_column_mass(call: tuple[Tensor, Tensor, dict[str, Any], int], per_head: bool) -> None:
    q, k, arguments, seed = call
    batch, heads, width, _ = q.shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand((batch, heads, width) if per_head else (batch, width), generator=generator)
    lse = row_logsumexp(q, k, **arguments)
    mass = attention_column_mass(q, k, query_weight=weight, **arguments)

    # The masses sum to the weights of the rows that see a key.
    seen = (weight if per_head else weight[:, None]) * lse.isfinite()
    assert_close(mass.sum(-1), seen.sum(-1))
    # A given lse changes nothing.
    assert_close(attention_column_mass(q, k, query_weight=weight, lse=lse, **arguments), mass)
    # Permuting the keys (with their positions) permutes the masses.
    order = torch.randperm(k.shape[2], generator=generator)
    k_pos = arguments.get("k_pos")
    k_pos = torch.arange(k.shape[2]).expand(batch, -1) if k_pos is None else k_pos
    moved = arguments | {"k_pos": k_pos[:, order]}
    if "key_valid" in moved:
        moved["key_valid"] = moved["key_valid"][:, order]
    assert_close(row_logsumexp(q, k[:, :, order], **moved), lse)
    permuted = attention_column_mass(q, k[:, :, order], query_weight=weight, **moved)
    assert_close(permuted, mass[..., order])
    # The queries in two chunks add up.
    q_pos = arguments.get("q_pos")
    q_pos = torch.arange(k.shape[2] - width, k.shape[2]).expand(batch, -1) if q_pos is None else q_pos
    total = torch.zeros_like(mass)
    for rows in (slice(0, width // 2), slice(width // 2, width)):
        chunk = arguments | {"q_pos": q_pos[:, rows], "query_weight": weight[..., rows]}
        total += attention_column_mass(q[:, :, rows], k, **chunk)
    assert_close(total, mass)


def test_the_lse_of_all_keys_gives_their_columns_of_some_keys() -> None:
    q, k = make_qk(20, group=2)
    lse = row_logsumexp(q, k, scale=0.25, causal=True)
    some = torch.tensor([1, 4, 7])
    got = attention_column_mass(q, k[:, :, some], scale=0.25, lse=lse, causal=True, **at_positions(some))
    assert_close(got, attention_column_mass(q, k, scale=0.25, causal=True)[..., some])


def at_positions(k_pos: Tensor) -> dict[str, Tensor]:
    return {"k_pos": k_pos.expand(2, -1), "q_pos": torch.arange(6, 11).expand(2, 5)}


def test_boolean_weights_count_the_valid_queries() -> None:
    q, k = make_qk(21, width=11)
    query_valid = torch.arange(11).expand(2, 11) >= torch.tensor([[0], [3]])
    mass = attention_column_mass(q, k, scale=0.25, causal=True, query_weight=query_valid, reduce="mean")
    assert_close(mass.sum(-1), torch.tensor([11.0, 8.0]))


# Packed segments.


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("reduce", ["none", "group", "mean"])
@pytest.mark.parametrize("weights", ["none", "shared", "per head"])
def test_cu_seqlens_equals_separate_calls(reduce: attention.Reduce, weights: str) -> None:
    q, k = make_qk(22, batch=1, group=3, width=17, keys=17)
    packed_q, packed_k = q[0].transpose(0, 1), k[0].transpose(0, 1)
    bounds = [0, 5, 5, 6, 17]  # one segment is empty
    weight = None if weights == "none" else torch.rand((17,) if weights == "shared" else (6, 17))
    arguments: dict[str, Any] = {"scale": 0.4, "softcap": 3.0, "reduce": reduce}
    parts, lses = [], []
    for a, b in pairwise(bounds):
        part_weight = None if weight is None else weight[..., a:b][None]
        parts.append(attention_column_mass(q[:, :, a:b], k[:, :, a:b], query_weight=part_weight, **arguments)[0])
        lses.append(row_logsumexp(q[:, :, a:b], k[:, :, a:b], scale=0.4, softcap=3.0)[0])
    arguments |= {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "query_weight": weight}
    got = attention_column_mass(packed_q, packed_k, **arguments)
    assert got.shape == {"none": (6, 17), "group": (2, 17), "mean": (17,)}[reduce]
    assert_close(got, torch.cat(parts, dim=-1))
    assert_close(attention_column_mass(packed_q, packed_k, lse=torch.cat(lses, dim=-1), **arguments), got)


def test_cu_seqlens_matches_a_block_diagonal_oracle() -> None:
    q, k = make_qk(23, batch=1, group=2, width=12, keys=12)
    bounds = [0, 3, 12]
    expected = np.concatenate(
        [oracle(q[:, :, a:b], k[:, :, a:b], scale=0.5)[1][0].sum(1) for a, b in pairwise(bounds)],
        -1,
    )
    got = attention_column_mass(
        q[0].transpose(0, 1), k[0].transpose(0, 1), scale=0.5, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)
    )
    assert relative_error(got, expected) < 1e-5


def test_no_packed_tokens_give_an_empty_mass() -> None:
    empty = torch.zeros(0, 4, 8)
    for bounds in ([0], [0, 0]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        assert attention_column_mass(empty, empty, scale=1.0, cu_seqlens=cu_seqlens).shape == (4, 0)


# How it is computed.


class LargestTensor(TorchDispatchMode):
    """Remember the most bytes that any result held."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel() * result.itemsize)
        return result


def test_neither_the_attention_matrix_nor_repeated_keys_are_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = make_qk(24, batch=1, kv_heads=2, group=8, width=64, keys=64, dtype=torch.bfloat16)
    block, keys_float32, keys_repeated, matrix = 16 * 64 * 4 * 4, 2 * 64 * 16 * 4, 16 * 64 * 16 * 4, 16 * 64 * 64 * 4
    assert keys_float32 < block < keys_repeated < matrix
    monkeypatch.setattr(attention, "_LOGITS_BLOCK_BYTES", block)
    for op in (row_logsumexp, attention_column_mass):
        with LargestTensor() as largest:
            op(q, k, scale=0.25, causal=True)
        assert largest.size == block


def test_an_ambient_autocast_changes_nothing() -> None:
    q, k = make_qk(25)
    weight = torch.rand(2, 5)
    lse, mass = row_logsumexp(q, k, scale=0.25), attention_column_mass(q, k, scale=0.25, query_weight=weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(row_logsumexp(q, k, scale=0.25), lse)
        assert torch.equal(attention_column_mass(q, k, scale=0.25, query_weight=weight), mass)


def test_the_same_call_gives_the_same_bits() -> None:
    q, k = make_qk(26, group=7, width=40, keys=50, dtype=torch.bfloat16)
    for op in (row_logsumexp, attention_column_mass):
        assert torch.equal(op(q, k, scale=0.25, causal=True), op(q, k, scale=0.25, causal=True))


@pytest.mark.usefixtures("blocks")
def test_gradients_are_right_also_beside_fully_masked_rows() -> None:
    q, k = (x.requires_grad_() for x in make_qk(27, group=2, width=3, keys=2, dim=3, dtype=torch.float64))
    weight = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    masks: dict[str, Any] = {"scale": 0.7, "causal": True, "softcap": 5.0}  # row 0 comes before every key

    def finite_lse(q: Tensor, k: Tensor) -> Tensor:
        return row_logsumexp(q, k, **masks)[:, :, 1:]

    def mass(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        return attention_column_mass(q, k, query_weight=weight, **masks)

    def mass_of_lse(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return attention_column_mass(q, k, lse=lse, **masks)

    assert torch.autograd.gradcheck(finite_lse, (q, k))
    assert torch.autograd.gradcheck(mass, (q, k, weight))
    lse = row_logsumexp(q, k, **masks).detach().requires_grad_()
    mass_of_lse(q, k, lse).sum().backward()
    assert lse.grad is not None
    assert q.grad is not None
    assert lse.grad.isfinite().all()
    assert q.grad.isfinite().all()
    assert (lse.grad[:, :, 0] == 0).all()


def test_the_reference_is_traceable_as_one_graph() -> None:
    q, k = make_qk(28, group=2)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return attention_column_mass(q, k, lse=row_logsumexp(q, k, scale=0.25), scale=0.25, reduce="mean")

    assert_close(torch.compile(scores, backend="eager", fullgraph=True)(q, k), scores(q, k))


# Errors.

q_, k_ = make_qk(29, group=2)
PACKED = {"q": q_[0].transpose(0, 1), "k": q_[0].transpose(0, 1)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": q_[0]}, ValueError, r"q must be \[B, Hq, W, D\], got \(4, 5, 16\)"),
        ({"q": 3}, TypeError, "q must be a tensor, got int"),
        ({"q": q_.int()}, TypeError, "q must be float32 or float16 or bfloat16 or float64, got int32"),
        (
            {"k": k_[..., :8]},
            ValueError,
            r"k must be \[B, Hk, S, D\] with B = 2, D = 16 \(from q\), got \(2, 2, 11, 8\)",
        ),
        ({"k": k_.half()}, TypeError, "k must be float32, got float16"),
        ({"k": k_.to("meta")}, ValueError, r"k must be on cpu \(as q\), got meta"),
        ({"q": q_[:, :3]}, ValueError, "the heads of k must divide those of q, got 2 for 3"),
        ({"scale": q_}, TypeError, "scale must be a number, got Tensor"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
        ({"q_pos": torch.zeros(1, 5).int()}, ValueError, r"q_pos must be \[B, W\] with B = 2, W = 5 \(from q\)"),
        ({"k_pos": torch.zeros(2, 11)}, TypeError, "k_pos must be int32 or int64, got float32"),
        ({"key_valid": torch.zeros(2, 11)}, TypeError, "key_valid must be bool, got float32"),
        ({"key_valid": torch.zeros(2, 5).bool()}, ValueError, r"key_valid must be \[B, S\]"),
        ({"lse": torch.zeros(2, 2, 5)}, ValueError, r"lse must be \[B, Hq, W\] with B = 2, Hq = 4, W = 5"),
        ({"query_weight": torch.zeros(2, 11)}, ValueError, r"query_weight must be \[B, W\] with B = 2, W = 5"),
        ({"query_weight": torch.zeros(2, 5).int()}, TypeError, "query_weight must be bool or float32"),
        ({"reduce": "sum"}, ValueError, "reduce must be one of none, group, mean, got 'sum'"),
        (
            PACKED | {"cu_seqlens": torch.tensor([0, 4])},
            ValueError,
            r"cu_seqlens must go from 0 up to T = 5, got \[0, 4\]",
        ),
        (PACKED | {"cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, "cu_seqlens must go from 0 up to T = 5"),
        (PACKED | {"cu_seqlens": torch.tensor([0.0, 5])}, TypeError, "cu_seqlens must be int32 or int64, got float32"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 5]), "causal": True}, ValueError, "cannot be combined with causal"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"q must be \[T, Hq, D\], got \(2, 4, 5, 16\)"),
        (PACKED | {"k": k_[0], "cu_seqlens": torch.tensor([0, 5])}, ValueError, r"k must be \[T, Hk, D\] with T = 5"),
    ],
)
def test_errors_name_op_argument_and_what_was_expected(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"q": q_, "k": k_, "scale": 1.0} | changes
    with pytest.raises(error, match=f"^attention_column_mass: .*{message}"):
        attention_column_mass(**arguments)
    if arguments.keys() <= {"q", "k", "scale", "softcap", "q_pos", "k_pos", "key_valid"}:
        with pytest.raises(error, match=f"^row_logsumexp: .*{message}"):
            row_logsumexp(**arguments)
