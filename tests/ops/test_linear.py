"""Quantized linear layers: against sums of Python-sized integers and float64, for every scheme's op."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops
from vlmeff.ops.linear import dequantize_weight, int_matmul
from vlmeff.ops.packing import pack_nibbles

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
EXACT = 1e-6  # relative to the largest output: a few roundings to float32 after an exact integer sum
FP8_SUM = 2e-6  # float32 sums in another order
SIZES = [(1, 3, 5), (17, 16, 32), (4, 1, 1), (3, 24, 129), (5, 40, 256), (0, 4, 7)]
NAMES = ["w8a8_int8", "w8a8_fp8", "wna16_int8", "wna16_uint4", "w4a8_groups", "w4a4_groups", "w4a8_channel", "wnan"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ints(lo: int, hi: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(lo, hi + 1, shape, generator=generator(seed))


def scales(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) + 0.25


def of_groups(group: int, k: int) -> list[slice]:
    size = group if 0 < group < k else max(k, 1)
    return [slice(i, min(i + size, k)) for i in range(0, max(k, 1), size)]


def call(
    name: str,
    m: int,
    n: int,
    k: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    bias: Any = "random",
    change: Any = None,
) -> tuple[Tensor, np.ndarray]:
    """(what the op gives, what a float64 sum over groups gives) on random codes.

    ``change`` edits the arguments that both get (a dict of the unpacked tensors) before they are used.
    """
    group = {"wna16_uint4": 32, "w4a8_groups": 32, "w4a4_groups": 16}.get(name, 0)
    n_g = len(of_groups(group, k))
    a: dict[str, Tensor] = {"ws": scales(n, n_g, seed=seed + 1)}
    if name == "w8a8_int8":
        a |= {"q": ints(-127, 127, m, k, seed=seed), "w": ints(-127, 127, n, k, seed=seed + 2)}
    elif name == "w8a8_fp8":
        a |= {"q": ints(-448, 448, m, k, seed=seed).float().to(torch.float8_e4m3fn).float()}
        a |= {"w": torch.randn(n, k, generator=generator(seed)).to(torch.float8_e4m3fn).float()}
    elif name == "wna16_int8":
        a |= {"q": torch.randn(m, k, generator=generator(seed)), "w": ints(-127, 127, n, k, seed=seed + 2)}
    elif name == "wna16_uint4":
        a |= {"q": torch.randn(m, k, generator=generator(seed)), "w": ints(0, 15, n, k, seed=seed + 2)}
        a |= {"wz": scales(n, n_g, seed=seed + 4) * 12}
    elif name == "wnan":
        a |= {"q": ints(0, 15, m, k, seed=seed), "w": ints(0, 15, n, k, seed=seed + 2)}
        a |= {"wz": scales(n, 1, seed=seed + 4) * 12, "z": ints(0, 15, m, 1, seed=seed + 5)}
    else:
        most = 7 if name == "w4a4_groups" else 127
        a |= {"q": ints(-most, most, m, k, seed=seed), "w": ints(-7, 7, n, k, seed=seed + 2)}
    a["s"] = scales(m, n_g if name == "w4a4_groups" else 1, seed=seed + 3) * 0.01
    b = scales(n, seed=seed + 6) - 0.5 if isinstance(bias, str) else bias
    if name.startswith("wna16"):
        a["q"], b = a["q"].to(dtype), None if b is None else b.to(dtype)
    if change is not None:
        change(a)

    q, w, ws, s = a["q"], a["w"], a["ws"], a["s"]
    if name == "w8a8_int8":
        got = ops.linear_w8a8_int8(q.to(torch.int8), s, w.to(torch.int8), ws, b, dtype)
    elif name == "w8a8_fp8":
        got = ops.linear_w8a8_fp8(q.to(torch.float8_e4m3fn), s, w.to(torch.float8_e4m3fn), ws, b, dtype)
    elif name == "wna16_int8":
        got = ops.linear_wna16(q, w.to(torch.int8), ws, None, b, bits=8)
    elif name == "wna16_uint4":
        got = ops.linear_wna16(q, pack_nibbles(w), ws, a["wz"], b, bits=4, group=group)
    elif name == "wnan":
        arguments = (q.to(torch.uint8), s, a["z"].int(), q.sum(1, keepdim=True).int(), pack_nibbles(w), ws, a["wz"])
        got = ops.linear_wnan_int(*arguments, w.sum(1).int(), b, dtype)
    else:
        got = ops.linear_w4a8_int8(q.to(torch.int8), s, pack_nibbles(w + 8, pad=15), ws, b, dtype, group=group)

    x, y = q.double().numpy().copy(), w.double().numpy().copy()
    expected = np.zeros((m, n))
    for g, here in enumerate(of_groups(group, k)):
        left = x[:, here] - (a["z"].double().numpy() if "z" in a else 0)
        right = y[:, here] - (a["wz"].double().numpy()[:, g : g + 1] if "wz" in a else 0)
        if not name.startswith("wna16"):
            left = left * s.double().numpy()[:, g if s.shape[1] > 1 else 0][:, None]
        expected += left @ (right * ws.double().numpy()[:, g : g + 1]).T
    return got, expected if b is None else expected + b.double().numpy()


def relative(got: Tensor, expected: np.ndarray) -> float:
    if not expected.size:
        return 0.0
    return float(np.abs(got.double().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_the_result_is_the_integer_sum(name: str, m: int, n: int, k: int) -> None:
    for bias in ("random", None):
        got, expected = call(name, m, n, k, bias=bias)
        assert got.shape == (m, n)
        assert got.dtype == torch.float32
        assert relative(got, expected) <= (FP8_SUM if name == "w8a8_fp8" or name.startswith("wna16") else EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_rounding_of_it(name: str, dtype: torch.dtype) -> None:
    got, expected = call(name, 6, 9, 70, dtype=dtype)
    assert got.dtype == dtype
    if name.startswith("wna16"):  # the weight is rounded to the dtype, and so is the library's product
        assert relative(got, expected) <= 4 * torch.finfo(dtype).eps
    else:
        wide, _ = call(name, 6, 9, 70)
        assert torch.equal(got, wide.to(dtype))


@PROPERTY
@given(st.sampled_from(NAMES), st.integers(1, 5), st.integers(1, 20), st.integers(1, 140), st.integers(0, 2**20))
def test_any_size_and_seed(name: str, m: int, n: int, k: int, seed: int) -> None:
    got, expected = call(name, m, n, k, seed)
    scale = max(float(np.abs(expected).max()), 1e-2)
    assert float(np.abs(got.double().numpy() - expected).max()) <= 1e-5 * scale


def test_large_sums_keep_every_digit() -> None:
    """K of Wan-14B's feed-forward; expanding the zero-points in float32 is off by 3e-4 here."""
    got, expected = call("wnan", 4, 8, 13824)
    assert relative(got, expected) <= 3e-6
    got, expected = call("w8a8_int8", 2, 4, 13824)
    assert relative(got, expected) <= EXACT
    everything = torch.full((1, 13824), 127, dtype=torch.int8)
    assert int(int_matmul(everything, -everything)) == -127 * 127 * 13824


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_zeros_gives_the_bias_exactly(name: str) -> None:
    bias = torch.randn(12, generator=generator(3))

    def zero(a: dict[str, Tensor]) -> None:
        a["q"][1] = a["z"][1] if "z" in a else 0  # the code that stands for zero

    got, _ = call(name, 3, 12, 45, bias=bias, change=zero)
    assert torch.equal(got[1], bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_scale_of_nan_spoils_exactly_its_row(name: str, bad: float) -> None:
    def spoil(a: dict[str, Tensor]) -> None:
        if name.startswith("wna16"):
            a["q"][1, 3] = bad
        else:
            a["s"][1] = math.nan  # what quantizing such a row gives
            a["q"][1] = 0

    clean, _ = call(name, 3, 6, 40)
    got, _ = call(name, 3, 6, 40, change=spoil)
    assert not bool(got[1].isfinite().any())
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("k", [5, 33])
def test_what_fills_an_odd_byte_is_not_read(k: int) -> None:
    x = torch.randn(2, k, generator=generator(0))
    codes, ws, wz = ints(0, 15, 3, k, seed=1), scales(3, 1, seed=2), scales(3, 1, seed=3)
    outputs = [ops.linear_wna16(x, pack_nibbles(codes, pad=pad), ws, wz, None, bits=4) for pad in (0, 15)]
    assert torch.equal(*outputs)
    assert torch.equal(
        dequantize_weight(pack_nibbles(codes, pad=9), ws, wz, bits=4, group=0, k=k), ws * (codes.float() - wz)
    )


def test_symmetric_weights_of_four_bits_are_stored_with_an_offset_of_eight() -> None:
    codes, x = ints(-7, 7, 4, 50, seed=0), torch.randn(3, 50, generator=generator(1))
    ws = scales(4, 4, seed=2)
    wide = codes * ws.repeat_interleave(16, 1)[:, :50]
    got = ops.linear_wna16(x, pack_nibbles(codes + 8), ws, None, None, bits=4, group=16)
    assert relative(got, (x.double() @ wide.double().T).numpy()) <= FP8_SUM


def test_float8_weights_alone() -> None:
    w = torch.randn(4, 9, generator=generator(0)).to(torch.float8_e4m3fn)
    x, ws = torch.randn(3, 9, generator=generator(1)), scales(4, 1, seed=2)
    expected = x.double() @ (w.double() * ws.double()).T
    assert relative(ops.linear_wna16(x, w, ws, None, None, bits=8), expected.numpy()) <= FP8_SUM


def test_strided_operands() -> None:
    q, wq = (ints(-127, 127, 2 * n, 66, seed=n).to(torch.int8) for n in (5, 7))
    s, ws = scales(10, 1, seed=0), scales(14, 1, seed=1)
    a, b = (q[::2, ::3], s[::2]), (wq[::2, ::3], ws[::2])
    got = ops.linear_w8a8_int8(*a, *b, None, torch.float32)
    assert torch.equal(got, ops.linear_w8a8_int8(*(t.contiguous() for t in (*a, *b)), None, torch.float32))
    transposed = ops.linear_w8a8_int8(q.T.contiguous().T, s, wq, ws, None, torch.float32)
    assert torch.equal(transposed, ops.linear_w8a8_int8(q, s, wq, ws, None, torch.float32))


Q, W, S, WS = (
    torch.zeros(4, 6, dtype=torch.int8),
    torch.zeros(4, 6, dtype=torch.int8),
    torch.ones(4, 1),
    torch.ones(4, 1),
)
P4 = torch.zeros(4, 3, dtype=torch.uint8)
F32 = torch.float32


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: ops.linear_w8a8_int8(Q[None], S, W, WS, None, F32), ValueError, r"\[M, K\], got \(1, 4, 6\)"),
        (lambda: ops.linear_w8a8_int8(Q, S, W[:, :5], WS, None, F32), ValueError, r"wq must be \[N, 6\].*\(4, 5\)"),
        (lambda: ops.linear_w8a8_int8(Q, S, W[0], WS, None, F32), ValueError, r"wq must be \[N, 6\].*\(6,\)"),
        (
            lambda: ops.linear_w8a8_int8(Q.float(), S, W, WS, None, F32),
            TypeError,
            "q must be torch.int8, got",
        ),
        (lambda: ops.linear_w8a8_fp8(Q, S, W, WS, None, F32), TypeError, "q must be torch.float8_e4m3fn"),
        (lambda: ops.linear_w8a8_int8(Q, S[:, 0], W, WS, None, F32), ValueError, r"s must be \[4, 1\]"),
        (lambda: ops.linear_w8a8_int8(Q, S, W, WS.T, None, F32), ValueError, r"ws must be \[4, 1\].*\(1, 4\)"),
        (lambda: ops.linear_w8a8_int8(Q, S, W, WS, S[:3, 0], F32), ValueError, r"bias must be \[4\].*\(3,\)"),
        (lambda: ops.linear_w4a8_int8(Q, S, W, WS, None, F32), ValueError, r"packed \[N, 3\]"),
        (lambda: ops.linear_w4a8_int8(Q, S, P4, WS, None, F32, group=2), ValueError, r"ws must be \[4, 3\]"),
        (lambda: ops.linear_wna16(S, W[:, :1], WS, None, None, bits=6), ValueError, "8 or 2 to 4, got 6"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("z", torch.zeros(1, 1, dtype=torch.int32)),  # would be spread over all tokens
        ("z", torch.zeros(4, 1)),
        ("rowsum", torch.zeros(4, dtype=torch.int32)),
        ("colsum", torch.zeros(1, dtype=torch.int32)),
        ("colsum", None),
    ],
)
def test_sums_and_zero_points_of_another_shape_or_dtype_are_refused(name: str, value: Any) -> None:
    sums = {
        "z": torch.zeros(4, 1, dtype=torch.int32),
        "rowsum": torch.zeros(4, 1, dtype=torch.int32),
        "colsum": torch.zeros(4, dtype=torch.int32),
    }
    call = {"q": Q.to(torch.uint8), "s": S, "wq": P4, "ws": WS, "wz": WS, "bias": None, "out_dtype": F32}
    ops.linear_wnan_int(**call, **sums)
    with pytest.raises((ValueError, TypeError), match=name):
        ops.linear_wnan_int(**call, **{**sums, name: value})


def test_codes_of_another_dtype_are_refused_and_no_argument_is_changed() -> None:
    with pytest.raises(TypeError, match=r"wq must be torch\.uint8, got torch\.int8"):
        ops.linear_w4a8_int8(Q, S, P4.view(torch.int8), WS, None, F32)
    with pytest.raises(TypeError, match=r"wq must be torch\.int8 or torch\.float8_e4m3fn, got torch\.float32"):
        ops.linear_wna16(S.expand(4, 6), W.float(), WS, WS, None, bits=8)
    with pytest.raises(TypeError, match=r"x must be a float tensor, got torch\.int64"):
        ops.linear_wna16(Q.long(), W, WS, None, None, bits=8)
    with pytest.raises(TypeError, match="wq must be a tensor, got list"):
        ops.linear_wna16(torch.ones(4, 6), [1], WS, None, None, bits=8)
    w = ints(-127, 127, 4, 6, seed=1).to(torch.int8)
    before = w.clone()
    ops.linear_wna16(torch.ones(4, 6), w, WS, WS, None, bits=8)
    assert torch.equal(w, before)


def test_an_ambient_autocast_changes_nothing() -> None:
    q = ints(-127, 127, 3, 64, seed=0).float().to(torch.float8_e4m3fn)
    w = ints(-127, 127, 5, 64, seed=1).float().to(torch.float8_e4m3fn)
    s, ws, x = scales(3, 1, seed=2), scales(5, 1, seed=3), torch.randn(3, 64, generator=generator(4))

    def both() -> list[Tensor]:
        return [ops.linear_w8a8_fp8(q, s, w, ws, None, F32), ops.linear_wna16(x, w, ws, None, None, bits=8)]

    expected = both()
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", half):
            got = both()
        assert [t.dtype for t in got] == [F32, F32]
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(("k", "group"), [(12, 4), (15, 5), (15, 4), (12, 0)])
@pytest.mark.parametrize("zeros", [True, False])
def test_groups_that_fill_the_row_and_groups_that_do_not(k: int, group: int, zeros: bool) -> None:
    codes, groups = ints(0, 15, 3, k, seed=5), -(-k // group) if group else 1
    ws, wz = scales(3, groups, seed=6), scales(3, groups, seed=7) if zeros else None
    got = ops.linear_wna16(torch.eye(k), pack_nibbles(codes), ws, wz, None, bits=4, group=group)
    for n in range(3):
        for i in range(k):
            g = i // group if group else 0
            zero = 8.0 if wz is None else float(wz[n, g])
            assert float(got[i, n]) == pytest.approx(float(ws[n, g]) * (int(codes[n, i]) - zero), rel=1e-6)


def test_they_are_counted_and_explained() -> None:
    with ops.counters() as ran:
        ops.linear_w8a8_int8(Q, S, W, WS, None, F32)
    assert ran == {("linear_w8a8_int8", "reference"): 1}
    explained = ops.explain("linear_w4a8_int8", Q, S, P4, WS, None, F32)
    assert (explained.backend, explained.why) == ("reference", "the tensors are on cpu")


def test_a_compiled_function_gives_the_same_numbers() -> None:
    q, p = ints(0, 15, 3, 9, seed=0), pack_nibbles(ints(0, 15, 4, 9, seed=1))
    w, s, ws, bias = ints(-127, 127, 4, 9, seed=2), scales(3, 1, seed=3), scales(4, 1, seed=4), scales(4, seed=5)
    fp8 = w.float().to(torch.float8_e4m3fn)

    def all_of_them(x: Tensor) -> list[Tensor]:
        i8 = q.to(torch.int8)
        rest = (q.sum(1, keepdim=True).int(), p, ws, ws, w.sum(1).int(), bias, torch.bfloat16)
        return [
            ops.linear_w8a8_int8(i8, s, w.to(torch.int8), ws, bias, torch.bfloat16),
            ops.linear_w8a8_fp8(q.float().to(torch.float8_e4m3fn), s, fp8, ws, bias, torch.float32),
            ops.linear_wna16(x, p, ws, ws, bias, bits=4),
            ops.linear_w4a8_int8(i8, s, p, ws, bias, torch.float32),
            ops.linear_wnan_int(q.to(torch.uint8), s, q[:, :1].int(), *rest),
        ]

    x = torch.randn(3, 9, generator=generator(6))
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), all_of_them(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
