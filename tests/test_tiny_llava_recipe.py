"""The KV recipe that ships with tiny-llava, and the command that made it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

import vlmeff
from kvcache import read_recipe
from vlmeff.loading import embedded_folder

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "demos" / "pictures" / "four-shapes.png"
RECIPE = embedded_folder("tiny_llava").parent / "prefixkv.json"


def test_its_recipe_was_calibrated_on_these_weights_and_says_how() -> None:
    from vlmeff import zoo

    recipe = read_recipe(RECIPE)
    assert recipe.model["id"] == "tiny-llava"
    assert recipe.model["revision"] == zoo.load_zoo().models["tiny-llava"].revision
    assert recipe.layers == (0, 1, 2, 3)
    assert sorted(recipe.keep_ratios) == sorted(recipe.std) == [tenths / 10 for tenths in range(1, 10)]
    made = recipe.calibration
    assert (made["dataset"], made["samples"], made["token_pruning"]) == ("mosaics", 48, None)
    assert max(made["half_difference"].values()) <= 0.03
    assert all(max(shares) - min(shares) > 0.01 for shares in recipe.keep_ratios.values())
    assert os.sep not in RECIPE.read_text()


def test_generate_with_the_recipe_keeps_what_it_says_and_does_not_warn() -> None:
    model, processor = vlmeff.load("tiny-llava")
    text = "USER: <image>\ndescribe the picture. ASSISTANT:"
    inputs = processor(images=Image.open(PICTURE), text=text, return_tensors="pt")
    n = inputs["input_ids"].shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(keep_ratio=0.3, recipe=RECIPE))
        out = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert "circle" in processor.decode(out[0, n:], skip_special_tokens=True)
    retention = vlmeff.report(model).retention
    assert [layer.kept[0] for layer in retention.layers] == read_recipe(RECIPE).budgets(keep_ratio=0.3, n=n)
    assert retention.keep_ratio == pytest.approx(0.3, abs=0.001)


def test_a_recipe_of_another_model_of_equal_geometry_warns() -> None:
    model, _ = vlmeff.load("tiny-llava")
    ours = read_recipe(RECIPE)
    other = dataclasses.replace(ours, model={**ours.model, "id": "another"})
    with pytest.warns(UserWarning, match="calibrated on another, used on tiny-llava"):
        vlmeff.wrap(model, None, kv=vlmeff.PrefixKV(recipe=other))


def calibrate(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlmeff.cli", "calibrate", "prefixkv", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_writes_a_recipe_and_goes_on_where_it_was(tmp_path: Path) -> None:
    file, partial = tmp_path / "recipe.json", tmp_path / "recipe.partial.jsonl"
    # The folder's second picture cannot be read, so only one is measured.
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(PICTURE.read_bytes())
    (pictures / "b.png").write_bytes(b"not a picture")
    options = ["--samples", str(pictures), "--budgets", "0.5,0.2", "--sink", "1", "--out", str(file)]
    done = calibrate(*options)
    assert (done.returncode, file.exists()) == (3, False), done.stderr
    first = partial.read_text()
    assert len(first.splitlines()) == 2
    (pictures / "b.png").write_bytes(PICTURE.with_name("one-shape.png").read_bytes())
    done = calibrate(*options, "--resume")
    assert (done.returncode, partial.exists()) == (0, False), done.stderr
    recipe = read_recipe(file)
    assert (list(recipe.keep_ratios), recipe.sink, recipe.recent) == ([0.2, 0.5], 1, 8)
    assert (recipe.calibration["samples"], recipe.calibration["dataset"]) == (2, "pictures")
    assert str(tmp_path) not in file.read_text()
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines() if "│" in line]
    assert [float(row[0]) for row in rows] == [0.2, 0.5]
    for row, shares in zip(rows, recipe.keep_ratios.values(), strict=True):
        assert float(row[1]) == pytest.approx(min(shares), abs=0.00051)
        assert float(row[-1]) == pytest.approx(recipe.calibration["half_difference"][row[0]], abs=0.00006)
    assert "vlmeff.PrefixKV(recipe=" in done.stdout
    wrong = calibrate("--samples", "mosaics", "--budgets", "0.5,two", "--out", str(file))
    assert wrong.returncode == 2
    assert "--budgets" in wrong.stderr
