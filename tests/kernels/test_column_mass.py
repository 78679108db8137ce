"""The Triton attention_column_mass against a dense float64 softmax, for whatever masks, segments, sizes and dtypes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

pytest.importorskip("triton")
from vlmeff_kernels import _launch

# Relative Frobenius error against float64 on the same inputs: exp2 and the order of summation.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
REDUCES = ["none", "group", "mean"]
STRETCH = 8 if torch.cuda.is_available() else 1  # the interpreter's tiles are 16, those of a GPU up to 128
PROCESSORS = [1, 132]  # 1: nothing is cut into parts
drawn = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dense_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    lse: Tensor | None = None,
    query_weight: Tensor | None = None,
    reduce: str = "none",
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    key_valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The whole attention matrix in float64."""
    (_, heads, width, _), (_, kv_heads, keys, _) = q.shape, k.shape
    z = scale * (q.double() @ k.double().repeat_interleave(heads // kv_heads, 1).mT)
    z = z if softcap is None else softcap * (z / softcap).tanh()
    rows = torch.arange(keys - width, keys, device=q.device)[None] if q_pos is None else q_pos
    columns = torch.arange(keys, device=q.device)[None] if k_pos is None else k_pos
    allowed = (columns[:, None] <= rows[..., None]) | (not causal)
    if key_valid is not None:
        allowed = allowed & key_valid[:, None]
    z = z.masked_fill(~allowed[:, None], -torch.inf)
    lse = z.logsumexp(-1) if lse is None else lse.double()
    weight = torch.ones_like(lse) if query_weight is None else query_weight.double()
    weight = weight[:, None] if weight.ndim == 2 else weight
    p = weight[..., None] * (z - lse[..., None]).exp()
    p = p.masked_fill(~allowed[:, None], 0).masked_fill((lse == -torch.inf)[..., None], 0)
    mass = p.sum(2)
    if reduce == "none":
        return mass
    return mass.mean(1) if reduce == "mean" else mass.unflatten(1, (kv_heads, -1)).mean(2)


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert got.is_contiguous()
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def on_triton(q: Tensor, k: Tensor, **arguments: Any) -> Tensor:
    with ops.backend("triton"), ops.counters() as ran:
        got = ops.attention_column_mass(q, k, **arguments)
    assert ran["attention_column_mass", "triton"] == 1
    return got


def random_qk(
    device: torch.device, *, batch: int = 2, kv_heads: int = 2, group: int = 2, width: int = 10, keys: int = 21,
    dim: int = 24, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q = torch.randn(batch, kv_heads * group, width, dim, device=device).to(dtype)
    return q, torch.randn(batch, kv_heads, keys, dim, device=device).to(dtype)


def random_masks(kind: str, batch: int, width: int, keys: int, device: torch.device) -> dict[str, Any]:
    if kind == "none":
        return {}
    if kind == "causal":
        return {"causal": True}
    key_valid = torch.rand(batch, keys, device=device) < 0.7
    if kind == "padding":
        return {"key_valid": key_valid}
    # As after an eviction: gaps, slots out of order, padding, and one row that sees nothing.
    k_pos = torch.stack([torch.randperm(3 * keys, device=device)[:keys] for _ in range(batch)])
    q_pos = torch.randint(0, 3 * keys, (batch, width), device=device)
    q_pos[0, 0] = -1
    return {"causal": True, "q_pos": q_pos, "k_pos": k_pos, "key_valid": key_valid}


@pytest.mark.usefixtures("poison")
@drawn
@given(data=st.data())
def test_equals_the_dense_softmax(data: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = data.draw
    processors = draw(st.sampled_from(PROCESSORS))
    monkeypatch.setattr(_launch, "processors", lambda device: processors)
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    width, keys = draw(st.sampled_from([1, 2, 5, 9, 18, 33])) * STRETCH, draw(st.integers(1, 40)) * STRETCH
    dim, dtype = draw(st.sampled_from([1, 24, 64, 80, 96])), draw(st.sampled_from(list(TOLERANCE)))
    shape = {"batch": batch, "kv_heads": kv_heads, "group": group, "width": width, "keys": keys, "dim": dim}
    q, k = random_qk(device, dtype=dtype, **shape)
    kind = draw(st.sampled_from(["none", "causal", "padding", "eviction"]))
    weights = draw(st.sampled_from([None, (batch, width), (batch, kv_heads * group, width)]))
    arguments = {
        "scale": draw(st.floats(-0.5, 0.5)),
        "softcap": draw(st.sampled_from([None, 0.5, 20.0])),
        "reduce": draw(st.sampled_from(REDUCES)),
        "query_weight": None if weights is None else torch.rand(weights, device=device),
        **random_masks(kind, batch, width, keys, device),
    }
    expected = dense_mass(q, k, **arguments)
    assert relative_error(on_triton(q, k, **arguments), expected) < TOLERANCE[dtype]


@pytest.mark.usefixtures("poison")
@drawn
@given(data=st.data())
def test_packed_segments_equal_separate_calls(data: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = data.draw
    processors = draw(st.sampled_from(PROCESSORS))
    monkeypatch.setattr(_launch, "processors", lambda device: processors)
    lengths = [n * STRETCH for n in draw(st.lists(st.sampled_from([0, 1, 4, 16, 19]), min_size=1, max_size=4))]
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    q, k = random_qk(device, batch=1, kv_heads=kv_heads, group=group, width=bounds[-1], keys=bounds[-1], dim=20)
    reduce, weights = draw(st.sampled_from(REDUCES)), draw(st.sampled_from([None, (), (kv_heads * group,)]))
    weight = None if weights is None else torch.rand((*weights, bounds[-1]), device=device)
    arguments = {"scale": 0.4, "softcap": draw(st.sampled_from([None, 3.0])), "reduce": reduce}
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    packed = (x[0].transpose(0, 1).contiguous() if draw(st.booleans()) else x[0].transpose(0, 1) for x in (q, k))
    got = on_triton(*packed, query_weight=weight, cu_seqlens=cu_seqlens, **arguments)
    parts = []
    for a, b in pairwise(bounds):
        part_weight = None if weight is None else weight[..., a:b][None]
        parts.append(dense_mass(q[:, :, a:b], k[:, :, a:b], query_weight=part_weight, **arguments)[0])
    assert relative_error(got, torch.cat(parts, dim=-1)) < 1e-5


def test_bounds_that_lie_touch_no_other_memory(device: torch.device) -> None:
    """The masses have no meaning then, but a wrong bound must not become a wrong address."""
    q, k = (torch.randn(20, 1, 16, device=device) for _ in range(2))
    for bounds in ([5, 9], [0, 9, 3, 20], [-7, 50], [20, 0]):
        got = on_triton(q, k, scale=0.3, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device))
        assert got.shape == (1, 20)
        assert got.isfinite().all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, torch.float16), (72, torch.bfloat16), *((80, dtype) for dtype in TOLERANCE), (96, torch.float32),
     (128, torch.bfloat16), (160, torch.float16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("width", [1, 17])
def test_head_dims_and_dtypes(width: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k = random_qk(device, batch=1, kv_heads=1, width=width, dim=dim, dtype=dtype)
    arguments = {"scale": dim**-0.5, "causal": True}
    assert relative_error(on_triton(q, k, **arguments), dense_mass(q, k, **arguments)) < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [1, 10])
@pytest.mark.parametrize("layout", ["heads behind rows", "strided last dim", "expanded batch", "sliced cache"])
def test_strides_do_not_matter(layout: str, width: int, device: torch.device) -> None:
    q, k = random_qk(device, width=width)
    weight = torch.rand(2, 4, width + 1, device=device)[..., 1:]
    lse = torch.rand(2, width, 4, device=device).mT
    if layout == "heads behind rows":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    elif layout == "strided last dim":
        q, k = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in (q, k))
    elif layout == "expanded batch":
        q, k = q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1)
        weight = weight[:, :1].expand(-1, 4, -1)
    else:
        q, k, lse, weight = q[:, 1:3], torch.cat([k, k], dim=2)[:, 1:, 5:26], lse[:, 1:3], weight[:, 2:]
    given, plain = ({"lse": f(lse), "query_weight": f(weight)} for f in (lambda x: x, Tensor.contiguous))
    got = on_triton(q, k, scale=0.2, causal=True, **given)
    assert torch.equal(got, on_triton(q.contiguous(), k.contiguous(), scale=0.2, causal=True, **plain))


@pytest.mark.parametrize("width", [1, 10])
def test_neighbours_in_memory_are_not_read(width: int, device: torch.device) -> None:
    q, k = random_qk(device, width=width, dim=21)
    lse, weight = torch.rand(2, 4, width, device=device), torch.rand(2, width, device=device)
    inner = []
    for x in (q, k, lse, weight):
        room = torch.full([n + 5 for n in x.shape], torch.nan, device=device)
        inner.append(room[tuple(slice(2, 2 + n) for n in x.shape)])
        inner[-1].copy_(x)
    flags = torch.zeros(4, 30, dtype=torch.bool, device=device)
    positions = torch.full((4, 30), -1, device=device, dtype=torch.int32)
    flags[1:3, 4:25] = True
    positions[1:3, 4:25] = torch.arange(21, device=device)
    masks = {"causal": True, "key_valid": flags[1:3, 4:25], "k_pos": positions[1:3, 4:25]}
    got = on_triton(*inner[:2], scale=0.2, lse=inner[2], query_weight=inner[3], **masks)
    assert relative_error(got, dense_mass(q, k, scale=0.2, lse=lse, query_weight=weight, causal=True)) < 1e-5


# The comparison itself: it must notice each of these mistakes.
MISTAKES: dict[str, dict[str, Any]] = {
    "causal offset + 1": {"q_pos": torch.arange(11, 21).expand(1, 10) + 1},
    "causal offset - 1": {"q_pos": torch.arange(11, 21).expand(1, 10) - 1},
    "key positions shifted": {"k_pos": torch.arange(21).expand(1, 21) + 1},
    "not causal": {"causal": False},
    "mask shifted by one key": {"key_valid": torch.arange(21).expand(1, 21) != 4},
    "mask ignored": {"key_valid": None},
    "scale": {"scale": 0.25 * 1.001},
    "base 2": {"scale": 0.25 / math.log(2)},
    "no softcap": {"softcap": None},
    "weights shifted": {"query_weight": (torch.arange(10).expand(1, 10) + 1.0).roll(1, 1)},
    "sum and not mean": {"reduce": "none"},
}


@pytest.mark.parametrize("width", [2, 10])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake: str, width: int, device: torch.device) -> None:
    q, k = random_qk(device, batch=1, kv_heads=1, dtype=torch.bfloat16)
    right = {
        "scale": 0.25, "softcap": 4.0, "causal": True, "key_valid": torch.arange(21).expand(1, 21) != 3,
        "query_weight": torch.arange(10).expand(1, 10) + 1.0, "reduce": "group",
    }  # fmt: skip
    wrong = right | MISTAKES[mistake]
    calls = []
    for arguments in (right, wrong):
        call = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        calls.append(call | {n: call[n][:, -width:] for n in ("q_pos", "query_weight") if n in call})
    q = q[:, :, -width:]
    expected = dense_mass(q, k, **calls[0])
    assert relative_error(on_triton(q, k, **calls[0]), expected) < 1e-4
    got = on_triton(q, k, **calls[1])
    assert relative_error(got.sum(1, keepdim=True), expected) > 1e-4


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "width", "keys"), [(2, 0, 11), (2, 5, 0), (2, 0, 0), (0, 5, 11)])
def test_empty_sizes(batch: int, width: int, keys: int, causal: bool, device: torch.device) -> None:
    q, k = random_qk(device, batch=batch, width=width, keys=keys)
    for reduce, shape in (("none", (batch, 4, keys)), ("group", (batch, 2, keys)), ("mean", (batch, keys))):
        got = on_triton(q, k, scale=1.0, causal=causal, reduce=reduce)
        assert got.shape == shape
        assert (got == 0).all()


def test_no_packed_tokens_give_an_empty_mass(device: torch.device) -> None:
    empty = torch.zeros(0, 4, 8, device=device)
    for bounds in ([0], [0, 0]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        assert on_triton(empty, empty, scale=1.0, cu_seqlens=cu_seqlens).shape == (4, 0)


@pytest.mark.parametrize("width", [2, 20])
def test_a_nan_spoils_what_depends_on_it_and_nothing_else(width: int, device: torch.device) -> None:
    q, k = random_qk(device, batch=1, width=width)
    q[0, 1, 0, 3] = torch.nan
    k[0, 1, -1, 0] = torch.nan  # seen by the last row, through which it reaches every key
    weight = (torch.arange(width, device=device) > 0).float()[None]  # a weight of 0 hides nothing
    got = on_triton(q, k, scale=0.25, causal=True, query_weight=weight)
    assert torch.equal(got.isnan(), dense_mass(q, k, scale=0.25, causal=True, query_weight=weight).isnan())
    assert got.isnan().sum() == 21 - width + 1 + 2 * 21
    padding = torch.arange(21, device=device).expand(1, 21) != 20
    assert on_triton(q, k, scale=0.25, causal=True, key_valid=padding)[:, 2:].isfinite().all()


@pytest.mark.parametrize("given", ["its own lse", "an lse"])
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("width", [2, 10])
def test_an_infinity_spoils_what_the_reference_says_it_does(
    width: int, where: str, given: str, device: torch.device
) -> None:
    q, k = random_qk(device, width=width)
    q[..., 3], k[..., 3] = q[..., 3].abs(), k[..., 3].abs()  # against them it is +inf: a NaN, and not a weight of 0
    (q if where == "q" else k)[0, 1, 1, 3] = torch.inf
    arguments: dict[str, Any] = {"scale": 0.25, "causal": True}
    with ops.backend("reference"):
        if given == "an lse":
            arguments["lse"] = ops.row_logsumexp(q, k, **arguments)
        expected = ops.attention_column_mass(q, k, **arguments)
    got = on_triton(q, k, **arguments)
    assert expected.isnan().any()
    assert torch.equal(got.isnan(), expected.isnan())
    assert relative_error(got.nan_to_num(), expected.nan_to_num().double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("width", [2, 20])
def test_rows_that_see_nothing_add_nothing(width: int, device: torch.device) -> None:
    q, k = random_qk(device, kv_heads=1, width=width)
    key_valid = torch.ones(2, 21, dtype=torch.bool, device=device)
    key_valid[1] = False
    mass = on_triton(q, k, scale=0.25, key_valid=key_valid)
    assert (mass[1] == 0).all()  # the rows of a sample without keys
    assert torch.allclose(mass[0].sum(-1), torch.tensor(float(width), device=device))
    lse = ops.row_logsumexp(q, k, scale=0.25)
    lse[:, :, 1] = -torch.inf
    expected = dense_mass(q, k, scale=0.25, lse=lse)
    q[:, :, 1] *= 1e4  # logits whose exponential overflows
    assert relative_error(on_triton(q, k, scale=0.25, lse=lse), expected) < 1e-5


def test_an_lse_over_more_keys_normalises_over_them(device: torch.device) -> None:
    q, k = random_qk(device)
    expected = dense_mass(q, k, scale=0.25)[..., 4:9]
    with ops.backend("triton"):
        lse = ops.row_logsumexp(q, k, scale=0.25)
    assert relative_error(on_triton(q, k[:, :, 4:9], scale=0.25, lse=lse), expected) < 1e-5


def test_the_same_bits_every_time(device: torch.device) -> None:
    q, k = random_qk(device, batch=1, width=20, keys=20)
    first, again = (on_triton(q, k, scale=0.25, causal=True, reduce="mean") for _ in range(2))
    assert torch.equal(first, again)


def test_what_is_not_supported_is_refused(device: torch.device) -> None:
    q, k = random_qk(device)
    with ops.backend("triton"), pytest.raises(BackendUnavailableError, match="float64"):
        ops.attention_column_mass(q.double(), k.double(), scale=1.0)


def test_as_an_operator_of_pytorch_it_is_well_formed(device: torch.device) -> None:
    q, k = random_qk(device, batch=1, width=2, keys=5)
    for reduce in REDUCES:
        on_triton(q, k, scale=0.2, reduce=reduce)  # imports the module, which defines the op
        arguments = (q, k, 0.2, None, None, reduce, True, None, None, None, 3.0, None)
        op = torch.ops.vlmeff_kernels.attention_column_mass.default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
