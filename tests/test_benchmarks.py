"""The token benchmark runs and writes what it promises; scoring 16384 patches stays far from heads x T x T."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
METHODS = {
    *("hiprune", "hiprune++", "divprune", "scope", "visionzip"),
    *("downsample", "random", "text", "fourier", "adaptinfer"),
}
MILLISECONDS = {"median", "min", "max"}


def run(script: str, *arguments: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The result file, and what was printed."""
    out = tmp_path_factory.mktemp("benchmark") / "deep" / "tokens.json"
    printed = run("tokens.py", "--smoke", "--device", "cpu", "--out", str(out))
    return json.loads(out.read_text()), printed


def test_a_result_says_where_and_how_it_was_measured(smoke):
    result, _ = smoke
    assert result["torch"] == torch.__version__
    assert result["device"].startswith("CPU, ")
    assert result["threads"] >= 1
    assert result["dtype"] == "float32"
    assert "profile_memory" in result["peak_memory"]
    for name in ("transformers", "vlmeff", "python", "date", "cores", "notes"):
        assert result[name]
    for name in ("load_average", "load_average_at_the_end"):
        assert result[name] is None or len(result[name]) == 3
    assert result["geometry"]["visual_tokens"] == 36
    assert str(ROOT) not in json.dumps(result)


def test_every_method_is_measured_at_a_third_of_the_tokens_against_the_unwrapped_model(smoke):
    result, _ = smoke
    rows = result["prefill"]
    assert rows.keys() == {"unwrapped", *METHODS}
    assert rows["unwrapped"]["visual_tokens"] == 36
    assert rows["unwrapped"]["to_unwrapped"] == 1
    for name in METHODS:
        row = rows[name]
        assert row["prefill_ms"].keys() == MILLISECONDS
        assert row["to_unwrapped"] == pytest.approx(
            row["prefill_ms"]["median"] / rows["unwrapped"]["prefill_ms"]["median"], rel=1e-2
        )  # of the one round
        assert row["visual_tokens"] == {"fourier": 9}.get(name, 12)  # 3 x 3 is the nearest square grid
        assert row["llm_prefill_gflops_counted"] < rows["unwrapped"]["llm_prefill_gflops_counted"]
        assert row["kv_bytes"] < rows["unwrapped"]["kv_bytes"]
        assert row["extra_peak_bytes"] > row["kv_bytes"]
        assert (row["encode_ms"] is None) == (name == "adaptinfer")
    assert all(0 < rows[n]["encode_ms"]["median"] < rows[n]["prefill_ms"]["median"] for n in METHODS - {"adaptinfer"})


def test_selection_and_scoring_are_measured_alone(smoke):
    result, _ = smoke
    assert result["selection"]["methods"].keys() == METHODS - {"adaptinfer"}
    assert (result["selection"]["tokens"], result["selection"]["kept"]) == (36, 12)
    for row in [*result["selection"]["methods"].values(), *result["scoring"]["alone"].values()]:
        assert row["ms"].keys() == MILLISECONDS
        assert row["extra_peak_bytes"] > 0
    encoder = result["scoring"]["encoder"]
    assert encoder["encode"]["to_encode"] == 1
    assert {"encode + object and deep", "encode + deep", "encode, eager, all maps"} < encoder.keys()


def test_the_eager_route_that_is_compared_gives_the_same_scores(smoke):
    agreement = smoke[0]["scoring"]["agreement"]
    assert agreement["largest_relative_difference"] < 1e-4
    assert agreement["kept_alike_at_share"] == 1


def test_the_tables_show_every_section(smoke):
    _, printed = smoke
    for title in ("Prefill", "Vision encoder and scores", "256 patches"):
        assert title in printed


@pytest.mark.parametrize(
    "part",
    [
        # All heads; 512 query rows, of which a map would hold 537 MB. More rows are more blocks of the same size.
        pytest.param(("--heads", "16", "--rows", "512"), id="16 heads"),
        # All rows in the layout of the real tower; the map of this one head would hold 1074 MB.
        pytest.param(("--heads", "1"), id="all rows"),
    ],
)
def test_scoring_16384_patches_takes_less_than_300_mb(part):
    result = json.loads(run("patches.py", "--patches", "16384", "--only", "op", *part).splitlines()[-1])
    assert result["patches"] == 16384
    assert result["eager_map_bytes_computed"] == 16384**2 * 4 * int(part[1])
    peak = result["op"]["extra_peak_bytes"]
    # Not a broken meter: there are at least a float32 copy of the keys and one row of logits for each head.
    assert 16384 * int(part[1]) * (80 + 1) * 4 < peak < 300e6
    of_process = result["op"]["process_extra_peak_bytes"]
    if of_process is not None:  # Linux: resident memory, library scratch included
        assert of_process < 300e6


def test_the_hook_of_qwens_tower_takes_less_than_300_mb_for_16384_patches():
    # q, k and their rotation are as large in 32 frames as in one; the products of a frame are quicker.
    result = json.loads(run("patches.py", "--patches", "16384", "--frames", "32", "--only", "hook").splitlines()[-1])
    assert 16384 * 80 * 4 < result["hook"]["extra_peak_bytes"] < 300e6
    assert result["hook"]["extra_peak_bytes"] < result["attention_module_sdpa"]["extra_peak_bytes"]
