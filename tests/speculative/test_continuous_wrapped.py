"""A wrapped MAR generator decodes as configured, reports, and is given back whole."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

import vlmeff
from tests.speculative.mar_nets import random_mar
from vlmeff.errors import ConfigError
from vlmeff.speculative.continuous import Continuous
from vlmeff.speculative.wrapped import attach, compare, detach

LABELS = torch.tensor([2, 5])


def test_sample_uses_the_configured_mode_and_detach_restores_it() -> None:
    model = random_mar(0)
    kind, plain = type(model), model.sample(LABELS)
    names = set(model.state_dict())
    attach(model, Continuous(delta=0.3, window=4))
    assert isinstance(model, kind)
    out = model.sample(LABELS)
    assert out.stats.mode == "coupled"
    assert out.stats.target_passes < 16
    detach(model)
    assert type(model) is kind
    assert "_vlmeff" not in model.__dict__
    assert set(model.state_dict()) == names
    assert torch.equal(model.sample(LABELS).latents, plain.latents)


def test_a_mode_in_the_call_wins() -> None:
    model = random_mar(0)
    plain = model.sample(LABELS)
    attach(model, Continuous())
    assert torch.equal(model.sample(LABELS, mode=None).latents, plain.latents)
    assert vlmeff.report(model).mode == "plain"
    assert vlmeff.report(model).deviation_rms == 0.0


def test_the_report_says_what_was_done_and_what_it_guarantees() -> None:
    model, draft = random_mar(0), random_mar(1)
    attach(model, Continuous(mode="cspd", gamma=3), draft)
    out = model.sample(LABELS, cfg=2.0)
    report = vlmeff.report(model)
    assert report.stats is out.stats
    assert report.guarantee.startswith("Approximate")
    as_json = json.loads(json.dumps(report.to_dict()))
    assert as_json["mode"] == "cspd-paper"
    assert as_json["config"]["softening"] == 42.0
    assert as_json["stats"]["target_passes"] == out.stats.target_passes
    text = str(report)
    for part in ("Approximate", "acceptance", "tokens per round", "draft passes", f"{out.stats.wall_s:.3f}"):
        assert part in text
    assert all(len(row) == 3 for row in report.rows_of_text())


def test_the_report_before_a_call_is_an_error() -> None:
    model = random_mar(0)
    attach(model, Continuous())
    with pytest.raises(ConfigError, match="has not been called"):
        vlmeff.report(model)


def test_a_draft_is_no_part_of_the_model_and_of_no_one_elses() -> None:
    model, other, draft = random_mar(0), random_mar(0), random_mar(1)
    count = len(list(model.parameters()))
    attach(model, Continuous(mode="exact"), draft)
    assert len(list(model.parameters())) == count
    assert "_vlmeff" not in other.__dict__
    assert other.sample(LABELS).stats.mode == "plain"


def test_wrapping_again_replaces_the_mode() -> None:
    model, kind = random_mar(0), type(random_mar(0))
    attach(model, Continuous())
    attach(model, Continuous(delta=0.0, window=2))
    assert model.sample(LABELS).stats.window == 2
    detach(model)
    assert type(model) is kind


def test_drafts_that_cannot_work_leave_the_model_as_it_was() -> None:
    model = random_mar(0)
    for config, draft in (
        (Continuous(mode="exact"), None),
        (Continuous(mode="exact"), random_mar(1, num_sampling_steps=5)),
        (Continuous(), random_mar(1)),
    ):
        with pytest.raises(ConfigError, match="draft"):
            attach(model, config, draft)
        assert "_vlmeff" not in model.__dict__


def test_compare_holds_the_mode_against_plain_decoding_with_fewer_steps() -> None:
    model = random_mar(0)
    plain = {k: model.sample(LABELS, num_iter=k, seed=3).latents for k in (16, 8, 4)}
    attach(model, Continuous(delta=0.2))
    out = compare(model, LABELS, seed=3)
    report = vlmeff.report(model)
    assert [b.num_iter for b in report.baselines] == [16, 8, 4]
    assert [b.target_passes for b in report.baselines] == [16, 8, 4]
    for baseline in report.baselines:
        wanted = float((plain[baseline.num_iter] - plain[16]).square().mean().sqrt())
        assert baseline.deviation_rms == pytest.approx(wanted)
    assert report.deviation_rms == pytest.approx(float((out.latents - plain[16]).square().mean().sqrt()))
    assert report.speedup == pytest.approx(report.baselines[0].wall_s / out.stats.wall_s)
    assert "plain, 4 steps" in str(report)


def test_compare_warms_up_with_a_run_that_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_mar(0)
    modes: list[Any] = []
    sample = type(model).sample

    def watched(self: Any, labels: Any = None, **call: Any) -> Any:
        modes.append(getattr(call["mode"], "mode", None))
        return sample(self, labels, **call)

    monkeypatch.setattr(type(model), "sample", watched)
    attach(model, Continuous(delta=0.2))
    compare(model, LABELS, seed=3, shares=(1.0, 0.5))
    assert modes == ["coupled", None, None, "coupled"]
    assert len(vlmeff.report(model).baselines) == 2


@pytest.mark.parametrize("mode", [None, "coupled"])
def test_every_mode_is_timed_from_before_its_noise_is_drawn(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmeff.models.mar import sampling
    from vlmeff.speculative import job

    class Slow(sampling.NoiseBank):
        def __init__(self, *args: Any, **options: Any) -> None:
            time.sleep(0.5)
            super().__init__(*args, **options)

    for module in (sampling, job):
        monkeypatch.setattr(module, "NoiseBank", Slow)
    stats = random_mar(0).sample(LABELS, seed=3, num_iter=2, mode=mode).stats
    assert stats.wall_s >= 0.5
