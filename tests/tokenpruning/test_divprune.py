"""DivPrune against the greedy rule written out with loops over exact numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenpruning import similarity
from tokenpruning.divprune import DivPrune, divprune_select
from tokenpruning.plan import Segment

CLOSE = 1e-5  # float32 similarities of up to 64 channels are good to a few 1e-7


def cosines(tokens):
    """Similarities in float64 from Python sums."""

    def cosine(a, b):
        length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0

    return [[cosine(a, b) for b in tokens] for a in tokens]


def exact_cosines(tokens):
    """Of rows whose length is a whole number: no rounding at all."""
    lengths = [math.isqrt(sum(x * x for x in row)) for row in tokens]
    assert all(length**2 == sum(x * x for x in row) for length, row in zip(lengths, tokens, strict=True))
    return [
        [
            Fraction(sum(x * y for x, y in zip(a, b, strict=True)), p * q) if p * q else Fraction(0)
            for b, q in zip(tokens, lengths, strict=True)
        ]
        for a, p in zip(tokens, lengths, strict=True)
    ]


def greedy(similar, k):
    """(chosen in order, the smallest lead of a winner over one that does not tie with it)."""
    n = len(similar)
    distance = [[1 - similar[i][j] for j in range(n)] for i in range(n)]
    chosen, lead = [], math.inf
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        value = {i: min((distance[i][j] for j in (chosen or range(n)) if j != i), default=math.inf) for i in left}
        ranking = sorted(left, key=lambda i: (-value[i], i))
        behind = [value[ranking[0]] - value[i] for i in ranking]
        lead = min([lead, *filter(None, behind)])
        chosen.append(ranking[0])
    return chosen, lead


def random_tokens(n, channels=8, seed=0):
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_the_kept_tokens_equal_the_reference_for_every_budget(n):
    tokens = random_tokens(n, seed=n)
    order, _ = greedy(cosines(tokens.tolist()), n)
    for k in range(1, n + 1):
        assert divprune_select(tokens, k).tolist() == sorted(order[:k])


def test_of_two_tokens_that_are_nearest_to_each_other_and_farthest_from_the_rest_the_first_begins():
    for seed in range(50):
        crowd = torch.tensor([1.0] + [0.0] * 30) + 0.01 * random_tokens(6, 31, seed)
        far = torch.tensor([0.0] * 30 + [1.0]) + 0.1 * random_tokens(2, 31, seed + 1000)
        tokens = torch.cat([crowd[:3], far[:1], crowd[3:], far[1:]])
        assert divprune_select(tokens, 1).tolist() == [3]


# Rows of length 1 or 2: their similarities are multiples of 1/4 or 1/2, exact in float32, and tie all the time.
whole_rows = st.one_of(
    st.permutations([1, 0, 0, 0]), st.permutations([-1, 0, 0, 0]), st.tuples(*[st.sampled_from([-1, 1])] * 4)
)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(whole_rows.map(tuple), min_size=1, max_size=9), data=st.data())
def test_equal_distances_go_to_the_lowest_index(rows, data):
    k = data.draw(st.integers(1, len(rows)))
    expected, _ = greedy(exact_cosines(rows), k)
    assert divprune_select(torch.tensor(rows).float(), k).tolist() == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 40), channels=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_k_distinct_tokens_in_raster_order_also_when_many_are_alike(data, n, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = random_tokens(n, channels, seed)[torch.randint(n, (n,), generator=generator) // 2]
    tokens[torch.rand(n, generator=generator) < 0.2] = 0
    k = data.draw(st.integers(1, n))
    index = divprune_select(tokens, k).tolist()
    assert index == sorted(set(index))
    assert len(index) == k


def test_one_token_of_each_direction_is_kept_before_any_twin():
    tokens = torch.eye(5)[[0, 0, 1, 2, 2, 2, 3, 4, 4]] * torch.arange(1, 10)[:, None]
    assert divprune_select(tokens, 5).tolist() == [0, 2, 3, 6, 7]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(2, 20), seed=st.integers(0, 2**31))
def test_the_length_of_a_token_does_not_matter(data, n, seed):
    tokens = random_tokens(n, seed=seed)
    exponents = data.draw(st.lists(st.integers(-20, 20), min_size=n, max_size=n))
    scaled = tokens * 2.0 ** torch.tensor(exponents)[:, None]  # powers of two leave every rounding as it was
    k = data.draw(st.integers(1, n))
    assert torch.equal(divprune_select(scaled, k), divprune_select(tokens, k))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 14), seed=st.integers(0, 2**31), data=st.data())
def test_a_permutation_of_the_tokens_permutes_the_choice(n, seed, data):
    tokens = random_tokens(n, seed=seed)
    k = data.draw(st.integers(1, n))
    order = data.draw(st.permutations(range(n)))
    chosen, lead = greedy(cosines(tokens.tolist()), k)
    shuffled, _ = greedy(cosines(tokens[list(order)].tolist()), k)
    assume(lead > CLOSE)
    got = divprune_select(tokens[list(order)], k).tolist()
    assert got == sorted(shuffled)
    if order.index(chosen[0]) == shuffled[0]:  # not where two nearest tokens tie for the first place
        assert {order[i] for i in got} == set(chosen)


def test_bfloat16_features_are_compared_as_exactly_as_their_values_allow():
    compared = 0
    for seed in range(40):
        tokens = random_tokens(14, 32, seed).bfloat16()
        for k in range(1, 14):
            order, lead = greedy(cosines(tokens.double().tolist()), k)
            if lead > 1e-6:
                compared += 1
                assert divprune_select(tokens, k).tolist() == sorted(order)
    assert compared > 400


@pytest.mark.parametrize("held", [2**26, 4 * 11 * 11, 4 * 11 * 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_gives_what_its_pictures_give_one_by_one_however_much_is_held(held, dtype, monkeypatch):
    batch = torch.stack([random_tokens(11, 5, seed) for seed in range(4)]).to(dtype)
    expected = [divprune_select(tokens, 6).tolist() for tokens in batch]
    assert expected == [sorted(greedy(cosines(tokens.double().tolist()), 6)[0]) for tokens in batch]
    monkeypatch.setattr(similarity, "BLOCK_BYTES", held)
    assert divprune_select(batch, 6).tolist() == expected


def test_no_matrix_exceeds_the_bound(monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 4 * 100 * 7)
    sizes = [len(block) * 100 * 4 for _, block in similarity.row_blocks(torch.randn(100, 3), torch.randn(100, 3))]
    assert max(sizes) <= 4 * 100 * 7
    assert sum(sizes) == 4 * 100 * 100
    assert not similarity.fits(100, torch.float32)
    assert similarity.fits(26, torch.float32)


def test_no_picture_at_all_is_an_empty_choice():
    assert divprune_select(torch.zeros(0, 5, 3), 2).shape == (0, 2)


def test_autocast_and_gradients_do_not_change_the_choice():
    tokens = random_tokens(30, 16).requires_grad_()
    expected = divprune_select(tokens.detach(), 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(divprune_select(tokens, 12), expected)
    assert tokens.grad_fn is None


def test_the_method_passes_the_features_on():
    tokens = random_tokens(12)
    chosen = DivPrune().select(Segment(grid=(3, 4), features=tokens), 5)
    assert torch.equal(chosen.index, divprune_select(tokens, 5))
    assert chosen.into is None


@pytest.mark.parametrize(
    ("features", "k", "message"),
    [
        (torch.zeros(4), 1, r"features must be floats \[N, D\] or \[B, N, D\], got torch.float32 \(4,\)"),
        (torch.zeros(4, 2, dtype=torch.int64), 1, "features must be floats"),
        (torch.zeros(4, 2), 0, r"k=0 must lie in \[1, 4\]"),
        (torch.zeros(4, 2), 5, r"k=5 must lie in \[1, 4\]"),
    ],
)
def test_errors_name_the_argument(features, k, message):
    with pytest.raises(ValueError, match=f"^divprune_select: {message}"):
        divprune_select(features, k)
