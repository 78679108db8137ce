"""The Triton decode attention over packed keys and values, against each entry written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError
from vlmeff.ops import StoredStates

pytest.importorskip("triton")
from vlmeff_kernels import _launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stored(
    kind: str, shape: tuple[int, int, int, int, int], *, bits: int, group: int, dtype: torch.dtype, device: torch.device
) -> StoredStates:
    """Random codes with plausible scales; shape (B, Hk, T, R, D)."""
    batch, heads, tokens, newer, dim = shape
    small = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    codes = torch.randint(0, 256, (batch, heads, tokens, -(-dim * bits // 8)), dtype=torch.uint8, device=device)
    about = (-(-tokens // group), dim) if kind == "keys" else (tokens, dim // group)
    scale = (torch.rand(batch, heads, *about, device=device) / 2**bits + 1e-3).to(small)
    zero = torch.randn(batch, heads, *about, device=device).to(small)
    rest = torch.randn(batch, heads, newer, dim, device=device).to(dtype)
    return StoredStates(codes, scale, zero, rest, bits, group)


def written_out(states: StoredStates, kind: str) -> Tensor:
    """[B, Hk, S, D] float64: each entry from its own code, scale and zero, rounded to the dtype of the rest."""
    dim, tokens = states.rest.shape[3], states.codes.shape[2]
    entries = []
    for d in range(dim):
        bit = d * states.bits
        code = states.codes[..., bit // 8].int() >> bit % 8 & 2**states.bits - 1
        if kind == "keys":
            at = torch.arange(tokens, device=code.device) // int(states.group)  # type: ignore[arg-type]
            scale, zero = states.scale[:, :, at, d], states.zero[:, :, at, d]
        else:
            scale, zero = (t[..., d // int(states.group)] for t in (states.scale, states.zero))  # type: ignore[arg-type]
        entries.append((code.float() * scale.float() + zero.float()).to(states.rest.dtype))
    return torch.cat([torch.stack(entries, -1), states.rest], 2).double()


def oracle(q: Tensor, keys: StoredStates, values: StoredStates, *, scale: float, valid: Tensor | None = None,
           softcap: float | None = None) -> Tensor:  # fmt: skip
    k, v = written_out(keys, "keys"), written_out(values, "values")
    group = q.shape[1] // k.shape[1]
    z = (q.double() * scale) @ k.repeat_interleave(group, 1).mT
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if valid is not None:
        z = z.masked_fill(~valid[:, None, None], -torch.inf)
    return z.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(group, 1)


def off(got: Tensor, expected: Tensor) -> float:
    """Relative to the Frobenius norm, of what rounding the output to its dtype does not explain: half an ulp."""
    half_ulp = torch.finfo(got.dtype).eps / 4 * torch.exp2(expected.frexp().exponent.double()) * (expected != 0)
    error = ((got.double() - expected).abs() - half_ulp).clamp_min(0)
    error = error.where(got.isfinite(), torch.inf)
    return (error.norm() / expected.norm().clamp_min(1e-12)).item()


def run(*arguments: Any, **options: Any) -> Tensor:
    with ops.backend("triton"), ops.counters() as ran:
        out = ops.quantized_decode_attention(*arguments, **options)
    assert ran["quantized_decode_attention", "triton"] == 1
    return out


def case(
    *, batch: int = 2, heads: int = 2, group: int = 3, tokens: tuple[int, int] = (96, 101), total: int = 140,
    dims: tuple[int, int] = (32, 32), bits: tuple[int, int] = (4, 4), groups: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32, device: torch.device,
) -> tuple[Tensor, StoredStates, StoredStates]:  # fmt: skip
    q = torch.randn(batch, heads * group, 1, dims[0], device=device).to(dtype)
    about = zip(("keys", "values"), tokens, dims, bits, groups, strict=True)
    keys, values = (
        stored(kind, (batch, heads, t, total - t, d), bits=b, group=g, dtype=dtype, device=device)
        for kind, t, d, b, g in about
    )
    return q, keys, values


@pytest.mark.usefixtures("poison")
@few
@given(data=st.data())
def test_any_shape_equals_each_entry_written_out(data: Any, device: torch.device) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    total = draw(st.integers(1, 150))
    tokens = draw(st.integers(0, total)), draw(st.integers(0, total))
    value_group = draw(st.sampled_from([8, 16, 32]))
    whole = dtype == torch.float32  # takes half as much of everything
    value_dims = [d for n in (1, 2, 3) if (d := n * value_group) <= (64 if whole else 96)]
    dims = draw(st.sampled_from([16, 24, 40, 64])), draw(st.sampled_from(value_dims))
    key_groups = [1, 8, 32] if whole else [1, 8, 32, 64]
    bits = draw(st.sampled_from([8, 4, 2])), draw(st.sampled_from([8, 4, 2]))
    q, keys, values = case(
        batch=draw(st.integers(1, 2)), heads=draw(st.integers(1, 2)), group=draw(st.sampled_from([1, 2, 7])),
        tokens=tokens, total=total, dims=dims, bits=bits, groups=(draw(st.sampled_from(key_groups)), value_group),
        dtype=dtype, device=device,
    )  # fmt: skip
    valid = torch.rand(len(q), total, device=device) < 0.7 if draw(st.booleans()) else None
    options = {"scale": 0.2, "valid": valid, "softcap": draw(st.sampled_from([None, 1.5]))}
    got = run(q, keys, values, **options)
    assert (got.shape, got.dtype) == ((*q.shape[:3], dims[1]), dtype)
    assert off(got, oracle(q, keys, values, **options)) < TOLERANCE[dtype]


def test_little_shared_memory_leaves_no_room_for_many_scales() -> None:
    q, keys, values = case(group=1, dims=(256, 32), groups=(4, 32), dtype=torch.bfloat16, device=torch.device("meta"))
    with _launch.recording((9, 0)) as record:
        run(q, keys, values, scale=0.2)
    assert record.launches
    with _launch.recording((12, 0)), ops.backend("triton"), pytest.raises(BackendUnavailableError, match="99 KiB"):
        ops.quantized_decode_attention(q, keys, values, scale=0.2)


def test_more_splits_than_are_combined_at_a_time(device: torch.device) -> None:
    q, keys, values = case(batch=1, heads=1, group=2, tokens=(640, 655), total=700, device=device)
    assert off(run(q, keys, values, scale=0.2), oracle(q, keys, values, scale=0.2)) < TOLERANCE[torch.float32]


def strided(x: Tensor) -> Tensor:
    """The same values in every other row of a larger tensor of NaN, or of a sentinel."""
    room = torch.full((*x.shape[:2], 2 * x.shape[2] + 3, x.shape[3] + 5), 0x7B, device=x.device).to(x.dtype)
    if x.is_floating_point():
        room.fill_(torch.nan)
    inside = room[:, :, 1 : 2 * x.shape[2] + 1 : 2, 2:-3]
    inside.copy_(x)
    return inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter_and_neighbours_are_not_read(dtype: torch.dtype, device: torch.device) -> None:
    q, keys, values = case(heads=1, dtype=dtype, device=device)
    expected = run(q, keys, values, scale=0.2)
    apart = [
        StoredStates(strided(s.codes), strided(s.scale), strided(s.zero), strided(s.rest), s.bits, s.group)
        for s in (keys, values)
    ]
    got = run(strided(q), *apart, scale=0.2)
    assert torch.equal(got, expected)
    # Nor what lies in front of and behind contiguous tensors.
    room = torch.full((4, *keys.rest.shape[1:]), torch.nan, dtype=dtype, device=device)
    room[1:3] = keys.rest
    assert torch.equal(run(q, keys._replace(rest=room[1:3]), values, scale=0.2), expected)


def test_the_same_bits_every_time(device: torch.device) -> None:
    q, keys, values = case(batch=1, dtype=torch.bfloat16, device=device)
    first = run(q, keys, values, scale=0.2)
    assert all(torch.equal(run(q, keys, values, scale=0.2), first) for _ in range(3))


def test_a_nan_reaches_its_own_head_and_row_alone(device: torch.device) -> None:
    q, keys, values = case(device=device)
    expected = run(q, keys, values, scale=0.2)
    q[0, 1], keys.rest[1, 1, -1, 3] = torch.nan, torch.nan
    got = run(q, keys, values, scale=0.2)
    hit = torch.zeros(2, 6, dtype=torch.bool, device=device)
    hit[0, 1], hit[1, 3:] = True, True
    assert torch.equal(got.isnan().any(-1)[:, :, 0], hit)
    assert torch.equal(got[~hit], expected[~hit])


def test_what_is_hidden_changes_no_bit_and_a_row_that_sees_nothing_is_zero(device: torch.device) -> None:
    q, keys, values = case(device=device)
    valid = torch.ones(2, 140, dtype=torch.bool, device=device)
    valid[0, :64], valid[1] = False, False
    expected = run(q, keys, values, scale=0.2, valid=valid)
    keys.zero[0, :, :2], values.zero[0, :, :64] = 1e4, 1e4
    got = run(q, keys, values, scale=0.2, valid=valid)
    assert torch.equal(got, expected)
    assert not got[1].any()


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": (0, 0), "total": 0}], ids=str)
@pytest.mark.usefixtures("poison")
def test_empty_sizes(sizes: dict[str, Any], device: torch.device) -> None:
    q, keys, values = case(**sizes, device=device)
    out = run(q, keys, values, scale=0.2)
    assert out.shape == q.shape
    assert not out.any()


WRONG: dict[str, Any] = {
    "scale": {"scale": 0.21},
    "softcap": {"softcap": 30.0},
    "one column hidden": {"hidden": 100},
    "the newest column hidden": {"hidden": -1},
    "keys one group on": {"keys": lambda k: k._replace(scale=k.scale.roll(1, 2))},
    "values one token on": {"values": lambda v: v._replace(zero=v.zero.roll(1, 2))},
    "codes in the other order": {"keys": lambda k: k._replace(codes=k.codes << 4 | k.codes >> 4)},
    "the rest one column on": {"values": lambda v: v._replace(rest=v.rest.roll(1, 2))},
}


@pytest.mark.parametrize("broken", WRONG)
def test_the_comparison_notices(broken: str, device: torch.device) -> None:
    q, keys, values = case(batch=1, heads=1, device=device)
    wrong = WRONG[broken]
    valid = torch.ones(1, 140, dtype=torch.bool, device=device)
    if "hidden" in wrong:
        valid[:, wrong["hidden"]] = False
    options = {"scale": 0.2} | {name: wrong[name] for name in ("scale", "softcap") if name in wrong}
    changed = wrong.get("keys", lambda k: k)(keys), wrong.get("values", lambda v: v)(values)
    got = run(q, *changed, valid=valid, **options)
    assert off(got, oracle(q, keys, values, scale=0.2)) > 10 * TOLERANCE[torch.float32]


REFUSED: dict[str, Any] = {
    "inputs are float64": {"dtype": torch.float64},
    "different sizes": {"sizes": (40, 30, 26)},
    r"power of two up to 64 tokens, got 24": {"groups": (24, 32)},
    r"groups of values of a power of two of channels, got 20": {"dims": (32, 80), "groups": (32, 20)},
    r"head dims up to 256 of torch.bfloat16, got 288": {"dims": (288, 32), "dtype": torch.bfloat16},
    r"head dims up to 64 of torch.float32, got 96": {"dims": (32, 96)},
    r"no room for 17 query heads": {"group": 17},
    r"no room for 65 query heads": {"group": 65, "dtype": torch.float16},
    r"no room for 17 query heads on a key head of 160": {"group": 17, "dims": (32, 160), "dtype": torch.float16},
    r"with keys in groups of 64 tokens": {"group": 1, "dims": (256, 32), "groups": (64, 32), "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_do_it_refuses_with_the_reason(why: str, device: torch.device) -> None:
    options = dict(REFUSED[why])
    sizes = options.pop("sizes", None)
    q, keys, values = case(**options, device=device)
    keys = keys._replace(group=sizes) if sizes else keys
    with ops.backend("triton"), pytest.raises(BackendUnavailableError, match=why):
        ops.quantized_decode_attention(q, keys, values, scale=0.2)
