"""Presets against their controls: does a method beat random at equal budget? Figures recomputed by hand."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from math import comb
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from finished_runs import row, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmeff.errors import DataError
from vlmeff.evaluation import tables
from vlmeff.evaluation.comparing import adjust_controls
from vlmeff.evaluation.results import build_report
from vlmeff.evaluation.results_schema import ControlComparison, McNemar, json_schema
from vlmeff.evaluation.samples import SampleRow

N = 40


def rows(wrong: set[int], kept: int = 16, count: int = N) -> list[SampleRow]:
    """Two questions a picture; those of ``wrong`` are answered wrongly."""
    return [row(f"d{i}", float(i not in wrong), group=f"g{i // 2}", visual_tokens_kept=kept) for i in range(count)]


FAST = {0, 1}  # wrong documents
RANDOM = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}  # and nothing that fast gets wrong is right
DOWN = {2, 3}  # as many, others
BLANK = set(range(30))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_run(tmp_path, rows(set(), 64))
    write_run(tmp_path, rows(FAST), kind="preset", preset="fast")
    write_run(tmp_path, rows(RANDOM), kind="control", control="random", preset="fast")
    write_run(tmp_path, rows(DOWN)[::-1], kind="control", control="downsample", preset="fast")
    write_run(tmp_path, rows(BLANK, 64), kind="control", control="blank")
    write_run(tmp_path, rows({5}, 8), kind="preset", preset="small")
    return tmp_path


def two_sided(b: int, c: int) -> float:
    """The exact test by counting outcomes of b + c fair coins that are at most as likely in the lesser direction."""
    n = b + c
    return float(min(Fraction(1), 2 * Fraction(sum(comb(n, k) for k in range(min(b, c) + 1)), 2**n)))


def test_each_preset_meets_its_own_controls_and_blank(output: Path) -> None:
    results = build_report(output)
    pairs = [(c.preset_label, c.control_label) for c in results.against_controls]
    assert sorted(pairs) == [
        ("fast", "blank"),
        ("fast", "downsample (fast)"),
        ("fast", "random (fast)"),
        ("small", "blank"),
    ]
    assert [label for label, _ in pairs] == sorted(label for label, _ in pairs)  # preset by preset
    labels = {run.id: run.label for run in results.runs}
    assert [(labels[c.preset], labels[c.control]) for c in results.against_controls] == pairs


def test_the_figures_are_those_of_the_pairs(output: Path) -> None:
    found = {(c.preset_label, c.control_label): c for c in build_report(output).against_controls}
    for label, wrong, control, other, ratio in (
        ("fast", FAST, "random (fast)", RANDOM, 1.0),
        ("fast", FAST, "downsample (fast)", DOWN, 1.0),
        ("fast", FAST, "blank", BLANK, 0.25),
        ("small", {5}, "blank", BLANK, 0.125),
    ):
        c = found[label, control]
        better, worse = len(other - wrong), len(wrong - other)
        assert (c.n, c.unmatched, c.metric, c.benchmark) == (N, 0, "accuracy", "quiz")
        assert c.delta == pytest.approx((better - worse) / N)
        assert (c.mcnemar.b, c.mcnemar.c) == (better, worse)
        assert c.mcnemar.p == pytest.approx(two_sided(better, worse))
        assert c.token_ratio == pytest.approx(ratio)
    assert found["fast", "random (fast)"].verdict == "better"
    assert found["fast", "downsample (fast)"].verdict == "inconclusive"


def test_holm_goes_over_presets_controls_and_benchmarks(output: Path) -> None:
    write_run(output, rows({1}, count=20), kind="preset", preset="fast", benchmark="second")
    write_run(output, rows({1, 2, 3, 4}, count=20), kind="control", control="random", preset="fast", benchmark="second")
    found = build_report(output).against_controls
    assert len(found) == 5
    ordered = sorted(found, key=lambda c: c.mcnemar.p)
    largest = 0.0
    for rank, c in enumerate(ordered):
        largest = max(largest, min(1.0, (5 - rank) * c.mcnemar.p))
        assert c.p_holm == pytest.approx(largest)


@settings(max_examples=50)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_comparisons_without_a_test_are_no_part_of_the_family(p: list[float | None]) -> None:
    given_ = [
        ControlComparison.model_construct(mcnemar=None if x is None else McNemar(b=1, c=1, p=x), p_holm=None) for x in p
    ]
    known = [x for x in p if x is not None]
    for before, after in zip(p, adjust_controls(given_), strict=True):
        if before is None:
            assert after.p_holm is None
        else:  # Holm by its definition: the largest of (tests not smaller than q) x q over all q up to p
            bound = max(min(1.0, sum(y >= q for y in known) * q) for q in known if q <= before)
            assert after.p_holm == pytest.approx(bound)


def test_the_interval_is_that_of_resampled_pictures(output: Path) -> None:
    c = next(c for c in build_report(output).against_controls if c.control_label == "random (fast)")
    change = [(i in RANDOM) - (i in FAST) for i in range(N)]
    by_picture = [change[2 * g] + change[2 * g + 1] for g in range(N // 2)]
    generator = np.random.default_rng(3)
    means = [sum(generator.choice(by_picture, N // 2)) / N for _ in range(6000)]
    assert c.resamples == 10_000
    assert c.ci95 == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=1 / N)


def test_a_preset_that_loses_to_random_is_worse_and_few_pictures_show_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, rows(RANDOM), kind="preset", preset="fast")
    write_run(tmp_path, rows(FAST), kind="control", control="random", preset="fast")
    results = build_report(tmp_path)  # there is no baseline, and none is needed
    assert results.comparisons == []
    assert [(c.verdict, c.delta) for c in results.against_controls] == [("worse", pytest.approx(-9 / N))]
    few = tmp_path / "few"
    write_run(few, rows(set(), count=18), kind="preset", preset="fast")
    write_run(few, rows(set(range(18)), count=18), kind="control", control="random", preset="fast")
    (c,) = build_report(few).against_controls
    assert (c.delta, c.verdict) == (1.0, "inconclusive")  # nine pictures


def test_a_headline_that_is_no_mean_is_compared_by_itself(tmp_path: Path) -> None:
    def pope(right: list[bool]) -> list[SampleRow]:
        made = [row(f"p{i}", float(r), group=f"g{i // 4}", split="random") for i, r in enumerate(right)]
        for i, one in enumerate(made):
            one.scores.update(doc_yes=float(i % 4 < 2), right_strict=one.scores["right"])
        return made

    def f1(right: list[bool]) -> float:
        hits = sum(r for i, r in enumerate(right) if i % 4 < 2)
        false = sum(not r for i, r in enumerate(right) if i % 4 >= 2)
        return 2 * hits / (2 * hits + false + sum(not r for i, r in enumerate(right) if i % 4 < 2))

    preset, control = [i % 9 > 0 for i in range(80)], [i % 4 > 0 for i in range(80)]
    write_run(tmp_path, pope(preset), metric="pope", benchmark="pope", kind="preset", preset="fast")
    write_run(tmp_path, pope(control), metric="pope", benchmark="pope", kind="control", control="random", preset="fast")
    (c,) = build_report(tmp_path).against_controls
    assert (c.metric, c.delta) == ("f1", pytest.approx(f1(preset) - f1(control)))
    assert c.ci95[0] < c.delta < c.ci95[1]


def test_runs_of_other_data_are_refused_by_name(tmp_path: Path) -> None:
    write_run(tmp_path, rows(FAST), kind="preset", preset="fast")
    write_run(tmp_path, rows(FAST), kind="control", control="random", preset="fast", prompt="other words")
    with pytest.raises(DataError, match=r"E-STAT-01: different prompt or data fingerprint: .*fast.*random.*prompt"):
        build_report(tmp_path)


def test_results_json_fits_its_schema_and_older_files_still_do(output: Path) -> None:
    build_report(output)
    stored = json.loads((output / "results.json").read_text("utf-8"))
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(stored)
    assert len(stored["against_controls"]) == 4
    del stored["against_controls"]
    validator.validate(stored)


def test_results_md_shows_them_under_their_benchmark(output: Path) -> None:
    results = build_report(output)
    lines = (output / "results.md").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| preset | control |"))
    shown = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start + 2 : start + 6]]
    cells = next(cells for cells in shown if cells[1] == "random (fast)")
    c = next(c for c in results.against_controls if c.control_label == "random (fast)")
    low, high = (f"{100 * x:+.1f}" for x in c.ci95)
    p = two_sided(9, 0)
    assert cells == [
        "fast",
        "random (fast)",
        f"+22.5 ({low} to {high})",
        "better",
        "9",
        "0",
        f"{p:.2g}",
        tables.probability(c.p_holm),
        "1.00",
    ]
    assert any("positive is better than the control" in line for line in lines[start:])


class Cells(HTMLParser):
    """The rows of the page's tables, as texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_the_page_shows_them_and_their_text_stays_text(output: Path) -> None:
    write_run(output, rows({7}), kind="preset", preset="</table><b>x", created="2026-02-01T00:00:00+00:00")
    build_report(output)
    text = (output / "regressions.html").read_text("utf-8")
    head, *told = Cells(text).rows
    assert head[:5] == ["benchmark", "preset", "control", "Δ (95 % CI)", "verdict"]
    assert sorted(r[1] for r in told) == ["</table><b>x", "fast", "fast", "fast", "small"]
    assert re.search(r"\+22\.5 \(", next(r for r in told if r[2] == "random (fast)")[3])
    assert "<b>x" not in text
