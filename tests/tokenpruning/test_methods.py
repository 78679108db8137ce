"""What every token reduction method promises; a new one is tested by being registered."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import binom

from tokenpruning import KIND_NAMES, Downsample, Random, Segment, Selection, Selector, methods
from tokenpruning.plan import PrunePlan, all_of, join_segments
from vlmeff.errors import UnknownNameError
from vlmeff.registry import Registry

GRIDS = [(1, 8), (8, 1), (1, 2), (3, 5), (6, 6), (7, 4)]
every_method = pytest.mark.parametrize("name", methods.names())


def segment(grid, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(grid[0] * grid[1], generator=g) for name in ("object", "deep")}
    return Segment(grid=grid, scores=scores)


def selections(method):
    """(segment, k, selection) for every budget of every grid."""
    for grid in GRIDS:
        part = segment(grid)
        for k in range(1, part.size):
            yield part, k, method.select(part, k)


@every_method
def test_a_method_is_a_frozen_dataclass_that_needs_no_argument(name):
    method = methods.get(name)()
    assert isinstance(method, Selector)
    assert dataclasses.is_dataclass(method)
    assert set(method.scores) <= {"object", "deep"}
    assert methods.name_of(method) == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = 0.5


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


def test_the_selection_of_a_picture_counts_on_through_its_segments():
    parts = [segment((2, 3)), segment((1, 4))]
    picks = [Selection(torch.tensor([1, 5]), torch.tensor([1, 2], dtype=torch.int8)), all_of(parts[1])]
    whole = join_segments(parts, picks)
    assert whole.index.tolist() == [1, 5, 6, 7, 8, 9]
    assert whole.kind.tolist() == [1, 2, 0, 0, 0, 0]
    plan = PrunePlan([[(2, 3), (1, 4)]], [whole.index], [whole.kind])
    assert (plan.sizes, plan.n_before, plan.n_after) == ([10], 10, 6)


def test_an_unknown_method_name_gets_the_nearest_one():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'hiprune'.*Available: "):
        methods.get("hi_prune")


def test_a_name_is_registered_once():
    registry = Registry("thing")
    registry.register("a")(int)
    with pytest.raises(ValueError, match="registered already"):
        registry.register("a")(float)
