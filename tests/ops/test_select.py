"""The choice of the best k against Python's sort: ties, infinities, NaN, groups, batches, nothing to choose."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.utils.flop_counter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmeff import ops

# Few values, so that most examples have ties; both zeros, both infinities and NaN among them.
VALUES = [-math.inf, -1.5, -0.0, 0.0, 0.5, 1.0, math.inf, math.nan]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
drawn = settings(max_examples=60, deadline=None)


def best(scores: list[float], k: int, groups: list[int], ties: str, tolerance: float = 0.0) -> list[int]:
    """The rule, one comparison at a time."""

    def value(i: int) -> tuple[int, float]:
        return (1, 0.0) if math.isnan(scores[i]) else (0, scores[i])

    def compare(i: int, j: int) -> int:
        for a, b in ((groups[i], groups[j]), (value(i), value(j))):
            if a != b:
                return -1 if a > b else 1
        return i - j if ties == "first" else j - i

    order = sorted(range(len(scores)), key=functools.cmp_to_key(compare))
    if tolerance and k:
        last = scores[order[k - 1]]
        near = [abs(x - last) <= tolerance * abs(last) for x in scores]
        return best([last if n else x for x, n in zip(scores, near, strict=True)], k, groups, ties)
    return sorted(order[:k])


@drawn
@given(data=st.data())
def test_the_choice_equals_a_sort_in_python(data: Any) -> None:
    draw = data.draw
    n = draw(st.integers(0, 12))
    k = draw(st.integers(0, n))
    rows = draw(st.lists(st.lists(st.sampled_from(VALUES), min_size=n, max_size=n), min_size=1, max_size=3))
    ties = draw(st.sampled_from(["first", "last"]))
    of_rows = draw(st.booleans())  # groups for each row, or one for all
    lists = draw(st.lists(st.lists(st.integers(-1, 2), min_size=n, max_size=n), min_size=len(rows), max_size=len(rows)))
    groups = lists if of_rows else [lists[0]] * len(rows)
    scores = torch.tensor(rows, dtype=draw(st.sampled_from(DTYPES))).view(len(rows), n)
    given = torch.tensor(lists if of_rows else lists[0]).view((len(rows), n) if of_rows else (n,))
    none = [[0] * n] * len(rows)
    for grouping, tensor in ((none, None), (groups, given.to(torch.int8))):
        got = ops.top_indices(scores, k, groups=tensor, ties=ties)
        assert got.dtype == torch.int64
        assert got.shape == (len(rows), k)
        assert got.tolist() == [best(r, k, g, ties) for r, g in zip(rows, grouping, strict=True)]


@drawn
@given(
    scores=st.lists(st.sampled_from([1.0, 1.01, 1.02, 1.05, 1.2, -1.0, 0.0, math.inf, math.nan]), min_size=1),
    data=st.data(),
    tolerance=st.sampled_from([0.005, 0.02, 0.1]),
    ties=st.sampled_from(["first", "last"]),
)
def test_near_equals_of_the_last_one_taken_count_as_equal(
    scores: list[float], data: Any, tolerance: float, ties: Any
) -> None:
    k = data.draw(st.integers(0, len(scores)))
    groups = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    x, mask = torch.tensor(scores, dtype=torch.float64), torch.tensor(groups)
    got = ops.top_indices(x, k, groups=mask, ties=ties, tolerance=tolerance)
    assert got.tolist() == best(scores, k, [int(g) for g in groups], ties, tolerance)


def test_equals_are_taken_from_the_end_that_was_asked_for() -> None:
    same = torch.zeros(2, 3, 1000)  # more than the sizes at which sorts are stable by chance
    assert ops.top_indices(same, 4)[1, 2].tolist() == [0, 1, 2, 3]
    assert ops.top_indices(same, 4, ties="last")[1, 2].tolist() == [996, 997, 998, 999]
    minus = torch.full((5,), -math.inf)
    assert ops.top_indices(minus, 2, ties="last").tolist() == [3, 4]


def test_a_group_goes_before_better_scores_and_is_cut_by_score() -> None:
    scores = torch.tensor([9.0, 1.0, 8.0, 2.0, 3.0])
    groups = torch.tensor([False, True, False, True, True])
    assert ops.top_indices(scores, 2, groups=groups).tolist() == [3, 4]
    assert ops.top_indices(scores, 4, groups=groups).tolist() == [0, 1, 3, 4]


def test_integers_and_strided_scores_are_ranked_as_they_are() -> None:
    # Two neighbours that float32 cannot tell apart.
    assert ops.top_indices(torch.tensor([2**24, 2**24 + 1]), 1).tolist() == [1]
    wide = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.top_indices(wide.T, 3), ops.top_indices(wide.T.contiguous(), 3))


def test_scores_that_require_grad_are_ranked_and_the_choice_carries_none() -> None:
    scores = torch.randn(4, requires_grad=True)
    index = ops.top_indices(scores, 2)
    assert not index.requires_grad
    scores[index].sum().backward()
    assert scores.grad is not None
    assert scores.grad.sum() == 2


def test_a_call_is_counted_and_traced_without_a_break() -> None:
    def choose(x: Tensor, g: Tensor) -> Tensor:
        return ops.top_indices(x, 3, groups=g, ties="last", tolerance=0.01)

    x, g = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 2 == 0
    with ops.counters() as ran:
        expected = choose(x, g)
    assert ran == {("top_indices", "reference"): 1}
    assert torch.equal(torch.compile(choose, backend="aot_eager", fullgraph=True)(x, g), expected)


def test_ways_that_look_at_no_values_choose_alike() -> None:
    x = torch.randint(4, (3, 9), generator=torch.Generator().manual_seed(1)).float()  # with equals at the edge

    def choose(x: Tensor) -> Tensor:
        return ops.top_indices(x, 4)

    expected = [best(row, 4, [0] * 9, "first") for row in x.tolist()]
    assert choose(x).tolist() == expected
    assert choose(x).is_contiguous()
    assert torch.vmap(choose)(x).tolist() == expected
    assert torch.fx.experimental.proxy_tensor.make_fx(choose)(x)(x.flip(1)).tolist() == choose(x.flip(1)).tolist()
    compiled = torch.compile(choose, backend="aot_eager", fullgraph=True)
    assert compiled(x).tolist() == expected
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert choose(x).tolist() == expected


def test_a_compiled_call_takes_another_tolerance_and_another_size() -> None:
    choose = torch.compile(
        lambda x, t: ops.top_indices(x, 3, tolerance=t), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n, tolerance in ((9, 0.01), (12, 0.02), (17, 0.5)):
        x = torch.rand(2, n, generator=torch.Generator().manual_seed(n))
        assert torch.equal(choose(x, tolerance), ops.top_indices(x, 3, tolerance=tolerance))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 4}, ValueError, r"k must lie in \[0, 3\] \(n from scores\), got 4"),
        ({"k": -1}, ValueError, r"k must lie in \[0, 3\]"),
        ({"k": 1.0}, TypeError, r"k must be an int, got 1\.0"),
        ({"k": True}, TypeError, "k must be an int, got True"),
        ({"scores": torch.tensor(1.0)}, ValueError, r"scores must be \[\.\.\., n\], got a scalar"),
        (
            {"scores": torch.zeros(3, dtype=torch.complex64)},
            TypeError,
            "numbers that can be ordered, got torch.complex64",
        ),
        ({"scores": torch.zeros(3).to(torch.float8_e4m3fn)}, TypeError, "can be ordered, got torch.float8_e4m3fn"),
        ({"scores": [1.0, 2.0, 3.0]}, TypeError, "got list"),
        ({"groups": torch.zeros(3)}, TypeError, "groups must be a bool or integer tensor, got torch.float32"),
        ({"groups": [0, 1, 2]}, TypeError, "groups must be a bool or integer tensor, got list"),
        ({"groups": torch.zeros(2, dtype=torch.bool)}, ValueError, r"groups must be \[3\] or \[3\].*got \[2\]"),
        ({"groups": torch.zeros(3, dtype=torch.bool, device="meta")}, ValueError, "groups must be on cpu"),
        ({"ties": "any"}, ValueError, "ties must be 'first' or 'last', got 'any'"),
        ({"tolerance": -0.1}, ValueError, r"tolerance must be finite and not negative, got -0\.1"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be finite"),
        ({"scores": torch.arange(3), "tolerance": 0.1}, TypeError, "a tolerance needs float scores, got torch.int64"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="top_indices: .*" + message):
        ops.top_indices(**({"scores": torch.zeros(3), "k": 1} | arguments))
