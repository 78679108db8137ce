"""What ``vlmeff eval`` prints on terminals of any width, and the list of benchmarks with a broken folder among them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finished_runs import row, write_run
from question_folders import row as question
from question_folders import write_folder
from rich.console import Console

from vlmeff.errors import ConfigError, DataError
from vlmeff.evaluation import benchmarks, terminal
from vlmeff.evaluation.results import build_report
from vlmeff.evaluation.results_schema import Results


def printed(table: Any, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


@pytest.fixture
def results(tmp_path: Path) -> Results:
    write_run(tmp_path, [row(str(i), 1.0) for i in range(400)])
    slight = [row(str(i), float(i not in range(8)), visual_tokens_kept=21) for i in range(400)]
    write_run(tmp_path, slight, kind="preset", preset="slight")
    lost = [row(str(i), float(i not in (0, 1)), visual_tokens_kept=21) for i in range(400)]
    write_run(tmp_path, lost, kind="preset", preset="fast")
    write_run(tmp_path, lost, kind="control", control="downsample", preset="fast")
    bad = [row(str(i), float(i > 99), visual_tokens_kept=21) for i in range(400)]
    write_run(tmp_path, bad, kind="control", control="random", preset="fast")
    return build_report(tmp_path, margin=5)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_verdict_is_never_cut_or_broken(results: Results, width: int) -> None:
    runs = "\n".join(printed(terminal.benchmark_table(results, "quiz"), width))
    verdicts = {c.verdict for c in results.comparisons}
    assert verdicts == {"non-inferior", "inferior", "worse but within margin"}
    for line in ("non-inferior", "inferior", "worse but", "within margin"):
        assert line in runs
    for word in ("score", "TTFT", "KiB", "baseline", "random") if width >= 80 else ("KV",):
        assert word in runs.split()
    assert "\N{HORIZONTAL ELLIPSIS}" not in runs
    beside = "\n".join(printed(terminal.controls_table(results, "quiz"), width))
    assert "better" in beside
    assert "\N{HORIZONTAL ELLIPSIS}" not in beside


def test_the_table_of_controls_has_the_difference_and_its_p(results: Results) -> None:
    line = next(line for line in printed(terminal.controls_table(results, "quiz"), 120) if "random" in line)
    # 100 wrong against 2 of them: 98 documents are right with the preset alone.
    assert "+24.5 (" in line
    assert "< 0.0001" in line
    results = results.model_copy(update={"against_controls": []})
    assert terminal.controls_table(results, "quiz") is None


def test_the_headline_is_json_and_has_the_controls(results: Results) -> None:
    base, fast, _, _, control = json.loads(json.dumps(terminal.headline(results)))
    assert (base["run"], base["value"], base["delta"]) == ("baseline", 1.0, None)
    _, beside = fast["against_controls"]
    assert (beside["control"], beside["delta"], beside["verdict"]) == ("random (fast)", pytest.approx(0.245), "better")
    assert "against_controls" not in control


BROKEN = {
    "no-json": "{",
    "no-metric": '{"schema": "vlmeff.data/1"}',
    "odd-metric": '{"schema": "vlmeff.data/1", "metric": "exakt"}',
}


def test_one_broken_manifest_does_not_hide_the_others(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", [question(0)], manifest={"metric": "exact"})
    write_folder(tmp_path / "z-yours", [question(0)], manifest={"metric": "yesno"})
    for name, content in BROKEN.items():
        write_folder(tmp_path / name, [question(0)])
        (tmp_path / name / "manifest.json").write_text(content)
    found, broken = benchmarks.every(tmp_path)
    assert sorted(broken) == sorted(BROKEN)
    assert {"mine", "z-yours", "pope"} <= {benchmark.name for benchmark in found}
    assert all(isinstance(error, DataError) for error in broken.values())
    table, told = terminal.listing(tmp_path)
    lines = printed(table, 250)
    assert any(line.split()[:2] == ["mine", "exact"] for line in (line.replace("│", " ") for line in lines))
    assert "E-DATA-04" in next(line for line in lines if "no-json" in line)
    assert "E-DATA-08" in next(line for line in lines if "odd-metric" in line)
    told = json.loads(json.dumps(told))
    assert set(told["broken"]) == set(BROKEN)
    easy = next(row for row in told["benchmarks"] if row["benchmark"] == "easy_vqa")
    assert easy == {"benchmark": "easy_vqa", "documents": 9_673, "metric": "easy_vqa", "data": ["package"]}


def test_checks_say_what_was_expected_and_whether_it_holds() -> None:
    common = {"benchmark": "quiz", "metric": "accuracy", "expected": 90.0, "tolerance": 1.0}
    measured = {"r0": (90.5, True), "r1": (None, False)}
    checks = [SimpleNamespace(**common, run=run, measured=m, holds=h) for run, (m, h) in measured.items()]
    lines = [line.replace("│", " ").split() for line in printed(terminal.checks_table(checks), 100)]
    assert ["quiz", "accuracy", "r0", "90.0", "90.5", "1.0", "holds"] in lines
    assert ["quiz", "accuracy", "r1", "90.0", "\N{EN DASH}", "1.0", "differs"] in lines


def test_a_name_that_is_no_folder_is_still_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="E-USE-01"):
        benchmarks.get("a/b", tmp_path)
