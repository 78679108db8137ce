"""The Triton row_logsumexp against a dense float64 formula, for whatever masks, sizes, strides and dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError

pytest.importorskip("triton")
from vlmeff_kernels import _launch, logits

# Relative Frobenius error against float64 on the same inputs: exp2 and the order of summation.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
STRETCH = 8 if torch.cuda.is_available() else 1  # the interpreter's tiles are 16, those of a GPU up to 128
PROCESSORS = [1, 132]  # 1: nothing is cut into parts
drawn = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dense_logits(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    key_valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[B, H, W, S] float64, -inf where not allowed."""
    width, keys = q.shape[2], k.shape[2]
    z = scale * (q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
    z = z if softcap is None else softcap * (z / softcap).tanh()
    rows = torch.arange(keys - width, keys, device=q.device)[None] if q_pos is None else q_pos
    columns = torch.arange(keys, device=q.device)[None] if k_pos is None else k_pos
    allowed = (columns[:, None] <= rows[..., None]) | (not causal)
    if key_valid is not None:
        allowed = allowed & key_valid[:, None]
    return z.masked_fill(~allowed[:, None], -torch.inf)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Over the finite entries; infinities must match exactly, and everything must be written."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    finite = expected.isfinite()
    if not torch.equal(got[~finite].double(), expected[~finite]):
        return math.inf
    return float((got.double() - expected)[finite].norm() / expected[finite].norm().clamp_min(1e-30))


def on_triton(q: Tensor, k: Tensor, **arguments: Any) -> Tensor:
    with ops.backend("triton"), ops.counters() as ran:
        got = ops.row_logsumexp(q, k, **arguments)
    assert ran["row_logsumexp", "triton"] == 1
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
def test_equals_the_dense_formula(data: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = data.draw
    processors = draw(st.sampled_from(PROCESSORS))
    monkeypatch.setattr(_launch, "processors", lambda device: processors)
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    width, keys = draw(st.integers(1, 20)) * STRETCH, draw(st.integers(1, 50)) * STRETCH
    dim, dtype = draw(st.sampled_from([1, 24, 64, 80, 96])), draw(st.sampled_from(list(TOLERANCE)))
    shape = {"batch": batch, "kv_heads": kv_heads, "group": group, "width": width, "keys": keys, "dim": dim}
    q, k = random_qk(device, dtype=dtype, **shape)
    kind = draw(st.sampled_from(["none", "causal", "padding", "eviction"]))
    arguments = {
        "scale": draw(st.floats(-0.5, 0.5)),
        "softcap": draw(st.sampled_from([None, 0.5, 20.0])),
        **random_masks(kind, batch, width, keys, device),
    }
    expected = dense_logits(q, k, **arguments).logsumexp(-1)
    assert relative_error(on_triton(q, k, **arguments), expected) < TOLERANCE[dtype]


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
    expected = dense_logits(q, k, **arguments).logsumexp(-1)
    assert relative_error(on_triton(q, k, **arguments), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [1, 10])
@pytest.mark.parametrize("layout", ["heads behind rows", "strided last dim", "expanded batch", "sliced cache"])
def test_strides_do_not_matter(layout: str, width: int, device: torch.device) -> None:
    q, k = random_qk(device, width=width)
    if layout == "heads behind rows":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    elif layout == "strided last dim":
        q, k = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in (q, k))
    elif layout == "expanded batch":
        q, k = q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1)
    else:
        q, k = q[:, 1:3], torch.cat([k, k], dim=2)[:, 1:, 5:26]
    arguments = {"scale": 0.2, "causal": True}
    assert torch.equal(on_triton(q, k, **arguments), on_triton(q.contiguous(), k.contiguous(), **arguments))


@pytest.mark.parametrize("width", [1, 10])
def test_neighbours_in_memory_are_not_read(width: int, device: torch.device) -> None:
    q, k = random_qk(device, width=width, dim=21)
    rooms = [torch.full([n + 5 for n in x.shape], torch.nan, device=device) for x in (q, k)]
    inner_q, inner_k = (room[2:-3, 1:-4, 3:-2, 3:-2] for room in rooms)
    inner_q.copy_(q)
    inner_k.copy_(k)
    flags = torch.zeros(4, 30, dtype=torch.bool, device=device)
    positions = torch.full((4, 30), -1, device=device, dtype=torch.int32)
    flags[1:3, 4:25] = True
    positions[1:3, 4:25] = torch.arange(21, device=device)
    arguments = {"causal": True, "key_valid": flags[1:3, 4:25], "k_pos": positions[1:3, 4:25]}
    got = on_triton(inner_q, inner_k, scale=0.2, **arguments)
    assert relative_error(got, dense_logits(q, k, scale=0.2, causal=True).logsumexp(-1)) < 1e-5


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
}


@pytest.mark.parametrize("width", [2, 10])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake: str, width: int, device: torch.device) -> None:
    q, k = random_qk(device, batch=1, kv_heads=1, width=10, dtype=torch.bfloat16)
    right = {"scale": 0.25, "softcap": 4.0, "causal": True, "key_valid": torch.arange(21).expand(1, 21) != 3}
    wrong = right | MISTAKES[mistake]
    right, wrong = (
        {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        for arguments in (right, wrong)
    )
    if "q_pos" in wrong:
        wrong["q_pos"] = wrong["q_pos"][:, -width:]
    q = q[:, :, -width:]
    expected = dense_logits(q, k, **right).logsumexp(-1)
    assert relative_error(on_triton(q, k, **right), expected) < 1e-4
    assert relative_error(on_triton(q, k, **wrong), expected) > 1e-4


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "width", "keys"), [(2, 0, 11), (2, 5, 0), (2, 0, 0), (0, 5, 11)])
def test_empty_sizes(batch: int, width: int, keys: int, causal: bool, device: torch.device) -> None:
    q, k = random_qk(device, batch=batch, width=width, keys=keys)
    got = on_triton(q, k, scale=1.0, causal=causal)
    assert got.shape == (batch, 4, width)
    assert (got == -torch.inf).all()


@pytest.mark.parametrize("group", [1, 3])
def test_a_nan_spoils_the_rows_that_see_it_and_no_other(group: int, device: torch.device) -> None:
    for width in (2, 18) if group == 1 else (18,):
        q, k = random_qk(device, group=group, width=width)
        q[1, 1, 1, 3] = k[0, 1, -2, 0] = torch.nan
        got = on_triton(q, k, scale=0.25, causal=True)
        assert torch.equal(got.isnan(), dense_logits(q, k, scale=0.25, causal=True).logsumexp(-1).isnan())
        assert got.isnan().sum() == 1 + 2 * group
        key_valid = torch.arange(21, device=device).expand(2, 21) != 19
        assert on_triton(q, k, scale=0.25, key_valid=key_valid).isnan().sum() == 1


def test_more_rows_than_keys_and_large_logits(device: torch.device) -> None:
    q, k = random_qk(device, width=20, keys=17)
    for arguments in ({"scale": 0.3, "causal": True}, {"scale": 60.0}, {"scale": -60.0, "softcap": 1000.0}):
        expected = dense_logits(q, k, **arguments).logsumexp(-1)
        assert relative_error(on_triton(q, k, **arguments), expected) < 1e-5


def test_many_parts_are_joined_in_several_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than the joining kernel holds at a time; only few rows are cut that fine."""
    from vlmeff_kernels import row_logsumexp

    monkeypatch.setattr(row_logsumexp, "JOINED_AT_ONCE", 2)
    q, k = random_qk(device, batch=1, width=2, keys=70 * STRETCH)
    assert relative_error(on_triton(q, k, scale=0.3), dense_logits(q, k, scale=0.3).logsumexp(-1)) < 1e-5


def test_small_logits_survive_a_large_softcap(device: torch.device) -> None:
    """cap * tanh(z / cap) is z where z is small: the error must not grow with the cap."""
    q, k = random_qk(device, keys=1)
    for cap in (1.0, 1e4):
        expected = dense_logits(q, k, scale=0.01, softcap=cap).logsumexp(-1)
        assert relative_error(on_triton(q, k, scale=0.01, softcap=cap), expected) < 1e-4


def test_what_is_not_supported_is_refused(device: torch.device) -> None:
    q, k = random_qk(device)
    with ops.backend("triton"), pytest.raises(BackendUnavailableError, match="float64"):
        ops.row_logsumexp(q.double(), k.double(), scale=1.0)
    with ops.backend("triton"), pytest.raises(BackendUnavailableError, match="head dims up to 256"):
        ops.row_logsumexp(torch.zeros(1, 1, 2, 257, device=device), torch.zeros(1, 1, 2, 257, device=device), scale=1.0)


def test_as_an_operator_of_pytorch_it_is_well_formed(device: torch.device) -> None:
    q, k = random_qk(device, batch=1)
    on_triton(q, k, scale=0.2)  # imports the module, which defines the op
    arguments = (q, k, 0.2, True, None, None, None, 3.0)
    op = torch.ops.vlmeff_kernels.row_logsumexp.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("halve", [False, True])
def test_the_parts_of_a_head_dim_cover_it(halve: bool) -> None:
    for dim in range(257):
        first, second = logits.head_dim_parts(dim, halve=halve)
        assert dim <= first + second <= max(16, _launch.next_power_of_2(dim))
        assert all(part in (0, 16, 32, 64, 128, 256) for part in (first, second))
    assert [logits.head_dim_parts(dim) for dim in (64, 72, 80, 96, 128)] == [
        (64, 0), (64, 16), (64, 16), (64, 32), (128, 0),
    ]  # fmt: skip
