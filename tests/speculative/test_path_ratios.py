"""The modes take ratios of paths from ``vlmeff.ops``, and draw residual proposals in blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.speculative.analytic import Chain, in_order
from vlmeff import ops
from vlmeff.errors import BackendUnavailableError
from vlmeff.speculative import cspd, exact
from vlmeff.speculative.continuous import Continuous, decode

TARGET, DRAFT = Chain(a=0.8, b=0.2, std=0.45, length=6), Chain(a=0.5, b=-0.2, std=0.6, length=6)
MODES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact", "gamma": 3},
    "exact-final-noise": {"mode": "exact", "gamma": 3, "final_noise": True},
    "cspd": {"mode": "cspd", "gamma": 3, "softening": 1.0, "residual": "official"},
    "cspd-official": {"mode": "cspd", "variant": "official", "gamma": 3},
}


def run(config: dict[str, Any], *, batch: int = 8, seed: int = 30) -> tuple[Tensor, Any]:
    order = in_order(TARGET.length).expand(batch, -1)
    return decode(TARGET, DRAFT, None, config=Continuous(**config), batch=batch, seed=seed, order=order)


@pytest.mark.parametrize("name", MODES)
def test_the_ratio_is_the_operation_and_no_private_copy(name: str) -> None:
    with ops.counters() as ran:
        _, stats = run(MODES[name])
    assert stats.residual_draws > 0
    # One a round, and one for each block of residual proposals.
    assert ran["gaussian_path_log_ratio", "reference"] > max(stats.rounds_of)
    with ops.backend(gaussian_path_log_ratio="triton"), pytest.raises(BackendUnavailableError):
        run(MODES[name])


def test_coupled_compares_no_densities() -> None:
    with ops.counters() as ran:
        run({"mode": "coupled", "delta": 0.1})
    assert not ran


def keep(share: float) -> Any:
    """A residual that keeps so much of everything."""
    return lambda log_q_over_p: torch.full_like(log_q_over_p, share)


@pytest.mark.parametrize("name", MODES)
def test_a_sample_that_needs_many_blocks_does_not_depend_on_its_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exact, cspd):
        monkeypatch.setattr(module, "residual_acceptance", keep(0.06))
    monkeypatch.setattr(cspd, "TRIES_AT_ONCE", 5)
    together, stats = run(MODES[name])
    decisions = stats.accepted + stats.rejections if name.startswith("exact") else stats.rejections
    assert stats.residual_draws > 5 * decisions  # more than one block for most
    for b in range(8):
        alone, _ = run(MODES[name], batch=1, seed=30 + b)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("tries", [1, 3, 9, 200])
def test_tries_that_run_out_are_counted(name: str, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exact, cspd):
        monkeypatch.setattr(module, "residual_acceptance", keep(0.0))
    found, stats = run({**MODES[name], "max_tries": tries})
    assert stats.residual_exhausted > 0
    assert stats.residual_draws == tries * stats.residual_exhausted
    if name.startswith("exact"):
        assert stats.residual_exhausted == stats.rejections
    assert found.isfinite().all()


@pytest.mark.parametrize("name", MODES)
def test_a_residual_that_keeps_everything_takes_the_first_proposal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exact, cspd):
        monkeypatch.setattr(module, "residual_acceptance", keep(1.0))
    _, stats = run(MODES[name])
    assert stats.residual_exhausted == 0
    assert stats.residual_draws >= stats.rejections > 0
    if name.startswith("exact"):
        assert stats.residual_draws == stats.rejections


def test_what_was_accepted_is_never_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the published code: a later accepted proposal overwrites an earlier one."""
    from vlmeff.speculative.job import Job

    written: list[tuple[int, int]] = []
    emit = Job.emit

    def watched(self: Any, tokens: Any, x0: Tensor) -> None:
        written.extend(zip(tokens.sample.tolist(), tokens.position.tolist(), strict=True))
        emit(self, tokens, x0)

    monkeypatch.setattr(Job, "emit", watched)
    monkeypatch.setattr(exact, "residual_acceptance", keep(0.3))
    run(MODES["exact"])
    assert len(written) == len(set(written)) == 8 * TARGET.length
