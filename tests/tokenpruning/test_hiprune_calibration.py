"""The object layer from curves whose turning point is known, and distances against a double loop."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpruning.hiprune_calibration import suggest_object_layer, top_distance, turning_point
from vlmeff.errors import ConfigError, DataError

# Read off figure 8 of arXiv 2508.00553 (CLIP-L/14-336, layers 1 to 23), to about half a unit.
PUBLISHED = {
    0.05: "31 30 30 28.5 26.5 26.4 26 26.2 27.4 58.5 56.5 56.2 54 52.2 49.8 50.3 47.5 48.4 48 49.5 50 49 48.6",
    0.1: "31.7 31 31 29 27 26.9 26.3 26.4 28.3 44.2 42.2 43.8 41.3 39.5 38.1 38.5 37.6 38 38 38.3 38.6 38.5 37.8",
    0.25: "32 31.8 31.9 30 27.8 27.8 26.9 26.7 29.5 34.7 33.1 35.6 33 31.5 30.9 31.3 31.2 31.3 31.5 31.4 31.3 31.2 31",
}


def slow_distance(scores, rows, top):
    n = len(scores)
    k = max(2, int(n * top))
    chosen = sorted(range(n), key=lambda i: (-scores[i], i))[:k]
    pairs = [(i, j) for place, i in enumerate(chosen) for j in chosen[place + 1 :]]
    return math.fsum(math.dist(rows[i], rows[j]) for i, j in pairs) / len(pairs)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 7), st.floats(0.01, 1), st.integers(0, 10**6), st.booleans())
def test_the_distance_is_that_of_a_double_loop_over_the_strongest_tokens(n, d, top, seed, ties):
    rng = random.Random(seed)
    scores = [float(rng.randrange(3)) if ties else rng.randrange(2**20) / 2**20 for _ in range(n)]
    rows = [[rng.gauss(0, 3) for _ in range(d)] for _ in range(n)]
    got = top_distance(torch.tensor(scores), torch.tensor(rows, dtype=torch.float64), top=top)
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(slow_distance(scores, rows, top), rel=1e-12, abs=1e-12)


def test_half_precision_is_widened_and_tokens_that_are_alike_are_not_lost_to_rounding():
    rows = torch.full((40, 64), 100.0)
    rows[:, 0] += torch.arange(40) * 0.5
    scores = torch.arange(40.0)
    expected = slow_distance(scores.tolist(), rows.tolist(), 0.25)
    assert float(top_distance(scores, rows.bfloat16().float(), top=0.25)) == pytest.approx(expected, rel=1e-6)
    assert float(top_distance(scores, rows.bfloat16(), top=0.25)) == pytest.approx(expected, rel=1e-6)


def test_the_number_of_tokens_is_the_papers_but_never_below_a_pair():
    rows = torch.tensor([[0.0], [1.0], [3.0], [100.0]])
    assert float(top_distance(torch.tensor([4.0, 3, 2, 1]), rows, top=0.05)) == 1
    assert float(top_distance(torch.tensor([4.0, 3, 2, 1]), rows, top=0.99)) == 2  # int(3.96): pairs 1, 2, 3
    assert top_distance(torch.ones(1), torch.ones(1, 5)) is None


@pytest.mark.parametrize("top", PUBLISHED)
def test_the_published_curves_of_clip_give_the_papers_layer_9(top):
    curve = [float(d) for d in PUBLISHED[top].split()]
    found = suggest_object_layer([curve], range(1, 24), top=top)
    assert found.object_layer == 9
    assert (found.agreement, found.samples, found.top) == (1.0, 1, top)
    assert len(found.rises) == 22
    assert max(found.rises) == found.rises[8] == pytest.approx(curve[9] - curve[8])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_known_step_is_found_under_noise_also_between_layers_that_were_left_out(data):
    count = data.draw(st.integers(2, 24))
    layers = sorted(data.draw(st.sets(st.integers(1, 48), min_size=count, max_size=count)))
    step = data.draw(st.integers(0, count - 2))
    noise = st.floats(-1, 1)
    curves = [[30 + 5 * (i > step) + data.draw(noise) for i in range(count)] for _ in range(3)]
    found = suggest_object_layer(curves, layers)
    assert found.object_layer == layers[step]
    assert found.agreement == 1
    assert found.distances == pytest.approx([sum(ds) / 3 for ds in zip(*curves, strict=True)])


def test_scale_and_offset_of_the_curve_change_nothing_and_the_first_of_equal_rises_is_taken():
    curve = [5.0, 3.0, 4.0, 3.0, 6.0, 5.0]
    assert turning_point(range(1, 7), curve) == 4
    assert turning_point(range(1, 7), [1024 * d + 8 for d in curve]) == 4
    assert turning_point([2, 5, 9, 11], [1.0, 2.0, 1.0, 2.0]) == 2


def test_a_curve_that_never_rises_has_no_turning_point():
    found = suggest_object_layer([[3.0, 2.0, 2.0], [3.0, 2.0, 1.0], [1.0, 2.0, 1.0]], [8, 16, 24])
    assert found.object_layer is None
    assert found.agreement == pytest.approx(2 / 3)


def test_agreement_is_the_share_of_pictures_that_turn_at_the_same_layer():
    curves = [[0.0, 9.0, 9.0], [0.0, 9.0, 9.0], [0.0, 0.0, 5.0], [0.0, 0.0, 6.0], [1.0, 5.0, 2.0]]
    found = suggest_object_layer(curves, [1, 2, 3])
    assert (found.object_layer, found.agreement) == (1, 0.6)


@pytest.mark.parametrize("top", [0, -0.1, 1.01, True, "0.1", float("nan"), None])
def test_a_top_that_is_no_share_is_refused(top):
    with pytest.raises(ConfigError, match="top="):
        top_distance(torch.ones(4), torch.ones(4, 2), top=top)


def test_broken_layers_and_curves_are_refused():
    for layers in ([], [3], [2, 1], [1, 1], [0, 1]):
        with pytest.raises(ConfigError, match="layers="):
            suggest_object_layer([[1.0] * len(layers)], layers)
    with pytest.raises(DataError, match="no sample"):
        suggest_object_layer([], [1, 2])
    for broken in ([1.0], [1.0, math.nan], [math.inf, 1.0], [-1.0, 2.0]):
        with pytest.raises(DataError, match="picture 1"):
            suggest_object_layer([[1.0, 2.0], broken], [1, 2])
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        top_distance(torch.ones(4), torch.ones(3, 2))
