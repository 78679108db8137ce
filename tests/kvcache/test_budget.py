"""The exact solver and the rounding of shares, against bisection and fractions in plain Python."""

from __future__ import annotations

import math
import random
import warnings
from bisect import bisect_left
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache import cumulative_priority, recipe_budgets, solve_budgets
from kvcache.budget import fill, round_shares
from vlmeff.errors import BudgetTooSmallError, NonFiniteScoreError


def attention_like(layers, n, seed):
    """[layers, n] positive scores: some layers concentrated, some flat."""
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(0.05, 3.0, (layers, 1))
    return np.exp(sigma * rng.standard_normal((layers, n)))


def solve(scores, keep_ratio, protected=2, **arguments):
    rows = [torch.as_tensor(row, dtype=torch.float64) for row in scores]
    return solve_budgets(rows, keep_ratio=keep_ratio, protected=protected, **arguments)


def kept_at(p, priorities, protected):
    """The definition: k(p) is the smallest k with c[k] >= p, the protected tokens come on top."""
    return [min(len(c), max(1, bisect_left(c, p) + 1) + protected) for c in priorities]


def bisected(scores, target, protected):
    """p by at most 60 halvings; where the total jumps over the target, the layers that jump get one each in turn."""
    priorities = []
    for row in scores:
        sums = list(accumulate(sorted(map(float, row), reverse=True)))
        priorities.append([s / sums[-1] for s in sums])
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        total = sum(kept_at(p, priorities, protected))
        if total == target:
            return kept_at(p, priorities, protected)
        low, high = (p, high) if total < target else (low, p)
    kept, most = kept_at(low, priorities, protected), kept_at(high, priorities, protected)
    while sum(kept) < target:
        for layer in range(len(kept)):
            if sum(kept) < target and kept[layer] < most[layer]:
                kept[layer] += 1
    return kept


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 40),
    n=st.integers(3, 700),
    seed=st.integers(0, 2**32 - 1),
    keep_ratio=st.floats(0.05, 0.99),
    protected=st.integers(0, 12),
)
def test_budgets_equal_bisection_within_one_token_per_layer_and_the_total_exactly(
    layers, n, seed, keep_ratio, protected
):
    scores = attention_like(layers, n, seed)
    floor = min(n, protected + 1)
    target = max(round(keep_ratio * layers * n), layers * floor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = solve(scores, keep_ratio, protected).kept
    assert sum(kept) == min(target, layers * n)
    assert all(floor <= k <= n for k in kept)
    assert all(abs(a - b) <= 1 for a, b in zip(kept, bisected(scores, target, protected), strict=True))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_budgets_equal_the_sorted_pool_in_exact_arithmetic_when_scores_tie(data):
    n, layers = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 6))
    protected = data.draw(st.integers(0, 4))
    scores = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=n, max_size=n), min_size=layers, max_size=layers))
    floor = min(n, protected + 1)
    target = data.draw(st.integers(layers * floor, layers * n))
    pool = []
    for layer, row in enumerate(scores):
        sums = list(accumulate(sorted(row, reverse=True)))
        pool += [(Fraction(sums[k - 1], sums[-1]), layer, k) for k in range(1, n - protected)]
    taken = sorted(pool)[: target - layers * floor]
    expected = [floor + sum(layer == entry[1] for entry in taken) for layer in range(layers)]
    found = solve(scores, target / (layers * n), protected)
    assert found.kept == expected
    if target < layers * n:
        assert found.p == (float(taken[-1][0]) if taken else 0.0)


def official_counts(scores, evict_ratio):
    """The official search: a p whose total is within 5 tokens, then evicted counts rescaled and rounded down."""
    layers, n = scores.shape
    priorities = [list(accumulate(sorted(row / row.sum(), reverse=True))) for row in scores]
    goal = layers * n * (1 - evict_ratio)
    low, high = 0.0, 1.0
    for _ in range(200):
        p = (low + high) / 2
        kept = kept_at(p, priorities, 2)
        if abs(sum(kept) - goal) <= 5:
            break
        low, high = (p, high) if sum(kept) < goal else (low, p)
    evicted = [n - k for k in kept]
    scale = (layers * n - goal) / sum(evicted)
    return [n - int(e * scale) for e in evicted]


@pytest.mark.parametrize("evict_ratio", [0.2, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_official_search_agrees_within_one_token_per_layer(seed, evict_ratio):
    scores = attention_like(32, 620, seed)
    ours, official = solve(scores, 1 - evict_ratio).kept, official_counts(scores, evict_ratio)
    assert max(abs(a - b) for a, b in zip(ours, official, strict=True)) <= 1
    assert sum(ours) == round((1 - evict_ratio) * 32 * 620)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), a=st.floats(0.05, 1), b=st.floats(0.05, 1), n=st.integers(3, 60))
def test_the_threshold_and_every_layer_grow_with_keep_ratio(seed, a, b, n):
    scores = attention_like(6, n, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        less, more = (solve(scores, keep_ratio) for keep_ratio in sorted((a, b)))
    assert less.p <= more.p
    assert all(x <= y for x, y in zip(less.kept, more.kept, strict=True))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), keep_ratio=st.floats(0.2, 0.95))
def test_neither_the_order_of_tokens_nor_the_scale_of_a_layer_matters(seed, keep_ratio):
    scores = attention_like(5, 40, seed)
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(row) for row in scores])
    scaled = scores * 2.0 ** rng.integers(-20, 20, (5, 1))  # powers of two round nothing
    assert solve(shuffled, keep_ratio) == solve(scores, keep_ratio) == solve(scaled, keep_ratio)


@pytest.mark.parametrize("row", ["random", "equal", "one hot", "half zero"])
@pytest.mark.parametrize("keep_ratio", [0.03, 0.1, 0.5, 0.77, 0.99])
def test_identical_layers_get_budgets_that_differ_by_one_at_most(row, keep_ratio):
    rows = {
        "random": attention_like(1, 100, 0)[0],
        "equal": np.ones(100),
        "one hot": np.eye(100)[7],
        "half zero": np.repeat([1.0, 0.0], 50),
    }
    kept = solve([rows[row]] * 32, keep_ratio).kept
    assert max(kept) - min(kept) <= 1
    assert sum(kept) == round(keep_ratio * 3200)


def test_a_concentrated_layer_keeps_less_than_a_flat_one():
    concentrated, flat = [100.0] + [0.01] * 99, [1.0] * 100
    kept = solve([concentrated, flat], 0.4).kept
    assert kept[0] == 3  # its best token and the two protected ones
    assert kept[1] == 77


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_prompt_no_longer_than_what_is_protected_is_kept_whole(n):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert solve(np.ones((4, n)), 0.5, protected=3).kept == [n] * 4


def test_a_layer_of_zeros_counts_as_uniform():
    rows = attention_like(2, 50, 0)
    zero, one = np.zeros(50), np.ones(50)
    assert solve([*rows, zero], 0.5) == solve([*rows, one], 0.5)
    assert cumulative_priority(torch.zeros(4)).tolist() == [0.25, 0.5, 0.75, 1.0]


def test_layers_of_different_lengths_share_one_budget():
    rows = [torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (50, 30, 7, 2)]
    kept = solve_budgets(rows, keep_ratio=0.5, protected=2).kept
    assert sum(kept) == round(0.5 * 89)
    assert all(min(len(row), 3) <= k <= len(row) for row, k in zip(rows, kept, strict=True))


def test_a_budget_below_the_floors_is_raised_with_one_warning_or_refused():
    scores = attention_like(4, 20, 0)
    with pytest.warns(UserWarning, match="keep_ratio=0.1") as caught:
        found = solve(scores, 0.1, protected=5)
    assert len(caught) == 1
    assert (found.kept, found.p) == ([6] * 4, 0.0)
    with pytest.raises(BudgetTooSmallError, match="keep_ratio"):
        solve(scores, 0.1, protected=5, on_small_budget="raise")
    assert solve(scores, 0.3, protected=5, on_small_budget="raise").kept == [6] * 4  # exactly the floors


def test_everything_is_kept_at_one():
    assert solve(attention_like(3, 9, 0), 1.0).kept == [9, 9, 9]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_overflowed_are_refused(bad):
    scores = attention_like(2, 9, 0)
    scores[1, 3] = bad
    with pytest.raises(NonFiniteScoreError, match="NaN or infinite"):
        solve(scores, 0.6)


def test_float32_and_bfloat16_scores_are_summed_in_float64():
    scores = torch.rand(3, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = solve_budgets(list(scores.double()), keep_ratio=0.5, protected=2)
    assert solve_budgets(list(scores), keep_ratio=0.5, protected=2) == expected
    assert solve_budgets(list(scores.float()), keep_ratio=0.5, protected=2) == expected


def test_a_thousand_random_recipes_round_to_the_total_within_the_bounds_and_in_proportion():
    rng = random.Random(0)
    for _ in range(1000):
        layers, n, protected = rng.randint(1, 40), rng.randint(1, 900), rng.randint(0, 12)
        shares = [min(1.0, rng.lognormvariate(-1, 1.2)) for _ in range(layers)]
        keep_ratio = rng.uniform(0.01, 1)
        floor = min(n, protected + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = recipe_budgets(shares, keep_ratio=keep_ratio, n=n, protected=protected)
        target = max(round(keep_ratio * layers * n), layers * floor)
        assert sum(kept) == target
        assert all(floor <= k <= n for k in kept)
        # One scale fits all layers: bisected here, and every budget is its clamped ideal rounded up or down.
        low, high = 0.0, 1e9
        for _ in range(200):
            scale = (low + high) / 2
            total = sum(min(max(scale * share, floor), n) for share in shares)
            low, high = (scale, high) if total < target else (low, scale)
        ideal = [min(max(high * share, floor), n) for share in shares]
        assert all(abs(k - x) < 1 + 1e-6 for k, x in zip(kept, ideal, strict=True))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_without_binding_bounds_the_remainder_goes_to_the_largest_fractions(data):
    shares = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=12))
    total = data.draw(st.integers(0, 500))
    ideal = [Fraction(share * total, sum(shares)) for share in shares]
    expected = [math.floor(x) for x in ideal]
    order = sorted(range(len(shares)), key=lambda layer: (expected[layer] - ideal[layer], layer))
    for layer in order[: total - sum(expected)]:
        expected[layer] += 1
    if len({x - math.floor(x) for x in ideal}) == len(ideal):  # equal fractions are for the next test
        assert round_shares(shares, total=total, floor=0, cap=1000) == expected


def test_equal_fractions_go_to_the_lowest_layer():
    assert round_shares([0.5, 0.5, 0.5, 0.5], total=10, floor=0, cap=9) == [3, 3, 2, 2]
    assert round_shares([0.0, 0.0, 0.0], total=4, floor=1, cap=9) == [2, 1, 1]  # no shares at all: equal ones


def test_filling_raises_and_lowers_the_layers_that_break_a_bound():
    assert fill([8.0, 1.0, 1.0], total=10, low=[2] * 3, high=[5] * 3) == [5, 2.5, 2.5]
    assert fill([0.0, 1.0, 1.0], total=10, low=[2] * 3, high=[9] * 3) == [2, 4, 4]
    assert fill([0.0, 0.0, 9.0], total=10, low=[0] * 3, high=[5] * 3) == [2.5, 2.5, 5]
    assert fill([1.0, 1.0, 1.0], total=9, low=[0, 0, 0], high=[9, 2, 1]) == [6, 2, 1]
