"""How many tokens a budget keeps, and which budgets are refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpruning import PerFrame, Selector, methods, split_budget, tokens_to_keep
from vlmeff.errors import ConfigError, VlmeffError

NOT_A_BUDGET = [0, -1, 0.0, -0.25, 1.0001, 5.0, math.nan, math.inf, -math.inf, True, False, None, "0.5"]


@given(budget=st.integers(1, 700), n=st.integers(1, 600))
def test_an_int_budget_keeps_that_many_tokens_or_all(budget, n):
    assert tokens_to_keep(budget, n) == min(budget, n)


@pytest.mark.parametrize(
    ("share", "n", "kept"),
    [
        (0.5, 5, 2),  # 2.5: half goes to the even number
        (0.5, 7, 4),  # 3.5
        (0.5, 1, 1),  # 0.5 rounds to none, and one is the least
        (0.25, 10, 2),  # 2.5
        (0.75, 10, 8),  # 7.5
        (1 / 3, 576, 192),
        (0.334, 320, 107),
        (0.223, 320, 71),
        (0.112, 320, 36),
        (1e-9, 576, 1),
        (1.0, 576, 576),
    ],
)
def test_a_share_is_rounded_half_to_even_and_never_to_nothing(share, n, kept):
    assert tokens_to_keep(share, n) == kept


def test_an_int_budget_is_divided_over_the_tiles_of_a_picture_and_a_share_is_not():
    assert split_budget(640, [576] * 5) == [128] * 5
    assert split_budget(100, [16, 576]) == [16, 84]  # what a tile cannot use goes to the others
    assert split_budget(130, [36, 24, 24, 24]) == [36, 24, 24, 24]
    assert split_budget(100, [36, 24, 24, 24]) == [28, 24, 24, 24]
    assert split_budget(3, [36] * 5) == [1] * 5
    assert split_budget(0.25, [16, 40]) == [4, 10]
    # A mosaic of four tiles in one segment gets the part of four.
    assert split_budget(100, [36, 144], [1, 4]) == [20, 80]


def test_a_budget_per_frame_is_that_of_every_tile_and_frame():
    assert split_budget(PerFrame(9), [16, 40, 4]) == [9, 9, 4]
    assert split_budget(PerFrame(9), [16, 144], [1, 4]) == [9, 36]
    for wrong in (0, 2.0, True):
        with pytest.raises(ConfigError, match=r"PerFrame: tokens="):
            PerFrame(wrong)


@pytest.mark.parametrize("keep", NOT_A_BUDGET, ids=repr)
@pytest.mark.parametrize("name", [name for name in methods.names() if isinstance(methods.get(name)(), Selector)])
def test_every_method_refuses_what_is_not_a_budget_when_it_is_made(name, keep):
    with pytest.raises(ConfigError, match=r"keep=.*\(0, 1\]") as error:
        methods.get(name)(keep=keep)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan, math.inf], ids=repr)
def test_hiprune_refuses_an_alpha_outside_0_to_1(alpha):
    with pytest.raises(ConfigError, match=r"alpha=.*\[0, 1\]"):
        methods.get("hiprune")(alpha=alpha)


@pytest.mark.parametrize(
    "argument",
    [{"alpha": "0.1"}, {"alpha": None}, {"object_layer": True}, {"object_layer": 0}, {"buffer_mode": "ring"}],
    ids=str,
)
def test_hiprune_refuses_a_value_of_the_wrong_kind_by_an_error_that_names_the_argument(argument):
    with pytest.raises(VlmeffError, match=next(iter(argument))):
        methods.get("hiprune")(**argument)


def test_random_refuses_a_seed_that_is_no_int():
    with pytest.raises(ConfigError, match="seed"):
        methods.get("random")(seed=0.5)
