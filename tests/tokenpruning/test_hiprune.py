"""HiPrune's selection against the rule of the paper's code, written out in plain Python."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpruning import hiprune_select
from tokenpruning.plan import ANCHOR, BUFFER, REGISTER

GRIDS = [(1, 1), (1, 9), (9, 1), (3, 3), (2, 5), (5, 4), (5, 7), (6, 6)]
ALPHAS = [0.0, 0.1, 0.35, 0.8, 1.0]


def ranked(score, candidates):
    """Highest score first, lowest index first among equals."""
    return sorted(candidates, key=lambda i: (-score[i], i))


def clamped_neighbours(i, height, width):
    return {min(max(i + step, 0), height * width - 1) for step in (-1, 1, -width, width)}


def true_neighbours(i, height, width):
    return {y * width + x for y in range(height) for x in range(width) if abs(y - i // width) + abs(x - i % width) == 1}


def reference(object_score, deep_score, k, grid, alpha, neighbours=clamped_neighbours):
    """{kept index: kind}."""
    n = grid[0] * grid[1]
    anchors = ranked(object_score, range(n))[: round(k * alpha / 5)]
    buffers = set().union(*(neighbours(i, *grid) for i in anchors)) - set(anchors)
    buffers = ranked(object_score, buffers)[: k - len(anchors)]
    registers = ranked(deep_score, set(range(n)) - {*anchors, *buffers})[: k - len(anchors) - len(buffers)]
    kinds = {**dict.fromkeys(anchors, ANCHOR), **dict.fromkeys(buffers, BUFFER), **dict.fromkeys(registers, REGISTER)}
    return dict(sorted(kinds.items()))


def select(object_score, deep_score, **arguments):
    """{kept index: kind}, in the order in which the indices come."""
    chosen = hiprune_select(torch.tensor(object_score).float(), torch.tensor(deep_score).float(), **arguments)
    return dict(zip(chosen.index.tolist(), chosen.kind.tolist(), strict=True))


def shuffled(n, seed):
    """Scores without ties."""
    return random.Random(seed).sample(range(n), n)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_the_kept_tokens_and_their_kinds_equal_the_reference_for_every_budget(grid, alpha):
    n = grid[0] * grid[1]
    for k in range(1, n + 1):
        o, d = shuffled(n, k), shuffled(n, 1000 + k)
        expected = reference(o, d, k, grid, alpha)
        assert select(o, d, k=k, grid=grid, alpha=alpha) == expected
        assert len(expected) == k


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_grid_buffers_are_the_true_neighbours_only(grid, alpha):
    n = grid[0] * grid[1]
    for k in range(1, n + 1):
        o, d = shuffled(n, k), shuffled(n, 1000 + k)
        expected = reference(o, d, k, grid, alpha, true_neighbours)
        assert select(o, d, k=k, grid=grid, alpha=alpha, buffer_mode="grid") == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equal_scores_go_to_the_lowest_index(data):
    grid = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    n = grid[0] * grid[1]
    few_values = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    o, d = data.draw(few_values), data.draw(few_values)
    k, alpha = data.draw(st.integers(1, n)), data.draw(st.sampled_from(ALPHAS))
    mode, neighbours = data.draw(st.sampled_from([("linear", clamped_neighbours), ("grid", true_neighbours)]))
    expected = reference(o, d, k, grid, alpha, neighbours)
    assert select(o, d, k=k, grid=grid, alpha=alpha, buffer_mode=mode) == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_kept_indices_ascend_and_hold_every_anchor_for_any_finite_scores(data):
    grid = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    n = grid[0] * grid[1]
    scores = st.lists(st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False), min_size=n, max_size=n)
    o, d = data.draw(scores), data.draw(scores)
    k, alpha = data.draw(st.integers(1, n)), data.draw(st.floats(0, 1))
    kept = select(o, d, k=k, grid=grid, alpha=alpha)
    anchors = ranked(o, range(n))[: round(k * alpha / 5)]
    assert list(kept) == sorted(kept)
    assert len(kept) == k
    assert [i for i, kind in kept.items() if kind == ANCHOR] == sorted(anchors)


@pytest.mark.parametrize(
    ("k", "anchors"),
    [(576, 12), (225, 4), (192, 4), (175, 4), (128, 3), (125, 2), (75, 2), (64, 1), (32, 1), (25, 0)],
)
def test_the_number_of_anchors_at_alpha_0_1_is_that_of_the_official_code(k, anchors):
    kept = select(shuffled(576, 1), shuffled(576, 2), k=k, grid=(24, 24), alpha=0.1)
    assert list(kept.values()).count(ANCHOR) == anchors


def test_a_linear_buffer_wraps_to_the_next_row_and_is_clamped_at_the_ends_where_a_grid_buffer_is_dropped():
    last_column, corner = [0.0] * 12, [0.0] * 12
    last_column[7], corner[0] = 1.0, 1.0  # on a 3 x 4 grid: (1, 3) and (0, 0)
    falling = [-float(i) for i in range(12)]

    def buffers(o, mode):
        kept = select(o, falling, k=12, grid=(3, 4), alpha=0.4, buffer_mode=mode)
        return [i for i, kind in kept.items() if kind == BUFFER]

    assert buffers(last_column, "linear") == [3, 6, 8, 11]
    assert buffers(last_column, "grid") == [3, 6, 11]
    assert buffers(corner, "linear") == [1, 4]
    assert buffers(corner, "grid") == [1, 4]


def test_clusters_that_exceed_the_budget_lose_the_buffers_with_the_lowest_object_score():
    o = [0.0] * 25
    o[12] = 9.0  # the centre of 5 x 5; its neighbours are 7, 11, 13, 17
    o[7], o[11], o[13], o[17] = 1.0, 4.0, 2.0, 3.0
    kept = select(o, [100.0 - i for i in range(25)], k=3, grid=(5, 5), alpha=1.0)
    assert kept == {11: BUFFER, 12: ANCHOR, 17: BUFFER}


def test_a_token_that_is_an_anchor_and_a_neighbour_of_one_counts_as_anchor():
    o = [0.0] * 9
    o[4], o[5] = 2.0, 1.0
    kept = select(o, [0.0] * 9, k=9, grid=(3, 3), alpha=1.0)
    assert [i for i, kind in kept.items() if kind == ANCHOR] == [4, 5]


@pytest.mark.parametrize("factor", [1e-12, 0.3, 7.0, 1e12])
def test_a_positive_factor_on_the_scores_changes_nothing(factor):
    o, d = shuffled(35, 3), shuffled(35, 4)
    for k in range(1, 36):
        plain = select(o, d, k=k, grid=(5, 7), alpha=0.5)
        assert select([factor * x for x in o], [factor * x for x in d], k=k, grid=(5, 7), alpha=0.5) == plain


def test_the_scores_are_not_changed():
    o, d = torch.rand(20), torch.rand(20)
    before = o.clone(), d.clone()
    hiprune_select(o, d, k=7, grid=(4, 5), alpha=1.0)
    assert torch.equal(o, before[0])
    assert torch.equal(d, before[1])
