"""Plain sampling: steps and weights of the paper, the law of an analytic head, a slow decode, determinism."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as distributions
from torch import nn

from vlmeff.errors import ConfigError
from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.head import DiffusionHead
from vlmeff.models.mar.sampling import NoiseBank, guidance, plain, units
from vlmeff.models.mar.schedule import cosine_betas, schedule
from vlmeff.models.mar.trunk import MAR

BATCHED = 1e-4  # what other batch shapes change
CONFIG = MARConfig.named("mar_nano_digits", num_sampling_steps=5)


def model() -> MAR:
    torch.manual_seed(5)
    made = MAR(CONFIG).eval()
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


# -- steps, weights, noise ---------------------------------------------------------------------------------------------


def test_units_of_the_paper():
    assert units(16, 8) == [1, 1, 1, 2, 3, 2, 3, 3]
    assert units(256, 256) == [1] * 256
    sizes = units(256, 64)
    assert sizes[:18] == [1] * 13 + [2, 3, 2, 2, 3]
    assert max(sizes) == 7
    assert units(16, 1) == [16]


@given(st.integers(1, 80), st.data())
def test_units_cover_the_picture(length, data):
    steps = data.draw(st.integers(1, length))
    sizes = units(length, steps)
    assert len(sizes) == steps
    assert sum(sizes) == length
    assert min(sizes) >= 1


def test_guidance_rises_with_the_tokens_that_exist():
    assert guidance(16, 4, 3.0, "constant") == [3.0] * 4
    assert guidance(16, 16, 1.0) == [1.0] * 16
    left = [14, 11, 6, 1]  # floor(16 cos(pi/8 k)), the last step counts as 1
    assert guidance(16, 4, 3.0) == pytest.approx([1 + 2 * (16 - m) / 16 for m in left])
    assert guidance(256, 256, 2.9)[-1] == pytest.approx(1 + 1.9 * 255 / 256)
    assert guidance(16, 1, 3.0) == pytest.approx([1 + 2 * 15 / 16])


@pytest.mark.parametrize("lazy", [False, True])
def test_noise_of_a_sample_depends_on_its_own_seed(lazy):
    bank = NoiseBank(7, 4, 6, 3, 2, lazy=lazy)
    assert bank.x_T.shape == (4, 6, 2)
    assert bank.eps.shape == (4, 6, 3, 2)
    assert all(sorted(order) == list(range(6)) for order in bank.orders.tolist())
    alone = NoiseBank(9, 1, 6, 3, 2, lazy=lazy)
    for name in ("x_T", "eps", "orders"):
        assert torch.equal(getattr(bank, name)[2], getattr(alone, name)[0])
        assert not torch.equal(getattr(bank, name)[1], getattr(bank, name)[0])
    samples, positions = torch.tensor([0, 2, 2]), torch.tensor([5, 0, 1])
    x_T, eps = NoiseBank(7, 4, 6, 3, 2, lazy=lazy).gather(samples, positions)
    assert torch.equal(x_T, bank.x_T[samples, positions])
    assert torch.equal(eps, bank.eps[samples, positions])


@pytest.mark.parametrize("lazy", [False, True])
def test_noise_is_unit_normal_and_uncorrelated(lazy):
    bank = NoiseBank(0, 40, 16, 4, 4, lazy=lazy)
    values = torch.cat([bank.x_T[:, :, None], bank.eps], 2)  # [40, 16, 5, 4]
    assert distributions.kstest(values.flatten().numpy(), "norm").pvalue > 1e-4
    for left, right in [
        (values[1:], values[:-1]),
        (values[:, 1:], values[:, :-1]),
        (values[:, :, 1:], values[:, :, :-1]),
    ]:
        product = (left * right).flatten()
        assert abs(float(product.mean())) < 4.5 / math.sqrt(product.numel())


# -- the law -----------------------------------------------------------------------------------------------------------

MEAN, STD, ANALYTIC_STEPS = 0.3, 0.5, 50


class AnalyticNet(nn.Module):
    """The best epsilon for data N(m, s^2), with v = -1.

    x0 = g x + m (1 - g sqrt(abar)), g = sqrt(abar) s^2 / (abar s^2 + 1 - abar)
    """

    def __init__(self) -> None:
        super().__init__()
        self.cond_embed = nn.Linear(1, 1)
        nn.init.zeros_(self.cond_embed.weight)
        nn.init.zeros_(self.cond_embed.bias)
        self.abar = torch.tensor(np.cumprod([1 - beta for beta in cosine_betas(1000)]))

    def time_embed(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps.float()[:, None]

    def body(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        abar = self.abar[y.round().long()]
        g = abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar)
        x0 = g * x + MEAN * (1 - g * abar.sqrt())
        epsilon = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        return torch.cat([epsilon, torch.full_like(epsilon, -1.0)], -1).float()


def analytic_head() -> DiffusionHead:
    """The sampler with the network replaced; D = 1."""
    config = MARConfig.named(
        "mar_nano_digits", patch_size=1, num_sampling_steps=ANALYTIC_STEPS, clip_x0=None, decoder_dim=4, head_width=4
    )
    head = DiffusionHead(config)
    head.net = AnalyticNet()
    return head


def law() -> tuple[float, float]:
    """Mean and variance of what the sampler draws: x <- A x + B + sigma eps, in numpy."""
    picked = np.cumprod([1 - beta for beta in cosine_betas(1000)])[
        [round(i * 999 / (ANALYTIC_STEPS - 1)) for i in range(ANALYTIC_STEPS)]
    ]
    mean, variance = 0.0, 1.0
    for i in reversed(range(ANALYTIC_STEPS)):
        now, before = picked[i], picked[i - 1] if i else 1.0
        beta = 1 - now / before
        g = math.sqrt(now) * STD**2 / (now * STD**2 + 1 - now)
        to_x0 = beta * math.sqrt(before) / (1 - now)
        factor = to_x0 * g + (1 - before) * math.sqrt(1 - beta) / (1 - now)
        shift = to_x0 * MEAN * (1 - g * math.sqrt(now))
        mean = factor * mean + shift
        variance = factor**2 * variance + (beta * (1 - before) / (1 - now) if i else 0)
    return mean, variance


def test_sampler_has_the_law_of_the_recursion():
    mean, variance = law()
    assert (mean, math.sqrt(variance)) == (pytest.approx(0.3, abs=1e-3), pytest.approx(0.46721, abs=1e-4))
    count = 50_000
    g = torch.Generator().manual_seed(0)
    run = analytic_head().sample(
        torch.zeros(count, 1),
        torch.randn(count, 1, generator=g),
        torch.randn(count, ANALYTIC_STEPS, 1, generator=g),
    )
    drawn = run.x0[:, 0].double().numpy()
    assert distributions.kstest(drawn, "norm", args=(mean, math.sqrt(variance))).pvalue > 1e-4
    # The test can tell: a law that is off by 6 % of its width is refused.
    assert distributions.kstest(drawn, "norm", args=(mean, 1.06 * math.sqrt(variance))).pvalue < 1e-4


class Chain:
    """A model whose tokens depend on the one before: N(a previous + b, STD^2), for ``plain``."""

    def __init__(self, config: SimpleNamespace, head: object) -> None:
        self.config, self.head, self.device = config, head, torch.device("cpu")

    def class_embedding(self, labels, batch):
        return torch.zeros(batch, 1)

    def trunk(self, tokens, visible, class_embedding):
        previous = torch.cat([torch.zeros(len(tokens), 1), tokens[:, :-1, 0]], 1)
        return (0.8 * previous + 0.2 - MEAN)[..., None]  # the shift of the mean


class ShiftedHead:
    """The analytic head of data N(MEAN + z, STD^2): an affine map of states, so x0 moves along."""

    def __init__(self) -> None:
        self.head = analytic_head()

    def sample(self, z, x_T, eps, **options):
        tables = schedule(ANALYTIC_STEPS)
        shift = z * tables.abar[-1].sqrt()  # x_T of shifted data, up to 5e-5
        run = self.head.sample(torch.zeros_like(z), x_T - shift, eps, **options)
        return SimpleNamespace(x0=run.x0 + z)


def test_plain_decoding_of_a_chain_has_its_law():
    config = SimpleNamespace(seq_len=3, token_dim=1, num_sampling_steps=ANALYTIC_STEPS)
    count = 12_000
    bank = NoiseBank.given(
        torch.randn(count, 3, 1, generator=torch.Generator().manual_seed(1)),
        torch.randn(count, 3, ANALYTIC_STEPS, 1, generator=torch.Generator().manual_seed(2)),
        torch.arange(3).expand(count, -1),
    )
    drawn, counted = plain(Chain(config, ShiftedHead()), None, batch=count, noise=bank)
    assert counted.target_passes == 3
    _, variance = law()
    means, variances = [0.2], [variance]
    for _ in range(2):
        means.append(0.8 * means[-1] + 0.2)
        variances.append(0.64 * variances[-1] + variance)
    for position in range(3):
        args = (means[position], math.sqrt(variances[position]))
        assert distributions.kstest(drawn[:, position, 0].numpy(), "norm", args=args).pvalue > 1e-4
    for position in (1, 2):
        expected = 0.8 * math.sqrt(variances[position - 1] / variances[position])
        assert np.corrcoef(drawn[:, position - 1, 0], drawn[:, position, 0])[0, 1] == pytest.approx(expected, abs=0.02)


# -- decoding ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("steps", "cfg", "schedule_name"), [(16, 1.0, "linear"), (5, 2.5, "linear"), (4, 2.0, "constant")]
)
def test_plain_decoding_is_the_slow_one(steps, cfg, schedule_name):
    """Token by token, sample by sample; masks and weights from the paper's formulas."""
    made, bank = model(), NoiseBank(3, 2, 16, 5, 4)
    labels = torch.tensor([4, 9])
    fast = made.sample(labels, num_iter=steps, cfg=cfg, cfg_schedule=schedule_name, seed=3, temperature=0.8)
    for b in range(2):
        tokens, order = torch.zeros(1, 16, 4), bank.orders[b].tolist()
        left = 16
        for k in range(steps):
            after = max(1, min(left - 1, math.floor(16 * math.cos(math.pi / 2 * (k + 1) / steps))))
            weight = 1 + (cfg - 1) * (16 - after) / 16 if schedule_name == "linear" else cfg
            now = order[16 - left : 16 - (after if k < steps - 1 else 0)]
            visible = torch.zeros(1, 16, dtype=torch.bool)
            visible[0, order[: 16 - left]] = True
            z = made.trunk(tokens, visible, made.class_emb(labels[b : b + 1]))
            free = made.trunk(tokens, visible, made.fake_latent)
            fresh = tokens.clone()
            for position in now:
                run = made.diffloss.sample(
                    z[:, position],
                    bank.x_T[b, position][None],
                    bank.eps[b, position][None],
                    z_uncond=free[:, position] if cfg != 1 else None,
                    cfg=weight,
                    temperature=0.8,
                )
                fresh[:, position] = run.x0
            tokens, left = fresh, after
        torch.testing.assert_close(fast.latents[b : b + 1], tokens, atol=BATCHED, rtol=0)
    halves = 2 if cfg != 1 else 1
    assert fast.stats.target_passes == steps
    assert fast.stats.target_rows == halves * steps * 2
    assert fast.stats.target_head_rows == halves * 2 * 16 * 5


def test_passes_are_the_calls_of_the_transformer():
    made, calls = model(), []
    handle = made.encoder_norm.register_forward_hook(lambda *_: calls.append(1))
    out = made.sample([1, 2], num_iter=6, cfg=2.0)
    handle.remove()
    assert len(calls) == out.stats.target_passes == 6


def test_samples_do_not_depend_on_their_batch_mates():
    made = model()
    together = made.sample([1, 2, 3], cfg=2.0, seed=11, num_iter=8).latents
    for b in range(3):
        alone = made.sample([b + 1], cfg=2.0, seed=11 + b, num_iter=8).latents
        torch.testing.assert_close(together[b : b + 1], alone, atol=BATCHED, rtol=0)
    assert torch.equal(made.sample([1, 2, 3], cfg=2.0, seed=11, num_iter=8).latents, together)
    assert not torch.allclose(made.sample([1, 2, 3], cfg=2.0, seed=12, num_iter=8).latents, together)


def test_order_and_noise_can_be_given():
    made = model()
    orders = torch.arange(15, -1, -1)[None]
    bank = NoiseBank(5, 1, 16, 5, 4)
    given_order = made.sample([3], order=orders, seed=5).latents
    same = NoiseBank.given(bank.x_T, bank.eps, orders)
    assert torch.equal(made.sample([3], noise=same, seed=99).latents, given_order)
    assert not torch.allclose(made.sample([3], seed=5).latents, given_order)


def test_one_label_is_drawn_batch_times_and_none_draws_without_class():
    made = model()
    assert torch.equal(made.sample(7, batch=2).latents, made.sample([7, 7]).latents)
    free = made.sample(batch=2, seed=4)
    assert free.images.shape == (2, 1, 8, 8)
    with pytest.warns(UserWarning, match="no effect without labels"):
        guided = made.sample(batch=2, seed=4, cfg=3.0)
    assert torch.equal(guided.latents, free.latents)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_iter": 0}, "num_iter=0"),
        ({"num_iter": 17}, r"num_iter=17: .* \[1, 16\]"),
        ({"cfg": -0.5}, "cfg=-0.5"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule='cosine'"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch": 3}, "batch=3 and 1 labels"),
        ({"labels": None}, "batch=None"),
        ({"labels": [11]}, "11 is not a class"),
        ({"labels": [[1]]}, "one dimension"),
        ({"order": torch.zeros(1, 16, dtype=torch.long)}, "permutation"),
        ({"order": torch.arange(4)[None]}, "shape"),
        ({"noise": NoiseBank(0, 1, 16, 4, 4)}, r"\(1, 16, 4, 4\), this call needs \(1, 16, 5, 4\)"),
    ],
)
def test_calls_that_cannot_work_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        model().sample(**({"labels": [1]} | call))


def test_noise_of_other_shapes_is_refused():
    with pytest.raises(ConfigError, match="do not fit"):
        NoiseBank.given(torch.zeros(2, 3, 1), torch.zeros(2, 4, 5, 1), torch.zeros(2, 3))


def test_a_token_that_is_not_finite_is_an_error_that_says_where():
    made = model()
    made.diffloss.net.final_layer.linear.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite after step 0"):
        made.sample([1])


def test_half_precision_weights_give_float32_latents():
    made = model().to(torch.bfloat16)
    latents = made.sample([1, 2], num_iter=8, cfg=2.0).latents
    assert latents.dtype == torch.float32
    full = model().sample([1, 2], num_iter=8, cfg=2.0).latents
    assert float((latents - full).square().mean().sqrt()) < 0.25 * float(full.square().mean().sqrt())
