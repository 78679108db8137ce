"""``Continuous``: defaults, presets, what it refuses and what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.speculative.analytic import Chain
from tests.speculative.mar_nets import random_mar
from vlmeff.errors import ConfigError, UnknownPresetError
from vlmeff.speculative.continuous import PRESETS, Continuous, decode


def test_defaults_follow_the_mode_and_the_variant() -> None:
    coupled, paper = Continuous(), Continuous(mode="cspd")
    official = Continuous(mode="cspd", variant="official")
    assert (coupled.mode, coupled.window, coupled.delta, coupled.proposal) == ("coupled", 8, 0.02, "self")
    assert (paper.verify, paper.rollback, paper.sigma_term, paper.softening) == ("sequential", True, "paper", 42.0)
    assert (official.verify, official.rollback, official.sigma_term) == ("parallel", False, "official")
    assert (official.gamma, official.prefill, official.residual) == (8, 0.15, "official")
    assert official.on_exhausted == "target"  # the published code leaves tokens of zeros


def test_named_fields_win_over_the_variant() -> None:
    config = Continuous(mode="cspd", variant="official", rollback=True, sigma_term="off")
    assert (config.verify, config.rollback, config.sigma_term) == ("parallel", True, "off")


def test_window_and_gamma_are_one_field() -> None:
    assert Continuous(mode="exact", gamma=6) == Continuous(mode="exact", window=6)
    assert Continuous(mode="exact", gamma=6).but(window=2).gamma == 2


def test_every_preset_makes_a_configuration_with_a_guarantee() -> None:
    for name in PRESETS:
        assert Continuous.named(name).guarantee.endswith(".")
    assert Continuous.named("coupled-strict").delta == 1e-4
    assert Continuous.named("coupled", window=4).window == 4
    with pytest.raises(UnknownPresetError, match=r"'coupld'.*Did you mean 'coupled'"):
        Continuous.named("coupld")


def test_only_cspd_is_called_approximate() -> None:
    for config in (Continuous(mode=None), Continuous(), Continuous(mode="exact")):
        assert "Approximate" not in config.guarantee
    for variant in ("paper", "official"):
        assert Continuous(mode="cspd", variant=variant).guarantee.startswith("Approximate, without a bound")


def test_who_needs_a_draft() -> None:
    assert not Continuous().needs_draft
    assert Continuous(proposal="draft").needs_draft
    assert Continuous(mode="exact").needs_draft
    assert not Continuous(mode="exact", gamma=0).needs_draft


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "cspd", "gamma": -1}, "window=-1"),
        ({"mode": "coupled", "window": 0}, "window=0"),
        ({"mode": "exact", "window": 2.5}, "window=2.5"),
        ({"delta": -0.1}, "delta=-0.1"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"prefill": 1.5}, "prefill=1.5"),
        ({"mode": "cspd", "softening": 0.0}, "softening=0.0"),
        ({"mode": "exact", "max_tries": 0}, "max_tries=0"),
        ({"mode": "fast"}, "mode='fast'; choose one of None, 'coupled', 'exact', 'cspd'"),
        ({"mode": "cspd", "sigma_term": "none"}, "sigma_term='none'"),
        ({"mode": "coupled", "softening": 3.0}, "softening=3.0 has no effect with mode='coupled'"),
        ({"mode": "exact", "delta": 0.1}, "delta=0.1 has no effect"),
        ({"window": 3, "gamma": 4}, "window=3 and gamma=4"),
    ],
)
def test_values_that_cannot_work(config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Continuous(**config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_iter": 0}, "num_iter=0"),
        ({"num_iter": 17}, "num_iter=17"),
        ({"cfg": -1.0}, "cfg=-1.0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": 0.0}, "temperature=0: mode='exact'"),
        ({"labels": torch.tensor([10])}, "10 is not a class"),
        ({"batch": 2}, "batch=2"),
        ({"cfg_schedule": "cosine"}, "cosine"),
        ({"order": torch.zeros(1, 16, dtype=torch.long)}, "order"),
    ],
)
def test_calls_that_cannot_work(call: dict[str, Any], message: str) -> None:
    model = random_mar(0)
    labels = call.pop("labels", torch.tensor([1]))
    with pytest.raises(ConfigError) as caught:
        decode(model, model, labels, config=Continuous(mode="exact"), **call)
    assert message in str(caught.value)


def test_a_head_of_one_step_has_no_paths() -> None:
    model = random_mar(0, num_sampling_steps=1)
    with pytest.raises(ConfigError, match="num_sampling_steps=1"):
        decode(model, model, torch.tensor([1]), config=Continuous(mode="exact"))


def test_a_variance_that_is_not_positive_has_no_density() -> None:
    chain = Chain(a=0.5, b=0.1, std=0.4)
    chain.head.log_sigma[3] = -torch.inf
    with pytest.raises(ConfigError, match="not positive"):
        decode(chain, chain, None, config=Continuous(mode="exact"), batch=2)


def test_a_mode_without_its_draft() -> None:
    for config in (Continuous(mode="exact"), Continuous(mode="cspd"), Continuous(proposal="draft")):
        with pytest.raises(ConfigError, match="needs a draft"):
            decode(random_mar(0), None, torch.tensor([1]), config=config)


def test_everything_that_a_pair_differs_in_is_said_at_once() -> None:
    target = random_mar(0)
    draft = random_mar(1, num_sampling_steps=9, clip_x0=None, class_num=4)
    with pytest.raises(ConfigError) as caught:
        decode(target, draft, torch.tensor([1]), config=Continuous(mode="exact"))
    for part in ("num_sampling_steps: target 8, draft 9", "clip_x0: target 2.5, draft None", "class_num: target 10"):
        assert part in str(caught.value)


def test_a_draft_of_other_width_and_depth_is_fine() -> None:
    target, draft = random_mar(0), random_mar(1, encoder_dim=16, decoder_dim=16, decoder_depth=2, head_width=24)
    latents, _ = decode(target, draft, torch.tensor([1]), config=Continuous(mode="cspd"))
    assert latents.isfinite().all()


def test_a_token_that_is_not_finite_is_an_error_that_says_where() -> None:
    chain = Chain(a=0.5, b=0.1, std=0.4, length=4)
    chain.head.B[0] = float("nan")
    with pytest.raises(FloatingPointError, match="sample 0, position 0, round 0"):
        decode(chain, None, None, config=Continuous(window=2), batch=1)
