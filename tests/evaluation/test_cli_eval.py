"""The command ``vlmeff eval``: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from vlmeff import zoo
from vlmeff.cli import main
from vlmeff.cli_eval import _Shown
from vlmeff.errors import ConfigError, UnknownNameError
from vlmeff.evaluation import statistics, verifying
from vlmeff.evaluation.results_schema import json_schema
from vlmeff.evaluation.samples import SampleRow

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, *arguments):
    """The exit code of ``vlmeff eval``."""
    monkeypatch.setattr(sys, "argv", ["vlmeff", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


def test_one_json_object_and_every_file(output, monkeypatch, capsys):
    assert run(monkeypatch, "--limit", 5, "--warmup", 0, "--output", output, "--json") == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    answer = json.loads(line)
    assert [row["run"] for row in answer["headline"]] == [
        "baseline",
        "fast",
        "blank",
        "downsample (fast)",
        "random (fast)",
    ]
    results = json.loads(Path(answer["results"]).read_text())
    jsonschema.validate(results, json_schema())
    assert results["partial"]
    assert results["model"]["revision"] == zoo.load_zoo().models["tiny-llava"].revision
    assert str(ROOT) not in json.dumps(results)
    for name in ("results.md", "frontier.png", "frontier.csv", "regressions.html"):
        assert (output / name).stat().st_size > 100
    page = (output / "regressions.html").read_text()
    assert "<script src" not in page


def test_the_report_needs_no_torch_and_says_the_same(output, monkeypatch):
    before = (output / "results.json").read_bytes()
    code = (
        "import sys; sys.argv = ['vlmeff', 'eval', 'report', sys.argv[1], '--json']\n"
        "from vlmeff.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(output)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["headline"]
    assert json.loads((output / "results.json").read_text())["runs"] == json.loads(before)["runs"]


def test_a_regression_is_an_exit_code_where_it_is_asked_for(output, monkeypatch, capsys):
    arguments = ("--limit", 5, "--warmup", 0, "--output", output, "--fail-on-regression")
    assert run(monkeypatch, *arguments) == 0
    for file in output.glob("tiny-llava/easy_vqa/*/samples.rank0.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["group"] = str(number)  # each document its own, so that there is an interval
            if file.parent.name.startswith("fast-") and file.parent.name.count("-") == 1:
                row["scores"] = {name: 0.0 if name in ("open", "right") else x for name, x in row["scores"].items()}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(statistics, "FEWEST_GROUPS", 1)  # three documents will do here
    assert run(monkeypatch, *arguments) == 5
    assert "inferior to the baseline: fast" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--benchmarks", "easy_vqs"], 2, "E-USE-01"),
        (["--limit", "1.0"], 2, "E-USE-02"),
        (["--margin", "-1"], 2, "E-USE-02"),
        (["--margin", "nan"], 2, "E-USE-02"),
        (["--repeats", "0"], 2, "E-USE-02"),
        (["--batch-size", "0"], 2, "E-USE-02"),
        (["--max-image-pixels", "0"], 2, "E-USE-02"),
        (["--perf", "latency", "--batch-size", "2"], 2, "E-USE-03"),
        (["--perf", "accuracy", "--fixed-output", "16"], 2, "E-USE-02"),
        (["--model", "no-such-org/no-such-model", "--offline", "--presets", "none"], 4, "hf download no-such-org"),
        (["--dtype", "float31"], 2, "--dtype"),
        (["--data-root", "nowhere"], 2, "--data-root"),
        (["--workers", "2"], 2, "--engine ray"),
        (["--fail-on-regression", "--no-baseline"], 2, "needs a baseline"),
        (["--fail-on-regression", "--presets", "none"], 2, "needs a baseline"),
        (["report", "a", "b", "--json"], 2, "one folder"),
        (["--perf", "fast"], 2, "--perf"),
        (["--engine", "slurm"], 2, "--engine"),
        (["--benchmarks", "pope", "--offline"], 3, "E-DATA-01"),
        (["--presets", "fsat"], 4, "Did you mean 'fast'"),
        (["--controls", "randon"], 2, "E-USE-01"),
        (["report", "nowhere"], 3, "E-DATA-02"),
    ],
)
def test_what_cannot_work_says_so(arguments, code, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_cannot_work_is_refused_before_a_model_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("vlmeff.loading.load", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, "--output", tmp_path / "file") == 2
    assert "is a file" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "--controls", "randon", "--output", tmp_path) == 2
    assert run(monkeypatch, "--presets", "fsat", "--output", tmp_path) == 4


def test_another_limit_is_another_run_and_a_name_twice_is_one(monkeypatch, capsys, tmp_path):
    common = ("--warmup", 0, "--controls", "none", "--output", tmp_path, "--json")
    assert run(monkeypatch, "--limit", 2, "--presets", "fast,fast", *common) == 0
    assert run(monkeypatch, "--limit", 3, "--presets", "balanced", *common) == 0
    assert run(monkeypatch, "--limit", 2, "--presets", "fast", *common) == 0
    first, second, third = (json.loads(line)["headline"] for line in capsys.readouterr().out.splitlines())
    assert [row["run"] for row in first] == [row["run"] for row in third] == ["baseline", "fast"]
    assert [row["run"] for row in second] == ["baseline", "balanced"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert any("left out" in note for note in results["notes"])


def test_what_the_report_is_of_besides_this_command_is_said(monkeypatch, capsys, tmp_path):
    common = ("--limit", 2, "--warmup", 0, "--controls", "none", "--output", tmp_path, "--json")
    assert run(monkeypatch, "--presets", "balanced", *common) == 0
    first = capsys.readouterr()
    assert "earlier commands" not in first.err
    assert run(monkeypatch, "--presets", "fast", "--no-resume", *common) == 0
    second = capsys.readouterr()
    said = " ".join(second.err.split())
    assert "the report is also of runs of earlier commands" in said
    assert "easy_vqa: balanced (" in said
    assert "what was there is kept in" in said
    headline = json.loads(second.out)["headline"]
    assert {row["run"]: row["earlier"] for row in headline} == {"baseline": False, "fast": False, "balanced": True}
    assert [p.name for p in tmp_path.rglob("*.bak-*")] == [
        p.name for p in tmp_path.rglob("*") if p.name.startswith("baseline-") and ".bak-" in p.name
    ]


def test_options_reach_the_settings(monkeypatch, tmp_path):
    seen = []

    def evaluate(settings, **others):
        seen.append(settings)
        raise ConfigError("enough")

    monkeypatch.setattr("vlmeff.evaluation.runner.evaluate", evaluate)
    arguments = ["--batch-size", 3, "--repeats", 4, "--fixed-output", 5, "--trust-remote-code", "--max-image-pixels", 6]
    assert run(monkeypatch, *arguments, "--output", tmp_path) == 2
    (found,) = seen
    values = (found.batch_size, found.repeats, found.fixed_output, found.trust_remote_code, found.max_image_pixels)
    assert values == (3, 4, 5, True, 6)


def test_a_line_of_progress_has_the_score_so_far(monkeypatch, capsys):
    monkeypatch.setattr("vlmeff.cli_eval.QUIET_SECONDS", -1)
    with _Shown(quiet=False) as shown:
        shown.begin("pope", 0, 2)
        shown.scored("pope", {"baseline": 1.0, "fast": 0.5})
        shown.step("pope", [SampleRow(doc_id="a", visual_tokens_in=9, visual_tokens_kept=3)])
    line = " ".join(capsys.readouterr().err.split())
    assert line == "pope, tokens kept 33%, score so far: baseline 100.0, fast 50.0: 1 of 2 documents"


def test_the_list_names_every_benchmark(monkeypatch, capsys):
    assert run(monkeypatch, "--list") == 0
    printed = capsys.readouterr().out
    for name in ("easy_vqa", "scenes", "mosaics", "textvqa_val_ocr", "mmmu_val"):
        assert name in printed


def test_an_entry_is_verified_against_its_figures(tmp_path, monkeypatch):
    entry = zoo.get("tiny-llava/fast")
    row = entry.expected[0].model_copy(
        update={"benchmark": "easy_vqa", "metric": "easy_vqa_open", "limit": 5, "baseline": 100.0, "value": 90.0}
    )
    monkeypatch.setattr(zoo, "get", lambda name: entry.model_copy(update={"expected": (row,)}))
    baseline, preset = verifying.verify_entry("tiny-llava/fast", tmp_path)
    assert (baseline.run, baseline.measured, baseline.holds) == ("baseline", 100.0, True)
    assert (preset.run, preset.measured, preset.holds) == ("fast", 100.0, False)
    monkeypatch.setattr(zoo, "get", lambda name: entry.model_copy(update={"expected": ()}))
    with pytest.raises(ConfigError, match="no expected figures"):
        verifying.verify_entry("tiny-llava/fast", tmp_path)
    wrong = row.model_copy(update={"benchmark": "easy"})
    monkeypatch.setattr(zoo, "get", lambda name: entry.model_copy(update={"expected": (wrong,)}))
    with pytest.raises(UnknownNameError, match="E-USE-01"):
        verifying.verify_entry("tiny-llava/fast", tmp_path)
