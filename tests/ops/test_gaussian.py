"""gaussian_path_log_ratio against sums of scipy's log densities and against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vlmeff import ops

# Of the sum of the terms' magnitudes: each is rounded a few times in its dtype, the sum is float64.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}


def drawn(seed, shape, spread=1.0):
    """(x, mean_p, log_std_p, mean_q, log_std_q), float64, and near each other as two models of one thing are."""
    rng = np.random.default_rng(seed)
    x, log_std = rng.normal(size=shape), 0.5 * rng.normal(size=shape)
    means = [x + spread * np.exp(log_std) * rng.normal(size=shape) for _ in range(2)]
    stds = [log_std + 0.1 * rng.normal(size=shape) for _ in range(2)]
    return [torch.tensor(a) for a in (x, means[0], stds[0], means[1], stds[1])]


def terms(x, mean_p, log_p, mean_q, log_q, softening=1.0):
    """[T, N, D] float64 in numpy: the difference of scipy's log densities, the distances divided."""
    x, mean_p, log_p, mean_q, log_q = (t.double().numpy() for t in (x, mean_p, log_p, mean_q, log_q))
    at_p, at_q = ((x - m) / np.exp(s) / softening for m, s in ((mean_p, log_p), (mean_q, log_q)))
    return (stats.norm.logpdf(at_p) - log_p) - (stats.norm.logpdf(at_q) - log_q)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 7), st.integers(0, 6), st.integers(1, 9)),
    softening=st.sampled_from([1.0, 42.0, 0.5]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_it_is_the_sum_of_the_steps_log_densities(seed, shape, softening, dtype):
    arguments = [t.to(dtype) for t in drawn(seed, shape)]
    with ops.counters() as ran:
        found = ops.gaussian_path_log_ratio(*arguments, softening=softening)
    assert ran == {("gaussian_path_log_ratio", "reference"): 1}
    assert found.dtype == torch.float64
    assert found.shape == shape[1:2]
    wanted = terms(*arguments, softening=softening)
    np.testing.assert_array_less(
        np.abs(found.numpy() - wanted.sum((0, 2))),
        TOLERANCE[dtype] * (np.prod(shape[::2]) + np.abs(wanted).sum((0, 2))) * max(1, softening**-2) * 4 + 1e-30,
    )


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.integers(-50, 50)] * 3, *[st.integers(-6, 6)] * 2), min_size=1, max_size=8),
    softening=st.sampled_from([1, 4]),
)
def test_it_is_exact_where_the_numbers_are(values, softening):
    """Small integers and powers of two: but for the volumes' logarithms, nothing is ever rounded."""
    distances, volumes = Fraction(0), 0
    for x, mean_p, mean_q, p, q in values:
        for mean, power, sign in ((mean_p, p, -1), (mean_q, q, 1)):
            distances += sign * Fraction((x - mean) ** 2, 2 * softening**2) / Fraction(4) ** power
        volumes += q - p
    columns = torch.tensor(values, dtype=torch.float64).T
    x, mean_p, mean_q = (column[None, None] for column in columns[:3])
    log_p, log_q = (column[None, None] * math.log(2) for column in columns[3:])
    found = ops.gaussian_path_log_ratio(x, mean_p, log_p, mean_q, log_q, softening=softening)
    wanted = float(distances) + volumes * math.log(2)
    assert float(found) == pytest.approx(wanted, rel=1e-12, abs=1e-8)


@pytest.mark.parametrize("log_std", [math.log(0.0064), 3.0])
def test_it_stays_finite_and_precise_where_densities_under_and_overflow(log_std):
    steps, tokens, dim = 100, 3, 512
    x, mean_p, _, mean_q, _ = drawn(5, (steps, tokens, dim))
    stds = torch.full_like(x, log_std)
    mean_p, mean_q = x + (mean_p - x) * math.exp(log_std), x + (mean_q - x) * math.exp(log_std)
    assert torch.exp(log_std * torch.tensor(float(dim))).item() in (0.0, math.inf)  # one step of one token
    arguments = [t.float() for t in (x, mean_p, stds, mean_q, stds)]
    found = ops.gaussian_path_log_ratio(*arguments)
    wanted = terms(*arguments)
    assert found.isfinite().all()
    np.testing.assert_allclose(found, wanted.sum((0, 2)), atol=1e-6 * np.abs(wanted).sum((0, 2)).max())


def test_one_small_term_is_not_lost_among_many():
    """What float32 sums would drop: 2^-20 beside a million terms of 1."""
    shape = (1024, 1, 1024)
    zeros = torch.zeros(shape)
    log_q = torch.ones(shape)
    log_q[0, 0, 0] += 2.0**-20
    found = ops.gaussian_path_log_ratio(zeros, zeros, zeros, zeros, log_q)
    assert float(found) == 2.0**20 + 2.0**-20


def test_equal_models_give_zero_and_swapped_ones_the_opposite():
    x, mean_p, log_p, mean_q, log_q = (t.float() for t in drawn(1, (30, 5, 8), spread=1e3))
    assert torch.equal(ops.gaussian_path_log_ratio(x, mean_p, log_p, mean_p, log_p), torch.zeros(5).double())
    there = ops.gaussian_path_log_ratio(x, mean_p, log_p, mean_q, log_q)
    assert torch.equal(ops.gaussian_path_log_ratio(x, mean_q, log_q, mean_p, log_p), -there)


def test_far_distances_do_not_become_nan():
    """Their squares leave float32; their difference still says which model is out of the question."""
    x, near, far = (torch.full((1, 1, 1), value) for value in (0.0, 1e20, 2e20))
    one = torch.zeros(1, 1, 1)
    assert ops.gaussian_path_log_ratio(x, near, one, far, one).item() == math.inf
    assert ops.gaussian_path_log_ratio(x, far, one, near, one).item() == -math.inf


def test_softening_divides_the_distance_and_not_the_volume():
    x, log_p = torch.tensor([[[0.3, -0.2]]]), torch.tensor([[[-1.0, 0.5]]])
    zeros = torch.zeros_like(x)
    found = ops.gaussian_path_log_ratio(x, zeros, log_p, zeros, zeros, softening=42.0)
    p = -0.5 * sum((v / (42 * np.exp(s))) ** 2 for v, s in [(0.3, -1.0), (-0.2, 0.5)]) - (-1.0 + 0.5)
    q = -0.5 * sum((v / 42) ** 2 for v in (0.3, -0.2))
    np.testing.assert_allclose(found, [p - q], rtol=1e-6)


def test_paths_are_independent_and_a_nan_stays_in_its_own():
    arguments = [t.float() for t in drawn(2, (6, 4, 3))]
    whole = ops.gaussian_path_log_ratio(*arguments)
    alone = [ops.gaussian_path_log_ratio(*(t[:, n : n + 1] for t in arguments)) for n in range(4)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-13, atol=0)
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in arguments]
    torch.testing.assert_close(ops.gaussian_path_log_ratio(*strided), whole, rtol=1e-13, atol=0)
    arguments[1][3, 2, 1] = torch.nan
    assert ops.gaussian_path_log_ratio(*arguments).isnan().tolist() == [False, False, True, False]


def test_it_is_differentiable_and_traceable():
    arguments = [t.requires_grad_() for t in drawn(3, (3, 2, 2))]
    assert torch.autograd.gradcheck(ops.gaussian_path_log_ratio, arguments)
    compiled = torch.compile(ops.gaussian_path_log_ratio, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), ops.gaussian_path_log_ratio(*arguments))


def test_arguments_that_do_not_fit_are_named():
    x = torch.zeros(3, 2, 4)
    for arguments, options, error, said in (
        ((x[0],) * 5, {}, ValueError, r"x must be \[T, N, D\], got \(2, 4\)"),
        ((x, x, x, x[:, :1], x), {}, ValueError, r"mean_q must be \[3, 2, 4\] \(from x\), got \(3, 1, 4\)"),
        ((x, x, x.int(), x, x), {}, TypeError, "log_std_p must be a float tensor, got torch.int32"),
        ((x, x, 1.0, x, x), {}, TypeError, "log_std_p must be a float tensor, got float"),
        ((x,) * 5, {"softening": 0.0}, ValueError, "softening must be a finite number above 0, got 0.0"),
        ((x,) * 5, {"softening": math.nan}, ValueError, "softening must be"),
    ):
        with pytest.raises(error, match=f"gaussian_path_log_ratio: {said}"):
            ops.gaussian_path_log_ratio(*arguments, **options)
