"""AdaptInfer's schedules: the published figures, the counting rules, and files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpruning import InnerPruner, methods
from tokenpruning.adaptinfer import (
    SCHEDULES,
    AdaptInfer,
    Schedule,
    choose,
    find_schedule,
    label_tokens,
    processed_tokens,
    read_schedule,
    write_schedule,
)
from vlmeff.errors import ConfigError, DataError, IncompatibleError, UnknownNameError, UnsupportedModelError

MANY = 10**6  # visual tokens, so that rounding to whole tokens does not show


@pytest.mark.parametrize(
    ("name", "processed"),
    [("128", 146.2), ("64", 82.9), ("48", 66.7), ("32", 51.0)],
)
def test_the_7b_schedules_process_as_many_tokens_as_was_measured_and_are_labelled_as_in_the_paper(name, processed):
    schedule = SCHEDULES[f"llava-1.5-7b-{name}"]
    assert processed_tokens(schedule, 576, 32) == pytest.approx(processed, abs=0.051)
    assert label_tokens(schedule, 576, 32) == pytest.approx(int(name), abs=1.01)


@pytest.mark.parametrize(("name", "percent"), [("10", 13.6), ("30", 32.9), ("50", 54.0)])
def test_the_qwen_schedules_process_the_shares_that_were_measured_and_are_labelled_as_in_the_paper(name, percent):
    schedule = SCHEDULES[f"qwen2-vl-2b-{name}"]
    assert 100 * processed_tokens(schedule, MANY, 28) / MANY == pytest.approx(percent, abs=0.051)
    assert 100 * label_tokens(schedule, MANY, 28) / MANY == pytest.approx(int(name), abs=1.5)


def test_the_13b_schedules_are_labelled_as_in_the_paper():
    for name in ("128", "64"):
        label = label_tokens(SCHEDULES[f"llava-1.5-13b-{name}"], 576, 40)
        assert label < int(name)  # counted over the 13B model's 40 layers
        assert label_tokens(SCHEDULES[f"llava-1.5-13b-{name}"], 576, 32) == pytest.approx(int(name), rel=0.16)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_layers_see_what_a_layer_by_layer_count_leaves(data):
    n = data.draw(st.integers(3, 12))
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, n - 2), min_size=1, max_size=4))))
    relative = data.draw(st.booleans())
    amount = st.floats(0.01, 1) if relative else st.integers(0, 30)
    amounts = tuple(data.draw(amount) for _ in layers)
    nv = data.draw(st.integers(0, 40))
    schedule = Schedule(layers=layers, **{"ratios" if relative else "keep": amounts})
    seen, now = [], nv
    for layer in range(n):
        seen.append(now)  # a pruning layer still runs all
        if layer in layers:
            value = amounts[layers.index(layer)]
            now = max(min(1, now), int(value * now)) if relative else max(0, min(value, now - 1))
    assert schedule.visual_per_layer(nv, n) == seen
    assert processed_tokens(schedule, nv, n) == pytest.approx(sum(seen) / n)


def test_a_table_drops_at_least_one_token_and_may_drop_all():
    assert Schedule(layers=(1, 2), keep=(50, 50)).counts(20) == (19, 18)
    assert SCHEDULES["llava-1.5-7b-32"].counts(576) == (40, 12, 0)
    assert SCHEDULES["llava-1.5-7b-32"].counts(1) == (0, 0, 0)


def test_ratios_keep_at_least_one_token_and_one_keeps_all():
    assert Schedule(layers=(0, 1), ratios=(0.1, 1)).counts(4) == (1, 1)
    assert Schedule(layers=(0,), ratios=(1.0,)).counts(7) == (7,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(0, 6))
def test_the_best_are_chosen_in_their_order_and_of_equals_the_first(score, k):
    got = choose(torch.tensor(score).float(), k).tolist()
    assert got == [sorted(sorted(range(6), key=lambda i: (-row[i], i))[:k]) for row in score]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (), "keep": ()}, "layers"),
        ({"layers": (3, 3), "keep": (1, 1)}, "ascending"),
        ({"layers": (-1,), "keep": (1,)}, "ascending"),
        ({"layers": ("a", 1), "keep": (1, 1)}, "ascending"),
        ({"layers": (1,)}, "either keep"),
        ({"layers": (1,), "keep": (1,), "ratios": (0.5,)}, "either keep"),
        ({"layers": (1, 2), "keep": (1,)}, "do not match"),
        ({"layers": (1,), "keep": (-1,)}, "keep"),
        ({"layers": (1,), "keep": (True,)}, "keep"),
        ({"layers": (1,), "ratios": (0.0,)}, "ratios"),
        ({"layers": (1,), "ratios": (float("nan"),)}, "ratios"),
        ({"layers": (1,), "ratios": (1.2,)}, "ratios"),
        ({"layers": (1,), "ratios": 0.5}, "tuple"),
        ({"layers": (1,), "keep": (1,), "origin": "mine"}, "origin"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**fields)


def test_the_method_is_registered_and_takes_a_name_a_schedule_or_a_file(tmp_path):
    assert methods.get("adaptinfer") is AdaptInfer
    named = AdaptInfer(schedule="qwen2-vl-2b-30")
    assert isinstance(named, InnerPruner)
    assert (named.layers, named.relative, named.schedule.origin) == ((0, 9, 19), True, "published")
    path = write_schedule(tmp_path / "mine.json", Schedule(layers=(2,), ratios=(0.5,), origin="calibrated", name="x"))
    assert AdaptInfer(schedule=str(path)).schedule == AdaptInfer(schedule=path).schedule == read_schedule(path)
    with pytest.raises(UnknownNameError, match=r"llava-1\.5-7b-128"):
        AdaptInfer(schedule="llava-1.5-7b-129")
    with pytest.raises(ConfigError, match="schedule=3"):
        AdaptInfer(schedule=3)


def test_the_default_is_the_schedule_published_for_the_model_and_there_is_none_for_others():
    filled = AdaptInfer().for_model(model_type="llava", layers=32, hidden_size=4096)
    assert filled.schedule is SCHEDULES["llava-1.5-7b-128"]
    assert AdaptInfer().layers == ()
    with pytest.raises(UnsupportedModelError, match="vlmeff calibrate adaptinfer"):
        AdaptInfer().for_model(model_type="qwen3_vl", layers=36, hidden_size=4096)
    with pytest.raises(ConfigError, match="last legal number is 10"):
        AdaptInfer(schedule="llava-1.5-7b-64").for_model(model_type="llava", layers=12, hidden_size=64)


def test_after_a_method_that_drops_tokens_first_only_ratios_make_sense():
    AdaptInfer(schedule="qwen2-vl-2b-10").refuse_after(object())
    with pytest.raises(IncompatibleError, match="ratios"):
        AdaptInfer(schedule="llava-1.5-7b-64").refuse_after(object())


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), Schedule(layers=(4,), keep=(0,), name="own")], ids=str)
def test_a_schedule_survives_its_file(schedule, tmp_path):
    path = write_schedule(tmp_path / "schedule.json", schedule, model="m", samples=3)
    assert read_schedule(path) == schedule
    assert json.loads(path.read_text())["about"] == {"model": "m", "samples": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "format"),
        ({"format": "something"}, "format"),
        ({"version": 2}, "version 2"),
        ({"layers": None}, "layers"),
        ({"ratios": [0.5]}, "do not match"),
        ({"ratios": [0.5, "x"]}, "ratios"),
    ],
    ids=str,
)
def test_a_broken_file_is_named_with_its_fault(change, message, tmp_path):
    path = write_schedule(tmp_path / "broken.json", Schedule(layers=(1, 2), ratios=(0.5, 0.5)))
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message) as caught:
        find_schedule(path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        find_schedule(tmp_path / "missing.json")
