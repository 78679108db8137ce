"""Densities in log space, speculative sampling from two densities, reflection coupling."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vlmeff.speculative.gaussian import density_accept, log_normal, log_path_ratio, reflection_couple

KS_P = 1e-4  # with fixed seeds: a correct law fails once in 10,000 seeds


def test_log_densities_stay_finite_where_densities_do_not() -> None:
    sigma = torch.full((3, 64), 0.0064)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * sigma
    assert torch.prod(sigma[0]) == 0  # what the published code multiplies
    found = log_normal(x, torch.zeros_like(x), sigma.log())
    wanted = stats.norm.logpdf(x.double().numpy(), 0, 0.0064).sum(1) + 32 * np.log(2 * np.pi)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_softening_divides_the_distance_and_not_the_volume() -> None:
    x, log_sigma = torch.tensor([[0.3, -0.2]]), torch.tensor([[-1.0, 0.5]])
    found = log_normal(x, torch.zeros(1, 2), log_sigma, softening=42.0)
    wanted = -0.5 * sum((v / (42 * np.exp(s))) ** 2 for v, s in [(0.3, -1.0), (-0.2, 0.5)]) - (-1.0 + 0.5)
    np.testing.assert_allclose(found, [wanted], rtol=1e-6)


def test_the_ratio_of_paths_is_the_sum_of_the_steps_log_densities() -> None:
    rng = np.random.default_rng(3)
    steps, tokens, dim = 5, 4, 3
    path, after = rng.normal(size=(steps, tokens, dim)), rng.normal(size=(tokens, dim))
    p, q = ([rng.normal(size=path.shape), 0.3 * rng.normal(size=path.shape)] for _ in range(2))
    for last in (None, after):
        wanted = np.zeros(tokens)
        for step in range(steps if last is not None else steps - 1):
            end = path[step + 1] if step + 1 < steps else after
            for law, sign in ((p, 1), (q, -1)):
                wanted += sign * stats.norm.logpdf(end, law[0][step], np.exp(law[1][step])).sum(1)
        found = log_path_ratio(
            torch.tensor(path),
            None if last is None else torch.tensor(last),
            (torch.tensor(p[0]), torch.tensor(p[1])),
            (torch.tensor(q[0]), torch.tensor(q[1])),
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


class Mixture:
    """Two Gaussians on a line."""

    def __init__(self, weight: float, means: tuple[float, float], stds: tuple[float, float], seed: int) -> None:
        self.weight, self.means, self.stds = weight, means, stds
        self.generator = torch.Generator().manual_seed(seed)

    def pdf(self, x: np.ndarray) -> np.ndarray:
        a, b = (stats.norm.pdf(x, m, s) for m, s in zip(self.means, self.stds, strict=True))
        return self.weight * a + (1 - self.weight) * b

    def cdf(self, x: np.ndarray) -> np.ndarray:
        a, b = (stats.norm.cdf(x, m, s) for m, s in zip(self.means, self.stds, strict=True))
        return self.weight * a + (1 - self.weight) * b

    def log(self, x: Tensor) -> Tensor:
        return torch.tensor(np.log(self.pdf(x.numpy())))

    def sample(self, count: int) -> Tensor:
        first = torch.rand(count, generator=self.generator) < self.weight
        noise = torch.randn(count, generator=self.generator, dtype=torch.float64)
        mean = torch.where(first, self.means[0], self.means[1])
        return mean + torch.where(first, self.stds[0], self.stds[1]) * noise


def test_density_accept_turns_draws_of_one_mixture_into_the_other() -> None:
    n = 50_000
    p, q = Mixture(0.3, (-1.0, 1.2), (0.5, 0.8), 1), Mixture(0.6, (-0.6, 1.6), (0.7, 0.6), 2)
    out = density_accept(q.sample(n), p.log, q.log, p.sample, generator=torch.Generator().manual_seed(3))
    grid = np.linspace(-8, 9, 200_001)
    overlap = np.trapezoid(np.minimum(p.pdf(grid), q.pdf(grid)), grid)
    assert stats.kstest(q.sample(n).numpy(), p.cdf).pvalue < 1e-100  # the test sees the difference of the two
    assert stats.kstest(out.x.numpy(), p.cdf).pvalue > KS_P
    assert abs(out.kept.float().mean() - overlap) < 4 * np.sqrt(overlap * (1 - overlap) / n)
    # A row rejected (probability 1 - overlap) takes a geometric number of draws with success probability 1 - overlap.
    spread = np.sqrt((2 - (1 - overlap)) / (1 - overlap) - 1)
    assert abs(out.draws / n - 1) < 4 * spread / np.sqrt(n)
    assert out.exhausted == 0


def test_density_accept_keeps_everything_of_its_own_law() -> None:
    p = Mixture(0.3, (-1.0, 1.2), (0.5, 0.8), 5)
    x = p.sample(1000)
    out = density_accept(x, p.log, p.log, p.sample, generator=torch.Generator().manual_seed(0))
    assert bool(out.kept.all())
    assert torch.equal(out.x, x)


def test_reflection_coupling_is_maximal_and_has_the_targets_law() -> None:
    n, sigma = 50_000, 0.5
    generator = torch.Generator().manual_seed(4)
    mean_p, mean_q = torch.tensor([0.3, -0.1, 0.2]), torch.tensor([-0.1, 0.1, 0.2])
    noise = torch.randn(n, 3, generator=generator)
    uniform = torch.rand(n, generator=generator)
    x, kept = reflection_couple(mean_p.expand(n, 3), mean_q.expand(n, 3), sigma, noise, uniform)
    for axis in range(3):
        assert stats.kstest(x[:, axis].numpy(), stats.norm(mean_p[axis], sigma).cdf).pvalue > KS_P
    share = 2 * stats.norm.cdf(-float((mean_p - mean_q).norm()) / sigma / 2)  # 1 - TV of two shifted Gaussians
    assert abs(kept.float().mean() - share) < 4 * np.sqrt(share * (1 - share) / n)
    along = ((x - mean_p) / sigma) @ ((mean_p - mean_q) / (mean_p - mean_q).norm())
    assert abs(float((along * (x[:, 2] - 0.2)).mean())) < 0.02  # directions stay independent


def test_reflection_coupling_of_equal_means_keeps_the_draft() -> None:
    noise, mean = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)), torch.ones(50, 2)
    x, kept = reflection_couple(mean, mean, 0.1, noise, torch.full((50,), 0.999))
    assert bool(kept.all())
    assert torch.equal(x, mean + 0.1 * noise)
