"""The Triton linear layers on packed 4-bit weights against exact integer products and float64 scaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vlmeff_kernels import _launch

from vlmeff import ops

pytest.importorskip("triton")
sizes = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FLOAT32 = 1e-6  # relative Frobenius error
# Of one element: half a unit in the last place. The interpreter cuts bfloat16 off instead of rounding: a whole one.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7}


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["weights left", "weights right"])
def _both_sides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret what Hopper runs and what Ampere runs."""
    monkeypatch.setattr(_launch, "INTERPRETED_CAPABILITY", request.param)


def packed(codes: Tensor) -> Tensor:
    """Even k in the low nibble; the nibble that nothing may read is random."""
    n, k = codes.shape
    if k % 2:
        codes = torch.cat([codes, torch.randint(0, 16, (n, 1), device=codes.device)], 1)
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def weights(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(codes int64 [N, K] in 0..15, the same packed)."""
    codes = torch.randint(0, 16, (n, k), device=device)
    return codes, packed(codes)


def scales(rows: int, groups: int, device: torch.device) -> Tensor:
    return 0.01 + torch.rand(rows, groups, device=device)


def exact(q: Tensor, codes: Tensor) -> Tensor:
    return (q.cpu().long() @ codes.cpu().long().T).to(q.device)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9))  # all may be zeros


def w4a8(*arguments: Any, group: int = 0) -> Tensor:
    with ops.backend("triton"), ops.counters() as ran:
        out = ops.linear_w4a8_int8(*arguments, group=group)
    assert ran["linear_w4a8_int8", "triton"] == 1
    return out


def wnan(*arguments: Any) -> Tensor:
    with ops.backend("triton"), ops.counters() as ran:
        out = ops.linear_wnan_int(*arguments)
    assert ran["linear_wnan_int", "triton"] == 1
    return out


def tokens(m: int, k: int, device: torch.device) -> Tensor:
    return torch.randint(-128, 128, (m, k), device=device).to(torch.int8)


def grouped(q: Tensor, s: Tensor, codes: Tensor, ws: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """Float64, group after group; s and ws have a column for each or one for all."""
    k = q.shape[1]
    width = group if 0 < group < k else max(k, 1)
    out = torch.zeros(len(q), len(codes), dtype=torch.float64, device=q.device)
    for g in range(ws.shape[1]):
        here = slice(g * width, min((g + 1) * width, k))
        part = exact(q[:, here], codes[:, here] - 8).double()
        out += part * s[:, g if s.shape[1] > 1 else 0].double()[:, None] * ws[:, g].double()
    return out if bias is None else out + bias.double()


def asymmetric(m: int, n: int, k: int, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """(arguments up to bias, unpacked codes) of linear_wnan_int."""
    q = torch.randint(0, 128, (m, k), device=device).to(torch.uint8)
    z = torch.randint(0, 128, (m, 1), device=device).to(torch.int32)
    codes, wq = weights(n, k, device)
    sums = q.sum(1, keepdim=True, dtype=torch.int32), codes.sum(1, dtype=torch.int32)
    wz = 15 * torch.rand(n, 1, device=device)
    return (q, scales(m, 1, device), z, sums[0], wq, scales(n, 1, device), wz, sums[1]), codes


def from_zero_points(arguments: tuple[Tensor, ...], codes: Tensor, bias: Tensor | None) -> Tensor:
    q, s, z, _, _, ws, wz, _ = arguments
    y = s.double() * ws.double().T * ((q.double() - z) @ (codes.double() - wz.double()).T)
    return y if bias is None else y + bias.double()


@pytest.mark.usefixtures("poison", "_both_sides")
@sizes
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(0, 130))
def test_accumulators_of_signed_weights_are_exact(m: int, n: int, k: int, device: torch.device) -> None:
    q, (codes, wq) = tokens(m, k, device), weights(n, k, device)
    one = torch.ones(m, 1, device=device), torch.ones(n, 1, device=device)
    assert torch.equal(w4a8(q, one[0], wq, one[1], None, torch.float32).long(), exact(q, codes - 8))


@pytest.mark.usefixtures("poison", "_both_sides")
@sizes
@given(m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(0, 130))
def test_accumulators_with_zero_points_are_exact(m: int, n: int, k: int, device: torch.device) -> None:
    (q, _, z, rowsum, wq, _, _, colsum), codes = asymmetric(m, n, k, device)
    one = torch.ones(m, 1, device=device), torch.ones(n, 1, device=device)
    inner = exact(q, codes) - z.long() * colsum.long()
    outer = rowsum.long() - k * z.long()
    for wz in (0, 9):  # whole numbers: float32 holds every step
        got = wnan(q, one[0], z, rowsum, wq, one[1], wz * one[1], colsum, None, torch.float32)
        assert torch.equal(got.long(), inner - wz * outer)


@pytest.mark.usefixtures("poison", "_both_sides")
@sizes
@given(data=st.data())
def test_groups_are_scaled_one_by_one(data: Any, device: torch.device) -> None:
    draw = data.draw
    # Several outputs: the groups of a lone one may cancel to nothing.
    m, n, k = draw(st.integers(1, 33)), draw(st.integers(5, 40)), draw(st.integers(1, 150))
    group = draw(st.sampled_from([0, 11, 16, 24, 32, 48, 64, 75, 500]))
    groups = -(-k // group) if 0 < group < k else 1
    q, (codes, wq) = tokens(m, k, device), weights(n, k, device)
    s = scales(m, draw(st.sampled_from([1, groups])), device)
    ws = scales(n, groups, device).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    bias = torch.randn(n, device=device) if draw(st.booleans()) else None
    got = w4a8(q, s, wq, ws, bias, torch.float32, group=group)
    assert error(got, grouped(q, s, codes, ws, bias, group)) <= FLOAT32


@pytest.mark.usefixtures("poison", "_both_sides")
@pytest.mark.parametrize("k", [128, 192, 160])
@pytest.mark.parametrize("group", [32, 64])
def test_groups_of_whole_tiles(k: int, group: int, device: torch.device) -> None:
    q, (codes, wq) = tokens(18, k, device), weights(34, k, device)
    groups = -(-k // group)
    for s in (scales(18, 1, device), scales(18, groups, device)):
        ws = scales(34, groups, device).bfloat16()
        got = w4a8(q, s, wq, ws, None, torch.float32, group=group)
        assert error(got, grouped(q, s, codes, ws, None, group)) <= FLOAT32


@pytest.mark.usefixtures("poison")
@sizes
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 130))
def test_zero_points_are_taken_out(m: int, n: int, k: int, device: torch.device) -> None:
    arguments, codes = asymmetric(m, n, k, device)
    bias = torch.randn(n, device=device)
    got, wanted = wnan(*arguments, bias, torch.float32), from_zero_points(arguments, codes, bias)
    # Of what is subtracted from each other, not of the difference: with few channels that can be anything.
    size = (arguments[1].double() * arguments[5].double().T * 128 * 16 * k).norm()
    assert float((got.double() - wanted).norm() / size) <= FLOAT32


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (16, 32, 32), (33, 70, 100), (3, 65, 31)])
def test_the_output_is_rounded_once(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    bias = torch.randn(n, device=device, dtype=dtype)
    q, (codes, wq) = tokens(m, k, device), weights(n, k, device)
    s, ws = 0.01 * scales(m, 1, device), scales(n, 1, device)
    other, other_codes = asymmetric(m, n, k, device)
    other = (other[0], 0.01 * other[1], *other[2:])
    for got, wanted in (
        (w4a8(q, s, wq, ws, bias, dtype), grouped(q, s, codes, ws, bias, 0)),
        (wnan(*other, bias, dtype), from_zero_points(other, other_codes, bias)),
    ):
        assert got.dtype == dtype
        assert got.shape == (m, n)
        assert got.is_contiguous()
        allowed = ROUNDING.get(dtype, 0) * wanted.abs() + 3e-6 * (wanted.abs().max() + k)
        assert bool(((got.double() - wanted).abs() <= allowed).all())


def test_neighbours_of_the_operands_are_left_alone(device: torch.device) -> None:
    """Rows in the middle of larger buffers, at odd and at even offsets, with rows of odd and of even length."""
    for at, k in ((3, 52), (4, 52), (4, 51), (4, 50)):
        stored = (k + 1) // 2
        room = torch.full((40, 64), 99, dtype=torch.int8, device=device)
        q = room[5:24, 7 : 7 + k]
        q.copy_(tokens(len(q), k, device))
        codes, bytes_ = weights(21, k, device)
        around = torch.full((30, 60), 0xA7, dtype=torch.uint8, device=device)
        wq = around[4:25, at : at + stored]
        wq.copy_(bytes_)
        scale = torch.full((2, 50, 3), torch.nan, device=device)
        s, ws = scale[0, 6:25, 1:2], scale[1, 2:23, 2:]
        s.copy_(scales(19, 1, device)), ws.copy_(scales(21, 1, device))
        got = w4a8(q, s, wq, ws, None, torch.float32)
        assert error(got, grouped(q, s, codes, ws, None, 0)) <= FLOAT32
        assert int((room == 99).sum()) >= room.numel() - q.numel()
        assert torch.equal(wq, bytes_)


def test_strided_operands_are_read_right(device: torch.device) -> None:
    (q, s, z, rowsum, wq, ws, wz, colsum), _ = asymmetric(10, 34, 40, device)
    wide = [torch.stack([x, x + 1], 1).flatten(1) for x in (s, z, rowsum, wz, ws)]
    views = [x[:, :1] for x in wide]
    rows = torch.stack([wq, ~wq], 1).flatten(0, 1)[::2]
    arguments = (q, views[0], views[1], views[2], rows, views[4], views[3], colsum)
    assert torch.equal(
        wnan(*arguments, None, torch.float32), wnan(q, s, z, rowsum, wq, ws, wz, colsum, None, torch.float32)
    )


@pytest.mark.usefixtures("poison")
def test_no_rows_no_channels_and_nan(device: torch.device) -> None:
    bias = torch.randn(8, device=device)
    for m, k in ((0, 9), (2, 0)):
        _, wq = weights(8, k, device)
        s, ws = scales(m, 1, device), scales(8, 1, device)
        got = w4a8(tokens(m, k, device), s, wq, ws, bias, torch.float32)
        assert torch.equal(got, bias.expand(m, -1))
        arguments, _ = asymmetric(m, 8, k, device)
        assert torch.equal(wnan(*arguments, bias, torch.float32), bias.expand(m, -1))
    s = scales(3, 4, device)
    s[1, 3] = torch.nan
    _, wq = weights(8, 64, device)
    got = w4a8(tokens(3, 64, device), s, wq, scales(8, 4, device), bias, torch.float32, group=16)
    assert got.isnan().all(1).tolist() == got.isnan().any(1).tolist() == [False, True, False]
    arguments, _ = asymmetric(3, 8, 20, device)
    arguments[1][2] = torch.nan
    assert wnan(*arguments, None, torch.float32).isnan().all(1).tolist() == [False, False, True]


def _break(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any]) -> None:
    launch = _launch.launch

    def broken(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        at = list(kernel.arg_names).index(name)
        launch(kernel, grid, *arguments[:at], change(arguments[at]), *arguments[at + 1 :], **options)

    monkeypatch.setattr(_launch, "launch", broken)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("channels", lambda channels: channels - 1),
        ("rows", lambda rows: rows - 1),
        ("outputs", lambda outputs: outputs - 1),
        ("stored", lambda stored: stored - 1),
        ("s", lambda s: s * (1 + 1e-5)),
        ("z", lambda z: z + 1),
        ("rowsum", lambda rowsum: rowsum + 1),
        ("colsum", lambda colsum: colsum + 1),
        ("wz_n", lambda stride: 0),
        ("bias", lambda bias: None),
    ],
)
def test_a_broken_product_with_zero_points_is_noticed(
    name: str, change: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, codes = asymmetric(18, 35, 50, device)
    bias = torch.randn(35, device=device)
    wanted = from_zero_points(arguments, codes, bias)
    assert error(wnan(*arguments, bias, torch.float32), wanted) <= 2 * FLOAT32
    _break(monkeypatch, name, change)
    assert not error(wnan(*arguments, bias, torch.float32), wanted) <= 2 * FLOAT32


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("channels", lambda channels: channels - 1),
        ("group", lambda group: group - 1),
        ("groups", lambda groups: groups - 1),
        ("stored", lambda stored: stored - 1),
        ("s", lambda s: s * (1 + 1e-5)),
        ("ws_n", lambda stride: 0),
    ],
)
def test_a_broken_product_of_groups_is_noticed(
    name: str, change: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, (codes, wq) = tokens(18, 50, device), weights(35, 50, device)
    s, ws = scales(18, 1, device), scales(35, 3, device)
    wanted = grouped(q, s, codes, ws, None, 20)
    assert error(w4a8(q, s, wq, ws, None, torch.float32, group=20), wanted) <= FLOAT32
    _break(monkeypatch, name, change)
    assert not error(w4a8(q, s, wq, ws, None, torch.float32, group=20), wanted) <= FLOAT32


def test_traced_calls_are_one_op_with_a_fitting_fake(device: torch.device) -> None:
    _, wq = weights(7, 33, device)
    arguments, _ = asymmetric(5, 7, 33, device)
    rest = (scales(5, 1, device), wq, scales(7, 3, device), None, torch.float32, 11)
    library = torch.ops.vlmeff_kernels
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(library.linear_w4a8_int8.default, (tokens(5, 33, device), *rest), test_utils=utils)
    torch.library.opcheck(library.linear_wnan_int.default, (*arguments, None, torch.float16), test_utils=utils)


def test_sums_that_an_int32_cannot_hold_are_refused() -> None:
    from vlmeff_kernels.linear_int4 import W4A8, WNAN

    def meta(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with _launch.recording((9, 0)):
        for k, groups, fits in ((2**17 - 1, 1, True), (2**17, 1, False), (2**17, 2, True)):
            rest = {"q": meta(1, k), "ws": meta(4, groups), "out_dtype": torch.float32}
            assert (W4A8.supports(**rest, group=2**16) is None) == fits
            assert (WNAN.supports(**rest) is None) == (k < 2**17)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes small tiles")
@pytest.mark.parametrize("m", [5, 40, 300, 1100])
@pytest.mark.parametrize(("k", "group"), [(1024, 0), (1021, 0), (1024, 64), (1024, 128), (1040, 256), (1021, 200)])
def test_tiles_of_a_gpu_are_exact_and_repeat(m: int, k: int, group: int, device: torch.device) -> None:
    groups = -(-k // group) if group else 1
    q, (codes, wq) = tokens(m, k, device), weights(520, k, device)
    for s in (scales(m, 1, device), scales(m, groups, device)):
        arguments = (q, s, wq, scales(520, groups, device), None, torch.float32)
        first = w4a8(*arguments, group=group)
        assert error(first, grouped(q, s, codes, arguments[3], None, group)) <= FLOAT32
        assert all(torch.equal(w4a8(*arguments, group=group), first) for _ in range(20))
    if not group:
        other, codes = asymmetric(m, 520, k, device)
        got = wnan(*other, None, torch.float32)
        assert error(got, from_zero_points(other, codes, None)) <= 2 * FLOAT32
        assert all(torch.equal(wnan(*other, None, torch.float32), got) for _ in range(20))
