"""Tables and JSON that ``vlmeff eval`` prints: what was measured, and which benchmarks there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from vlmeff.evaluation import benchmarks
from vlmeff.evaluation.results_schema import ControlComparison, Results, Run
from vlmeff.evaluation.tables import NONE, number, probability, signed

if TYPE_CHECKING:
    from vlmeff.evaluation.verifying import Check


def benchmark_table(results: Results, benchmark: str) -> Table:
    """The runs of a benchmark: baseline, presets, controls."""
    runs = results.runs_of(benchmark)
    table = _table(f"{benchmark}: {runs[0].metric}, {runs[0].metrics[runs[0].metric].n} documents")
    for column in ("run", "visual tokens", "score", "difference (95 %)", "verdict", "TTFT ms", "KV KiB"):
        _add(table, column)
    for run in runs:
        compared, cost = results.comparison_of(run), run.cost
        ttft = run.latency.ttft_ms.p50 if run.latency and run.latency.ttft_ms else None
        cells = ["", ""]
        if compared is not None:
            # The one long verdict takes two lines, so that its column, which is never cut, leaves room.
            told = compared.verdict.replace(" but ", " but\n")
            cells = [_difference(compared.delta, compared.ci95, run.scale), told]
        table.add_row(
            Text(run.label),  # "[ab12]" is no markup
            f"{cost.visual_tokens_in:.4g} -> {cost.visual_tokens_kept:.4g}",
            number(run.metrics[run.metric].value, run.scale),
            *cells,
            number(ttft),
            number(cost.kv_bytes_prefill, 1 / 1024),
        )
    return table


def controls_table(results: Results, benchmark: str) -> Table | None:
    """What the presets of a benchmark are worth beyond their controls; None where there is nothing to compare."""
    beside = results.against_controls_of(benchmark)
    if not beside:
        return None
    scale = results.runs_of(benchmark)[0].scale
    table = _table(f"{benchmark}: presets - their controls")
    for column in ("preset", "control", "difference (95 %)", "verdict", "p (Holm)"):
        _add(table, column)
    for c in beside:
        p = NONE if c.p_holm is None else probability(c.p_holm)
        labels = Text(c.preset_label), Text(c.control_label)
        table.add_row(*labels, _difference(c.delta, c.ci95, scale), c.verdict, p)
    return table


def headline(results: Results) -> list[dict[str, Any]]:
    """One object a run, as ``--json`` prints them; of a preset also how it compares with each control."""
    return [_headline(run, results) for run in results.runs]


def checks_table(checks: Sequence[Check]) -> Table:
    """What ``vlmeff eval verify`` compared: a zoo entry's figures and the measured ones."""
    table = _table(None)
    for column in ("benchmark", "figure", "run", "expected", "measured", "tolerance", "verdict"):
        _add(table, column)
    for check in checks:
        figures = (number(check.expected), number(check.measured), number(check.tolerance))
        names = (Text(name) for name in (check.benchmark, check.metric, check.run))
        table.add_row(*names, *figures, "holds" if check.holds else "differs")
    return table


def listing(data_root: Path | None) -> tuple[Table, dict[str, Any]]:
    """Every benchmark that can be named, as a table and as what ``--list --json`` prints; broken folders say why."""
    found, broken = benchmarks.every(data_root)
    table = _table(None)
    for column in ("benchmark", "documents", "metric", "data"):
        _add(table, column)
    rows = []
    for benchmark in found:
        kinds = [type(source).__name__.lower() for source in benchmark.sources] or ["folder"]
        count = benchmark.expected_count
        row = {"benchmark": benchmark.name, "documents": count, "metric": benchmark.metric_name, "data": kinds}
        rows.append(row)
        cells = (Text(benchmark.name), "" if count is None else str(count), benchmark.metric_name, ", ".join(kinds))
        table.add_row(*cells)
    for name, error in broken.items():
        table.add_row(Text(name), "", "broken", Text(str(error)))
    return table, {"benchmarks": rows, "broken": {name: str(error) for name, error in broken.items()}}


def _table(title: str | None) -> Table:
    return Table(title=None if title is None else Text(title), title_justify="left", show_edge=False)


def _add(table: Table, column: str) -> None:
    # On a narrow terminal every other column gives way before the verdict and the name of a benchmark do.
    table.add_column(column, no_wrap=column in ("verdict", "benchmark"), overflow="fold")


def _difference(delta: float, interval: tuple[float, float] | None, scale: float) -> str:
    low_high = interval and " to ".join(signed(x, scale) for x in interval)
    return signed(delta, scale) + (f" ({low_high})" if low_high else "")


def _headline(run: Run, results: Results) -> dict[str, Any]:
    compared = results.comparison_of(run)
    beside = [c for c in results.against_controls if c.preset == run.id]
    row = {
        "benchmark": run.benchmark,
        "run": run.label,
        "metric": run.metric,
        "value": run.metrics[run.metric].value,
        "delta": None if compared is None else compared.delta,
        "ci95": None if compared is None else compared.ci95,
        "verdict": None if compared is None else compared.verdict,
    }
    return row | ({"against_controls": [_beside(c) for c in beside]} if beside else {})


def _beside(c: ControlComparison) -> dict[str, Any]:
    return {"control": c.control_label, "delta": c.delta, "ci95": c.ci95, "p_holm": c.p_holm, "verdict": c.verdict}
