"""Recipe files: round trip, interpolation, every refusal, the official files, averages of samples."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

from kvcache import Recipe, convert_official, half_difference, mean_shares, read_recipe, renormalise, std_shares
from kvcache import write_recipe as write
from vlmeff.errors import ConfigError, DataError, RecipeFormatError, RecipeMismatchError

MODEL = {
    "id": "a/b",
    "model_type": "llava",
    "text_model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
RECIPE = Recipe(
    layers=(0, 1, 3),
    keep_ratios={0.2: (0.4, 0.1, 0.1), 0.5: (0.8, 0.4, 0.3)},
    std={0.2: (0.01, 0.02, 0.0), 0.5: (0.1, 0.0, 0.0)},
    metric="window",
    metric_args={"window": 16},
    sink=1,
    recent=2,
    model=MODEL,
    calibration={"samples": 32, "token_pruning": None},
)
FITS = {"layers": (0, 1, 3), "kv_heads": 2, "head_dim": 16, "hidden_layers": 4}


@pytest.fixture
def content(tmp_path):
    return json.loads(write(tmp_path / "recipe.json", RECIPE).read_text())


def read(tmp_path, content):
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return read_recipe(path)


def test_a_recipe_comes_back_from_its_file_as_it_was(tmp_path, content):
    assert read_recipe(tmp_path / "recipe.json") == RECIPE
    assert (content["format"], content["version"]) == ("vlmeff.kv_recipe", 1)
    assert content["keep_ratios"]["0.2"] == [0.4, 0.1, 0.1]
    assert content["layers"] == [0, 1, 3]


def test_shares_are_linear_between_the_budgets_and_run_to_nothing_and_to_everything():
    assert RECIPE.shares(0.2) == (0.4, 0.1, 0.1)
    assert RECIPE.shares(0.3) == pytest.approx((0.4 + 0.4 / 3, 0.2, 0.1 + 0.2 / 3))
    assert RECIPE.shares(0.1) == pytest.approx((0.2, 0.05, 0.05))
    assert RECIPE.shares(0.75) == pytest.approx((0.9, 0.7, 0.65))
    assert RECIPE.shares(1.0) == (1.0, 1.0, 1.0)


def test_budgets_add_up_to_the_share_of_this_prompt():
    assert RECIPE.budgets(keep_ratio=0.5, n=100) == [80, 40, 30]
    assert RECIPE.budgets(keep_ratio=0.5, n=10) == [7, 4, 4]  # 8, 4, 3 with at least sink + recent + 1
    assert RECIPE.budgets(keep_ratio=0.5, n=10, protected=2) == [8, 4, 3]
    assert RECIPE.budgets(keep_ratio=1.0, n=7) == [7, 7, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version 2"),
        ({"keep_ratios": {}}, "keep_ratios"),
        ({"keep_ratios": {"0.5": [0.5, 0.5]}}, "2 entries for 3 layers"),
        ({"keep_ratios": {"0.5": [0.5, 0.5, 1.2]}}, "1.2"),
        ({"keep_ratios": {"0.5": [0.5, -0.1, 0.5]}}, "-0.1"),
        ({"keep_ratios": {"0.5": [0.5, float("nan"), 0.5]}}, "nan"),
        ({"keep_ratios": {"0.5": [0.5, "x", 0.5]}}, "'x'"),
        ({"keep_ratios": {"0.5": [0.52, 0.52, 0.52]}}, "mean"),
        ({"keep_ratios": {"50%": [0.5, 0.5, 0.5]}}, "50%"),
        ({"keep_ratios": {"1.5": [0.5, 0.5, 0.5]}}, "1.5"),
        ({"keep_ratios": [0.5]}, "keep_ratios"),
        ({"std": {"0.5": [0.1]}}, "std"),
        ({"layers": [0, 2, 1]}, "ascend"),
        ({"layers": [0, 1, "2"]}, "layers"),
        ({"policy": "snapkv"}, "policy"),
        ({"metric": "sum"}, "metric"),
        ({"metric_args": {"window": 0}}, "window"),
        ({"selection": "per_head"}, "selection"),
        ({"sink": -1}, "sink"),
        ({"recent": 1.5}, "recent"),
        ({"ratio": 0.5}, "ratio"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_the_field(tmp_path, content, change, message):
    with pytest.raises(RecipeFormatError, match=r"changed\.json") as caught:
        read(tmp_path, content | change)
    assert message in str(caught.value)


def test_what_is_no_json_or_not_there_is_refused(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(RecipeFormatError, match=name):
            read_recipe(tmp_path / name)


def test_a_mean_within_a_hundredth_of_its_budget_passes():
    assert Recipe(keep_ratios={0.5: (0.59, 0.425)}).layers == (0, 1)


def test_the_model_it_was_made_for_passes_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RECIPE.check_model(**FITS, model_id="a/b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (0, 1)}, "retained layers"),
        ({"layers": (0, 1, 2)}, "retained layers"),
        ({"kv_heads": 4}, "num_key_value_heads 2"),
        ({"head_dim": 32}, "head_dim 16"),
        ({"hidden_layers": 5}, "num_hidden_layers 4"),
    ],
)
def test_another_geometry_is_refused(change, message):
    with pytest.raises(RecipeMismatchError, match=message):
        RECIPE.check_model(**FITS | change)


def test_another_model_of_equal_geometry_and_another_token_pruning_warn():
    with pytest.warns(UserWarning, match="calibrated on a/b"):
        RECIPE.check_model(**FITS, model_id="c/d")
    with pytest.warns(UserWarning, match="token pruning"):
        RECIPE.check_model(**FITS, model_id="a/b", token_pruning="hiprune")


def test_an_official_list_holds_evicted_shares(tmp_path):
    path = tmp_path / "prefixkv_0.9.json"
    path.write_text("[0.75, 0.95, 1.0]")
    recipe = convert_official(path, 0.9)
    assert dict(recipe.keep_ratios) == {0.1: pytest.approx((0.25, 0.05, 0.0))}
    assert (recipe.sink, recipe.recent, recipe.layers) == (1, 1, (0, 1, 2))
    recipe.check_model(layers=(0, 1, 2), kv_heads=7, head_dim=9, hidden_layers=3)
    with pytest.raises(RecipeFormatError, match=r"evict_ratio=0\.1"):  # the retained share, mixed up
        convert_official(path, 0.1)
    path.write_text('{"0.9": [0.75]}')
    with pytest.raises(RecipeFormatError, match="list of evicted shares"):
        convert_official(path, 0.9)


def test_averages_are_scaled_to_their_budget_and_never_above_one():
    assert renormalise([0.995, 0.501, 0.498], 0.667) == pytest.approx([0.995 * 2.001 / 1.994, 0.502759, 0.499748], 1e-5)
    capped = renormalise([0.9999, 0.4, 0.4], 0.604)
    assert capped == pytest.approx([1.0, 0.406, 0.406])
    with pytest.raises(DataError, match=r"keep_ratio=0\.5"):
        renormalise([0.6, 0.5], 0.5)


def test_mean_and_deviation_over_the_samples():
    samples = [[0.2, 0.5], [0.4, 0.5]]
    assert mean_shares(samples) == pytest.approx([0.3, 0.5])
    assert std_shares(samples) == pytest.approx([0.1, 0.0])


def test_halves_that_agree_differ_by_nothing_and_others_warn():
    assert half_difference([[0.3, 0.7]] * 8) == 0
    with pytest.warns(UserWarning, match="calibrate on more"):
        assert half_difference([[0.2, 0.6], [0.4, 0.4]]) == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="samples"):
        half_difference([[0.5]])


def test_a_recipe_is_a_value():
    assert dataclasses.replace(RECIPE, sink=3) != RECIPE
