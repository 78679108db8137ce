"""``vlmeff calibrate``, end to end on the shipped model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kvcache import read_recipe

ROOT = Path(__file__).resolve().parent.parent


def test_calibrate_hiprune_prints_the_curve_and_writes_it(tmp_path: Path) -> None:
    files = ["--plot", str(tmp_path / "curve.png"), "--out", str(tmp_path / "layers.json")]
    done = subprocess.run(
        [sys.executable, "-m", "vlmeff.cli", "calibrate", "hiprune", "--samples", "mosaics", "--limit", "8", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "layers.json").read_text())
    assert written["layers"] == [1, 2, 3, 4, 5, 6]  # of seven; the sixth is projected
    assert (written["samples"], written["top"], written["default_object_layer"]) == (8, 0.1, 3)
    assert (written["about"]["model"], written["about"]["source"]) == ("tiny-llava", "mosaics")
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines() if "│" in line]
    assert [int(row[0]) for row in rows] == written["layers"]
    assert [float(row[1]) for row in rows] == pytest.approx(written["distances"], abs=0.00051)
    marked = {word.strip(","): int(row[0]) for row in rows for word in row[2:] if word.strip(",").isalpha()}
    assert marked == {"suggested": written["object_layer"], "default": 3}
    assert f"vlmeff.HiPrune(object_layer={written['object_layer']})" in done.stdout
    assert "measuring tiny-llava" in done.stderr
    assert Image.open(tmp_path / "curve.png").size == (720, 360)


def calibrate_prefixkv(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    out = ["--out", str(folder / "recipe.json"), "--limit", "2"]
    return subprocess.run(
        [sys.executable, "-m", "vlmeff.cli", "calibrate", "prefixkv", *out, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_calibrate_prefixkv_takes_images_a_metric_and_its_window(tmp_path: Path) -> None:
    done = calibrate_prefixkv(
        tmp_path, "--images", "mosaics", "--budgets", "0.5", "--metric", "window", "--window", "16"
    )
    assert done.returncode == 0, done.stderr
    recipe = read_recipe(tmp_path / "recipe.json")
    assert (recipe.metric, recipe.metric_args, list(recipe.keep_ratios)) == ("window", {"window": 16}, [0.5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budgets", "0.5,0.02"], ["--budgets", "0.02 of a prompt", "--sink", "--recent"]),
        (["--metric", "sum"], ["--metric sum", "mean"]),
        (["--window", "16"], ["--window 16", "--metric window"]),
    ],
)
def test_what_calibrate_prefixkv_refuses_names_its_options(
    tmp_path: Path, options: list[str], words: list[str]
) -> None:
    done = calibrate_prefixkv(tmp_path, "--samples", "mosaics", *options)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert all(word in said for word in words), done.stderr
    assert not any(name in said for name in ("keep_ratio", "on_small_budget", "policy=")), done.stderr
    assert not (tmp_path / "recipe.json").exists()
