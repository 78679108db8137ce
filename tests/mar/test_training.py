"""The loss, token by token in numpy; masks, averages and parameter groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats as distributions

from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.schedule import cosine_betas
from vlmeff.models.mar.training import Averaged, Draws, draw, head_loss, mask_ratio, optimizer_groups, training_loss
from vlmeff.models.mar.trunk import MAR

CONFIG = MARConfig.named("mar_nano_digits")
CLOSE = 1e-3  # relative; differences of nearly equal probabilities in float32


def model() -> MAR:
    torch.manual_seed(2)
    made = MAR(CONFIG).eval()
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def slow_loss(out: np.ndarray, x0: np.ndarray, noise: np.ndarray, t: int) -> float:
    """One token, from the network's output (epsilon, v): squared error and variational term, in float64."""
    abar_all = np.cumprod([1 - beta for beta in cosine_betas(1000)])
    abar, before = abar_all[t], abar_all[t - 1] if t else 1.0
    beta = 1 - abar / before
    epsilon, v = out[:4], out[4:]
    x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise
    guess = (x_t - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
    to_x0, to_x = beta * math.sqrt(before) / (1 - abar), (1 - before) * math.sqrt(1 - beta) / (1 - abar)
    tilde = beta * (1 - before) / (1 - abar)
    if t == 0:
        tilde = (1 - abar_all[1] / abar_all[0]) * (1 - abar_all[0]) / (1 - abar_all[1])
    variance = np.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(tilde))
    mean = to_x0 * guess + to_x * x_t
    if t == 0:
        edges = [distributions.norm.cdf((x0 + side / 255 - mean) / np.sqrt(variance)) for side in (1, -1)]
        mass = np.where(x0 < -0.999, edges[0], np.where(x0 > 0.999, 1 - edges[1], edges[0] - edges[1]))
        nats = -np.log(np.maximum(mass, 1e-12))
    else:
        true = to_x0 * x0 + to_x * x_t
        nats = 0.5 * (np.log(variance / tilde) + (tilde + (true - mean) ** 2) / variance - 1)
    return float(((epsilon - noise) ** 2).mean() + nats.mean() / math.log(2))


@torch.no_grad()
def test_loss_of_every_token_is_the_slow_one():
    made = model()
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 0, 1, 2, 50, 500, 900, 999])
    x0, noise = torch.randn(2, 8, 4, generator=g)
    x0[1] = torch.tensor([-1.5, 1.5, 0.2, -0.1])  # both open bins
    z = torch.randn(8, 32, generator=g)
    fast = head_loss(made.diffloss, x0, z, t, noise)
    abar = torch.tensor(np.cumprod([1 - beta for beta in cosine_betas(1000)])[t.tolist()]).float()[:, None]
    out = made.diffloss.net(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t, z).double().numpy()
    for n in range(8):
        wanted = slow_loss(out[n], x0[n].double().numpy(), noise[n].double().numpy(), int(t[n]))
        assert float(fast[n]) == pytest.approx(wanted, rel=CLOSE)


@torch.no_grad()
def test_loss_of_a_batch_is_the_mean_over_masked_tokens_of_the_official_form():
    """The official code computes all positions, weights by the mask and divides by its sum."""
    made = model()
    g = torch.Generator().manual_seed(1)
    latents, labels = torch.randn(5, 16, 4, generator=g), torch.tensor([0, 1, 2, 3, 4])
    draws = draw(made, 5, g)
    draws.dropped[:2] = torch.tensor([True, False])
    count = int(draws.masked[0].sum())
    classes = [made.fake_latent[0] if draws.dropped[b] else made.class_emb.weight[b] for b in range(5)]
    z = made.trunk(latents, ~draws.masked, torch.stack(classes))
    total, weights = 0.0, 0
    for repeat in range(2):
        for b in range(5):
            for place, position in enumerate(draws.masked[b].nonzero().flatten().tolist()):
                n = (repeat * 5 + b) * count + place
                one = head_loss(
                    made.diffloss,
                    latents[b, position][None],
                    z[b, position][None],
                    draws.t[n][None],
                    draws.noise[n][None],
                )
                total, weights = total + float(one), weights + 1
    assert weights == 2 * 5 * count == len(draws.t)
    assert float(training_loss(made, latents, labels, draws)) == pytest.approx(total / weights, rel=1e-4)


def test_variational_term_trains_the_variance_only():
    """With the squared error at its minimum, epsilon gets no gradient; v does."""
    made = model()
    noise, x0, z = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 32)
    outputs: list[torch.Tensor] = []

    def replaced(x, t, conditions):
        outputs.append(torch.cat([noise + 0.3, torch.zeros(3, 4)], -1).requires_grad_())
        return outputs[-1]

    made.diffloss.net.forward = replaced
    head_loss(made.diffloss, x0, z, torch.tensor([1, 400, 990]), noise).sum().backward()
    by_error = torch.full((3, 4), 2 * 0.3 / 4)
    torch.testing.assert_close(outputs[0].grad[:, :4], by_error)
    assert (outputs[0].grad[:, 4:] != 0).any()


def test_mask_ratios_are_a_truncated_normal():
    g = torch.Generator().manual_seed(0)
    ratios = [mask_ratio(0.7, g) for _ in range(4000)]
    assert min(ratios) >= 0.7
    assert max(ratios) <= 1
    law = distributions.truncnorm((0.7 - 1) / 0.25, 0, loc=1, scale=0.25)
    assert distributions.kstest(ratios, law.cdf).pvalue > 1e-4


def test_draws_mask_equally_many_positions_of_every_row():
    made = model()
    g = torch.Generator().manual_seed(3)
    seen: list[Draws] = [draw(made, 8, g) for _ in range(60)]
    for draws in seen:
        counts = draws.masked.sum(1)
        assert (counts == counts[0]).all()
        assert 12 <= int(counts[0]) <= 16  # ceil(16 * 0.7)
        assert draws.t.shape == (2 * 8 * int(counts[0]),)
    assert min(int(d.t.min()) for d in seen) < 10
    assert max(int(d.t.max()) for d in seen) > 989
    assert 0.05 < sum(float(d.dropped.float().mean()) for d in seen) / 60 < 0.16
    shares = torch.stack([d.masked.float().mean(0) for d in seen]).mean(0)
    assert float(shares.max() - shares.min()) < 0.15  # no position is favoured


def test_average_is_the_recursion():
    made = torch.nn.Linear(1, 1, bias=False)
    made.weight.data.fill_(0.0)
    averaged, expected = Averaged(made, 0.5), 0.0
    for n in range(12):
        made.weight.data.fill_(n + 1.0)
        averaged.update(made)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
    assert float(averaged.shadow["weight"]) == pytest.approx(expected, rel=1e-5)


def test_biases_norms_and_the_head_do_not_decay():
    made = model()
    decaying, free = optimizer_groups(made)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    assert decaying["weight_decay"] == 0.02
    assert free["weight_decay"] == 0.0
    chosen = {names[id(p)] for p in decaying["params"]}
    assert {"z_proj.weight", "encoder_blocks.0.attn.qkv.weight", "class_emb.weight", "mask_token"} <= chosen
    assert not any(name.startswith("diffloss") or name.endswith("bias") or "norm" in name for name in chosen)
    assert len(chosen) + len(free["params"]) == len(names)
