"""The schedule of Phi's rank against the official sequence, the decomposition between phases, and the controller."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlmeff.diffusion.qvgen import factors
from vlmeff.diffusion.qvgen.factors import low_rank_factors, product_norm, re_svd
from vlmeff.diffusion.qvgen.fake_quant import FakeQuantLinear
from vlmeff.diffusion.qvgen.prepare import parameter_groups, prepare_qat
from vlmeff.diffusion.qvgen.rank_decay import RankController, RankSchedule
from vlmeff.errors import ExportError, QuantConfigError

# step: (rank, u), r0 = 8, T = 10: from a run of the official code, to the three digits that were noted
OFFICIAL = {
    0: (8, 1.0),
    5: (8, 0.5),
    9: (8, 0.024),
    10: (4, 1.0),
    20: (2, 1.0),
    30: (1, 1.0),
    39: (1, 0.024),
    40: (0, 0.0),
}


def test_the_sequence_is_the_official_one():
    schedule = RankSchedule(steps=80, rank=8)  # half of them hold four phases of ten
    assert schedule.phase_length == 10
    for step, (rank, u) in OFFICIAL.items():
        stage = schedule.at(step)
        assert stage.rank == rank, step
        assert stage.fade == pytest.approx(u, abs=6e-4), step


def test_ranks_of_the_official_runs():
    schedule = RankSchedule(steps=2667, rank=32, decay_fraction=1.0)
    assert schedule.ranks == (32, 16, 8, 4, 2, 1, 0)
    assert schedule.phase_length == 444  # of the Wan run
    assert RankSchedule(steps=2000, rank=32, decay_fraction=1.0).phase_length == 333  # CogVideoX


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 40),
    decay=st.floats(0.05, 1.0),
    fraction=st.floats(0.2, 1.0),
    warmup=st.integers(0, 20),
    fade=st.sampled_from(["cosine", "linear"]),
)
def test_gamma_fades_the_columns_that_go_and_ends_at_zero(rank, decay, fraction, warmup, fade):
    schedule = RankSchedule(steps=600, rank=rank, decay=decay, decay_fraction=fraction, warmup=warmup, fade=fade)
    ranks = schedule.ranks
    assert ranks[0] == rank
    assert ranks[-1] == 0
    for now, then in pairwise(ranks):
        assert now - then == max(1, math.ceil(decay * now))
    end = warmup + (len(ranks) - 1) * schedule.phase_length
    assert end <= fraction * 600
    before = None
    for step in range(end + 2):
        gamma = schedule.gamma(step)
        assert gamma.shape == (rank,)
        if step < warmup:
            assert (gamma == 1).all()
        assert (gamma[1:] <= gamma[:-1]).all()
        if before is not None:
            assert (gamma <= before + 1e-7).all()  # a column never comes back
        before = gamma
    assert schedule.at(end - 1).rank > 0
    assert (schedule.gamma(end) == 0).all()


def test_linear_fade_and_the_modes():
    linear = RankSchedule(steps=80, rank=8, fade="linear")
    assert [linear.at(t).fade for t in (0, 3, 9)] == pytest.approx([1.0, 0.7, 0.1])
    keep = RankSchedule(steps=10, rank=8, mode="keep")
    assert keep.at(10**6).rank == 8
    drop = RankSchedule(steps=10, rank=8, mode="drop")
    assert [drop.at(t).rank for t in (0, 4, 5, 9)] == [8, 8, 0, 0]
    assert drop.at(4).fade == 1.0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"rank": -1}, "rank"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.1}, "decay"),
        ({"decay": math.nan}, "decay"),
        ({"decay_fraction": 0.0}, "decay_fraction"),
        ({"warmup": -1}, "warmup"),
        ({"steps": 11}, "steps=11 is too short"),  # half of eleven does not hold six phases
        ({"fade": "square"}, "fade"),
        ({"mode": "grow"}, "mode"),
    ],
)
def test_schedules_that_cannot_work_are_refused(arguments, word):
    with pytest.raises(QuantConfigError, match=word):
        RankSchedule(**{"steps": 100, **arguments})


def test_the_decomposition_keeps_the_product_and_sorts_by_singular_value():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 6, generator=generator), torch.randn(6, 31, generator=generator)
    new_left, new_right = re_svd(left, right)
    product = left @ right
    assert (new_left @ new_right - product).norm() <= 2e-6 * product.norm()
    values = torch.linalg.svdvals(product.double())[:6]
    torch.testing.assert_close(new_left.norm(dim=0).pow(2).double(), values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_right.norm(dim=1).pow(2).double(), values, rtol=1e-5, atol=1e-5)
    # First columns of a sorted factorisation are the best approximation of their rank.
    u, s, vh = torch.linalg.svd(product)
    best = (u[:, :2] * s[:2]) @ vh[:2]
    torch.testing.assert_close(new_left[:, :2] @ new_right[:2], best, atol=1e-4, rtol=1e-4)


def test_the_norm_of_a_product_needs_no_product():
    left, right = torch.randn(20, 3), torch.randn(3, 30)
    torch.testing.assert_close(product_norm(left, right), (left @ right).norm())


def test_the_randomised_decomposition_is_nearly_the_best_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(factors, "LARGE", 16)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(80, 60, generator=generator)
    state = torch.get_rng_state()
    left, right = low_rank_factors(matrix, 4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again = low_rank_factors(matrix, 4, seed=3)
    assert torch.equal(left, again[0])
    best = torch.linalg.svdvals(matrix)[4:].norm()
    assert (matrix - left @ right).norm() <= 1.02 * best


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)))


def prepared(rank=8, steps=80, **schedule):
    torch.manual_seed(0)
    model = Two()
    with pytest.warns(UserWarning, match="narrow"):
        layers = prepare_qat(model, ["wide", "narrow"], 3, rank=rank)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    return model, layers, optimizer, RankController(layers, RankSchedule(steps=steps, rank=rank, **schedule), optimizer)


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(16, 24)).pow(2).mean().backward()
    optimizer.step()


def test_a_layer_smaller_than_the_rank_gets_its_full_rank():
    _, layers, _, controller = prepared()
    assert int(layers["narrow"].rank) == 3
    controller.step(10)  # rank 4 of the schedule: only the wide layer is cut
    assert {name: int(layer.rank) for name, layer in layers.items()} == {"wide": 4, "narrow": 3}
    controller.step(20)
    assert {name: int(layer.rank) for name, layer in layers.items()} == {"wide": 2, "narrow": 2}


def test_truncating_keeps_the_kept_columns_product_and_forgets_the_moments():
    model, layers, optimizer, controller = prepared()
    layer = layers["wide"]
    for step in range(10):
        controller.step(step)
        update(model, optimizer)
    kept = (layer.phi_L[:, :4] @ layer.phi_R[:4]).detach()
    assert optimizer.state[layer.phi_L]["exp_avg"].abs().sum() > 0
    controller.step(10)
    torch.testing.assert_close((layer.phi_L * layer.gamma) @ layer.phi_R, kept, atol=1e-5, rtol=1e-4)
    assert (layer.phi_L[:, 4:] == 0).all()
    assert (layer.phi_R[4:] == 0).all()
    assert layer.gamma.tolist() == [1.0] * 4 + [0.0] * 4
    for factor in (layer.phi_L, layer.phi_R):
        assert (optimizer.state[factor]["exp_avg"] == 0).all()
        assert (optimizer.state[factor]["exp_avg_sq"] == 0).all()
    update(model, optimizer)
    assert (layer.phi_L[:, 4:] == 0).all()  # what was cut stays away


def test_at_rank_zero_nothing_is_left_of_phi():
    model, layers, optimizer, controller = prepared()
    for step in range(41):
        controller.step(step)
        update(model, optimizer)
    assert controller.rank == 0
    assert not any("phi" in name or "gamma" in name for name in model.state_dict())
    assert [group["params"] for group in optimizer.param_groups if group["name"] == "phi"] == [[]]
    known = {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= known
    assert layers["wide"].phi_L is None
    assert controller.phi_share() == 0.0


def test_the_share_of_phi_is_the_mean_ratio_of_norms():
    _, layers, _, controller = prepared()
    controller.step(5)
    ratios = [((layer.phi_L * layer.gamma) @ layer.phi_R).norm() / layer.weight.norm() for layer in layers.values()]
    assert controller.phi_share() == pytest.approx(float(sum(ratios).detach() / 2), rel=1e-4)


def test_the_end_of_training_cuts_what_is_left_and_a_kept_phi_is_an_error():
    *_, controller = prepared(decay_fraction=1.0)
    controller.step(79)
    assert controller.rank == 1
    controller.finish()
    assert controller.rank == 0
    *_, controller = prepared(mode="keep")
    with pytest.raises(ExportError, match="wide: rank 8"):
        controller.finish()


def test_a_controller_of_a_resumed_run_goes_on_where_the_layers_are():
    layer = FakeQuantLinear.from_linear(nn.Linear(24, 20), phi="svd", rank=8)
    first = RankController({"x": layer}, RankSchedule(steps=80, rank=8))
    first.step(10)
    kept = layer.phi_L.detach().clone()
    second = RankController({"x": layer}, RankSchedule(steps=80, rank=8))
    second.step(12)
    assert torch.equal(layer.phi_L, kept)  # no second truncation
