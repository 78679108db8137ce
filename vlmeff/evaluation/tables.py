"""``results.md``: a table for each benchmark, and what the presets retain over all of them."""

from __future__ import annotations

from collections.abc import Sequence

from vlmeff.evaluation.results_schema import Comparison, ControlComparison, Results, Run

NONE = "\N{EN DASH}"
MIB = 2**20
CONTROLS_HEAD = (
    "preset", "control", "Δ (95 % CI)", "verdict", "better b", "worse c", "p (McNemar)", "p (Holm)", "tokens",
)  # fmt: skip
ABOUT_CONTROLS = (
    "Presets against the controls that they have to beat, paired by document; positive is better than the control. "
    "Better and worse: the interval leaves out 0. Holm's adjustment goes over all presets, controls and benchmarks. "
    "Tokens: visual tokens of the preset / the control's; 1.00 is an equal budget."
)


def markdown(results: Results) -> str:
    """The whole of ``results.md``."""
    model = results.model
    title = f"# {text(model.get('id', 'model'))}: what the presets cost and save"
    parts = [title, *(benchmark_table(results, name) for name in results.benchmarks)]
    if results.retained:
        parts.append(retained_table(results))
    if results.notes:
        parts.append("\n".join(["## Notes", "", *(f"* {text(note)}" for note in results.notes)]))
    return "\n\n".join(parts) + "\n"


def benchmark_table(results: Results, benchmark: str) -> str:
    """Table, caption and tests of one benchmark; rows are baseline, presets, controls."""
    runs = results.runs_of(benchmark)
    head = ["run", "visual tokens (in→kept)", runs[0].metric, "Δ (95 % CI)", "verdict", "TTFT ms (p50)", "e2e ms"]
    rows = [_row(run, results.comparison_of(run)) for run in runs]
    lines = [
        f"## {text(benchmark)}",
        "",
        *_table([*head, "KV MiB", "peak MiB", "agreement"], rows),
        "",
        caption(results, benchmark),
    ]
    compared = [(run, c) for run in runs if (c := results.comparison_of(run)) is not None]
    if compared:
        head = [
            "against the baseline",
            "better b",
            "worse c",
            "p (McNemar)",
            "p (Holm)",
            "churn",
            "detectable",
            "retained",
        ]
        lines += ["", *_table(head, [_tests(run, c) for run, c in compared])]
        if any(c.categories for _, c in compared):
            lines += ["", *_categories(compared)]
    if beside := results.against_controls_of(benchmark):
        lines += [
            "",
            *_table(CONTROLS_HEAD, [controls_row(c, runs[0].scale) for c in beside]),
            "",
            text(ABOUT_CONTROLS),
        ]
    return "\n".join(lines)


def caption(results: Results, benchmark: str) -> str:
    """What the figures of a benchmark rest on: documents, machine, versions, and what its runs say of themselves."""
    runs = results.runs_of(benchmark)
    first, environment = runs[0], results.environment
    groups = first.data.get("n_groups")
    n = f"n = {first.metrics[first.metric].n} documents of {first.data.get('n_docs', '?')}"
    if groups and groups != first.data.get("n_docs"):
        n += f" in {groups} groups"
    facts = [n, "limited run: partial" if first.partial else "no limit"]
    facts.append(str(environment.get("device_name") or environment.get("device") or environment.get("cpu") or "?"))
    facts.append(str(results.model.get("dtype", "?")))
    versions = [f"{k} {environment[k]}" for k in ("torch", "transformers", "python") if environment.get(k)]
    facts.append(", ".join([f"vlmeff {results.vlmeff}", *versions]))
    notes = list(dict.fromkeys(note for run in runs for note in run.caption_notes))
    sentences = ["; ".join(facts), *notes]
    compared = [c for run in runs if (c := results.comparison_of(run)) is not None]
    if compared:
        unit = "points" if first.scale == 100 else f"points ({results.margin:g} % of the baseline)"
        accepted = signed(compared[0].margin, first.scale).lstrip("+")
        sentences.append(
            f"Margin {accepted} {unit}; intervals are 95 % bootstrap percentiles "
            f"of paired differences, {min(c.resamples for c in compared)} resamples"
        )
    errors = [f"{run.label}: errors {run.errors}" for run in runs if run.errors]
    return text(". ".join([*sentences, *errors]) + ".")


def retained_table(results: Results) -> str:
    """Accuracy of presets and controls in percent of the baseline's, by benchmark and on average."""
    names = list(results.retained[0].benchmarks)
    rows = []
    for row in results.retained:
        mean = NONE if row.mean is None else f"{row.mean:.1f}{_interval(row.ci95, 1.0, signed_numbers=False)}"
        rows.append([row.label, *(number(row.benchmarks[name]) for name in names), mean])
    about = (
        f"Preset or control / baseline in %, averaged over {', '.join(names)}. Each score is related to that of its "
        "own benchmark before averaging, so MME's points and percentages never meet."
    )
    table = _table(["retained accuracy, %", *names, "mean (95 % CI)"], rows)
    return "\n".join(["## Retained accuracy", "", *table, "", text(about)])


def controls_row(c: ControlComparison, scale: float) -> list[str]:
    """A preset against one control, under ``CONTROLS_HEAD``."""
    return [
        c.preset_label,
        c.control_label,
        signed(c.delta, scale) + _interval(c.ci95, scale),
        c.verdict,
        *_mcnemar(c),
        NONE if c.token_ratio is None else f"{c.token_ratio:.2f}",
    ]


def number(value: float | None, factor: float = 1.0, decimals: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return NONE if value is None else f"{value * factor:.{decimals}f}"


def signed(value: float, scale: float) -> str:
    """A difference in points with its sign: one decimal, none for scores in points of their own. Never "-0.0"."""
    decimals = 1 if scale == 100 else 0
    rounded = round(value * scale, decimals) + 0.0
    return f"{rounded:+.{decimals}f}" if rounded else f"{0:.{decimals}f}"


def text(value: object) -> str:
    """Text that cannot break out of its cell or line, nor become markup."""
    out = " ".join(str(value).split())
    for mark in "\\`*[]<>|":
        out = out.replace(mark, "\\" + mark)
    return out


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (map(text, head), aligned, *(map(text, row) for row in rows))]


def _interval(interval: tuple[float, float] | None, scale: float, *, signed_numbers: bool = True) -> str:
    if interval is None:
        return ""
    low, high = (signed(x, scale) if signed_numbers else f"{x * scale:.1f}" for x in interval)
    return f" ({low} to {high})"


def _row(run: Run, comparison: Comparison | None) -> list[str]:
    cost, latency, decimals = run.cost, run.latency, 1 if run.scale == 100 else 0
    ttft, e2e = (latency.ttft_ms, latency.e2e_ms) if latency else (None, None)
    delta = NONE if comparison is None else signed(comparison.delta, run.scale) + _interval(comparison.ci95, run.scale)
    return [
        run.label,
        f"{cost.visual_tokens_in:.4g}→{cost.visual_tokens_kept:.4g}",
        number(run.metrics[run.metric].value, run.scale, decimals),
        delta,
        comparison.verdict if comparison else NONE,
        number(ttft.p50 if ttft else None),
        number(e2e.p50 if e2e else None),
        number(cost.kv_bytes_prefill, 1 / MIB, 2),
        number(latency.peak_mem_bytes if latency else None, 1 / MIB, 0),
        number(comparison.agreement if comparison else None, 100) + (" %" if comparison else ""),
    ]


def _mcnemar(c: Comparison | ControlComparison) -> list[str]:
    """b, c, p and Holm's p."""
    counts = [str(c.mcnemar.b), str(c.mcnemar.c), probability(c.mcnemar.p)] if c.mcnemar else [NONE] * 3
    return [*counts, NONE if c.p_holm is None else probability(c.p_holm)]


def _tests(run: Run, c: Comparison) -> list[str]:
    return [
        run.label,
        *_mcnemar(c),
        f"{100 * c.churn:.1f} %",
        NONE if c.detectable is None else signed(c.detectable, run.scale).lstrip("+"),
        NONE if c.retained is None else f"{c.retained:.1f} %",
    ]


def probability(p: float) -> str:
    """A p-value with two significant digits; tiny ones as a bound."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _categories(compared: Sequence[tuple[Run, Comparison]]) -> list[str]:
    names = sorted({name for _, c in compared for name in c.categories})
    rows = []
    for name in names:
        cells = [name]
        for _, c in compared:
            part = c.categories.get(name)
            # Per-document scores are 0 to 1 whatever the scale of the headline.
            cells.append(NONE if part is None else signed(part.delta, 100) + _interval(part.ci95, 100))
        rows.append(cells)
    return _table(["Δ per document by category", *(run.label for run, _ in compared)], rows)
