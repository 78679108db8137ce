"""Official checkpoints, made here in their form: read unchanged, refused where they hold code or do not fit."""

from __future__ import annotations

import argparse
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from vlmeff.errors import CheckpointError, UnknownModelError
from vlmeff.models.mar.checkpoint import config_of
from vlmeff.models.mar.config import MARConfig
from vlmeff.models.mar.loading import find_mar, is_mar_folder, load_draft, load_mar, save_mar
from vlmeff.models.mar.trunk import MAR

CONFIG = MARConfig.named("mar_nano_digits")


def model(seed: int = 0, config: MARConfig = CONFIG) -> MAR:
    torch.manual_seed(seed)
    return MAR(config).eval()


def write_official(file, *, averaged: MAR, latest: MAR, **more) -> None:
    """What the official training script saves."""
    args = argparse.Namespace(model="mar_base", diffloss_d=6, output_dir="out")
    content = {"model": latest.state_dict(), "model_ema": averaged.state_dict(), "epoch": 399, "args": args, **more}
    torch.save(content, file)


def same_weights(a: MAR, b: MAR) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_official_file_gives_the_averaged_weights(tmp_path):
    averaged, latest = model(1), model(2)
    file = tmp_path / "checkpoint-last.pth"
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    write_official(file, averaged=averaged, latest=latest, optimizer=optimizer, scaler={"scale": 65536.0})
    loaded = load_mar(file, CONFIG)
    assert same_weights(loaded, averaged)
    assert not same_weights(loaded, latest)
    assert not loaded.training
    assert same_weights(load_mar(tmp_path, "mar_nano_digits"), averaged)  # a folder as it is published
    assert is_mar_folder(tmp_path)
    labels = [3, 8]
    assert torch.equal(loaded.sample(labels, num_iter=4).latents, averaged.sample(labels, num_iter=4).latents)


def test_bare_state_dicts_and_safetensors_load_too(tmp_path):
    made = model(3)
    torch.save(made.state_dict(), tmp_path / "bare.pt")
    torch.save({"model": made.state_dict()}, tmp_path / "model_only.pth")
    prefixed = {f"module.{name}": value for name, value in made.state_dict().items()}
    torch.save({"model": prefixed}, tmp_path / "parallel.pth")
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, tmp_path / "file.safetensors")
    for name in ("bare.pt", "model_only.pth", "parallel.pth", "file.safetensors"):
        assert same_weights(load_mar(tmp_path / name, CONFIG), made)


@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge"])
def test_shapes_tell_the_configuration(name):
    with torch.device("meta"):
        state = MAR(MARConfig.named(name)).state_dict()
    assert config_of(state) == MARConfig.named(name)
    changed = config_of(state, num_sampling_steps=50)
    assert changed == MARConfig.named(name, num_sampling_steps=50)


def test_head_of_another_size_than_the_class_default_is_read_off():
    with torch.device("meta"):
        state = MAR(MARConfig.named("mar_base", head_depth=3, head_width=512)).state_dict()
    assert (config_of(state).head_depth, config_of(state).head_width) == (3, 512)
    with torch.device("meta"):
        odd = MAR(MARConfig.named("mar_base", encoder_dim=96, encoder_heads=8)).state_dict()
    with pytest.raises(CheckpointError, match="pass encoder_heads"):
        config_of(odd)
    assert config_of(odd, encoder_heads=8).encoder_heads == 8
    with pytest.raises(CheckpointError, match=r"not the weights of a MAR model: .*z_proj"):
        config_of({"weight": torch.zeros(2)})


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("place", ["args", "model_ema", "whole"])
def test_a_file_with_code_is_refused_and_does_not_run(tmp_path, place):
    made, target, file = model(), tmp_path / "ran", tmp_path / "evil.pth"
    code = Malicious(str(target))
    if place == "whole":
        file.write_bytes(pickle.dumps(code))
    else:
        torch.save({"model": made.state_dict(), "model_ema": made.state_dict(), place: code}, file)
    with pytest.raises(CheckpointError, match="run code"):
        load_mar(file, CONFIG)
    assert not target.exists()
    if place != "whole":  # the file would have run, had it been loaded the unsafe way
        torch.load(file, weights_only=False)
        assert target.exists()


def test_namespace_is_allowed_for_the_time_of_a_load_only(tmp_path):
    write_official(tmp_path / "file.pth", averaged=model(), latest=model())
    load_mar(tmp_path / "file.pth", CONFIG)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_what_does_not_fit_is_listed(tmp_path):
    state = model().state_dict()
    for name in list(state)[-20:-13]:
        del state[name]
    state["class_emb.weight"] = torch.zeros(11, 32)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError) as caught:
        load_mar(tmp_path / "odd.pt", CONFIG)
    message = str(caught.value)
    missing = message.split("7 missing: ")[1].split(";")[0]
    assert missing.count(",") == 5  # five names, then dots
    assert missing.endswith("...")
    assert "1 unexpected: extra" in message
    assert "1 of another shape: class_emb.weight (11, 32) instead of (10, 32)" in message


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors", "text.pth", "nothing.pth"])
def test_broken_files_are_named(tmp_path, name):
    torch.save(model().state_dict(), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=name):
        load_mar(tmp_path / name, CONFIG)


def test_file_without_a_state_dict_is_named(tmp_path):
    torch.save({"epoch": 3, "note": "no weights"}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"no state dict.*epoch, note"):
        load_mar(tmp_path / "empty.pth", CONFIG)


@pytest.mark.parametrize("stored", [None, torch.float16])
def test_folder_round_trip(tmp_path, stored):
    made = model(4)
    save_mar(made, tmp_path, dtype=stored)
    assert is_mar_folder(tmp_path)
    loaded = load_mar(tmp_path)
    assert loaded.config == made.config
    assert loaded.dtype == torch.float32
    if stored is None:
        assert same_weights(loaded, made)
    else:
        assert load_mar(tmp_path, dtype=None).dtype == torch.float16
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044  # others can read it


def test_folders_that_are_not_of_a_mar_model(tmp_path):
    assert not is_mar_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert not is_mar_folder(tmp_path)
    with pytest.raises(CheckpointError, match="model_type"):
        load_mar(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_mar_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not a readable configuration"):
        load_mar(tmp_path)
    save_mar(model(), tmp_path)
    with pytest.raises(CheckpointError, match="without a draft"):
        load_draft(tmp_path)
    save_mar(model(6), tmp_path / "draft")
    assert same_weights(load_draft(tmp_path), model(6))
    assert find_mar(tmp_path) == tmp_path
    with pytest.raises(UnknownModelError, match="tiny-mar"):
        find_mar("tiny-mra")
