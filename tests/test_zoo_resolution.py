"""The model zoo: which record belongs to a live model or a name, what its presets are there, and what is listed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from vlmeff import zoo
from vlmeff.errors import ConfigError, UnknownNameError, UnknownPresetError
from vlmeff.models.tiny_llava.architecture import build_model


@pytest.fixture(autouse=True)
def _no_extra_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMEFF_ZOO", raising=False)


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model()


def test_a_live_model_is_found_by_geometry(tiny: torch.nn.Module) -> None:
    assert zoo.find_model(tiny).name == "tiny-llava"
    assert zoo.resolve(tiny, "fast") == zoo.ResolvedPreset(
        preset="fast",
        entry="tiny-llava/fast",
        model="tiny-llava",
        status="fixture",
        steps=(
            zoo.Step("hiprune", 0.3333, {"alpha": 0.1, "object_layer": 3}),
            zoo.Step("prefixkv", None, {"keep_ratio": 0.7, "metric": "mean"}),
        ),
    )
    assert zoo.resolve(tiny, "tiny-llava/fast") == zoo.resolve(tiny, "fast")


def test_a_live_model_is_found_by_its_origin_first(tiny: torch.nn.Module) -> None:
    config = copy.deepcopy(tiny.config)
    config._name_or_path = "llava-hf/llava-1.5-7b-hf"
    assert zoo.find_model(SimpleNamespace(config=config)).name == "llava-1.5-7b"


def test_qwen_is_found_by_geometry() -> None:
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        vision_config={"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
        text_config={
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    )
    assert zoo.find_model(SimpleNamespace(config=config)).name == "qwen2.5-vl-7b"
    config.text_config.num_hidden_layers = 27
    assert zoo.find_model(SimpleNamespace(config=config)) is None


@pytest.mark.parametrize(
    "model", [None, object(), torch.nn.Linear(2, 2), SimpleNamespace(config=None), "nobody/nothing"]
)
def test_what_is_not_in_the_zoo_is_not_found(model: object) -> None:
    assert zoo.find_model(model) is None


def test_a_preset_works_on_a_model_without_entry(tiny: torch.nn.Module) -> None:
    config = copy.deepcopy(tiny.config)
    config.text_config.num_hidden_layers = 3
    resolved = zoo.resolve(SimpleNamespace(config=config), "fast")
    assert (resolved.entry, resolved.model, resolved.status) == (None, None, None)
    kv = zoo.Step("prefixkv", None, {"keep_ratio": 0.7, "metric": "mean"})
    assert resolved.steps == (zoo.Step("hiprune", 0.3333, {"alpha": 0.1}), kv)


def test_an_unknown_preset_lists_the_nearest_names(tiny: torch.nn.Module) -> None:
    with pytest.raises(UnknownPresetError, match=r"unknown preset 'fsat'\. Did you mean 'fast'") as error:
        zoo.resolve(None, "fsat")
    assert "tiny-llava" not in str(error.value)  # fixtures are no suggestion
    assert error.value.exit_code == 4
    with pytest.raises(UnknownPresetError, match="Did you mean 'tiny-llava/fast'"):
        zoo.resolve(tiny, "tiny-llava/fst")
    with pytest.raises(UnknownPresetError, match=r"Did you mean 'llava-1\.5-7b/fast'"):
        zoo.get("llava-1.5-7b/fsat")
    with pytest.raises(ConfigError, match="must be a name"):
        zoo.resolve(tiny, 3)  # type: ignore[arg-type]


def test_an_entry_of_another_model_is_refused(tiny: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"is for the model 'llava-1\.5-7b'; this one is .*Use preset='fast'"):
        zoo.resolve(tiny, "llava-1.5-7b/fast")
    with pytest.raises(ConfigError, match="this one is the zoo's 'tiny-llava'"):
        zoo.resolve("tiny-llava", "llava-1.5-7b/fast")


def test_an_entry_can_be_resolved_for_a_folder_that_is_not_loaded_yet() -> None:
    assert zoo.resolve("folder/of-a-fine-tune", "llava-1.5-7b/fast") == zoo.resolve("llava-1.5-7b", "fast")


def test_names_of_models_entries_and_the_hub_find_the_record() -> None:
    for name in ("llava-1.5-7b", "llava-1.5-7b/fast", "llava-hf/llava-1.5-7b-hf"):
        assert zoo.find_model(name).name == "llava-1.5-7b"


def test_resolved_parameters_are_the_callers_own(tiny: torch.nn.Module) -> None:
    zoo.resolve(tiny, "fast").steps[0].params["alpha"] = 5
    assert zoo.resolve(tiny, "fast").steps[0].params["alpha"] == 0.1


def test_preset_table_gives_status_and_tokens_of_the_model(tiny: torch.nn.Module) -> None:
    rows = {row.preset: row for row in zoo.preset_table(tiny)}
    assert list(rows) == ["quality", "balanced", "fast", "smallest", "paper-hiprune"]
    assert [row.preset for row in zoo.preset_table()] == list(zoo.load_zoo().presets)
    assert "paper-fourier" in [row.preset for row in zoo.preset_table("fourier-llava-1.5-7b-144")]
    fast = rows["fast"]
    assert (fast.status, fast.tokens_in, fast.tokens_kept) == ("fixture", 324, 108)
    assert fast.steps == "hiprune(keep=0.3333, alpha=0.1, object_layer=3) + prefixkv(keep_ratio=0.7, metric=mean)"
    assert {(row.status, row.tokens_in) for row in zoo.preset_table()} == {(None, None)}


def test_listing_filters_by_task_and_status() -> None:
    assert {item.model for item in zoo.list_entries(status="fixture")} == {
        "tiny-llava",
        "tiny-qwen",
        "tiny-wan",
        "tiny-mar",
    }
    tasks = ("image-text-to-text", "text-to-video", "class-to-image")
    assert sum(len(zoo.list_entries(task=task)) for task in tasks) == len(zoo.list_entries())
    assert {item.model for item in zoo.list_entries(task="class-to-image")} == {"tiny-mar"}
    with pytest.raises(UnknownNameError, match="unknown status 'verifed'"):
        zoo.list_entries(status="verifed")
    with pytest.raises(UnknownNameError, match="unknown task"):
        zoo.list_entries(task="text")
