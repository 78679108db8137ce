"""SCOPE against its rule written out with loops over exact numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpruning import similarity
from tokenpruning.plan import Segment
from tokenpruning.scope import Scope, scope_select
from vlmeff.errors import ConfigError

HELD, NOT_HELD = 2**26, 4 * 3  # bytes: all pairs at once, or one row of three tokens at most


def cosines(tokens):
    """Similarities in float64 from Python sums."""

    def cosine(a, b):
        length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0

    return [[cosine(a, b) for b in tokens] for a in tokens]


def coverage(similar, chosen):
    return sum(max([0, *(row[s] for s in chosen)]) for row in similar)


def greedy(similar, saliency, k, alpha=1):
    """(chosen in order, the smallest relative lead of a winner over one that does not tie with it)."""
    chosen, lead = [], math.inf
    while len(chosen) < k:
        left = [i for i in range(len(similar)) if i not in chosen]
        gain = {i: coverage(similar, [*chosen, i]) - coverage(similar, chosen) for i in left}
        # Two tokens that nothing covers and that cover nothing else gain one each: a tie, but for the last digits.
        product = {i: round(gain[i] * saliency[i] ** alpha, 12) for i in left}
        ranking = sorted(left, key=lambda i: (-product[i], i))
        best = product[ranking[0]]
        behind = [(best - product[i]) / best for i in ranking if best > 0]
        lead = min([lead, *filter(None, behind)])
        chosen.append(ranking[0])
    return chosen, lead


def drawn(n, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, generator=generator), torch.rand(n, generator=generator)


@pytest.mark.parametrize("held", [HELD, NOT_HELD])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_the_kept_tokens_equal_the_reference_for_every_budget(n, alpha, held, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_BYTES", held)
    tokens, saliency = drawn(n, seed=n)
    order, lead = greedy(cosines(tokens.tolist()), saliency.tolist(), n, alpha)
    assert lead > 1e-4
    for k in range(1, n + 1):
        assert scope_select(tokens, saliency, k, alpha=alpha).tolist() == sorted(order[:k])


# Rows of length 1 or 2: their similarities are multiples of 1/4 or 1/2, exact in float32, and tie all the time.
whole_rows = st.one_of(
    st.permutations([1, 0, 0, 0]), st.permutations([-1, 0, 0, 0]), st.tuples(*[st.sampled_from([-1, 1])] * 4)
)


def exact_cosines(rows):
    lengths = [math.isqrt(sum(x * x for x in row)) for row in rows]
    return [
        [Fraction(sum(x * y for x, y in zip(a, b, strict=True)), p * q) for b, q in zip(rows, lengths, strict=True)]
        for a, p in zip(rows, lengths, strict=True)
    ]


@pytest.mark.parametrize("held", [HELD, NOT_HELD])
def test_equal_products_go_to_the_lowest_index(held, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_BYTES", held)

    @settings(max_examples=80, deadline=None)
    @given(rows=st.lists(whole_rows.map(tuple), min_size=1, max_size=9), data=st.data())
    def check(rows, data):
        k = data.draw(st.integers(1, len(rows)))
        saliency = data.draw(st.lists(st.sampled_from([0, 1, 2, 4]), min_size=len(rows), max_size=len(rows)))
        # All zeros count as all ones.
        weights = saliency if any(saliency) else [1] * len(rows)
        expected, _ = greedy(exact_cosines(rows), weights, k)
        got = scope_select(torch.tensor(rows).float(), torch.tensor(saliency).float(), k)
        assert got.tolist() == sorted(expected)

    check()


@pytest.mark.parametrize("held", [HELD, NOT_HELD])
def test_k_distinct_tokens_in_raster_order_also_when_nothing_is_gained(held, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_BYTES", held)
    same, none = torch.ones(9, 4), torch.zeros(9, 4)
    for k in range(1, 10):
        for tokens in (same, none):
            for saliency in (torch.zeros(9), torch.arange(9.0)):
                index = scope_select(tokens, saliency, k).tolist()
                assert index == sorted(set(index))
                assert len(index) == k


def test_saliency_decides_among_tokens_that_cover_alike_and_coverage_among_equally_salient_ones():
    tokens = torch.eye(4)[[0, 1, 2, 3, 3]]
    assert scope_select(tokens, torch.tensor([1.0, 4, 2, 0.1, 0.1]), 2).tolist() == [1, 2]
    assert scope_select(tokens, torch.ones(5), 2).tolist() == [0, 3]  # 3 stands for two, then the lowest index
    assert scope_select(tokens, torch.tensor([1.0, 4, 2, 0.1, 0.1]), 2, alpha=0).tolist() == [0, 3]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 2**31), exponent=st.integers(-100, 100), data=st.data())
def test_a_positive_factor_on_the_saliency_or_a_token_changes_nothing(n, seed, exponent, data):
    tokens, saliency = drawn(n, seed=seed)
    k, alpha = data.draw(st.integers(1, n)), data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    expected = scope_select(tokens, saliency, k, alpha=alpha)
    # Powers of two leave every rounding as it was.
    scale = 2.0 ** torch.tensor(data.draw(st.lists(st.integers(-20, 20), min_size=n, max_size=n)))[:, None]
    assert torch.equal(scope_select(tokens * scale, saliency * 2.0**exponent, k, alpha=alpha), expected)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 12), seed=st.integers(0, 2**31), data=st.data())
def test_a_permutation_of_the_tokens_permutes_the_choice(n, seed, data):
    tokens, saliency = drawn(n, 16, seed)
    k = data.draw(st.integers(1, n))
    order = list(data.draw(st.permutations(range(n))))
    chosen, lead = greedy(cosines(tokens.tolist()), saliency.tolist(), k)
    if lead > 1e-4:
        assert {order[i] for i in scope_select(tokens[order], saliency[order], k).tolist()} == set(chosen)


def test_bfloat16_features_are_compared_as_exactly_as_their_values_allow():
    compared = 0
    for seed in range(30):
        tokens, saliency = drawn(12, 32, seed)
        tokens = tokens.bfloat16()
        for k in (1, 4, 7, 10):
            order, lead = greedy(cosines(tokens.double().tolist()), saliency.double().tolist(), k)
            if lead > 1e-6:
                compared += 1
                assert scope_select(tokens, saliency, k).tolist() == sorted(order)
    assert compared > 100


def test_more_tokens_than_are_looked_at_anew_at_a_time(monkeypatch):
    tokens, saliency = drawn(300, 24, 5)
    tokens[100:200] = tokens[:1]  # a hundred twins go stale together
    tokens, saliency = tokens.double(), saliency.double()  # so that the two searches round far below any lead
    expected = [scope_select(tokens, saliency, k) for k in (1, 20, 120)]
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 8 * 300 * 7)
    for k, index in zip((1, 20, 120), expected, strict=True):
        assert torch.equal(scope_select(tokens, saliency, k), index)


@pytest.mark.parametrize("held", [HELD, NOT_HELD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_gives_what_its_pictures_give_one_by_one(held, dtype, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_BYTES", held)
    pictures = [drawn(11, 5, seed) for seed in range(4)]
    tokens, saliency = (torch.stack(part) for part in zip(*pictures, strict=True))
    expected = [scope_select(t.to(dtype), s, 6).tolist() for t, s in pictures]
    assert scope_select(tokens.to(dtype), saliency, 6).tolist() == expected
    assert scope_select(tokens[:0], saliency[:0], 6).shape == (0, 6)


def test_autocast_does_not_change_the_choice():
    tokens, saliency = drawn(30, 16)
    expected = scope_select(tokens, saliency, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scope_select(tokens.requires_grad_(), saliency, 12), expected)


def test_the_method_passes_features_deep_score_and_exponent_on():
    tokens, saliency = drawn(12)
    part = Segment(grid=(3, 4), scores={"deep": saliency}, features=tokens)
    for alpha in (0.0, 3.0):
        assert torch.equal(Scope(alpha=alpha).select(part, 5).index, scope_select(tokens, saliency, 5, alpha=alpha))
    assert not torch.equal(Scope(alpha=0).select(part, 5).index, Scope(alpha=3).select(part, 5).index)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf"), True, "1"])
def test_an_exponent_that_cannot_work_is_refused(alpha):
    with pytest.raises(ConfigError, match=r"^Scope: alpha=.* must be a finite number >= 0"):
        Scope(alpha=alpha)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"^scope_select: saliency must be \(4,\) \(as features\), got \(3,\)"):
        scope_select(torch.zeros(4, 2), torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"^scope_select: k=5 must lie in \[1, 4\]"):
        scope_select(torch.zeros(4, 2), torch.zeros(4), 5)
