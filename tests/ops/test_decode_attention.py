"""Decode attention over quantized keys and values, against every entry and every product written out in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmeff import ops
from vlmeff.ops import StoredStates, quantized_decode_attention
from vlmeff.ops.kv_codes import pack, unpack

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
DTYPES = list(TOLERANCE)
BATCH, HEADS = 2, 2


def stored(
    kind: str,
    tokens: int,
    rest: int,
    dim: int,
    *,
    bits: int = 4,
    group: Any = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> StoredStates:
    """Random codes. ``group``: of keys an int or the sizes, of values the channels."""
    g = torch.Generator().manual_seed(seed + (kind == "keys"))
    codes = torch.randint(0, 256, (BATCH, HEADS, tokens, -(-dim * bits // 8)), dtype=torch.uint8, generator=g)
    groups = len(group) if isinstance(group, tuple) else -(-tokens // group)
    about = (groups, dim) if kind == "keys" else (tokens, dim // group)
    scale = (torch.rand(BATCH, HEADS, *about, generator=g) / 2**bits + 1e-3).half()
    zero = torch.randn(BATCH, HEADS, *about, generator=g).half()
    newest = torch.randn(BATCH, HEADS, rest, dim, generator=g).to(dtype)
    return StoredStates(codes, scale, zero, newest, bits, group)


def sizes_of(states: StoredStates) -> list[int]:
    if isinstance(states.group, tuple):
        return list(states.group)
    tokens = states.codes.shape[2]
    return [min(states.group, tokens - start) for start in range(0, tokens, states.group)]


def entry(states: StoredStates, kind: str, b: int, h: int, t: int, d: int) -> float:
    """One entry, from its own code, scale and zero; what float32 makes of them, in the dtype of the rest."""
    tokens = states.codes.shape[2]
    if t >= tokens:
        return states.rest[b, h, t - tokens, d].item()
    bit = d * states.bits
    code = int(states.codes[b, h, t, bit // 8]) >> bit % 8 & 2**states.bits - 1
    if kind == "keys":
        place = (b, h, [i for i, size in enumerate(sizes_of(states)) for _ in range(size)][t], d)
    else:
        place = (b, h, t, d // states.group)  # type: ignore[operator]
    wide = torch.promote_types(states.rest.dtype, torch.float32)
    x = torch.tensor(code, dtype=wide) * states.scale[place].to(wide) + states.zero[place].to(wide)
    return x.to(states.rest.dtype).item()


def whole(states: StoredStates, kind: str) -> Tensor:
    """[B, Hk, S, D] float64."""
    _, _, rest, dim = states.rest.shape
    out = torch.empty(BATCH, HEADS, states.codes.shape[2] + rest, dim, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist() if out.numel() else ():
        out[tuple(place)] = entry(states, kind, *place)
    return out


def oracle(
    q: Tensor, keys: StoredStates, values: StoredStates, scale: float, valid: Tensor | None, softcap: float | None
) -> Tensor:
    k, v = whole(keys, "keys"), whole(values, "values")
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        seen = torch.arange(k.shape[2]) if valid is None else valid[b].nonzero()[:, 0]
        for h in range(q.shape[1]):
            at = h // (q.shape[1] // HEADS)
            z = scale * (k[b, at, seen] @ q[b, h, 0].double())
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            weights = torch.exp(z - z.max()) if len(seen) else z
            out[b, h, 0] = weights / weights.sum() @ v[b, at, seen] if len(seen) else 0
    return out


def check(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == expected.shape
    off = (got.double() - expected.to(dtype).double()).norm() / expected.norm().clamp_min(1e-9)
    assert off < TOLERANCE[dtype]


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_equals_every_entry_written_out(data: Any) -> None:
    draw = data.draw
    dtype, total = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 20))
    key_tokens, value_tokens = draw(st.integers(0, total)), draw(st.integers(0, total))
    if key_tokens and draw(st.booleans()):
        cuts = sorted(draw(st.sets(st.integers(1, key_tokens - 1), max_size=4))) if key_tokens > 1 else []
        key_group: Any = tuple(b - a for a, b in zip([0, *cuts], [*cuts, key_tokens], strict=True))
    else:
        key_group = draw(st.integers(1, 9))
    value_group = draw(st.integers(1, 5))
    dim, bits = draw(st.integers(1, 9)), st.sampled_from([8, 4, 2])
    keys = stored("keys", key_tokens, total - key_tokens, dim, bits=draw(bits), group=key_group, dtype=dtype)
    values = stored(
        "values", value_tokens, total - value_tokens, 2 * value_group, bits=draw(bits), group=value_group, dtype=dtype
    )
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    q = torch.randn(BATCH, HEADS * draw(st.sampled_from([1, 3])), 1, dim, generator=seed).to(dtype)
    valid = torch.rand(BATCH, total, generator=seed) < 0.6 if draw(st.booleans()) else None
    softcap = draw(st.sampled_from([None, 1.5]))
    got = quantized_decode_attention(q, keys, values, scale=0.4, valid=valid, softcap=softcap)
    check(got, oracle(q, keys, values, 0.4, valid, softcap), dtype)


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, StoredStates, StoredStates]:
    q = torch.randn(BATCH, 3 * HEADS, 1, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    return q, stored("keys", 24, 9, 16, dtype=dtype), stored("values", 28, 5, 16, dtype=dtype)


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    q, keys, values = example()
    valid = torch.tensor([[False], [True]]).expand(2, 33)
    out = quantized_decode_attention(q, keys, values, scale=0.25, valid=valid)
    assert not out[0].any()
    assert torch.equal(out[1], quantized_decode_attention(q, keys, values, scale=0.25)[1])


def test_hidden_tokens_change_no_bit_and_a_nan_is_passed_on() -> None:
    q, keys, values = example()
    valid = torch.ones(2, 33, dtype=torch.bool)
    valid[1, :8] = False
    before = quantized_decode_attention(q, keys, values, scale=0.25, valid=valid)
    keys.zero[1, :, 0], values.zero[1, :, :8] = 1e4, 1e4  # the first group of keys: tokens 0 to 7
    assert torch.equal(quantized_decode_attention(q, keys, values, scale=0.25, valid=valid), before)
    q[0, 4] = torch.nan
    after = quantized_decode_attention(q, keys, values, scale=0.25, valid=valid)
    assert after[0, 4].isnan().all()
    assert torch.equal(after[0, :4], before[0, :4])
    assert torch.equal(after[1], before[1])


def test_the_sizes_of_equal_groups_are_one_group() -> None:
    q, keys, values = example()
    expected = quantized_decode_attention(q, keys, values, scale=0.25)
    for sizes in ((8, 8, 8), (9, 7, 8)):
        got = quantized_decode_attention(q, keys._replace(group=sizes), values, scale=0.25)
        assert torch.equal(got, expected) == (sizes == (8, 8, 8))
    with ops.counters() as ran:
        quantized_decode_attention(q, keys, values, scale=0.25)
    assert ran["quantized_decode_attention", "reference"] == 1


def test_autocast_does_not_lower_the_precision() -> None:
    q, keys, values = example(torch.bfloat16)
    expected = quantized_decode_attention(q, keys, values, scale=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized_decode_attention(q, keys, values, scale=0.25), expected)


def test_a_compiled_step_goes_on_while_the_cache_grows() -> None:
    step = torch.compile(
        lambda q, k, v: quantized_decode_attention(q, k, v, scale=0.25), backend="aot_eager", fullgraph=True
    )
    q = example()[0]
    for tokens in (24, 32, 44):
        keys, values = stored("keys", tokens, 9, 16), stored("values", tokens, 9, 16)
        torch.testing.assert_close(step(q, keys, values), quantized_decode_attention(q, keys, values, scale=0.25))


def test_nothing_is_read_on_the_host() -> None:
    mode = FakeTensorMode()
    f = mode.from_tensor
    q, keys, values = example()
    fake = [StoredStates(f(s.codes), f(s.scale), f(s.zero), f(s.rest), s.bits, s.group) for s in (keys, values)]
    valid = mode.from_tensor(torch.ones(2, 33, dtype=torch.bool))
    with mode:
        out = quantized_decode_attention(mode.from_tensor(q), *fake, scale=0.25, valid=valid, softcap=30.0)
    assert out.shape == q.shape


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_unpacked_as_they_were_packed(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack(pack(codes, bits), bits)[..., :11], codes)


MEANT = [
    ({"q": (2, 6, 2, 16)}, ValueError, "one query a row"),
    ({"q": (2, 5, 1, 16)}, ValueError, "heads of keys must divide"),
    ({"q": (2, 6, 1, 15)}, ValueError, r"keys.rest must be \[B, Hk, R, D\] with B = 2, D = 15, got (2, 2, 9, 16)"),
    ({"dtype": torch.bfloat16}, TypeError, "keys.rest must be bfloat16, got float32"),
    ({"keys": {"bits": 3}}, ValueError, "keys.bits must be 8, 4 or 2, got 3"),
    ({"keys": {"bits": 8}}, ValueError, "keys.codes must be"),
    ({"keys": {"group": 7}}, ValueError, r"keys.group=7 .* T = 24 and G = 3"),
    ({"keys": {"group": (8, 8, 7)}}, ValueError, r"keys.group .* G = 3 groups, 24 in all, got 3 groups of 23"),
    ({"values": {"group": 4}}, ValueError, r"values.group=4 .* E = 16 and G = 2"),
    ({"values": {"codes": torch.zeros(2, 2, 27, 8, dtype=torch.uint8)}}, ValueError, r"values.scale must be .* T = 27"),
    ({"values": {"rest": torch.zeros(2, 2, 6, 16)}}, ValueError, "as many tokens as keys, 33, got 34"),
    ({"valid": torch.ones(2, 32, dtype=torch.bool)}, ValueError, "valid must be .* S = 33"),
    ({"valid": torch.ones(2, 33)}, TypeError, "valid must be bool, got float32"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    ({"scale": None}, TypeError, "scale must be a number"),
]


@pytest.mark.parametrize(("changed", "error", "meant"), MEANT, ids=[m[2] for m in MEANT])
def test_a_bad_argument_is_named(changed: dict[str, Any], error: type[Exception], meant: str) -> None:
    q, keys, values = example()
    if "q" in changed:
        q = torch.zeros(changed["q"])
    q = q.to(changed.get("dtype", q.dtype))
    keys, values = keys._replace(**changed.get("keys", {})), values._replace(**changed.get("values", {}))
    options = {"scale": 0.25} | {name: changed[name] for name in ("valid", "softcap", "scale") if name in changed}
    with pytest.raises(error, match="quantized_decode_attention: ") as caught:
        quantized_decode_attention(q, keys, values, **options)
    assert re.search(meant.replace("(2, 2, 9, 16)", r"\(2, 2, 9, 16\)"), str(caught.value)), caught.value
