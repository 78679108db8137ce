"""The script that runs compute-sanitizer: what it reads from the tool, and what it says where nothing can be run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("kernels_suite", "sanitize")})
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_sanitizers_words(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = scripts.sanitize.verdict
    assert verdict(0, "========= ERROR SUMMARY: 0 errors") == {"result": "clean"}
    assert verdict(0, "========= RACECHECK SUMMARY: 0 hazards displayed") == {"result": "clean"}
    found = verdict(9, "x\n========= Invalid read\n========= ERROR SUMMARY: 3 errors")
    assert (found["result"], found["errors"], len(found["report"])) == ("errors", 3, 2)
    refused = verdict(10, "refused: not built\n========= ERROR SUMMARY: 0 errors")
    assert refused == {"result": "not run", "why": "not built"}
    assert verdict(1, "Traceback")["result"] == "not run"


def test_without_a_gpu_the_sanitizer_is_not_run_and_says_so(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(scripts.sanitize, "missing", lambda: "there is no GPU")
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--out", str(tmp_path / "s.json"), "--op", "gather*"])
    assert scripts.sanitize.main() == 0
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["not_run"] == "there is no GPU"
    assert {row["result"] for row in report["runs"]} == {"not run"}
    assert {(row["op"], row["backend"]) for row in report["runs"]} == {
        ("gather_kv", "cuda"), ("gather_kv", "triton"), ("gather_tokens", "triton"),
    }  # fmt: skip
    assert "not run" in capsys.readouterr().out


def test_the_sanitizer_has_small_calls_of_every_kernel(scripts: SimpleNamespace) -> None:
    assert {op for op, _ in scripts.sanitize.targets(None)} <= {case.op for case in scripts.kernels_suite.small()}
