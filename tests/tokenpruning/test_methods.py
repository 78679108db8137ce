"""What every token reduction method promises; a new one is tested by being registered."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from scipy.stats import binom

import tokenpruning
from tokenpruning.controls import Downsample, Random
from tokenpruning.plan import KIND_NAMES, Resampler, Segment, Selection, Selector, methods
from vlmeff.errors import ConfigError, UnknownNameError
from vlmeff.registry import Registry

for module in pkgutil.iter_modules(tokenpruning.__path__):  # whatever a file of the package registers is tested
    importlib.import_module(f"tokenpruning.{module.name}")

GRIDS = [(1, 8), (8, 1), (1, 2), (3, 5), (6, 6), (7, 4)]
SCORES = ("object", "deep", "text")
CHANNELS = 5


def having(member):
    return [name for name in methods.names() if hasattr(methods.get(name), member)]


every_method = pytest.mark.parametrize("name", having("select"))
every_resampler = pytest.mark.parametrize("name", having("resample"))


def segment(grid, needs=(), seed=0):
    """A segment with what is needed and nothing else."""
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    drawn = {name: torch.rand(n, generator=g) for name in SCORES}
    features = torch.randn(n, CHANNELS, generator=g)
    scores = {name: drawn[name] for name in SCORES if name in needs}
    return Segment(grid=grid, scores=scores, features=features if "features" in needs else None)


def selections(method):
    """(segment, k, selection) for every budget of every grid."""
    for grid in GRIDS:
        part = segment(grid, method.needs)
        for k in range(1, part.size):
            yield part, k, method.select(part, k)


def test_the_registry_holds_methods_of_each_kind():
    assert {"hiprune", "random", "downsample", "divprune", "scope", "visionzip", "hiprune++", "text"} <= set(
        having("select")
    )
    assert "fourier" in having("resample")


@every_method
def test_a_method_is_a_frozen_dataclass_that_needs_no_argument(name):
    method = methods.get(name)()
    assert isinstance(method, Selector)
    assert not isinstance(method, Resampler)
    assert dataclasses.is_dataclass(method)
    assert set(method.needs) <= {*SCORES, "features"}
    assert methods.name_of(method) == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = 0.5


@every_method
@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.5, float("nan"), True, "half"])
def test_a_method_refuses_a_budget_that_is_none_in_its_own_name(name, keep):
    cls = methods.get(name)
    with pytest.raises(ConfigError, match=f"^{cls.__name__}: keep=.* is not a budget"):
        cls(keep=keep)


@every_method
def test_a_method_keeps_exactly_k_distinct_tokens_in_raster_order(name):
    for part, k, chosen in selections(methods.get(name)()):
        index = chosen.index.tolist()
        assert index == sorted(set(index))
        assert len(index) == k
        assert set(index) <= set(range(part.size))


@every_method
def test_a_method_answers_int64_indices_and_a_known_kind_for_each(name):
    for _, k, chosen in selections(methods.get(name)()):
        assert chosen.index.dtype == torch.int64
        assert chosen.kind.dtype == torch.int8
        assert chosen.kind.shape == (k,)
        assert set(chosen.kind.tolist()) <= set(KIND_NAMES)


@every_method
def test_merged_tokens_point_at_kept_ones_and_kept_ones_at_themselves(name):
    for part, k, chosen in selections(methods.get(name)()):
        if chosen.into is not None:
            assert chosen.into.shape == (part.size,)
            assert chosen.into.dtype == torch.int64
            assert chosen.into[chosen.index].tolist() == list(range(k))
            assert chosen.into.min() >= -1
            assert chosen.into.max() < k


@every_method
def test_a_method_leaves_scores_and_features_as_they_are(name):
    method = methods.get(name)()
    part, same = segment((3, 5), method.needs), segment((3, 5), method.needs)
    method.select(part, 6)
    assert all(torch.equal(part.scores[name], same.scores[name]) for name in same.scores)
    assert same.features is None or torch.equal(part.features, same.features)


@every_method
def test_a_positive_factor_on_the_scores_changes_nothing(name):
    method = methods.get(name)()
    for factor in (2.0**-30, 2.0**30):  # no rounding
        part = segment((6, 6), method.needs)
        scaled = dataclasses.replace(part, scores={name: factor * score for name, score in part.scores.items()})
        for k in (1, 12, 35):
            assert torch.equal(method.select(scaled, k).index, method.select(part, k).index)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_method_takes_features_of_any_float_dtype(name, dtype):
    method = methods.get(name)()
    part = segment((3, 5), method.needs)
    if part.features is None:
        part = dataclasses.replace(part, features=torch.zeros(15, CHANNELS))
    values = part.features.bfloat16().half().float()  # the same in every dtype
    wide, narrow = (dataclasses.replace(part, features=values.to(d)) for d in (torch.float32, dtype))
    assert torch.equal(narrow.features.float(), values)
    expected, got = method.select(wide, 7), method.select(narrow, 7)
    assert torch.equal(got.index, expected.index)
    assert torch.equal(got.kind, expected.kind)
    assert got.apply(narrow.features).dtype == dtype


@every_method
def test_a_method_depends_on_its_arguments_alone_and_leaves_the_global_random_state(name):
    method = methods.get(name)()
    torch.manual_seed(1)
    first = [chosen.index for _, _, chosen in selections(method)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = [chosen.index for _, _, chosen in selections(method)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_draws_another_set_for_another_seed_and_each_token_equally_often():
    seeds, k, n = 600, 9, 36
    counts = torch.zeros(n)
    for seed in range(seeds):
        counts[Random(seed=seed).select(segment((6, 6)), k).index] += 1
    # The chance that any of the 36 counts lies outside is below one in a thousand, and the seeds are fixed.
    low, high = binom.interval(1 - 1e-3 / n, seeds, k / n)
    assert low <= counts.min()
    assert counts.max() <= high


def test_downsample_of_a_quarter_is_every_second_token_of_every_second_row():
    kept = Downsample().select(segment((6, 8)), 12).index.tolist()
    assert kept == [y * 8 + x for y in (1, 3, 5) for x in (1, 3, 5, 7)]


@pytest.mark.parametrize("grid", GRIDS)
def test_downsample_spreads_the_tokens_evenly_over_the_rows_it_uses(grid):
    for k in range(1, grid[0] * grid[1]):
        rows = [i // grid[1] for i in Downsample().select(segment(grid), k).index.tolist()]
        per_row = [rows.count(row) for row in set(rows)]
        assert max(per_row) - min(per_row) <= 1


@every_resampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resampler_answers_a_grid_within_the_old_one_and_tokens_to_fit(name, dtype):
    method = methods.get(name)()
    assert isinstance(method, Resampler)
    assert not isinstance(method, Selector)
    assert dataclasses.is_dataclass(method)
    assert methods.name_of(method) == name
    for grid in GRIDS:
        new_grid = method.new_grid(grid)
        assert 1 <= new_grid[0] <= grid[0]
        assert 1 <= new_grid[1] <= grid[1]
        tokens = torch.randn(2, grid[0] * grid[1], CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
        got = method.resample(tokens, grid)
        assert got.shape == (2, new_grid[0] * new_grid[1], CHANNELS)
        assert got.dtype == dtype
        torch.testing.assert_close(method.resample(tokens[1], grid), got[1])


def test_a_merged_token_is_the_mean_of_all_that_point_at_it():
    index, kind = torch.tensor([1, 3]), torch.zeros(2, dtype=torch.int8)
    tokens = torch.tensor([[1.0, 8], [3, 0], [100, 100], [5, 5]])
    merged = Selection(index, kind, torch.tensor([0, 0, -1, 1])).apply(tokens)
    assert merged.tolist() == [[2, 4], [5, 5]]
    assert Selection(index, kind).apply(tokens).tolist() == [[3, 0], [5, 5]]


def test_an_unknown_method_name_gets_the_nearest_one():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'hiprune'.*Available: "):
        methods.get("hi_prune")


def test_a_name_is_registered_once():
    registry = Registry("thing")
    registry.register("a")(int)
    with pytest.raises(ValueError, match="registered already"):
        registry.register("a")(float)
