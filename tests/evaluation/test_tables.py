"""results.md: the columns of the specification, numbers as they are printed, and text that cannot become markup."""

from pathlib import Path

import pytest
from finished_runs import row, write_run

from vlmeff.evaluation import tables
from vlmeff.evaluation.results import build_report
from vlmeff.evaluation.results_schema import Results

HEADER = (
    "| run | visual tokens (in→kept) | accuracy | Δ (95 % CI) | verdict | TTFT ms (p50) | e2e ms | KV MiB | peak MiB "
    "| agreement |"
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    timed = {"ttft_ms": 12.34, "e2e_ms": 50.0, "kv_bytes_prefill": 3 * 2**19, "peak_mem_bytes": 200 * 2**20}
    notes = ["with OCR tokens: no"]
    write_run(tmp_path, [row(str(i), 1.0, group=str(i // 2), **timed) for i in range(40)], caption_notes=notes)
    fast = [row(str(i), float(i > 3), group=str(i // 2), visual_tokens_kept=21) for i in range(40)]
    write_run(tmp_path, fast, kind="preset", preset="a|b", partial=True)
    write_run(tmp_path, fast, kind="control", control="random", preset="a|b")
    return build_report(tmp_path)


def test_the_table_has_the_given_columns_in_the_given_order_of_rows(results: Results) -> None:
    lines = tables.benchmark_table(results, "quiz").splitlines()
    start = lines.index(HEADER)
    assert set(lines[start + 1]) <= set("|-: ")
    base, fast, control = lines[start + 2 : start + 5]
    assert cells(base) == [
        "baseline",
        "64→64",
        "100.0",
        tables.NONE,
        tables.NONE,
        "12.3",
        "50.0",
        "1.50",
        "200",
        tables.NONE,
    ]
    told = cells(fast)
    assert told[:3] == ["a\\|b", "64→21", "90.0"]
    assert told[4:] == ["inconclusive", tables.NONE, tables.NONE, tables.NONE, tables.NONE, "90.0 %"]
    low, high = results.comparisons[0].ci95
    assert told[3] == f"-10.0 ({100 * low:+.1f} to {tables.signed(high, 100)})"
    assert cells(control)[0] == "random (a\\|b)"
    assert lines[start + 5] == ""


def test_the_caption_says_what_the_figures_rest_on(results: Results) -> None:
    caption = tables.caption(results, "quiz")
    for part in (
        "n = 40 documents of 40 in 20 groups",
        "no limit",
        "test machine",
        "float32",
        "torch 2.11.0, transformers 5.23.0",
        "with OCR tokens: no",
        "Margin 1.0 points",
        "10000 resamples",
    ):
        assert part in caption


def test_tests_stand_in_a_table_of_their_own(results: Results) -> None:
    lines = tables.benchmark_table(results, "quiz").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| against the baseline"))
    line = next(line for line in lines[start:] if line.startswith("| a\\|b"))
    assert cells(line) == ["a\\|b", "0", "4", "0.12", "0.12", "10.0 %", "12.8", "90.0 %"]


def test_retained_accuracy_is_averaged_over_benchmarks_and_says_which(tmp_path: Path) -> None:
    for benchmark, wrong in (("one", 2), ("two", 4)):
        write_run(tmp_path, [row(str(i), 1.0) for i in range(20)], benchmark=benchmark)
        rows = [row(str(i), float(i >= wrong)) for i in range(20)]
        write_run(tmp_path, rows, kind="preset", preset="fast", benchmark=benchmark)
    write_run(tmp_path, rows, kind="preset", preset="part", benchmark="two")
    table = tables.retained_table(build_report(tmp_path)).splitlines()
    assert cells(table[2]) == ["retained accuracy, %", "one", "two", "mean (95 % CI)"]
    fast, part = cells(table[4]), cells(table[5])
    assert fast[:3] == ["fast", "90.0", "80.0"]
    assert fast[3].startswith("85.0 (")
    assert part == ["part", tables.NONE, "80.0", tables.NONE]
    assert "averaged over one, two." in table[-1]


def test_points_are_printed_without_decimals(tmp_path: Path) -> None:
    rows = [row(str(i), float(i % 7 > 0), group=str(i // 2), category="count") for i in range(60)]
    write_run(tmp_path, [row(r.doc_id, 1.0, group=r.group, category="count") for r in rows], metric="mme")
    write_run(tmp_path, rows, metric="mme", kind="preset", preset="fast")
    lines = build_report(tmp_path) and (tmp_path / "results.md").read_text("utf-8").splitlines()
    base, fast = (next(cells(line) for line in lines if line.startswith(f"| {name} ")) for name in ("baseline", "fast"))
    # 9 of 60 questions wrong, on 9 of 30 pictures: 85 + 70 points.
    assert (base[2], fast[2]) == ("200", "155")
    assert fast[3].startswith("-45 (-")
    assert "." not in fast[3]
    assert any("Margin 2 points (1 % of the baseline)" in line for line in lines)


def test_the_whole_file(results: Results) -> None:
    text = tables.markdown(results)
    assert text.startswith("# tiny/model")
    assert text.index("## quiz") < text.index("## Retained accuracy")
    assert text.endswith("\n")


@pytest.mark.parametrize(
    ("value", "scale", "expected"),
    [(0.0, 100, "0.0"), (-0.0001, 100, "0.0"), (0.0123, 100, "+1.2"), (-0.0123, 100, "-1.2"), (-12.6, 1, "-13")],
)
def test_differences_have_a_sign_unless_they_are_zero(value: float, scale: float, expected: str) -> None:
    assert tables.signed(value, scale) == expected


def test_text_stays_text() -> None:
    assert tables.text("a|b\nc <img src=x> `x` [l](u)") == "a\\|b c \\<img src=x\\> \\`x\\` \\[l\\](u)"
    assert tables.text("easy_vqa_open") == "easy_vqa_open"


def test_small_probabilities_are_bounds() -> None:
    assert (tables.probability(0.000012), tables.probability(0.04703), tables.probability(1.0)) == (
        "< 0.0001",
        "0.047",
        "1",
    )
