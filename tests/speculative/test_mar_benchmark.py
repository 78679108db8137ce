"""The benchmark of MAR decoding runs on any pair and writes what it promises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.speculative.mar_nets import random_mar
from vlmeff.models.mar.loading import save_mar

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("mar_benchmark", BENCHMARKS / "mar.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "mar_benchmark", module)
    spec.loader.exec_module(module)
    return module


def test_a_result_has_every_way_and_the_fewer_steps_beside_it(benchmark: Any, tmp_path: Path) -> None:
    save_mar(random_mar(0, num_sampling_steps=3), tmp_path / "pair")
    save_mar(random_mar(1, num_sampling_steps=3), tmp_path / "pair" / "draft")
    out = tmp_path / "deep" / "mar.json"
    benchmark.main(
        ["--weights", str(tmp_path / "pair"), "--samples", "2", "--rounds", "1", "--cfg", "1", "--out", str(out)]
    )
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["cfg_1"]}
    assert {"plain", "plain, K/2", "plain, K/4", "draft alone", "exact, gamma 4", benchmark.GOAL["row"]} <= set(rows)
    assert [rows[name]["target_passes"] for name in ("plain", "plain, K/2", "plain, K/4")] == [16, 8, 4]
    assert rows["plain"]["rms"] == 0
    assert rows["cspd-official, gamma 4"]["target_passes"] == 5
    assert rows["cspd, sequential, draft is target"]["acceptance"] == 1
    assert len(result["weights_sha256"]["target"]) == 64
    assert result["batch_1"]["ways"]["plain"]["speedup"] == 1
    assert set(result["goal"]["passed"]) == {"tokens_per_round", "rms", "speedup"}
    assert result["torch"] == torch.__version__
    assert out.with_suffix(".png").stat().st_size > 5000
    printed = benchmark.tables(result)
    assert all(f"| {row['name']} | " in printed for row in result["cfg_1"])


def test_costs_of_calls_are_measured_at_any_geometry(benchmark: Any) -> None:
    device = torch.device("cpu")
    found = {
        name: benchmark.geometry(name, device, rows=(1, 2), repeats=1, num_sampling_steps=2)
        for name in ("mar_nano_digits", "mar_tiny_digits")
    }
    assert found["mar_tiny_digits"]["parameters"] == 509_480
    assert set(found["mar_nano_digits"]["trunk_ms"]) == {"1", "2"}
    assert set(benchmark.call_costs(found)) == {"mar_nano_digits / mar_tiny_digits"}
