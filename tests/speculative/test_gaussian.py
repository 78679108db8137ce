"""Speculative sampling from two densities, which try of a block is taken, reflection coupling."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vlmeff.speculative.gaussian import density_accept, first_accepted, reflection_couple

KS_P = 1e-4  # with fixed seeds: a correct law fails once in 10,000 seeds


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


def test_a_block_of_tries_gives_what_a_loop_over_them_would() -> None:
    stay = torch.rand(7, 200, generator=torch.Generator().manual_seed(6)) < 0.2
    found, chosen, looked_at = first_accepted(stay)
    draws = 0
    for n, column in enumerate(stay.T.tolist()):
        tries = 0
        while tries < len(column) - 1 and not column[tries]:
            tries += 1
        draws += tries + 1
        assert bool(found[n]) == any(column)
        assert int(chosen[n]) == tries
    assert looked_at == draws
    assert 0 < int(found.sum()) < 200


def test_rows_whose_tries_run_out_keep_the_last_proposal() -> None:
    # p and q agree where p proposes, so that the residual keeps nothing; and the draft lies where p has no mass.
    x = torch.zeros(5, 2, dtype=torch.float64)
    out = density_accept(
        x,
        lambda at: torch.where(at[:, 0] > 0, 0.0, -torch.inf),
        lambda at: torch.zeros(len(at)),
        lambda count: torch.arange(1, count + 1)[:, None].expand(-1, 2).double(),
        max_tries=130,  # more than a block
    )
    assert not out.kept.any()
    assert (out.draws, out.exhausted) == (5 * 130, 5)
    assert torch.equal(out.x, torch.arange(6.0, 11.0)[:, None].expand(-1, 2).double())


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
