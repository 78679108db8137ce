"""Every mode on small random networks: identities, counts, batches, units, guidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.speculative.mar_nets import counted, random_mar
from vlmeff.models.mar.sampling import NoiseBank, guidance
from vlmeff.speculative.continuous import Continuous, decode

LABELS = torch.tensor([3, 7, 0])
SAME = 1e-4  # of latents: batch shapes change the last bits of floats, and denoising steps amplify them
MODES: dict[str, dict[str, Any]] = {
    "coupled": {"mode": "coupled", "window": 5, "delta": 0.02},
    "coupled-draft": {"mode": "coupled", "window": 4, "delta": 0.1, "proposal": "draft"},
    "exact": {"mode": "exact", "gamma": 3},
    "exact-final-noise": {"mode": "exact", "gamma": 3, "final_noise": True},
    "cspd-paper": {"mode": "cspd", "gamma": 4},
    "cspd-match": {"mode": "cspd", "gamma": 4, "residual": "match", "softening": 10.0},
    "cspd-official": {"mode": "cspd", "variant": "official", "gamma": 4},
}


@pytest.fixture(scope="module")
def target() -> Any:
    return random_mar(0)


@pytest.fixture(scope="module")
def draft(target: Any) -> Any:
    """A disturbed copy: near enough to be accepted now and then."""
    model = random_mar(0)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.05 * parameter.std().nan_to_num(0.0) * torch.randn(parameter.shape, generator=generator))
    return model


def run(target: Any, draft: Any, labels: Any = LABELS, config: Any = None, **call: Any) -> tuple[Any, Any]:
    given = {"mode": None} if config is None else config
    return decode(target, draft, labels, config=Continuous(**given), **call)


@pytest.mark.parametrize(
    "config",
    [
        {"mode": "cspd", "gamma": 0},
        {"mode": "exact", "gamma": 0},
        {"mode": "coupled", "prefill": 1.0},
        {"mode": "exact", "prefill": 1.0},
    ],
)
def test_nothing_to_speculate_on_is_plain_decoding_bit_for_bit(target: Any, config: Any) -> None:
    wanted = target.sample(LABELS, cfg=2.0, num_iter=9, seed=4).latents
    found, stats = run(target, None, config=config, cfg=2.0, num_iter=9, seed=4)
    assert torch.equal(found, wanted)
    assert stats.target_passes == 9
    assert stats.draft_passes == 0


@pytest.mark.parametrize("guidance", [{}, {"cfg": 3.0}])
@pytest.mark.parametrize(
    "config",
    [
        {"mode": "coupled", "proposal": "draft", "window": 4, "delta": 1e-3},
        {"mode": "exact", "gamma": 4},
        {"mode": "cspd", "gamma": 4, "softening": 1.0},
        {"mode": "cspd", "gamma": 4, "softening": 42.0},
    ],
)
def test_a_draft_that_is_the_target_is_always_accepted(target: Any, config: Any, guidance: Any) -> None:
    plain, _ = run(target, None, **guidance)
    found, stats = run(target, target, config={**config, "prefill": 1 / 16}, **guidance)
    assert stats.acceptance_rate == 1.0
    assert stats.tokens_per_round == 15 / 4
    assert stats.target_passes == 5
    torch.testing.assert_close(found, plain, atol=SAME, rtol=0)


def test_parallel_verification_does_not_accept_its_own_model(target: Any) -> None:
    config = {"mode": "cspd", "verify": "parallel", "gamma": 4, "softening": 1.0}
    _, stats = run(target, target, config=config)
    assert stats.acceptance_rate < 0.9


@pytest.mark.parametrize("window", [1, 3, 16])
@pytest.mark.parametrize("proposal", ["self", "draft"])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-4])
def test_coupled_with_a_small_tolerance_is_plain_decoding(
    target: Any, draft: Any, window: int, proposal: str, delta: float
) -> None:
    plain, _ = run(target, None, cfg=2.0)
    config = {"mode": "coupled", "window": window, "delta": delta, "proposal": proposal}
    found, stats = run(target, draft, config=config, cfg=2.0)
    assert (found - plain).abs().max() <= 1e-3
    assert math.ceil(16 / window) <= stats.target_passes <= 16


def test_a_larger_tolerance_needs_fewer_passes_and_deviates_more(target: Any) -> None:
    labels = torch.arange(10)
    plain, _ = run(target, None, labels)
    found = []
    for delta in (1e-4, 0.1, 0.5):
        latents, stats = run(target, None, labels, {"mode": "coupled", "window": 8, "delta": delta})
        found.append((float((latents - plain).square().mean().sqrt()), stats.tokens_per_round))
        assert stats.context_gap_max <= delta
    assert sorted(found) == found
    assert found[0][0] < found[1][0] < found[2][0]
    assert found[0][1] < found[2][1]


@pytest.mark.parametrize("name", MODES)
def test_a_sample_does_not_depend_on_its_batch(target: Any, draft: Any, name: str) -> None:
    call = {"cfg": 2.0, "cfg_schedule": "linear", "temperature": 0.9}
    together, _ = run(target, draft, config=MODES[name], seed=20, **call)
    again, _ = run(target, draft, config=MODES[name], seed=20, **call)
    other, _ = run(target, draft, config=MODES[name], seed=40, **call)
    assert torch.equal(together, again)
    assert (together - other).abs().max() > 0.1
    for b in range(3):
        alone, _ = run(target, draft, LABELS[b : b + 1], MODES[name], seed=20 + b, **call)
        torch.testing.assert_close(alone[0], together[b], atol=SAME, rtol=0)


@pytest.mark.parametrize("call", [{}, {"cfg": 2.0}, {"num_iter": 7}], ids=str)
@pytest.mark.parametrize("name", MODES)
def test_the_statistics_are_what_hooks_count_and_fit_each_other(target: Any, draft: Any, name: str, call: Any) -> None:
    config = {**MODES[name], "prefill": 0.1}
    with counted(target) as of_target, counted(draft) as of_draft:
        _, s = run(target, draft, config=config, **call)
    assert (s.target_passes, s.target_rows) == (of_target.passes, of_target.rows)
    assert (s.draft_passes, s.draft_rows) == (of_draft.passes, of_draft.rows)
    assert (s.target_head_calls, s.target_head_rows) == (of_target.head_calls, of_target.head_rows)
    assert (s.draft_head_calls, s.draft_head_rows) == (of_draft.head_calls, of_draft.head_rows)

    k = call.get("num_iter", 16)
    assert s.units == 3 * k
    assert s.prefill_units == (math.floor(0.1 * k) + 1 if name == "cspd-official" else math.ceil(0.1 * k))
    assert sum(s.accepted_length_hist.values()) == s.rounds == sum(s.rounds_of)
    assert sum(length * count for length, count in s.accepted_length_hist.items()) == s.accepted
    if name.startswith("coupled"):  # each round emits a unit of the target's own beside those whose guess held
        assert s.accepted + s.rounds == 3 * (k - s.prefill_units)
    else:  # each unit was accepted or replaced
        assert s.accepted + s.rejections == 3 * (k - s.prefill_units)
    assert s.drafted >= s.accepted + s.rejections
    assert s.tokens_per_round == pytest.approx(3 * (16 - s.prefill_tokens) / s.rounds)
    if s.drafted:
        assert s.acceptance_rate == s.accepted / s.drafted
    out = s.to_dict()
    assert out["accepted"] == sum(out["accepted_of"])
    assert out["rounds"] == s.rounds


@pytest.mark.parametrize("gamma", [1, 3, 4, 20])
@pytest.mark.parametrize(("num_iter", "prefill"), [(16, 0.0), (16, 0.15), (11, 0.05)])
def test_the_published_codes_passes_do_not_depend_on_acceptance(
    target: Any, draft: Any, gamma: int, num_iter: int, prefill: float
) -> None:
    # The published loop: steps k <= K ratio by the target, then one verification where k % gamma == 0 or k == K - 1.
    steps = [k for k in range(num_iter) if k > num_iter * prefill]
    wanted = num_iter - len(steps) + sum(k % gamma == 0 or k == num_iter - 1 for k in steps)
    for softening in (0.1, 1000.0):
        config = {"mode": "cspd", "variant": "official", "gamma": gamma, "prefill": prefill, "softening": softening}
        _, stats = run(target, draft, config=config, num_iter=num_iter)
        assert stats.target_passes == wanted
        assert stats.draft_passes == len(steps)
        if steps:
            assert (stats.acceptance_rate > 0.5) == (softening > 1)


def test_a_block_that_is_rejected_whole_is_parallel_prediction_by_the_target(target: Any, draft: Any) -> None:
    # As the published code does it: nothing drafted is visible to the target, so with the aligned token in place of a
    # rejected one the draft leaves no trace. Computed here from the trunk and the head, block by block.
    config = {"mode": "cspd", "variant": "official", "gamma": 4, "prefill": 0.0, "softening": 1e-6}
    found, stats = run(target, draft, LABELS, {**config, "residual": "match"}, cfg=3.0, seed=9)
    assert stats.accepted <= 2  # tokens that both models clamp to the same corner
    bank, weights = NoiseBank(9, 3, 16, 8, 4), guidance(16, 16, 3.0, "linear")
    classes = torch.cat([target.class_embedding(LABELS, 3), target.class_embedding(None, 3)])
    wanted = torch.zeros(3, 16, 4)
    visible = torch.zeros(3, 16, dtype=torch.bool)
    rows = torch.arange(3)[:, None]
    for start, end in [(0, 1), (1, 5), (5, 9), (9, 13), (13, 16)]:
        z, z_uncond = target.trunk(wanted.repeat(2, 1, 1), visible.repeat(2, 1), classes).chunk(2)
        at = bank.orders[:, start:end]
        out = target.head.sample(
            z[rows, at].flatten(0, 1),
            bank.x_T[rows, at].flatten(0, 1),
            bank.eps[rows, at].flatten(0, 1),
            z_uncond=z_uncond[rows, at].flatten(0, 1),
            cfg=weights[end - 1],
        )
        wanted[rows, at] = out.x0.view(3, end - start, 4)
        visible[rows, at] = True
    torch.testing.assert_close(found, wanted, atol=SAME, rtol=0)


def test_tokens_whose_residual_accepts_nothing_become_what_was_asked_for(target: Any, draft: Any) -> None:
    # A draft with a much larger determinant term takes all of the residual's mass away.
    config = {"mode": "cspd", "variant": "official", "gamma": 4, "softening": 0.01, "max_tries": 1}
    near = {"sigma_term": "off"}
    zeros, stats = run(target, target, config={**config, **near, "on_exhausted": "zeros"})
    kept, _ = run(target, target, config={**config, **near, "on_exhausted": "target"})
    empty = (zeros == 0).all(-1).sum()
    assert empty == stats.residual_exhausted > 0
    assert not (kept == 0).all(-1).any()


def test_unaligned_trajectories_are_accepted_less(target: Any, draft: Any) -> None:
    config = {"mode": "cspd", "gamma": 4}
    aligned, other = (run(target, draft, config={**config, "align": align})[1] for align in (True, False))
    assert other.acceptance_rate < aligned.acceptance_rate
    assert other.distance_mean > 2 * aligned.distance_mean


@pytest.mark.parametrize("name", MODES)
def test_blocks_longer_than_the_picture_and_pictures_without_a_class(target: Any, draft: Any, name: str) -> None:
    found, stats = run(target, draft, None, {**MODES[name], "window": 50, "gamma": None}, batch=2, seed=3)
    assert found.shape == (2, 16, 4)
    assert stats.target_passes <= 16
    with pytest.warns(UserWarning, match="no effect without labels"):
        guided, _ = run(target, draft, None, {**MODES[name], "window": 50, "gamma": None}, batch=2, seed=3, cfg=3.0)
    assert torch.equal(found, guided)


@pytest.mark.parametrize("name", ["coupled", "cspd-paper", "cspd-official"])
def test_without_noise_in_the_steps(target: Any, draft: Any, name: str) -> None:
    plain, _ = run(target, None, temperature=0.0)
    found, _ = run(target, draft, config={**MODES[name], "delta": 1e-5 if name == "coupled" else None}, temperature=0.0)
    assert found.isfinite().all()
    if name == "coupled":
        torch.testing.assert_close(found, plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["coupled", "cspd-paper", "cspd-official"])
def test_a_head_with_one_step(name: str) -> None:
    model, other = random_mar(1, num_sampling_steps=1), random_mar(2, num_sampling_steps=1)
    found, stats = run(model, other, config=MODES[name])
    assert found.isfinite().all()
    assert stats.rounds > 0
