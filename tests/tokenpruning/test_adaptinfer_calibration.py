"""Calibration on attention whose change points and needs are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpruning.adaptinfer import Schedule, processed_tokens
from tokenpruning.adaptinfer_calibration import calibrate, change_points, processed_share, shifts, stage_ratios
from vlmeff.errors import ConfigError, DataError


def turning(n, nv, points, seed, noise=0.02):
    """[n, nv]: attention that turns to other tokens at each of ``points``, with a little noise in every layer."""
    g = torch.Generator().manual_seed(seed)
    patterns = [torch.rand(nv, generator=g) ** 4 for _ in range(len(points) + 1)]
    rows = [patterns[sum(layer >= p for p in points)] * (1 + noise * torch.rand(nv, generator=g)) for layer in range(n)]
    scale = 0.1 + torch.rand(n, 1, generator=g)  # how much a layer looks at the picture is not what is looked for
    return scale * torch.stack(rows)


def narrowing(n=16, nv=100, points=(1, 5, 11), needed=(40, 20, 5)):
    """[n, nv]: behind each point only the first so many tokens are looked at, all of them alike."""
    out = torch.ones(n, nv)
    for point, count in zip(points, needed, strict=True):
        out[point:, count:] = 0
    return out


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([12, 28, 32]), st.integers(0, 1000), st.data())
def test_known_change_points_are_found(n, seed, data):
    gap = max(1, n // 8)
    points, low = [], 1
    for left in (2, 1, 0):
        points.append(data.draw(st.integers(low, n - 2 - left * gap)))
        low = points[-1] + gap
    maps = [turning(n, 64, points, seed + i) for i in range(4)]
    assert calibrate(maps, target=0.7 if points[0] < n // 2 else 0.95).schedule.layers == tuple(points)


def test_the_choice_is_the_best_of_all_choices_that_lie_apart():
    g = torch.Generator().manual_seed(1)
    for n in (8, 17, 24):
        shift, gap = torch.rand(n, generator=g), max(1, n // 8)
        every = itertools.combinations(range(2, n - 1), 3)
        apart = [c for c in every if all(b - a >= gap for a, b in itertools.pairwise(c))]
        best = max(apart, key=lambda c: float(shift[list(c)].double().sum()))
        assert change_points(shift, first_layer=2) == best


def test_the_shift_is_one_minus_the_cosine_of_neighbouring_layers():
    sample = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0, 3.0, 0], [0, 0, 0], [1.0, 1.0, 0]])
    torch.testing.assert_close(shifts(sample), torch.tensor([0, 0, 1.0, 0, 0]).double())
    p = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)).double()
    expected = 1 - torch.nn.functional.cosine_similarity(p[1:], p[:-1])
    torch.testing.assert_close(shifts(p)[1:], expected)


def test_ratios_that_lose_nothing_are_found_where_the_target_admits_them():
    sample, layers = narrowing(), (1, 5, 11)
    target = processed_share(layers, (0.4, 0.5, 0.25), 16)
    ratios, retained = stage_ratios([sample], layers, target=target)
    assert (ratios, retained) == ((0.4, 0.5, 0.25), 1.0)


def test_the_ratios_are_the_best_of_a_brute_force_search():
    g = torch.Generator().manual_seed(3)
    maps, layers, n = [torch.rand(10, 30, generator=g) ** 6 for _ in range(3)], (1, 3, 6), 10

    def kept(ratios):
        total = 0.0
        for sample in maps:
            left = list(range(30))
            for stage, layer in enumerate(layers):
                left = sorted(left, key=lambda i: (-float(sample[layer, i]), i))[
                    : max(1, int(ratios[stage] * len(left)))
                ]
                for behind in range(layer + 1, (*layers, n - 1)[stage + 1] + 1):
                    total += float(sample[behind, left].double().sum())
        return total

    ratios, retained = stage_ratios(maps, layers, target=0.5)
    everything = sum(float(sample[2:].double().sum()) for sample in maps)
    assert retained == pytest.approx(kept(ratios) / everything)
    for head in itertools.product([0.2, 0.35, 0.5, 0.75, 1.0], repeat=2):
        for last in [i / 100 for i in range(5, 101, 5)]:
            if processed_share(layers, (*head, last), n) <= processed_share(layers, ratios, n):
                assert kept((*head, last)) <= kept(ratios) + 1e-9


@pytest.mark.parametrize("target", [0.25, 0.4, 0.6])
def test_the_target_is_met_from_below_and_is_what_the_schedule_processes(target):
    maps = [turning(24, 50, (2, 8, 15), seed) for seed in range(3)]
    result = calibrate(maps, target=target, name="m")
    assert target - 0.01 < result.processed <= target + 1e-9
    schedule = result.schedule
    assert (schedule.origin, schedule.relative, schedule.name, result.samples) == ("calibrated", True, "m", 3)
    assert isinstance(schedule, Schedule)
    many = 10**6
    assert processed_tokens(schedule, many, 24) / many == pytest.approx(result.processed, abs=1e-4)
    assert 0 < result.retained <= 1
    assert len(result.shifts) == 24


def test_a_larger_target_never_keeps_less_attention():
    maps = [turning(24, 50, (2, 8, 15), seed) for seed in range(3)]
    retained = [calibrate(maps, target=target).retained for target in (0.2, 0.35, 0.5, 0.8)]
    assert retained == sorted(retained)


@pytest.mark.parametrize("target", [0, 1, -0.1, 1.5, True, "0.3", float("nan")])
def test_a_target_that_is_no_share_is_refused(target):
    with pytest.raises(ConfigError, match="target"):
        calibrate([narrowing()], target=target)


def test_a_target_below_what_the_layers_admit_says_what_they_admit():
    with pytest.raises(ConfigError, match=r"at least 0\.1"):
        stage_ratios([narrowing()], (1, 5, 11), target=0.05)
    with pytest.raises(ConfigError, match=r"need a target of 0\.169 or more"):  # (2 + 14 * 0.05) / 16
        calibrate([narrowing()], target=0.16)


def test_the_first_pruning_layer_is_never_so_late_that_the_target_is_out_of_reach():
    maps = [turning(16, 40, (7, 10, 13), seed) for seed in range(3)]
    assert calibrate(maps, target=0.8).schedule.layers == (7, 10, 13)
    for target in (0.2, 0.3, 0.4):
        result = calibrate(maps, target=target)
        assert result.processed <= target + 1e-9
        assert result.schedule.layers[1:] == (10, 13) or result.schedule.layers[1] == 7


def test_no_samples_broken_samples_and_shallow_models_are_refused():
    with pytest.raises(DataError, match="no sample"):
        calibrate([], target=0.3)
    for broken in (torch.full((16, 4), torch.nan), -torch.ones(16, 4), torch.ones(15, 4), torch.ones(16)):
        with pytest.raises(DataError, match="sample 1"):
            calibrate([narrowing(), broken], target=0.3)
    with pytest.raises(ConfigError, match="4 layers"):
        calibrate([torch.rand(4, 9)], target=0.3)


def test_a_model_of_four_layers_gets_two_stages():
    maps = [torch.rand(4, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    found = calibrate(maps, target=0.6)
    assert found.schedule.layers == (1, 2)
    assert found.processed == pytest.approx((2 + found.schedule.ratios[0] * (1 + found.schedule.ratios[1])) / 4)
    assert found.processed <= 0.6
