"""``load`` says in one sentence what is wrong with a model's files or the environment."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vlmeff
from vlmeff.environment import check_torchvision
from vlmeff.errors import ConfigError, EnvironmentMismatchError, ModelLoadError, UnknownModelError
from vlmeff.loading import embedded_folder


def test_truncated_weights_are_a_load_error_that_names_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(embedded_folder("tiny_llava"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="broken"):
        vlmeff.load(folder)


def test_a_local_folder_loads_and_its_geometry_finds_the_zoo_entry(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(embedded_folder("tiny_llava"), folder)
    model, _ = vlmeff.load(folder, preset="smallest")
    (row,) = [row for row in vlmeff.presets(model) if row.preset == "smallest"]
    assert (row.status, row.tokens_kept) == ("fixture", 36)
    assert vlmeff.is_wrapped(model)


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match="tiny-llava"):
        vlmeff.load("tiny-lava")


def test_a_device_that_is_not_there_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="no-such-device"):
        vlmeff.load("tiny-llava", device="no-such-device")


def test_a_torchvision_of_another_torch_names_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        """Fails as the import of a torchvision built for another torch does."""

        def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(EnvironmentMismatchError, match=r"torchvision .* does not fit torch .*nms.*pip install"):
        check_torchvision()


def test_offline_nothing_is_asked_of_the_network_and_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ModelLoadError, match=r"offline.*hf download no-such-org/no-such-model --revision v1"):
        vlmeff.load("no-such-org/no-such-model", revision="v1", local_files_only=True)


def test_a_model_with_code_of_its_own_is_run_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(embedded_folder("tiny_llava"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'own'\n"
        "class Own(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ModelLoadError, match=r"code of its own.*--trust-remote-code"):
        vlmeff.load(folder)
    model, processor = vlmeff.load(folder, trust_remote_code=True)
    assert type(model).__name__ == "Own"
    assert hasattr(processor, "image_processor")
