"""HiPrune++ and the text ablation against their rules written out in plain Python."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpruning.hiprune import HiPrune, hiprune_select
from tokenpruning.hiprune_plus import HiPrunePlus
from tokenpruning.plan import ANCHOR, BUFFER, REGISTER, TEXT, Segment
from tokenpruning.text_topk import TextTopK
from vlmeff.errors import ConfigError

GRIDS = [(1, 1), (1, 9), (3, 3), (5, 4), (6, 6)]
SHARES = [0.0, 0.1, 0.5, 1.0]


def ranked(score, candidates):
    """Highest score first, lowest index first among equals."""
    return sorted(candidates, key=lambda i: (-score[i], i))


def neighbours(i, height, width):
    return {min(max(i + step, 0), height * width - 1) for step in (-1, 1, -width, width)}


def reference(o, d, t, k, grid, alpha, beta):
    """{kept index: kind}."""
    everything = set(range(grid[0] * grid[1]))
    anchors = ranked(o, everything)[: round(k * alpha / 5)]
    buffers = ranked(o, set().union(*(neighbours(i, *grid) for i in anchors)) - set(anchors))
    asked = ranked(t, everything - {*anchors, *buffers})[: round(beta * k)]
    registers = ranked(d, everything - {*anchors, *buffers, *asked})
    order = [(ANCHOR, anchors), (BUFFER, buffers), (TEXT, asked), (REGISTER, registers)]
    return dict(sorted([(i, kind) for kind, group in order for i in group][:k]))


def select(method, grid, k, **scores):
    """{kept index: kind}, in the order in which the indices come."""
    part = Segment(grid=grid, scores={name: torch.tensor(score).float() for name, score in scores.items()})
    chosen = method.select(part, k)
    return dict(zip(chosen.index.tolist(), chosen.kind.tolist(), strict=True))


def shuffled(n, seed):
    """Scores without ties."""
    return random.Random(seed).sample(range(n), n)


@pytest.mark.parametrize("alpha", SHARES)
@pytest.mark.parametrize("beta", SHARES)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_the_kept_tokens_and_their_kinds_equal_the_reference_for_every_budget(grid, beta, alpha):
    n = grid[0] * grid[1]
    for k in range(1, n + 1):
        o, d, t = (shuffled(n, 1000 * s + k) for s in range(3))
        expected = reference(o, d, t, k, grid, alpha, beta)
        got = select(HiPrunePlus(alpha=alpha, beta=beta), grid, k, object=o, deep=d, text=t)
        assert list(got.items()) == list(expected.items())
        assert len(got) == k


@settings(max_examples=60, deadline=None)
@given(data=st.data(), alpha=st.floats(0, 1), beta=st.floats(0, 1))
def test_equal_scores_go_to_the_lowest_index(data, alpha, beta):
    grid = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    n = grid[0] * grid[1]
    o, d, t = (data.draw(st.lists(st.integers(-1, 1), min_size=n, max_size=n)) for _ in range(3))
    k = data.draw(st.integers(1, n))
    got = select(HiPrunePlus(alpha=alpha, beta=beta), grid, k, object=o, deep=d, text=t)
    assert got == reference(o, d, t, k, grid, alpha, beta)


@pytest.mark.parametrize("factor", [1e-12, 0.3, 7.0, 1e12])
def test_a_positive_factor_on_a_score_changes_nothing(factor):
    o, d, t = (shuffled(36, seed) for seed in range(3))
    method = HiPrunePlus(alpha=0.5, beta=0.3)
    for k in range(1, 36):
        plain = select(method, (6, 6), k, object=o, deep=d, text=t)
        scaled = select(method, (6, 6), k, object=o, deep=d, text=[factor * x for x in t])
        assert scaled == plain


def test_the_share_is_spent_inside_the_budget():
    o, d, t = (shuffled(576, seed) for seed in range(3))
    kinds = list(select(HiPrunePlus(), (24, 24), 192, object=o, deep=d, text=t).values())
    assert kinds.count(TEXT) == 19
    assert kinds.count(ANCHOR) == 4
    assert len(kinds) == 192


@pytest.mark.parametrize("buffer_mode", ["linear", "grid"])
def test_a_share_of_nothing_is_hiprune(buffer_mode):
    o, d, t = (shuffled(36, seed) for seed in range(3))
    for k in range(1, 36):
        plus = HiPrunePlus(alpha=0.7, beta=0.0, buffer_mode=buffer_mode)
        plain = HiPrune(alpha=0.7, buffer_mode=buffer_mode)
        assert select(plus, (6, 6), k, object=o, deep=d, text=t) == select(plain, (6, 6), k, object=o, deep=d)


def test_the_scores_are_not_changed():
    scores = [torch.rand(20) for _ in range(3)]
    before = [score.clone() for score in scores]
    hiprune_select(scores[0], scores[1], k=7, grid=(4, 5), alpha=1.0, text_score=scores[2], beta=0.5)
    assert all(torch.equal(a, b) for a, b in zip(scores, before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.1}, r"beta=1.1 must lie in \[0, 1\]"),
        ({"beta": float("nan")}, "beta=nan must lie"),
        ({"beta": True}, "beta=True must lie"),
        ({"alpha": -1}, r"alpha=-1 must lie in \[0, 1\]"),
        ({"keep": 0}, "keep=0 is not a budget"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_the_name_of_the_method(arguments, message):
    with pytest.raises(ConfigError, match=f"^HiPrunePlus: {message}"):
        HiPrunePlus(**arguments)


@settings(max_examples=60, deadline=None)
@given(score=st.lists(st.integers(-3, 3), min_size=1, max_size=30), data=st.data())
def test_text_keeps_the_most_relevant_tokens(score, data):
    k = data.draw(st.integers(1, len(score)))
    kept = select(TextTopK(), (1, len(score)), k, text=score)
    assert list(kept.items()) == [(i, TEXT) for i in sorted(ranked(score, range(len(score)))[:k])]
