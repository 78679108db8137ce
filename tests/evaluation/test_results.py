"""Reports from stored samples: figures recomputed by hand, files that may be published, and what is refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from finished_runs import ENVIRONMENT, row, write_run

from vlmeff.errors import ConfigError, DataError
from vlmeff.evaluation.results import build_report
from vlmeff.evaluation.results_schema import Results, json_schema
from vlmeff.evaluation.runs import presentable
from vlmeff.evaluation.samples import SampleRow

FILES = ["frontier.csv", "frontier.png", "regressions.html", "results.json", "results.md"]


def baseline_rows(n: int = 24) -> list[SampleRow]:
    """Pairs of questions on a picture; two of three right."""
    return [
        row(
            f"d{i}",
            float(i % 3 > 0),
            group=f"g{i // 2}",
            category="even" if i % 2 == 0 else "odd",
            kv_bytes_prefill=1000,
            ttft_ms=40.0 + i,
            e2e_ms=100.0 + i,
            output_tokens=3,
            peak_mem_bytes=10 * 2**20 + i,
        )
        for i in range(n)
    ]


def preset_rows(n: int = 24) -> list[SampleRow]:
    """d1, d2, d4 got worse, d0 got better; half of the tokens, twice as fast."""
    changed = {1: 0.0, 2: 0.0, 4: 0.0, 0: 1.0}
    return [
        row(
            f"d{i}",
            changed.get(i, float(i % 3 > 0)),
            group=f"g{i // 2}",
            category="even" if i % 2 == 0 else "odd",
            visual_tokens_kept=32,
            prefill_tokens=48,
            kv_bytes_prefill=600,
            ttft_ms=(40.0 + i) / (2 if i % 2 else 4),
            e2e_ms=80.0,
            output_tokens=1,
        )
        for i in range(n)
    ]


def control_rows() -> list[SampleRow]:
    return [row(f"d{i}", 0.0, group=f"g{i // 2}", visual_tokens_in=32, visual_tokens_kept=32) for i in range(24)]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_run(tmp_path, baseline_rows(), caption_notes=["blind prior 12.0 %"])
    write_run(tmp_path, preset_rows()[::-1], kind="preset", preset="fast", parameters={"keep": 0.5})
    return tmp_path


def test_every_file_is_written_and_results_json_fits_the_published_schema(output: Path) -> None:
    results = build_report(output)
    assert sorted(p.name for p in output.iterdir() if p.is_file()) == FILES

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    stored = json.loads((output / "results.json").read_text("utf-8"), parse_constant=refuse)
    jsonschema.Draft202012Validator(json_schema()).validate(stored)
    assert Results.model_validate(stored) == results
    assert stored["schema"] == "vlmeff.results/1"
    for run in stored["runs"]:
        assert (output / run["samples"]).is_file()


def test_the_figures_of_a_comparison(output: Path) -> None:
    results = build_report(output)
    base, fast = results.runs
    assert (base.label, fast.label) == ("baseline", "fast")
    assert (base.metric, base.metrics["accuracy"].value) == ("accuracy", pytest.approx(16 / 24))
    assert base.metrics["accuracy"].n == 24
    assert base.metrics["accuracy/odd"].value == pytest.approx(8 / 12)
    assert base.metrics["accuracy"].ci95[0] < 16 / 24 < base.metrics["accuracy"].ci95[1]
    (c,) = results.comparisons
    assert (c.baseline, c.candidate, c.n, c.unmatched) == (base.id, fast.id, 24, 0)
    assert c.delta == pytest.approx(-2 / 24)
    assert (c.mcnemar.b, c.mcnemar.c, c.mcnemar.p) == (1, 3, pytest.approx(0.625))
    assert c.p_holm == pytest.approx(0.625)
    assert c.churn == pytest.approx(4 / 24)
    assert c.agreement == pytest.approx(20 / 24)
    assert c.retained == pytest.approx(100 * 14 / 16)
    assert c.margin == 0.01
    assert c.verdict == "inconclusive"
    assert c.categories["odd"].delta == pytest.approx(-1 / 12)
    assert c.categories["even"].delta == pytest.approx(-1 / 12)
    assert (c.token_ratio, c.kv_ratio) == (0.5, pytest.approx(0.6))


def test_the_interval_is_that_of_resampled_pictures(output: Path) -> None:
    """Against resampling written down plainly: whole pictures, documents after documents."""
    by_group: dict[str, list[float]] = {}
    for b, c in zip(baseline_rows(), preset_rows(), strict=True):
        by_group.setdefault(str(b.group), []).append(c.scores["right"] - b.scores["right"])
    generator = np.random.default_rng(7)
    means = []
    for _ in range(4000):
        drawn = [d for g in generator.choice(list(by_group), len(by_group)) for d in by_group[g]]
        means.append(sum(drawn) / len(drawn))
    (c,) = build_report(output).comparisons
    assert c.resamples == 10_000
    assert c.ci95 == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.5 / 24)


def test_costs_and_times(output: Path) -> None:
    results = build_report(output)
    base, fast = results.runs
    assert (fast.cost.visual_tokens_in, fast.cost.visual_tokens_kept, fast.cost.kept_ratio) == (64, 32, 0.5)
    assert (base.cost.prefill_tokens, base.cost.kv_bytes_prefill, base.cost.kv_bytes_end) == (80, 1000, None)
    assert base.latency.ttft_ms.p50 == pytest.approx(51.5)
    assert base.latency.ttft_ms.p95 == pytest.approx(40 + 0.95 * 23)
    assert base.latency.decode_ms_per_token == pytest.approx(30)
    assert base.latency.peak_mem_bytes == 10 * 2**20 + 23
    assert fast.latency.decode_ms_per_token is None
    speedup = results.comparisons[0].speedup
    assert speedup.ttft == pytest.approx(3)  # half of the documents twice, half four times as fast
    assert speedup.ci95 == (2, 4)
    assert speedup.e2e == pytest.approx(111.5 / 80)
    assert (speedup.decode, speedup.n) == (None, 24)


def test_the_report_is_reproduced_without_torch(output: Path) -> None:
    build_report(output, seed=3)
    before = {name: (output / name).read_bytes() for name in FILES}
    for name in FILES:
        (output / name).unlink()
    code = (
        "import sys\nfrom vlmeff.evaluation.results import build_report\n"
        "build_report(sys.argv[1], seed=3)\nsys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(output)], check=True)
    for name in FILES[2:]:
        assert (output / name).read_bytes() == before[name], name


def test_another_seed_moves_the_interval_only(output: Path) -> None:
    one, other = (build_report(output, seed=s).comparisons[0] for s in (0, 1))
    assert one.model_copy(update={"ci95": None, "retained_ci95": None, "speedup": None, "categories": {}}) == (
        other.model_copy(update={"ci95": None, "retained_ci95": None, "speedup": None, "categories": {}})
    )


def test_nothing_private_is_published(tmp_path: Path) -> None:
    secret = "hf_" + "a" * 30
    model = {"id": "/home/alice/models/My Llava", "revision": None, "dtype": "float32"}
    parameters = {"recipe": "C:\\Users\\alice\\r.json", "note": f"see /home/alice/x.json, {secret}", "nan": [1.0]}
    data = {"source": "folder", "id": "~/data/quiz", "revision": None, "sha256": "00", "n_docs": 24, "n_groups": 12}
    write_run(tmp_path, baseline_rows(), model=model, data=data)
    write_run(tmp_path, preset_rows(), kind="preset", preset="fast", model=model, data=data, parameters=parameters)
    results = build_report(tmp_path)
    for name in ("results.json", "results.md", "regressions.html", "frontier.csv"):
        text = (tmp_path / name).read_text("utf-8")
        for word in ("alice", "secret-host", secret, str(tmp_path), "/home"):
            assert word not in text, (name, word)
    assert results.model["id"] == "My Llava"
    assert results.runs[0].data["id"] == "quiz"
    assert results.runs[1].parameters == {"recipe": "r.json", "note": "see x.json, (removed)", "nan": [1.0]}


def test_what_may_stay_stays_and_nan_does_not() -> None:
    kept = {"id": "llava-hf/llava-1.5-7b-hf", "url": "https://example.org/a/b", "ratio": "1/3", "n": 3, "flag": True}
    assert presentable(kept) == kept
    assert presentable({"a": float("nan"), "b": [float("inf"), 1.5]}) == {"a": None, "b": [None, 1.5]}


def test_baseline_presets_controls_and_their_names(output: Path) -> None:
    write_run(output, control_rows(), kind="control", control="downsample", preset="fast")
    write_run(output, preset_rows(), kind="preset", preset="balanced", created="2026-01-02T00:00:00+00:00")
    write_run(output, control_rows(), kind="control", control="blank")
    with pytest.raises(DataError, match=r"E-STAT-01: .*category"):
        build_report(output)
    for path in output.glob("*/*/*/samples.jsonl"):
        text = re.sub(r'"category": "\w+"', '"category": null', path.read_text("utf-8"))
        path.write_text(text, "utf-8")
    results = build_report(output)
    labels = ["baseline", "fast", "balanced", "blank", "downsample (fast)"]
    assert [r.label for r in results.runs] == labels
    assert [r.label for r in results.retained] == labels[1:]
    # Down-sampling yields few tokens: all of them are kept, and yet they are half of the baseline's.
    down = results.comparisons[-1]
    assert (results.runs[-1].cost.kept_ratio, down.token_ratio) == (1.0, 0.5)
    assert (down.verdict, down.mcnemar.c, down.speedup) == ("inferior", 16, None)
    assert results.regressions == []  # controls are no regressions
    # Presets are one family of tests, controls another: each p doubles here, up to 1.
    assert [c.p_holm for c in results.comparisons] == pytest.approx([1, 1, 2**-14, 2**-14])


def test_controls_stand_in_one_order_whenever_they_began(tmp_path: Path) -> None:
    write_run(tmp_path, [row(str(i), 1.0) for i in range(12)])
    for second, control in enumerate(("random", "downsample", "blank")):
        created = f"2026-01-01T00:00:0{second}+00:00"
        write_run(tmp_path, [row(str(i), 0.0) for i in range(12)], kind="control", control=control, created=created)
    assert [run.label for run in build_report(tmp_path).runs] == ["baseline", "blank", "downsample", "random"]


def test_a_preset_that_is_inferior_is_a_regression(tmp_path: Path) -> None:
    write_run(tmp_path, [row(str(i), 1.0) for i in range(50)])
    write_run(tmp_path, [row(str(i), float(i > 20)) for i in range(50)], kind="preset", preset="fast")
    assert [c.label for c in build_report(tmp_path).regressions] == ["fast"]
    assert build_report(tmp_path, margin=80).regressions == []


def test_runs_of_one_name_and_other_parameters_are_told_apart(output: Path) -> None:
    write_run(output, preset_rows(), kind="preset", preset="fast", parameters={"keep": 0.4}, fingerprint="beef" * 16)
    labels = [r.label for r in build_report(output).runs[1:]]
    assert "fast [beef]" in labels
    assert len(set(labels)) == 2


def test_the_newest_of_equal_runs_counts_and_unfinished_ones_do_not(output: Path) -> None:
    old = write_run(output, control_rows(), created="2025-01-01T00:00:00+00:00")
    unfinished = write_run(output, control_rows(), kind="preset", preset="slow", done=False)
    backup = write_run(output, control_rows(), kind="preset", preset="older")
    backup.rename(backup.with_name("older.bak-20260101"))
    results = build_report(output)
    assert [r.label for r in results.runs] == ["baseline", "fast"]
    assert results.runs[0].metrics["accuracy"].value > 0
    assert any(old.name in note and "newer" in note for note in results.notes)
    assert any(unfinished.name in note and "not finished" in note for note in results.notes)


def test_failed_documents_count_as_wrong_and_are_counted(tmp_path: Path) -> None:
    rows = [row(f"d{i}", 1.0) for i in range(10)]
    write_run(tmp_path, rows)
    broken = [row("d0", 0.0, error="out of memory", parsed=None, ttft_ms=5.0), *rows[1:]]
    write_run(tmp_path, broken, kind="preset", preset="fast")
    results = build_report(tmp_path)
    assert (results.runs[1].errors, results.runs[1].metrics["accuracy"].value) == (1, pytest.approx(0.9))
    assert results.comparisons[0].delta == pytest.approx(-0.1)
    assert results.comparisons[0].agreement == pytest.approx(0.9)
    assert results.runs[1].latency is None
    assert any("errors 1" in note for note in results.notes)


def test_cut_off_answers_are_pointed_out(tmp_path: Path) -> None:
    write_run(tmp_path, [row(str(i), 1.0, hit_max=i < 2) for i in range(50)])
    results = build_report(tmp_path)
    assert results.runs[0].hit_max == pytest.approx(0.04)
    assert any("4.0% of the answers were cut off" in note for note in results.notes)
    assert results.comparisons == results.retained == []
    assert not (tmp_path / "frontier.png").exists()


def test_times_of_other_machines_and_of_cached_answers_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, baseline_rows())
    write_run(tmp_path, preset_rows(), kind="preset", preset="far", environment={**ENVIRONMENT, "device_name": "other"})
    write_run(tmp_path, preset_rows(), kind="preset", preset="cached", perf={"response_cache": True})
    invalid = [SampleRow.from_json({**r.to_json(), "timing_valid": False}) for r in preset_rows()]
    write_run(tmp_path, invalid, kind="preset", preset="resumed")
    results = build_report(tmp_path)
    runs = {r.label: r for r in results.runs}
    comparisons = {c.label: c for c in results.comparisons}
    assert runs["far"].latency is not None
    assert comparisons["far"].speedup is None
    assert any("different environments" in note for note in results.notes)
    assert runs["cached"].latency is comparisons["cached"].speedup is None
    assert runs["resumed"].latency is comparisons["resumed"].speedup is None


def pope_row(i: int, right: bool) -> SampleRow:
    made = row(f"p{i}", float(right), group=f"g{i // 4}", split=["random", "popular"][i % 2])
    made.scores.update(doc_yes=float(i % 4 < 2), right_strict=float(right))
    return made


def test_a_headline_that_is_no_mean_is_compared_by_itself(tmp_path: Path) -> None:
    write_run(tmp_path, [pope_row(i, i % 8 > 0) for i in range(80)], metric="pope", benchmark="pope")
    worse = [pope_row(i, i % 8 > 0 and i % 5 > 0) for i in range(80)]
    write_run(tmp_path, worse, metric="pope", benchmark="pope", kind="preset", preset="fast")
    results = build_report(tmp_path)
    (c,) = results.comparisons
    f1 = [run.metrics["f1"].value for run in results.runs]
    accuracy = [run.metrics["accuracy"].value for run in results.runs]
    assert c.metric == "f1"
    assert c.delta == pytest.approx(f1[1] - f1[0])
    assert abs(c.delta - (accuracy[1] - accuracy[0])) > 0.005
    assert c.ci95[0] < c.delta < c.ci95[1]
    assert c.mcnemar.b == 0


def mme_rows(right: Callable[[int], bool]) -> list[SampleRow]:
    return [
        row(f"m{i}", float(right(i)), group=f"g{i // 2}", category="count" if i % 4 < 2 else "text_translation")
        for i in range(80)
    ]


def test_mme_is_compared_in_its_points(tmp_path: Path) -> None:
    write_run(tmp_path, mme_rows(lambda i: True), metric="mme", benchmark="mme")
    write_run(tmp_path, mme_rows(lambda i: i % 20 > 0), metric="mme", benchmark="mme", kind="preset", preset="fast")
    results = build_report(tmp_path)
    base, fast = results.runs
    (c,) = results.comparisons
    # 40 questions on 20 pictures in each category. Every 20th question is wrong, all of them in category count.
    assert (base.metric, base.scale) == ("total", 1.0)
    assert base.metrics["total"].value == 400
    assert fast.metrics["total"].value == pytest.approx(200 + 100 * (36 / 40 + 16 / 20))
    assert c.delta == pytest.approx(-30)
    assert c.margin == pytest.approx(4)  # 1 % of the baseline's 400
    # Each of the 20 pictures of the category costs 7.5 points if wrong: 4 of 20 are, binomially when resampled.
    assert c.ci95 == pytest.approx((-7.5 * 8, -7.5 * 1), abs=7.5)
    assert c.detectable == pytest.approx(2.802 * 7.5 * (20 * 0.2 * 0.8) ** 0.5, rel=0.05)
    assert c.verdict == "inferior"


def test_a_metric_about_some_documents_pairs_only_those(tmp_path: Path) -> None:
    def rows(wrong: int) -> list[SampleRow]:
        out = []
        for i in range(40):
            made = row(f"e{i}", float(i != wrong), group=f"g{i // 4}")
            made.scores.update({"doc_yes": 1.0, "doc_negated": 0.0} if i % 2 else {"open": float(i != wrong)})
            out.append(made)
        return out

    write_run(tmp_path, rows(-1), metric="easy_vqa", benchmark="easy_vqa")
    write_run(tmp_path, rows(0), metric="easy_vqa", benchmark="easy_vqa", kind="preset", preset="open")
    write_run(tmp_path, rows(1), metric="easy_vqa", benchmark="easy_vqa", kind="preset", preset="yesno")
    results = build_report(tmp_path)
    assert {c.label: (c.n, c.delta) for c in results.comparisons} == {"open": (20, -0.05), "yesno": (20, 0.0)}
    assert results.runs[0].metrics["easy_vqa_open"].n == 20


def test_averages_go_over_benchmarks_that_all_have(output: Path) -> None:
    write_run(output, [row(str(i), 1.0) for i in range(10)], benchmark="second")
    write_run(output, [row(str(i), float(i > 0)) for i in range(10)], benchmark="second", kind="preset", preset="fast")
    write_run(output, [row(str(i), 1.0) for i in range(10)], benchmark="second", kind="preset", preset="half")
    fast, half = build_report(output).retained
    assert fast.benchmarks == {"quiz": pytest.approx(87.5), "second": pytest.approx(90)}
    assert fast.mean == pytest.approx(88.75)
    assert fast.ci95[0] < 88.75 < fast.ci95[1]
    assert fast.token_ratio == pytest.approx(0.5**0.5)
    assert fast.ttft_speedup is None  # measured on one of the two only
    assert (half.benchmarks, half.mean) == ({"quiz": None, "second": 100}, None)


def test_runs_without_comparable_documents_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, baseline_rows())
    write_run(tmp_path, preset_rows(22), kind="preset", preset="fast")
    left = build_report(tmp_path)  # the newest run's documents count
    assert not left.comparisons
    assert any(re.search(r"left out: it is of 2[24] documents, the report of 2[24]", note) for note in left.notes)
    results = build_report(tmp_path, allow_partial_join=True)
    assert (results.comparisons[0].n, results.comparisons[0].unmatched) == (22, 2)
    assert any("2 documents are in one run only" in note for note in results.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sha256": "cd" * 32}}, "data hash"),
        ({"prompt": "other words"}, "prompt"),
        ({"metric": "exakt"}, r"E-DATA-08.*exakt.*'exact'"),
        ({"schema": "vlmeff.run/9"}, r"E-DATA-03.*vlmeff.run/9"),
        ({"kind": "other"}, r"E-DATA-03.*other"),
    ],
)
def test_runs_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_run(tmp_path, baseline_rows())
    write_run(tmp_path, preset_rows(), **{"kind": "preset", "preset": "fast", **changes})
    with pytest.raises(DataError, match=message):
        build_report(tmp_path)


def test_a_broken_line_is_named_by_its_number(output: Path) -> None:
    samples = next(output.glob("*/*/fast-*/samples.jsonl"))
    lines = samples.read_text("utf-8").splitlines(keepends=True)
    for broken in ('{"doc_id": "d3", \n', "[1]\n", "{}\n"):
        samples.write_text("".join([*lines[:4], broken, *lines[5:]]), "utf-8")
        with pytest.raises(DataError, match=r"E-DATA-03: .*samples\.jsonl, line 5 "):
            build_report(output)


def test_arguments_and_folders_that_cannot_be_are_refused(output: Path, tmp_path_factory: Any) -> None:
    with pytest.raises(ConfigError, match="E-USE-02: margin"):
        build_report(output, margin=-1)
    with pytest.raises(ConfigError, match="E-USE-02: seed"):
        build_report(output, seed=-1)
    with pytest.raises(DataError, match="E-DATA-02"):
        build_report(tmp_path_factory.mktemp("empty"))
    write_run(output, baseline_rows(), model={"id": "other", "dtype": "bfloat16"}, benchmark="second")
    with pytest.raises(ConfigError, match="2 models"):
        build_report(output)
