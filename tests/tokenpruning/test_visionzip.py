"""VisionZip's choice and merging against the rule written out in plain Python."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpruning import similarity
from tokenpruning.plan import MERGED, REGISTER, Segment
from tokenpruning.visionzip import VisionZip, visionzip_select
from vlmeff.errors import ConfigError

SHARES = [0.0, 10 / 64, 0.5, 1.0]


def cosine(a, b):
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def exact_cosine(a, b):
    """Of rows whose length is a whole number: no rounding at all."""
    return Fraction(
        sum(x * y for x, y in zip(a, b, strict=True)),
        math.isqrt(sum(x * x for x in a)) * math.isqrt(sum(y * y for y in b)),
    )


def reference(tokens, score, k, share, similar=cosine):
    """({kept token: kind}, {token: the kept token that takes it up})."""
    n = len(tokens)
    n_contexts = round(k * share)
    dominant = sorted(range(n), key=lambda i: (-score[i], i))[: k - n_contexts]
    rest = [i for i in range(n) if i not in dominant]
    contexts = [rest[(len(rest) // n_contexts) * c] for c in range(n_contexts)]
    kinds = {**dict.fromkeys(dominant, REGISTER), **dict.fromkeys(contexts, MERGED)}
    home = {i: i for i in kinds}
    for i in rest:
        if i not in kinds and contexts:
            home[i] = min(contexts, key=lambda c: (-similar(tokens[i], tokens[c]), c))
    return dict(sorted(kinds.items())), home


def outcome(chosen):
    index = chosen.index.tolist()
    kinds = dict(zip(index, chosen.kind.tolist(), strict=True))
    if chosen.into is None:
        return kinds, {i: i for i in index}
    return kinds, {i: index[place] for i, place in enumerate(chosen.into.tolist())}


def drawn(n, channels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, generator=generator), torch.rand(n, generator=generator)


@pytest.mark.parametrize("held", [2**26, 4])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_kept_and_merged_tokens_equal_the_reference_for_every_budget(n, share, held, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_BYTES", held)
    tokens, score = drawn(n, seed=n)
    for k in range(1, n + 1):
        expected = reference(tokens.tolist(), score.tolist(), k, share)
        assert outcome(visionzip_select(tokens, score, k, contextual=share)) == expected
        assert len(expected[0]) == k


whole_rows = st.one_of(
    st.permutations([1, 0, 0, 0]), st.permutations([-1, 0, 0, 0]), st.tuples(*[st.sampled_from([-1, 1])] * 4)
)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), rows=st.lists(whole_rows.map(tuple), min_size=1, max_size=12), share=st.floats(0, 1))
def test_equal_scores_go_to_the_lowest_index(data, rows, share):
    score = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    k = data.draw(st.integers(1, len(rows)))
    got = visionzip_select(torch.tensor(rows).float(), torch.tensor(score).float(), k, contextual=share)
    assert outcome(got) == reference(rows, score, k, share, exact_cosine)


@pytest.mark.parametrize(("k", "contextual"), [(64, 10), (128, 20), (192, 30), (3, 0), (4, 1)])
def test_the_default_is_the_published_number_of_contextual_tokens(k, contextual):
    chosen = VisionZip().select(Segment(grid=(24, 24), scores={"deep": drawn(576)[1]}, features=drawn(576)[0]), k)
    assert chosen.kind.tolist().count(MERGED) == contextual
    assert chosen.kind.tolist().count(REGISTER) == k - contextual
    assert (chosen.into is None) == (contextual == 0)


def test_a_contextual_token_becomes_the_mean_of_its_group_and_a_dominant_one_stays_bit_for_bit():
    tokens, score = drawn(20, seed=3)
    chosen = visionzip_select(tokens, score, 8, contextual=0.5)
    merged = chosen.apply(tokens)
    _, home = reference(tokens.tolist(), score.tolist(), 8, 0.5)
    for place, (i, kind) in enumerate(zip(chosen.index.tolist(), chosen.kind.tolist(), strict=True)):
        group = [j for j in range(20) if home[j] == i]
        assert kind == MERGED or group == [i]
        torch.testing.assert_close(merged[place], sum(tokens[j] for j in group) / len(group))
        assert kind == MERGED or torch.equal(merged[place], tokens[i])
    assert len(home) == 20  # no token is lost


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 24), seed=st.integers(0, 2**31), exponent=st.integers(-60, 60), data=st.data())
def test_a_positive_factor_on_the_score_or_on_a_token_changes_nothing(n, seed, exponent, data):
    tokens, score = drawn(n, seed=seed)
    k, share = data.draw(st.integers(1, n)), data.draw(st.sampled_from(SHARES))
    expected = outcome(visionzip_select(tokens, score, k, contextual=share))
    # Powers of two leave every rounding as it was.
    scale = 2.0 ** torch.tensor(data.draw(st.lists(st.integers(-20, 20), min_size=n, max_size=n)))[:, None]
    assert outcome(visionzip_select(tokens * scale, score * 2.0**exponent, k, contextual=share)) == expected


def test_bfloat16_features_are_compared_as_exactly_as_their_values_allow():
    compared = 0
    for seed in range(20):
        tokens, score = drawn(30, 32, seed)
        tokens = tokens.bfloat16()
        kinds, home = outcome(visionzip_select(tokens, score, 12, contextual=0.5))
        values = tokens.double().tolist()
        assert kinds == reference(values, score.tolist(), 12, 0.5)[0]
        for i in range(30):
            if i not in kinds:
                ranked = sorted(((cosine(values[i], values[c]), c) for c in kinds if kinds[c] == MERGED), reverse=True)
                if ranked[0][0] - ranked[1][0] > 1e-6:
                    compared += 1
                    assert home[i] == ranked[0][1]
    assert compared > 300


def test_autocast_does_not_change_the_groups():
    tokens, score = drawn(40, 16)
    expected = outcome(visionzip_select(tokens, score, 16, contextual=0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert outcome(visionzip_select(tokens.requires_grad_(), score, 16, contextual=0.5)) == expected


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "half"])
def test_a_share_that_cannot_work_is_refused(share):
    with pytest.raises(ConfigError, match=r"^VisionZip: contextual=.* must be a share of the budget in \[0, 1\]"):
        VisionZip(contextual=share)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"^visionzip_select: features must be \[N, D\] and deep_score \[N\]"):
        visionzip_select(torch.zeros(4, 2), torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"^visionzip_select: features must be \[N, D\] and deep_score \[N\]"):
        visionzip_select(torch.zeros(4, 4, 2), torch.zeros(4), 1)
    with pytest.raises(ValueError, match=r"^visionzip_select: k=5 must lie in \[1, 4\]"):
        visionzip_select(torch.zeros(4, 2), torch.zeros(4), 5)
