"""The frontier: which points are optimal, what the CSV says, and that the picture shows it."""

import csv
import itertools
import sys
from pathlib import Path

import pytest
from finished_runs import row, write_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmeff.errors import MissingExtraError
from vlmeff.evaluation import plots
from vlmeff.evaluation.plots import Point
from vlmeff.evaluation.results import build_report
from vlmeff.evaluation.results_schema import Results

pytest.importorskip("matplotlib", reason="the picture needs the extra eval")


def report(folder: Path, *, timed: bool) -> Results:
    times = ({"ttft_ms": 40.0}, {"ttft_ms": 20.0}, {"ttft_ms": 25.0}) if timed else ({}, {}, {})
    write_run(folder, [row(str(i), 1.0, **times[0]) for i in range(40)])
    fast = [row(str(i), float(i > 3), visual_tokens_kept=32, **times[1]) for i in range(40)]
    write_run(folder, fast, kind="preset", preset="fast $1$")
    worse = [row(str(i), float(i > 9), visual_tokens_kept=32, **times[2]) for i in range(40)]
    write_run(folder, worse, kind="control", control="=random")
    return build_report(folder)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_optimal_is_what_no_other_point_dominates(where: list[tuple[float, float]]) -> None:
    chosen = plots.pareto(where)
    for i, (x, y) in enumerate(where):
        dominated = any((a, b) != (x, y) and a >= x and b >= y for a, b in where)
        assert (i in chosen) != dominated


def test_fewer_tokens_are_better_and_more_speed_is() -> None:
    every = [
        Point("baseline", "baseline", 100.0, None, 1.0, 1.0),
        Point("good", "preset", 99.0, None, 0.3, 1.5),
        Point("bad", "preset", 98.0, None, 0.5, 1.2),
        Point("quick", "control", 90.0, None, 0.4, 2.0),
        Point("unknown", "preset", None, None, None, None),
    ]
    assert [p.label for p in plots.frontier(every, "token_ratio")] == ["good", "baseline"]
    assert [p.label for p in plots.frontier(every, "speedup")] == ["baseline", "good", "quick"]


def test_the_csv_has_the_average_and_each_benchmark(tmp_path: Path) -> None:
    report(tmp_path, timed=True)
    with (tmp_path / "frontier.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mean = {r["label"]: r for r in rows if r["benchmark"] == "mean"}
    base = mean["baseline"]
    assert (float(base["retained_percent"]), float(base["token_ratio"]), float(base["ttft_speedup"])) == (100, 1, 1)
    fast = mean["fast $1$"]
    assert (float(fast["retained_percent"]), float(fast["token_ratio"])) == (pytest.approx(90), 0.5)
    assert float(fast["ttft_speedup"]) == pytest.approx(2)
    assert float(fast["ci95_low"]) < 90 < float(fast["ci95_high"])
    assert [fast["on_token_frontier"], fast["on_time_frontier"]] == ["1", "1"]
    control = mean["'=random"]  # a spreadsheet must not take it for a formula
    assert [control["kind"], control["on_token_frontier"], control["on_time_frontier"]] == ["control", "0", "0"]
    assert [r["label"] for r in rows if r["benchmark"] == "quiz"] == ["fast $1$", "'=random"]


@pytest.mark.parametrize("timed", [False, True])
def test_there_is_a_panel_for_tokens_and_one_for_time_if_measured(tmp_path: Path, timed: bool) -> None:
    report(tmp_path, timed=timed)
    with Image.open(tmp_path / "frontier.png") as image:
        assert (image.format, image.size) == ("PNG", (960 * (1 + timed), 720))
    assert not list(tmp_path.glob(".*"))


def test_controls_are_hollow_and_bars_are_the_intervals() -> None:
    from matplotlib.figure import Figure

    every = [
        Point("baseline", "baseline", 100.0, None, 1.0, None),
        Point("fast", "preset", 90.0, (85.0, 93.0), 0.5, None),
        Point("random", "control", 80.0, (70.0, 84.0), 0.5, None),
    ]
    ax = Figure().subplots()
    plots._draw(ax, every, "token_ratio")
    drawn = {container.get_label(): container for container in ax.containers}
    assert drawn["control"][0].get_markerfacecolor() == "none"
    assert drawn["preset"][0].get_markerfacecolor() != "none"
    (bars,) = drawn["control"][2]
    assert [tuple(point) for point in bars.get_segments()[0]] == [(0.5, 70.0), (0.5, 84.0)]
    joined = next(line for line in ax.lines if line.get_label() == "Pareto-optimal")
    assert list(zip(*joined.get_data(), strict=True)) == [(0.5, 90.0), (1.0, 100.0)]
    assert ax.xaxis_inverted()
    assert {text.get_text() for text in ax.texts} == {"baseline", "fast", "random"}


def test_names_of_equal_points_do_not_cover_each_other() -> None:
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    plots._draw(ax, [Point(f"p{i}", "preset", 90.0, None, 0.5, None) for i in range(4)], "token_ratio")
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 11


def test_without_the_extra_the_other_files_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results = report(tmp_path, timed=False)
    assert (tmp_path / "results.json").exists()
    assert not (tmp_path / "frontier.png").exists()
    with pytest.raises(MissingExtraError, match=r'pip install "vlmeff\[eval\]"'):
        plots.frontier_png(results, tmp_path / "frontier.png")
