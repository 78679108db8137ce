"""The KV cost benchmark runs, counts bytes rightly, leaves out what does not fit, and its page shows the file."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PAGE, RESULT = ROOT / "docs" / "kv-cost.md", BENCHMARKS / "results" / "kv_cpu.json"
SETTINGS = {"dynamic", "keep all", "prefixkv full", "prefixkv window", "snapkv"}
COLUMN = 4 * 2 * 2 * 64 * 4  # bytes of one token: layers, keys and values, heads, head dim, float32


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The result file, and what was printed."""
    out = tmp_path_factory.mktemp("benchmark") / "deep" / "kv.json"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(BENCHMARKS / "kv.py"), "--smoke", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """``generating`` and ``kv_tables``."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("generating"), importlib.import_module("kv_tables")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_a_result_says_where_and_how_it_was_measured(smoke):
    result, _ = smoke
    assert result["torch"] == torch.__version__
    assert result["device"].startswith("CPU, ")
    assert (result["threads"], result["dtype"], result["keep_ratio"]) == (1, "float32", 0.3)
    for name in ("transformers", "vlmeff", "python", "date", "notes", "seconds"):
        assert result[name]
    assert result["geometries"]["llama-small"]["language_model"]["num_key_value_heads"] == 2
    assert result["left_out"] == []
    assert result["kvpress"] is None
    assert str(ROOT) not in json.dumps(result)


def test_bytes_and_ratios_of_every_setting(smoke):
    result, _ = smoke
    assert [(c["prompt_tokens"], c["batch"]) for c in result["cells"]] == [(128, 1), (192, 2)]
    for cell in result["cells"]:
        rows, length, batch = cell["settings"], cell["prompt_tokens"], cell["batch"]
        assert rows.keys() == SETTINGS
        dynamic = rows["dynamic"]
        assert dynamic["cache_bytes"] == COLUMN * batch * (length + 32)
        assert dynamic["prefill_to_dynamic"] == dynamic["decode_to_dynamic"] == dynamic["cache_to_dynamic"] == 1
        assert dynamic["decode_peak_bytes"] > COLUMN * batch * length
        for name in SETTINGS - {"dynamic"}:
            row, headroom = rows[name], rows[name]["headroom"]
            columns = COLUMN // 4 * batch * (sum(row["columns_per_layer"]) + 4 * 32)
            assert columns <= row["cache_bytes"] <= 1.02 * columns  # and the bookkeeping
            # 32 more tokens fit into the 64 columns allocated with the first of them.
            assert headroom["cache_bytes"] - row["cache_bytes"] == pytest.approx(COLUMN * batch * 65, rel=0.01)
            # One round: the ratio of the medians.
            assert row["decode_to_dynamic"] == pytest.approx(
                row["decode_tokens_per_s"]["median"] / dynamic["decode_tokens_per_s"]["median"], rel=1e-2
            )
            assert headroom["decode_tokens_per_s"]["median"] > 0
            assert 0 < row["eviction_ms"]["median"] < row["prefill_ms"]["median"]
        assert rows["keep all"]["scoring_ms"]["median"] == 0
        assert rows["keep all"]["columns_per_layer"] == [length] * 4
        for name in SETTINGS - {"dynamic", "keep all"}:
            assert 0 < rows[name]["scoring_ms"]["median"] < rows[name]["prefill_ms"]["median"]
            assert rows[name]["keep_ratio"] == pytest.approx(0.3, abs=0.02)
        assert rows["snapkv"]["decode_to_snapkv"] == 1
        assert len(set(rows["prefixkv full"]["columns_per_layer"])) > 1  # layers have budgets of their own


def test_peaks_are_told_apart_at_the_first_token(modules):
    generating, _ = modules

    def run(at_end: Any) -> None:
        first = torch.ones(2_000_000)
        kept = first[:1_000_000] + 1
        del first
        at_end(0)
        for _ in range(3):
            kept = kept + 1

    until, after = generating.peaks(run, torch.device("cpu"))
    assert until == pytest.approx(12e6, rel=0.01)
    assert after == pytest.approx(8e6, rel=0.01)


def test_a_forecast_goes_by_rows_and_by_nearly_the_square_of_the_length(modules):
    forecast = modules[0].Forecast()
    assert forecast.seconds("a", 512, 1) == 0
    forecast.note("a", 512, 1, 2.0)
    forecast.note("a", 1024, 1, 5.0)
    assert forecast.seconds("a", 1024, 4) == pytest.approx(20)
    assert 10 < forecast.seconds("a", 2048, 1) < 20
    assert forecast.seconds("a", 2048, 4) == pytest.approx(4 * forecast.seconds("a", 2048, 1))
    assert forecast.seconds("b", 2048, 1) == 0


def test_every_round_asks_each_name_once_and_begins_with_another(modules):
    order = list(modules[0].rounds(["a", "b", "c"], 4))
    assert order == list("abcbcacababc")


def test_the_page_shows_the_committed_result(modules):
    page, result = PAGE.read_text(), json.loads(RESULT.read_text())
    for table in modules[1].markdown(result).split("\n\n"):
        assert table in page
    assert result["date"] in page
    cells = {(c["model"], c["prompt_tokens"], c["batch"]) for c in result["cells"]}
    gone = {(g["model"], g["prompt_tokens"], g["batch"]) for g in result["left_out"] if "dynamic" in g["settings"]}
    grid = {("llama-small", n, b) for n in (512, 1024, 2048, 4096, 8192, 16384) for b in (1, 4, 16)}
    assert grid <= cells | gone
    assert not cells & gone


def test_the_tables_are_printed(smoke):
    _, printed = smoke
    for title in ("share of DynamicCache's", "decode tokens/s, as a multiple", "memory, as a share"):
        assert title in printed
